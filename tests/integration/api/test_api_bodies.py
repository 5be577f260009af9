"""What is no wish for a key is refused with the field's name; nothing that was sent is repeated."""

import json
import random
from typing import Any

import pytest

from tests.support.gateway import Gateway
from tests.support.people import Person
from tests.support.rawclient import RawRequest, exchange

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "fb_live_" + "s" * 38
WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({}, "name"),
    ({"name": ""}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"name": "a\x00b"}, "name"),
    ({"name": "a\n"}, "name"),
    ({"name": None}, "name"),
    ({"name": 1}, "name"),
    ({"name": "x", "nmae": "y"}, "nmae"),
    ({"name": "x", "account_id": "acct_1"}, "account_id"),
    ({"name": "x", SECRET + "!": 1}, None),
    ({"name": "x", "expires_at": "tomorrow"}, "expires_at"),
    ({"name": "x", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ({"name": "x", "expires_at": "2099-01-01T00:00:00"}, "expires_at"),
    ({"name": "x", "expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
    ({"name": "x", "expires_at": 4_000_000_000}, "expires_at"),
    ({"name": "x", "rpm": 0}, "rpm"),
    ({"name": "x", "rpm": "60"}, "rpm"),
    ({"name": "x", "rpm": 1.5}, "rpm"),
    ({"name": "x", "tpm": 2**31}, "tpm"),
    ({"name": "x", "max_concurrency": True}, "max_concurrency"),
    ({"name": "x", "models": []}, "models"),
    ({"name": "x", "models": ["plain", "plian"]}, "models[1]"),
    ({"name": "x", "models": ["plain"] * 201}, "models"),
    ({"name": "x", "models": [""]}, "models[0]"),
    ({"name": "x", "ip_allow": ["10.0.0.1/8"]}, "ip_allow"),
    ({"name": "x", "ip_allow": [SECRET]}, "ip_allow"),
    ({"name": "x", "ip_allow": ["fe80::1%eth0"]}, "ip_allow"),
    ({"name": "x", "scopes": []}, "scopes"),
    ({"name": "x", "scopes": [SECRET]}, "scopes[0]"),
    ({"name": "x", "budget": {"credits": "1"}}, "budget.window"),
    ({"name": "x", "budget": {"credits": 1, "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "0", "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "-1", "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "1e3", "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "1.2.3", "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "0.0000001", "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "9007199254.740992", "window": "day"}}, "budget.credits"),
    ({"name": "x", "budget": {"credits": "1", "window": SECRET}}, "budget.window"),
    ({"name": "x", "budget": {"credits": "1", "window": "day", "usd": "1"}}, "budget.usd"),
]


async def test_every_wrong_wish_is_refused_with_its_field(gateway: Gateway, alice: Person) -> None:
    for body, param in WRONG:
        answer = await alice.ask("POST", "/keys", body)
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_request", param), (body, error)
        assert SECRET[:12] not in answer.text
    assert (await alice.get("/keys"))["data"] == []


async def test_a_patch_is_held_to_the_same(alice: Person) -> None:
    made = await alice.new_key()
    for body, param in WRONG[1:]:
        error = await alice.patch(f"/keys/{made['id']}", body, 400)
        assert error["param"] == param, (body, error)
    for body in ({"scopes": None}, {"name": None}):
        await alice.patch(f"/keys/{made['id']}", body, 400)
    assert (await alice.get(f"/keys/{made['id']}"))["name"] == "test"


async def test_an_unknown_model_is_told_with_the_nearest(alice: Person) -> None:
    error = await alice.post("/keys", {"name": "x", "models": ["plian"]}, 400)

    assert "Did you mean plain?" in error["message"]


BROKEN = [
    b"",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b'{"name": "x"',
    b'{"name": "x"} {}',
    b'{"name": "\xff"}',
    b'{"name": "\\ud800"}',
    b'{"name": "x", "rpm": NaN}',
    b'{"name": "x", "rpm": ' + b"9" * 5000 + b"}",
    b'{"name": "x", "models": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    b'{"name": "x", "name": "y"}',
    b'{"name": "x", "budget": {"credits": "1", "window": "day", "credits": "9"}}',
    b'{"name": "x", "budget": null, "b\\u0075dget": {"credits": "9", "window": "day"}}',
]


async def send(
    gateway: Gateway,
    alice: Person,
    body: bytes,
    media: str = "application/json",
    **more: str,
) -> tuple[int, dict[str, Any]]:
    headers = [("authorization", alice.client.headers["authorization"])]
    headers += [("content-type", media)] if media else []
    headers += [(name.replace("_", "-"), value) for name, value in more.items()]
    request = RawRequest(method="POST", target="/api/v1/keys", headers=headers, body=body)
    answer = await exchange(gateway.origin, request)
    return answer.status, answer.json()


async def test_bodies_that_are_no_object_are_refused(gateway: Gateway, alice: Person) -> None:
    for body in BROKEN:
        status, answer = await send(gateway, alice, body)
        assert (status, answer["error"]["code"]) == (400, "invalid_request"), (body[:60], answer)
    assert (await alice.get("/keys"))["data"] == []


async def test_a_field_that_stands_twice_is_named(gateway: Gateway, alice: Person) -> None:
    _, answer = await send(gateway, alice, BROKEN[-1])

    assert answer["error"]["param"] == "budget"


async def test_mutated_bodies_never_crash(gateway: Gateway, alice: Person, is_full: bool) -> None:
    """Bytes of a good wish, changed at random: a key or an envelope, never a 500."""
    rng = random.Random(5)
    good = json.dumps({"name": "x", "rpm": 5, "budget": {"credits": "1.5", "window": "day"}})
    for _ in range(2000 if is_full else 150):
        body = bytearray(good.encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        status, answer = await send(gateway, alice, bytes(body))
        assert status in {201, 400}, (bytes(body), answer)


@pytest.mark.parametrize(
    ("content_type", "more", "code"),
    [
        ("text/plain", {}, "unsupported_media_type"),
        ("", {}, "unsupported_media_type"),
        ("application/jsonp", {}, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", {}, "unsupported_media_type"),
        ("application/json", {"content_encoding": "gzip"}, "unsupported_encoding"),
    ],
)
async def test_only_plain_json_is_read(
    gateway: Gateway, alice: Person, content_type: str, more: dict[str, str], code: str
) -> None:
    status, answer = await send(gateway, alice, b'{"name": "x"}', content_type, **more)

    assert (status, answer["error"]["code"]) == (415, code)


async def test_options_names_the_methods_and_needs_no_credential(gateway: Gateway) -> None:
    """The guard took the framework's own answer for a handler without a policy: a 500."""
    for path in ("/livez", "/api/v1/keys", "/api/v1/operator/accounts"):
        answer = await exchange(gateway.origin, RawRequest(method="OPTIONS", target=path))
        assert answer.status == 204
        assert answer.head is not None
        assert "OPTIONS" in str(answer.head.get("allow"))


async def test_json_with_a_charset_is_json(gateway: Gateway, alice: Person) -> None:
    status, _ = await send(gateway, alice, b'{"name":"x"}', "application/json; charset=utf-8")

    assert status == 201


async def test_a_large_body_is_refused(gateway: Gateway, alice: Person) -> None:
    body = json.dumps({"name": "x", "models": ["m" * 200] * 400}).encode()
    status, answer = await send(gateway, alice, body)

    assert len(body) > 64 * 1024
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


async def test_who_may_not_call_is_refused_before_the_body_is_read(
    gateway: Gateway, alice: Person
) -> None:
    request = RawRequest(method="POST", target="/api/v1/keys", body=b"{" * 70_000)
    answer = await exchange(gateway.origin, request)

    assert answer.status == 401
