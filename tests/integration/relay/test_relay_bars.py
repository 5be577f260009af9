"""Keys that may not do everything: models, addresses, permissions. Refused before anything is held.

The caller's address is that of its connection; what stands in headers counts only behind proxies
that are configured, of which there are none here.
"""

import json
from typing import Any

import pytest

from tests.support.gateway import zoo_model
from tests.support.rawclient import Outcome, RawRequest
from tests.support.relay import Relay, error_of, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = {**zoo("plain"), "second": zoo_model("plain"), "third": zoo_model("plain")}
FORGED = [
    ("x-forwarded-for", "203.0.113.7"),
    ("forwarded", "for=203.0.113.7"),
    ("x-real-ip", "203.0.113.7"),
]


async def get(relay: Relay, key: str, target: str) -> Outcome:
    headers = [("authorization", f"Bearer {key}")]
    return await relay.send(RawRequest(method="GET", target=target, headers=headers))


async def refused(relay: Relay, upstream: Upstream, outcome: Outcome, code: str) -> dict[str, Any]:
    """403, told that nothing was charged; the till holds nothing and nothing was forwarded."""
    error = error_of(outcome)
    assert (outcome.status, error["code"], error["type"]) == (403, code, "permission_error")
    assert "You were not charged." in error["message"]
    assert upstream.stats()["requests"] == 0
    assert await relay.left_in_till() == []
    return error


async def test_a_key_uses_its_models_and_no_other(relay: Relay, upstream: Upstream) -> None:
    key = await relay.key(models=["second", "third"])
    for model in ("plain", "no-such-model", "SECOND"):
        error = await refused(relay, upstream, await relay.call(key, model), "model_not_allowed")
        assert error["param"] == "model"
        assert "second, third" in error["message"]
    for stream in (False, True):
        assert (await relay.call(key, "second", stream=stream)).status == 200

    await relay.receipts(key, 2)


async def test_a_key_sees_its_models_and_no_other(relay: Relay) -> None:
    narrow, wide = await relay.key(models=["third"]), await relay.key()
    listed = [(await get(relay, key, "/v1/models")).json()["data"] for key in (narrow, wide)]
    names = [{model["id"] for model in models} for models in listed]

    assert names[0] == {"third"}
    assert names[1] > {"plain", "second", "third"}
    assert (await get(relay, narrow, "/v1/models/third")).status == 200
    for model in ("second", "secon", "thir"):
        outcome = await get(relay, narrow, f"/v1/models/{model}")
        assert (outcome.status, error_of(outcome)["code"]) == (404, "model_not_found")
        nearest = json.dumps(error_of(outcome)["message"].replace(f"'{model}'", ""))
        assert "second" not in nearest
    assert (await get(relay, wide, "/v1/models/second")).status == 200


async def test_a_key_works_from_its_networks_only(relay: Relay, upstream: Upstream) -> None:
    far = await relay.key(ip_allow=["203.0.113.0/24", "2001:db8::/32"])
    for headers in ([], FORGED):
        outcome = await relay.send(relay.chat(far, "plain", headers=headers))
        await refused(relay, upstream, outcome, "ip_not_allowed")
    for target in ("/v1/models", "/v1/models/plain", "/api/v1/key"):
        outcome = await get(relay, far, target)
        code = outcome.json()["error"]["code"]
        assert (outcome.status, code) == (403, "ip_not_allowed"), target
    for network in ("127.0.0.0/8", "127.0.0.1/32", "::ffff:127.0.0.0/104"):
        near = await relay.key(ip_allow=["203.0.113.0/24", network])
        assert (await relay.call(near, "plain")).status == 200
        assert (await get(relay, near, "/v1/models")).status == 200


async def test_a_key_that_may_not_infer_reads_but_calls_no_model(
    relay: Relay, upstream: Upstream
) -> None:
    key = await relay.key(permissions=["account"])
    for stream in (False, True):
        outcome = await relay.call(key, "plain", stream=stream)
        await refused(relay, upstream, outcome, "permission_missing")

    assert (await get(relay, key, "/v1/models")).status == 200
    assert (await get(relay, key, "/api/v1/key")).status == 200


async def test_a_refused_key_keeps_its_idempotency_key(relay: Relay, upstream: Upstream) -> None:
    """What was refused did nothing: the same request runs once it is allowed."""
    key = await relay.key(models=["second"])
    once = [("idempotency-key", "one")]
    outcome = await relay.send(relay.chat(key, "third", headers=once))
    await refused(relay, upstream, outcome, "model_not_allowed")

    assert (await relay.send(relay.chat(key, "second", headers=once))).status == 200
