"""A worker keeps its holds: leases, checkpoints, and a till that loses everything."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio

from billing.book import acquire
from billing.receipts import ChargeReceipt, decode_receipt
from billing.sweep import Sweeper
from billing.till_scopes import shard_prefix
from billing.tokens import count_tokens
from gateway.relay.reply import Reply
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import Outcome, chat, exchange
from tests.support.relay import MESSAGES
from tests.support.upstream.launch import Upstream

# 60 words, a word every 40 ms: longer than several renewals and one rebuilding.
SLOW = "plain:prompt=30,tokens=60,chunk_delay_ms=40"


@pytest.fixture
async def slow(book_url: str, till_url: str, upstream: Upstream) -> AsyncIterator[Gateway]:
    settings = make_settings(
        upstream.base_url,
        {"slow": zoo_model(SLOW)},
        till__renew_every_s=0.2,
        till__rebuild_wait_ms=300,
    )
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        yield gateway


class Stream:
    """A stream under way."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        payload = {"model": "slow", "messages": MESSAGES, "stream": True}
        self.answer = asyncio.ensure_future(exchange(gateway.origin, chat(key, payload)))
        self.gateway = gateway

    async def reply(self) -> Reply:
        """Our side of it, once something was delivered."""

        async def started() -> Reply | None:
            replies = [r for r in self.gateway.services.replies if r.call.first_byte_at]
            return replies[0] if replies else None

        return await eventually(started)

    async def end(self) -> Outcome:
        return await self.answer


async def draft_in(till_url: str, reply: Reply) -> ChargeReceipt | None:
    client = redis.asyncio.from_url(till_url)
    try:
        raw = await client.hget(
            f"{reply.call.caller.scopes.hold_prefix}{reply.call.request_id}", "draft"
        )
    finally:
        await client.aclose()
    return decode_receipt(raw) if isinstance(raw, bytes) else None


def sweeper(gateway: Gateway) -> Sweeper:
    return Sweeper(gateway.pool, gateway.services.till, grace_s=0, takeover_s=0)


async def test_checkpoints_grow_and_never_exceed_what_came(slow: Gateway, till_url: str) -> None:
    stream = Stream(slow, await slow.key())
    reply = await stream.reply()
    found: list[tuple[int, int]] = []

    async def three() -> bool | None:
        draft = await draft_in(till_url, reply)
        counts = (draft.input_tokens, draft.output_tokens) if draft else (0, 0)
        if counts[1] and counts not in found:
            found.append(counts)
        return len(found) >= 3 or None

    await eventually(three)
    answer = await stream.end()

    assert found == sorted(found)
    receipt = (await slow.receipts(1))[0]
    assert 0 < found[0][1] < found[-1][1] <= receipt["output_tokens"]
    assert 0 < found[0][0] <= receipt["input_tokens"]
    assert answer.status == 200
    assert receipt["outcome"] == "complete"


async def test_streams_outlive_a_till_that_lost_everything(slow: Gateway, till_url: str) -> None:
    key = await slow.key()
    streams = [Stream(slow, key) for _ in range(5)]
    await streams[0].reply()
    client = redis.asyncio.from_url(till_url)
    account_id = await slow.account_of(key)
    held = f"{shard_prefix(account_id)}leases"

    async def all_open() -> bool | None:
        return await client.zcard(held) == 5 or None

    await eventually(all_open)
    await client.flushall()
    await eventually(all_open)
    answers = [await stream.end() for stream in streams]
    await slow.at_rest()

    assert all(answer.frames()[-1] == "[DONE]" for answer in answers)
    receipts = await slow.receipts(5)
    assert {receipt["outcome"] for receipt in receipts} == {"complete"}
    assert await slow.pool.fetchval("SELECT epoch FROM till_epoch") == 2
    again = await exchange(slow.origin, chat(key, {"model": "plain", "messages": MESSAGES}))
    assert again.status == 200
    await slow.at_rest()
    assert await client.zcard(held) == 0
    await client.aclose()


async def test_credit_that_is_held_is_not_given_twice_by_an_emptied_till(
    slow: Gateway, till_url: str
) -> None:
    """The first admission after the loss came before the open hold was back."""
    key = await slow.key(credits="6")  # $0.006: one hold of 500 words takes more than half
    stream = Stream(slow, key)
    await stream.reply()
    client = redis.asyncio.from_url(till_url)

    before = await exchange(slow.origin, chat(key, {"model": "plain", "messages": MESSAGES}))
    await client.flushall()
    payload: dict[str, Any] = {"model": "plain", "messages": MESSAGES}
    answers = [await exchange(slow.origin, chat(key, payload)) for _ in range(3)]
    await stream.end()
    await client.aclose()

    assert [answer.status for answer in (before, *answers)] == [402] * 4


async def test_a_request_that_the_sweeper_took_stops_and_pays_what_was_delivered(
    slow: Gateway, till_url: str
) -> None:
    stream = Stream(slow, await slow.key())
    reply = await stream.reply()
    scopes = reply.call.caller.scopes
    client = redis.asyncio.from_url(till_url)
    await client.zadd(scopes.leases_key, {reply.call.request_id: 1})
    await client.aclose()
    reply.renewed_at += 0.3  # not renewed before it is swept
    swept = await sweeper(slow).sweep()
    answer = await stream.end()
    await slow.at_rest()

    assert swept == {"recovered": 1, "posted": 1}
    *_, failed, done = answer.frames()
    assert done == "[DONE]"
    assert "The gateway stood still" in json.loads(failed)["error"]["message"]
    (receipt,) = await slow.receipts(1)
    assert (receipt["outcome"], receipt["usage_source"]) == ("recovered", "checkpoint")
    query = "SELECT reason, amount_nanos FROM credit_ledger WHERE reason <> 'grant' ORDER BY seq"
    async with acquire(slow.pool) as conn:
        rows = await conn.fetch(query)
    assert [row["reason"] for row in rows] == ["charge", "adjust"]
    assert rows[1]["amount_nanos"] < 0
    assert -sum(row["amount_nanos"] for row in rows) <= receipt["hold_nanos"]


async def test_a_hold_that_the_till_lost_alone_is_placed_again(
    slow: Gateway, till_url: str
) -> None:
    """The till came back a second older, in the same epoch."""
    stream = Stream(slow, await slow.key())
    reply = await stream.reply()
    scopes, request_id = reply.call.caller.scopes, reply.call.request_id
    client = redis.asyncio.from_url(till_url)
    await client.delete(f"{scopes.hold_prefix}{request_id}")
    await client.zrem(scopes.leases_key, request_id)
    for key in scopes.scope_keys:
        await client.hset(key, mapping={"held": 0, "open": 0})

    async def is_back() -> bool | None:
        return await client.zscore(scopes.leases_key, request_id) is not None or None

    await eventually(is_back)
    await stream.end()
    await slow.at_rest()

    assert await client.hmget(scopes.scope_keys[0], "held", "open") == [b"0", b"0"]
    await client.aclose()
    (receipt,) = await slow.receipts(1)
    assert receipt["outcome"] == "complete"


async def test_a_count_that_fails_ends_no_renewals(
    slow: Gateway, till_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without renewals a sweeper would end every stream of a worker that lives."""
    failures = iter([RuntimeError("can't start new thread")])

    def count(text: str) -> int:
        for failure in failures:
            raise failure
        return count_tokens(text)

    monkeypatch.setattr("gateway.holds.count_tokens", count)
    stream = Stream(slow, await slow.key())
    reply = await stream.reply()

    async def is_renewed() -> bool | None:
        draft = await draft_in(till_url, reply)
        return (draft is not None and draft.output_tokens > 0) or None

    await eventually(is_renewed)
    assert (await stream.end()).frames()[-1] == "[DONE]"
    assert [r.message for r in caplog.records].count("holds.renew_crashed") == 1
