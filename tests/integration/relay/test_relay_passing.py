"""What passes in both directions and what never does; URLs, models, CORS, answers in one piece."""

import json
from typing import Any

import pytest

from tests.support.gateway import UPSTREAM_KEY, zoo_model
from tests.support.rawclient import RawRequest, connect
from tests.support.relay import MESSAGES, Relay, Tokens, error_of, price_by_hand, zoo
from tests.support.upstream import answer as provider
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

USED = "prompt=9,tokens=5"
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
MODELS: dict[str, Any] = {
    **zoo(*(f"{mode}:{USED}" for mode in ("plain", "comments", "gzip", "one-byte", "tools"))),
    **zoo(f"split-utf8:{USED}", f"cost:0.000029,{USED}", "big-frame:bytes=3000000"),
    "vendor/model/v2": zoo_model(f"plain:{USED}"),
    "unpriced": {"routes": [{"provider": "zoo", "model": f"plain:{USED}"}]},
    "images": zoo_model(f"plain:{USED}", image_tokens_max=1000),
}
OVERRIDES = {"billing__unpriced": "free"}


async def test_a_body_passes_byte_for_byte_but_for_its_usage(relay: Relay, key: str) -> None:
    model = f"plain:{USED}"
    outcome = await relay.call(key, model)

    facts = provider.facts_of({"model": model, "messages": MESSAGES})
    came = provider.pretty(provider.document(facts))
    start = came.index(b'{\n    "prompt_tokens"')
    end = came.index(b',\n  "service_tier"')
    assert outcome.body.startswith(came[:start])
    assert outcome.body.endswith(came[end:])
    told = json.loads(outcome.body[start : len(outcome.body) - len(came) + end])
    assert told["cost_nanos"] == PRICE


async def test_the_headers_of_an_answer(relay: Relay, key: str) -> None:
    outcome = await relay.call(key, f"plain:{USED}")
    receipt = await relay.only_receipt(key)

    head = outcome.head
    assert head is not None
    assert head.get("content-type") == "application/json"
    assert head.get("x-request-id") == f"req_{receipt['source_reference']}"
    assert head.get("x-receipt-id") == f"rcpt_{receipt['source_reference']}"
    assert float(head.get("x-farebox-overhead-ms") or -1) >= 0
    assert head.get("x-cost-usd") == "0.000058"
    assert head.get("x-balance-usd") == "0.999942"
    assert receipt["price_nanos"] == PRICE == 58_000
    assert head.get("access-control-allow-origin") == "*"
    exposed = (head.get("access-control-expose-headers") or "").split(", ")
    assert {"x-request-id", "x-receipt-id", "x-cost-usd", "x-balance-usd"} <= set(exposed)
    for never in ("openai-processing-ms", "set-cookie", "location", "server"):
        assert head.get(never) is None


@pytest.mark.parametrize(
    "mode", ["comments", "gzip", "one-byte", "split-utf8", "tools", "cost:0.000029"]
)
async def test_odd_bodies_arrive_and_are_charged(relay: Relay, key: str, mode: str) -> None:
    outcome = await relay.call(key, f"{mode}{',' if ':' in mode else ':'}{USED}")
    receipt = await relay.only_receipt(key)

    answer = outcome.json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["cost_nanos"] == receipt["price_nanos"] == PRICE
    assert (receipt["outcome"], receipt["usage_source"]) == ("complete", "provider")


async def test_a_large_body_arrives(relay: Relay, key: str) -> None:
    outcome = await relay.call(key, "big-frame:bytes=3000000")
    await relay.receipts(key, 1)

    assert len(outcome.json()["choices"][0]["message"]["content"]) == 3_000_000


async def test_unknown_fields_reach_the_provider_as_they_are(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    fields: dict[str, Any] = {
        **{"temperature": 0.3, "seed": 7, "user": "ünïcödé", "metadata": {"a": [1, None, "x"]}},
        **{"top_k": 5, "reasoning_effort": "low", "response_format": {"type": "json_object"}},
        "tools": [{"type": "function", "function": {"name": "n", "parameters": {}}}],
    }
    request = relay.chat(key, f"plain:{USED}", **fields)
    public = json.loads(request.body)["model"]

    await relay.send(request)

    (seen,) = upstream.last()
    # The public id is not the provider's: one value changes.
    assert json.loads(seen["body"]) == {
        **json.loads(request.body),
        "model": f"plain:{USED}",
    }
    assert public.encode() not in seen["body"]


async def test_the_clients_headers_never_reach_the_provider(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    mine = [
        *(("cookie", "session=1"), ("openai-organization", "org-1"), ("openai-project", "p-1")),
        *(("x-api-key", "mine"), ("x-forwarded-for", "10.0.0.1"), ("user-agent", "mine/1")),
        *(("x-stainless-lang", "js"), ("http-referer", "https://mine"), ("x-request-id", "mine")),
    ]
    await relay.send(relay.chat(key, f"plain:{USED}", headers=mine))
    receipt = await relay.only_receipt(key)

    (seen,) = upstream.last()
    headers = {name.lower(): value for name, value in seen["headers"]}
    assert headers.pop("authorization") == f"Bearer {UPSTREAM_KEY}"
    assert headers.pop("accept-encoding") == "identity"
    assert headers.pop("content-type") == "application/json"
    assert headers.pop("user-agent") == "farebox"
    assert set(headers) == {"host", "accept", "content-length"}
    assert receipt["client_request_id"] == "mine"


@pytest.mark.parametrize(("sent", "kept"), [("2", 2), ("99999999", 1000), ("x", 0), ("-1", 0)])
async def test_the_retry_count_of_sdks_stands_on_the_receipt(
    relay: Relay, key: str, sent: str, kept: int
) -> None:
    headers = [("x-stainless-retry-count", sent)]
    await relay.send(relay.chat(key, f"plain:{USED}", headers=headers))

    assert (await relay.only_receipt(key))["client_retry_count"] == kept


@pytest.mark.parametrize(
    "target",
    [
        *("/v1/chat/completions", "/chat/completions", "//v1//chat/completions"),
        *("/v1/chat/completions/", "/v1/v1/chat/completions", "//chat//completions//"),
        "/v1/chat/completions?api-version=1",
    ],
)
async def test_base_urls_in_all_their_forms(relay: Relay, key: str, target: str) -> None:
    request = relay.chat(key, f"plain:{USED}")
    outcome = await relay.send(
        RawRequest(target=target, headers=request.headers, body=request.body)
    )

    assert outcome.status == 200
    await relay.receipts(key, 1)


async def test_a_connection_serves_one_request_after_the_other(relay: Relay, key: str) -> None:
    async with connect(relay.gateway.origin) as conn:
        for stream in (False, True, False, True):
            await conn.send(relay.chat(key, f"plain:{USED}", stream=stream))
            assert (await conn.head()).status == 200
            assert [piece async for piece in conn.body()]
    await relay.receipts(key, 4)


async def test_without_a_price_a_model_is_free_where_the_operator_wants_it(
    relay: Relay, key: str
) -> None:
    outcome = await relay.call(key, "unpriced")
    receipt = await relay.only_receipt(key)

    assert outcome.json()["usage"]["cost"] == 0
    assert (receipt["price_nanos"], receipt["hold_nanos"]) == (0, 0)
    assert (receipt["cost_source"], receipt["usage_source"]) == ("none", "provider")
    assert (receipt["input_tokens"], receipt["output_tokens"]) == (9, 5)


async def test_images_are_held_at_their_bound_and_refused_without_one(
    relay: Relay, key: str
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [image, image]}]

    assert (await relay.call(key, "images", messages=messages, max_tokens=1)).status == 200
    receipt = await relay.only_receipt(key)
    # Two images of 1,000 tokens and less than 400 bytes of text, at $2 a million; one token out.
    assert 2000 * 2000 <= receipt["hold_nanos"] - 8000 <= 2400 * 2000
    error = error_of(await relay.call(key, f"plain:{USED}", messages=messages))
    assert error["code"] == "unpriced_parameter"


async def get(relay: Relay, target: str, *headers: tuple[str, str], method: str = "GET") -> Any:
    return await relay.send(RawRequest(method=method, target=target, headers=headers))


@pytest.mark.parametrize("target", ["/v1/models", "/models", "/v1/models/", "//v1/models"])
async def test_the_models_are_listed_with_prices(relay: Relay, key: str, target: str) -> None:
    outcome = await get(relay, target, ("authorization", f"Bearer {key}"))

    answer = outcome.json()
    assert (outcome.status, answer["object"]) == (200, "list")
    models = {model["id"]: model for model in answer["data"]}
    assert set(models) == {*MODELS, "echo", "plain"}
    model = models["vendor/model/v2"]
    assert model["pricing"]["prompt"] == "0.000002"
    assert model["pricing"]["completion"] == "0.000008"
    assert model["pricing"]["input_cache_read"] == "0.000001"
    assert model["context_length"] == 128_000
    assert "pricing" not in models["unpriced"]
    assert outcome.head.get("x-request-id").startswith("req_")
    assert outcome.head.get("x-farebox-overhead-ms") is not None


@pytest.mark.parametrize("prefix", ["/v1", "", "//v1/"])
async def test_one_model_may_have_slashes_in_its_id(relay: Relay, key: str, prefix: str) -> None:
    for name in ("vendor/model/v2", "vendor%2Fmodel%2Fv2"):
        outcome = await get(relay, f"{prefix}/models/{name}", ("x-api-key", key))
        assert outcome.json()["id"] == "vendor/model/v2"


async def test_models_need_a_key_and_name_the_nearest(relay: Relay, key: str) -> None:
    assert error_of(await get(relay, "/v1/models"))["code"] == "invalid_api_key"
    assert error_of(await get(relay, "/v1/models/x"))["code"] == "invalid_api_key"
    error = error_of(await get(relay, "/v1/models/vendor/model/v3", ("x-api-key", key)))
    assert error["code"] == "model_not_found"
    assert "vendor/model/v2" in error["message"]
    long = await get(relay, "/v1/models/" + "x" * 3000, ("x-api-key", key))
    assert len(error_of(long)["message"]) < 500


async def test_a_head_request_has_no_body(relay: Relay, key: str) -> None:
    async with connect(relay.gateway.origin) as conn:
        headers = [("x-api-key", key)]
        await conn.send(RawRequest(method="HEAD", target="/v1/models", headers=headers))
        assert (await conn.head()).status == 200
        await conn.send(RawRequest(method="GET", target="/v1/models", headers=headers))
        assert (await conn.head()).status == 200


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/models", "/chat/completions"])
async def test_browsers_may_ask_without_a_key(relay: Relay, target: str) -> None:
    asked = [("origin", "https://app"), ("access-control-request-method", "POST")]
    outcome = await get(relay, target, *asked, method="OPTIONS")

    head = outcome.head
    assert (outcome.status, outcome.body) == (204, b"")
    assert head.get("access-control-allow-origin") == "*"
    assert "authorization" in head.get("access-control-allow-headers")
    assert "POST" in head.get("access-control-allow-methods")
    assert head.get("content-length") is None
    assert head.get("x-request-id").startswith("req_")


async def test_without_limits_per_minute_no_header_speaks_of_them(relay: Relay, key: str) -> None:
    head = (await relay.call(key, "plain")).head

    assert head is not None
    assert not [name for name, _ in head.headers if name.startswith("x-ratelimit")]
