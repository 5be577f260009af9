"""What is refused before a provider is called: the OpenAI envelope, no charge, no open hold."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing import book
from keys.api_key import generate
from keys.keys_store import revoke_any_key
from keys.principal import Limits
from tests.support.gateway import eventually, zoo_model
from tests.support.rawclient import Outcome, RawRequest, connect
from tests.support.relay import Relay, error_of, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = {**zoo("plain"), "slow": zoo_model("plain:delay_ms=300")}
OVERRIDES = {
    "limits__body_bytes_max": 100_000,
    "limits__headers_bytes_max": 4096,
    "timeouts__body_s": 0.3,
    "keys__cache_ttl_ms": 500,
}
CHAT = "/v1/chat/completions"
JSON = ("content-type", "application/json")


def post(key: str, body: bytes, *headers: tuple[str, str]) -> RawRequest:
    given = {name for name, _ in headers}
    fixed = [("authorization", f"Bearer {key}"), JSON]
    return RawRequest(body=body, headers=[*(h for h in fixed if h[0] not in given), *headers])


async def refused(
    relay: Relay, request: RawRequest, status: int, code: str, upstream: Upstream
) -> dict[str, Any]:
    outcome = await relay.send(request)
    error = error_of(outcome)
    assert (outcome.status, error["code"]) == (status, code), error
    assert "You were not charged." in error["message"]
    assert upstream.stats()["requests"] == 0
    return error


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "plain",}', b"\xff", b"null"])
async def test_a_body_that_is_no_json_object(
    relay: Relay, key: str, upstream: Upstream, body: bytes
) -> None:
    await refused(relay, post(key, body), 400, "invalid_request", upstream)


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/xml"]
)
async def test_a_body_of_another_type(
    relay: Relay, key: str, upstream: Upstream, kind: str
) -> None:
    request = post(key, b"{}", ("content-type", kind))

    await refused(relay, request, 415, "unsupported_media_type", upstream)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity"])
async def test_a_compressed_body(relay: Relay, key: str, upstream: Upstream, encoding: str) -> None:
    request = post(key, b"\x1f\x8b", ("content-encoding", encoding))

    await refused(relay, request, 415, "unsupported_encoding", upstream)


async def test_a_body_that_is_too_large(relay: Relay, key: str, upstream: Upstream) -> None:
    request = post(key, b" " * 100_001)

    await refused(relay, request, 413, "request_too_large", upstream)


async def test_a_chunked_body_that_is_too_large(relay: Relay, key: str, upstream: Upstream) -> None:
    chunk = b"c350\r\n" + b" " * 50_000 + b"\r\n"
    request = post(key, chunk * 3 + b"0\r\n\r\n", ("transfer-encoding", "chunked"))

    await refused(relay, request, 413, "request_too_large", upstream)


async def test_a_body_that_does_not_arrive_in_time(relay: Relay, key: str) -> None:
    """Never 408: SDKs repeat that by themselves."""
    async with connect(relay.gateway.origin) as conn:
        await conn.send(post(key, b"{}" * 10), unsent=5)
        head = await conn.head()

    assert head.status == 400
    assert head.get("connection") == "close"


async def test_headers_that_are_too_large(relay: Relay, key: str, upstream: Upstream) -> None:
    request = post(key, b"{}", ("x-large", "x" * 5000))

    await refused(relay, request, 431, "headers_too_large", upstream)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "invalid_api_key"),
        ([("authorization", "Bearer ")], "key_malformed"),
        ([("authorization", "Basic eDp5")], "key_malformed"),
        ([("authorization", "Bearer sk-123")], "key_malformed"),
        ([("authorization", "Bearer \xff\xfe")], "key_malformed"),
        ([("x-api-key", "nonsense")], "key_malformed"),
    ],
)
async def test_a_missing_or_malformed_key(
    relay: Relay, upstream: Upstream, headers: Sequence[tuple[str, str]], code: str
) -> None:
    request = RawRequest(body=b"{}", headers=[JSON, *headers])

    error = await refused(relay, request, 401, code, upstream)
    assert error["type"] == "authentication_error"


async def test_a_key_that_nobody_has(relay: Relay, upstream: Upstream) -> None:
    other = generate("test")

    await refused(relay, relay.chat(other.secret, "plain"), 401, "invalid_api_key", upstream)


async def test_a_typing_error_in_a_key(relay: Relay, key: str, upstream: Upstream) -> None:
    wrong = key[:-1] + ("a" if key[-1] != "a" else "b")

    await refused(relay, relay.chat(wrong, "plain"), 401, "key_malformed", upstream)


async def test_an_expired_key(relay: Relay, upstream: Upstream) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    key = await relay.key(expires_at=past)

    await refused(relay, relay.chat(key, "plain"), 401, "key_expired", upstream)


async def test_a_revoked_key_is_out_within_five_seconds(relay: Relay, key: str) -> None:
    assert (await relay.call(key, "plain")).status == 200
    account_id = relay.account_of(key)
    key_id = await relay.gateway.pool.fetchval(
        "SELECT id FROM app_api_keys WHERE billing_account_id = $1", account_id
    )
    async with book.acquire(relay.gateway.pool) as conn:
        await revoke_any_key(conn, key_id)

    async def is_out() -> Outcome | None:
        outcome = await relay.call(key, "plain")
        return None if outcome.status == 200 else outcome

    outcome = await eventually(is_out, timeout_s=5)
    assert (outcome.status, error_of(outcome)["code"]) == (401, "invalid_api_key")


async def test_the_keys_of_other_headers_are_taken_too(relay: Relay, key: str) -> None:
    body = relay.chat(key, "plain").body
    for name in ("x-api-key", "api-key"):
        outcome = await relay.send(RawRequest(body=body, headers=[JSON, (name, key)]))
        assert outcome.status == 200
    await relay.receipts(key, 2)


async def test_a_frozen_account(relay: Relay, key: str, upstream: Upstream) -> None:
    account_id = relay.account_of(key)
    await relay.gateway.tamper(
        "UPDATE billing_accounts SET status = 'frozen' WHERE id = $1", account_id
    )

    error = await refused(relay, relay.chat(key, "plain"), 403, "account_frozen", upstream)
    assert error["type"] == "permission_error"


async def test_an_unknown_model_gets_the_nearest_names(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    error = await refused(relay, relay.chat(key, "plian"), 404, "model_not_found", upstream)

    assert "'plian'" in error["message"]
    assert "plain" in error["message"]
    assert error["param"] == "model"


async def test_too_little_credit_says_what_is_needed_and_what_is_there(
    relay: Relay, upstream: Upstream
) -> None:
    """402, not 429: SDKs would repeat that three times."""
    key = await relay.key(credits="0.5")
    request = relay.chat(key, "plain", max_tokens=1000)

    error = await refused(relay, request, 402, "insufficient_credits", upstream)

    assert "only 0.5 credits ($0.0005) are available" in error["message"]
    # 1,000 tokens out at $8 a million make 8 credits; the bytes of the prompt come on top.
    assert "may cost up to 8." in error["message"]
    assert error["type"] == "insufficient_quota"
    await relay.receipts(key, 0)


async def test_as_many_requests_as_a_key_may_have_open(relay: Relay) -> None:
    key = await relay.key(limits=Limits(open_requests=1))
    slow = asyncio.create_task(relay.call(key, "slow"))

    async def is_open() -> bool | None:
        return True if relay.services.open_calls else None

    await eventually(is_open)
    outcome = await relay.call(key, "plain")
    assert (outcome.status, error_of(outcome)["code"]) == (429, "rate_limited")
    assert outcome.head is not None
    assert outcome.head.get("retry-after") == "1"
    assert (await slow).status == 200
    await relay.receipts(key, 1)


async def test_draining_and_full_gateways_refuse(
    relay: Relay, key: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.services, "is_draining", True)
    error = await refused(relay, relay.chat(key, "plain"), 503, "unavailable", upstream)
    assert "shutting down" in error["message"]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models/plain", 405),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/", 404),
        ("POST", "/v1/chat/completions/more", 404),
        ("POST", "/v1/%ff%00", 404),
    ],
)
async def test_wrong_urls_and_methods(
    relay: Relay, key: str, upstream: Upstream, method: str, target: str, status: int
) -> None:
    headers = [("authorization", f"Bearer {key}")]
    request = RawRequest(method=method, target=target, headers=headers)
    code = "method_not_allowed" if status == 405 else "unknown_url"

    await refused(relay, request, status, code, upstream)


async def test_a_method_that_is_not_allowed_is_told_which_is(relay: Relay) -> None:
    outcome = await relay.send(RawRequest(method="GET", target=CHAT))

    assert outcome.head is not None
    assert outcome.head.get("allow") == "POST"


async def test_refusals_are_counted_by_our_own_codes(relay: Relay, key: str) -> None:
    await relay.call(key, "plian")

    metrics = relay.services.metrics.render().decode()
    assert 'code="model_not_found"' in metrics
