"""Addresses that keys are bound to, behind a proxy that is configured: its word counts."""

import pytest

from tests.support.rawclient import RawRequest
from tests.support.relay import Relay, zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = zoo("plain")
OVERRIDES = {"server__trusted_proxies": ["127.0.0.1/32"]}
ALLOWED = ["203.0.113.0/24", "2001:db8::/32"]


@pytest.mark.parametrize(
    ("forwarded", "is_in"),
    [
        (["203.0.113.7"], True),
        (["::ffff:203.0.113.7"], True),
        (["[2001:db8::1]:4711"], True),
        (["198.51.100.1, 203.0.113.7"], True),
        (["203.0.113.7, 198.51.100.1"], False),
        (["203.0.113.7", "198.51.100.1"], False),
        (["garbage"], False),
        ([], False),
    ],
)
async def test_the_address_that_the_proxy_saw_decides(
    relay: Relay, forwarded: list[str], is_in: bool
) -> None:
    key = await relay.key(ip_allow=ALLOWED)
    headers = [("x-forwarded-for", value) for value in forwarded]
    bearer = ("authorization", f"Bearer {key}")
    answers = [await relay.send(relay.chat(key, "plain", headers=headers))]
    for target in ("/v1/models", "/api/v1/key"):
        request = RawRequest(method="GET", target=target, headers=[bearer, *headers])
        answers.append(await relay.send(request))

    assert [answer.status for answer in answers] == [200 if is_in else 403] * 3
    if not is_in:
        assert {a.json()["error"]["code"] for a in answers} == {"ip_not_allowed"}
