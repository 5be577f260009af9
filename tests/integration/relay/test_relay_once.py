"""`Idempotency-Key`: of all requests with one key and body, one runs and is charged once."""

import asyncio
from collections import Counter
from typing import Any
from uuid import UUID

import pytest

from billing.idempotency import claim_of
from billing.till_scopes import spend_scopes
from config.ids import id_text, new_id
from gateway.cli.audit import run_audit
from keys.principal import Limits
from tests.support.gateway import eventually, zoo_model
from tests.support.rawclient import Outcome, RawRequest, connect
from tests.support.relay import Relay, Tokens, error_of, frames_of, price_by_hand, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLAIN = "plain:prompt=9,tokens=5"
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
SLOW = "plain:delay_ms=250,prompt=9,tokens=5"
MODELS: dict[str, Any] = {
    **zoo(PLAIN, SLOW, "status:500", "status:500,delay_ms=250", "status:400", "stall-head"),
    "dead": {**zoo_model("plain"), "routes": [{"provider": "dead"}]},
}
OVERRIDES = {
    "providers__dead": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"},
    "timeouts__drain_s": 0.3,
    "timeouts__request_total_s": 5.0,
}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def once(relay: Relay, key: str, model: str, mark: str = "token-1", **fields: Any) -> RawRequest:
    return relay.chat(key, model, headers=[("idempotency-key", mark)], **fields)


async def send(relay: Relay, key: str, model: str, mark: str = "token-1", **more: Any) -> Outcome:
    return await relay.send(once(relay, key, model, mark, **more))


def told(outcome: Outcome) -> tuple[int, str]:
    return outcome.status, error_of(outcome)["code"]


async def claims(relay: Relay, key: str) -> list[dict[str, Any]]:
    query = "SELECT i.* FROM idempotent_requests AS i JOIN virtual_keys AS v"
    query += " ON v.id = i.virtual_key_id WHERE v.billing_account_id = $1"
    return [dict(row) for row in await relay.gateway.pool.fetch(query, relay.account_of(key))]


async def old_claim(
    relay: Relay, key: str, request: RawRequest, age_s: int, token: bytes = b"token-1"
) -> UUID:
    """The claim of a request whose process died that long ago; the till has lost nothing since."""
    pool = relay.gateway.pool
    await pool.execute("UPDATE till_epoch SET changed_at = now() - interval '1 day'")
    query = "SELECT virtual_key_id FROM app_api_keys WHERE billing_account_id = $1"
    virtual_key_id = await pool.fetchval(query, relay.account_of(key))
    claim = claim_of(virtual_key_id, token, request.body, new_id())
    query = "INSERT INTO idempotent_requests SELECT $1, $2, $3, $4, now() - $5 * interval '1 s'"
    values = (claim.virtual_key_id, claim.key_digest, claim.body_digest, claim.request_id)
    await pool.execute(query, *values, age_s)
    return claim.request_id


@STREAMED
async def test_of_ten_at_once_one_runs(
    relay: Relay, key: str, upstream: Upstream, stream: bool
) -> None:
    request = once(relay, key, SLOW, stream=stream)
    answers = await asyncio.gather(*(relay.send(request) for _ in range(10)))
    receipt = await relay.only_receipt(key)

    (served,) = (answer for answer in answers if answer.status == 200)
    refused = [answer for answer in answers if answer is not served]
    assert {told(answer) for answer in refused} == {(409, "idempotency_in_flight")}
    assert {answer.head.get("retry-after") for answer in refused if answer.head} == {"1"}
    assert {answer.head.get("x-should-retry") for answer in refused if answer.head} == {None}
    assert upstream.stats()["requests"] == 1
    assert receipt["price_nanos"] == PRICE == await relay.spent(key)
    if stream:
        assert frames_of(served)


@STREAMED
async def test_what_has_ended_is_told_its_receipt_and_not_charged_again(
    relay: Relay, key: str, upstream: Upstream, stream: bool
) -> None:
    first = await send(relay, key, PLAIN, stream=stream)
    receipt = await relay.only_receipt(key)
    again = await send(relay, key, PLAIN, stream=stream)
    await relay.only_receipt(key)

    assert (first.status, told(again)) == (200, (409, "idempotency_completed"))
    receipt_id = f"rcpt_{receipt['source_reference']}"
    assert again.head is not None
    assert again.head.get("x-receipt-id") == receipt_id
    assert again.head.get("x-should-retry") == "false"
    assert receipt_id in error_of(again)["message"]
    assert "charged once, $0.0000" in error_of(again)["message"]
    assert upstream.stats()["requests"] == 1
    assert await relay.spent(key) == PRICE


async def test_what_failed_for_the_user_but_may_have_billed_is_not_run_again(
    relay: Relay, key: str
) -> None:
    async with connect(relay.gateway.origin) as conn:
        await conn.send(once(relay, key, "stall-head"))

        async def is_claimed() -> bool | None:
            return bool(await claims(relay, key)) or None

        await eventually(is_claimed)
        conn.close()
    receipt = await relay.only_receipt(key)
    again = await send(relay, key, "stall-head")

    assert receipt["outcome"] == "client_left"
    assert told(again) == (409, "idempotency_completed")


async def test_another_body_with_the_same_key_is_refused(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    assert (await send(relay, key, PLAIN)).status == 200
    other = await send(relay, key, PLAIN, max_tokens=7)

    assert told(other) == (422, "idempotency_mismatch")
    assert "not charged" in error_of(other)["message"]
    assert upstream.stats()["requests"] == 1
    await relay.only_receipt(key)


async def test_keys_of_different_callers_and_different_keys_have_nothing_in_common(
    relay: Relay, key: str
) -> None:
    other = await relay.key()
    same_account = await relay.gateway.key(relay.account_of(key))
    answers = [
        await send(relay, key, PLAIN),
        await send(relay, other, PLAIN),
        await send(relay, same_account, PLAIN),
        await send(relay, key, PLAIN, "token-2"),
        await relay.call(key, PLAIN),
        await relay.call(key, PLAIN),
    ]

    assert {answer.status for answer in answers} == {200}
    await relay.receipts(key, 5)
    await relay.receipts(other, 1)


async def test_neither_key_nor_body_is_kept(relay: Relay, key: str) -> None:
    await send(relay, key, PLAIN, "a-secret-token")
    (row,) = await claims(relay, key)
    receipt = await relay.only_receipt(key)

    assert set(row) == {
        *("virtual_key_id", "key_digest", "body_digest", "request_id", "created_at"),
    }
    assert (len(row["key_digest"]), len(row["body_digest"])) == (32, 32)
    assert row["request_id"] == receipt["request_id"]
    assert "a-secret-token" not in str(receipt)


@pytest.mark.parametrize("model", ["status:500", "dead", "status:400"])
async def test_what_was_voided_is_run_again(
    relay: Relay, key: str, upstream: Upstream, model: str
) -> None:
    statuses = []
    for number in (1, 2, 3):
        statuses.append((await send(relay, key, model)).status)
        receipts = await relay.receipts(key, number)
        assert {receipt["outcome"] for receipt in receipts} == {"voided"}

    assert set(statuses) == {400 if model == "status:400" else 502}
    assert upstream.stats()["requests"] == (0 if model == "dead" else 3)
    assert len(await claims(relay, key)) == 1


async def test_of_ten_that_find_a_voided_request_one_runs(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    request = once(relay, key, "status:500,delay_ms=250")
    await relay.send(request)
    await relay.only_receipt(key)
    answers = await asyncio.gather(*(relay.send(request) for _ in range(10)))
    await relay.receipts(key, 2)

    assert Counter(answer.status for answer in answers) == {502: 1, 409: 9}
    assert upstream.stats()["requests"] == 2


async def test_a_request_refused_for_want_of_credit_can_be_mended_and_sent_at_once(
    relay: Relay, upstream: Upstream
) -> None:
    key = await relay.key(credits="1")
    refused = await send(relay, key, PLAIN, max_tokens=400)
    assert told(refused) == (402, "insufficient_credits")
    assert await claims(relay, key) == []
    mended = await send(relay, key, PLAIN, max_tokens=10)

    assert mended.status == 200
    assert upstream.stats()["requests"] == 1
    await relay.only_receipt(key)


async def test_a_request_refused_for_its_limit_leaves_the_key_to_the_next(
    relay: Relay, upstream: Upstream
) -> None:
    key = await relay.key(limits=Limits(open_requests=1))
    running = asyncio.ensure_future(relay.call(key, SLOW))
    await asyncio.to_thread(upstream.wait, lambda stats: stats["requests"] == 1)
    refused = await send(relay, key, PLAIN)
    await running

    assert told(refused) == (429, "rate_limited")
    assert (await send(relay, key, PLAIN)).status == 200
    await relay.receipts(key, 2)


async def test_a_malformed_request_claims_nothing(relay: Relay, key: str) -> None:
    statuses = [
        (await send(relay, key, PLAIN, max_tokens=-1)).status,
        (await send(relay, key, "no-such-model")).status,
    ]

    assert statuses == [400, 404]
    assert await claims(relay, key) == []


@pytest.mark.parametrize("token", ["", "x" * 256, "tab\there", "ümlaut"])
async def test_a_key_that_is_none_is_refused(
    relay: Relay, key: str, upstream: Upstream, token: str
) -> None:
    answer = await send(relay, key, PLAIN, token)

    assert told(answer) == (400, "invalid_request")
    assert "Idempotency-Key" in error_of(answer)["message"]
    assert upstream.stats()["requests"] == 0


async def test_the_longest_key_and_any_printable_one_is_taken(relay: Relay, key: str) -> None:
    answers = [await send(relay, key, PLAIN, token) for token in ("x" * 255, "a b, {\"~'}", "1")]

    assert [answer.status for answer in answers] == [200] * 3


async def test_a_claim_whose_process_died_is_taken_over_by_one_of_ten(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    request = once(relay, key, SLOW)
    await relay.call(key, PLAIN)
    dead_id = await old_claim(relay, key, request, 61)
    answers = await asyncio.gather(*(relay.send(request) for _ in range(10)))
    receipts = await relay.receipts(key, 2)

    assert Counter(answer.status for answer in answers) == {200: 1, 409: 9}
    assert upstream.stats()["requests"] == 2
    assert dead_id not in {receipt["request_id"] for receipt in receipts}


async def test_a_claim_of_less_than_a_minute_may_still_be_admitted(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    await relay.call(key, PLAIN)
    request = once(relay, key, PLAIN)
    await old_claim(relay, key, request, 50)

    assert told(await relay.send(request)) == (409, "idempotency_in_flight")
    assert upstream.stats()["requests"] == 1


async def test_a_claim_that_the_till_still_knows_is_never_taken_over(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    """Its process died after the hold: whoever sweeps holds writes its receipt."""
    request = once(relay, key, PLAIN)
    dead_id = await old_claim(relay, key, request, 10_000)
    account_id = relay.account_of(key)
    query = "SELECT id FROM app_api_keys WHERE billing_account_id = $1"
    app_key_id = await relay.gateway.pool.fetchval(query, account_id)
    scopes = spend_scopes(account_id, app_key_id)
    till, dead = relay.services.till, id_text(dead_id)
    await till.admit(scopes, dead, 1000, b"{}")
    while_held = await relay.send(request)
    await till.settle(scopes, dead, 10, b"{}")
    while_settled = await relay.send(request)
    await relay.services.link.command(("FLUSHALL",))

    assert told(while_held) == told(while_settled) == (409, "idempotency_in_flight")
    assert upstream.stats()["requests"] == 0


async def test_a_till_that_lost_something_since_proves_nothing(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    """Its request may be running without a hold: it is given the longest time it may take."""
    await relay.call(key, PLAIN)
    request, later = once(relay, key, PLAIN), once(relay, key, PLAIN, "token-2")
    await old_claim(relay, key, request, 61)
    await old_claim(relay, key, later, 200, b"token-2")
    await relay.gateway.tamper("UPDATE till_epoch SET changed_at = now()")

    assert told(await relay.send(request)) == (409, "idempotency_in_flight")
    assert (await relay.send(later)).status == 200
    assert upstream.stats()["requests"] == 2
    await relay.receipts(key, 2)


async def test_an_empty_till_proves_nothing(relay: Relay, key: str, upstream: Upstream) -> None:
    await relay.call(key, PLAIN)
    await relay.at_rest()
    request = once(relay, key, PLAIN)
    await old_claim(relay, key, request, 61)
    await relay.services.link.command(("FLUSHALL",))

    assert told(await relay.send(request)) == (409, "idempotency_in_flight")
    assert upstream.stats()["requests"] == 1


async def test_a_large_body_is_one_of_its_key_too(relay: Relay, key: str) -> None:
    text = [{"role": "user", "content": "x" * 300_000}]
    first = await send(relay, key, PLAIN, messages=text)
    await relay.only_receipt(key)
    again = await send(relay, key, PLAIN, messages=text)

    assert (first.status, told(again)) == (200, (409, "idempotency_completed"))


async def test_refusals_are_counted_by_their_codes_and_the_books_stay_clean(
    relay: Relay, key: str, valkey_url: str
) -> None:
    tokens = [f"t{number % 5}" for number in range(40)]
    answers = await asyncio.gather(*(send(relay, key, PLAIN, token) for token in tokens))
    receipts = await relay.receipts(key, 5)
    report = await run_audit(relay.gateway.book_url, valkey_url, at_rest=True)

    assert sum(answer.status == 200 for answer in answers) == 5
    assert {answer.status for answer in answers} == {200, 409}
    assert await relay.spent(key) == 5 * PRICE == sum(row["price_nanos"] for row in receipts)
    assert report.is_clean
    assert 'code="idempotency_in_flight"' in relay.services.metrics.render().decode()
