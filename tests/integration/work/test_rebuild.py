"""A till is made anew beside a gateway that serves."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from billing import till_rebuild
from billing.till_rebuild import RebuildRefused
from billing.till_scopes import account_scope_key
from gateway.cli.audit import run_audit
from tests.support.audit_world import client_of, explain
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import Outcome, chat, exchange
from tests.support.rebuilds import rebuild_at
from tests.support.relay import MESSAGES
from tests.support.upstream.launch import Upstream

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


async def test_streams_go_on_while_their_till_is_made_anew(slow: Gateway, till_url: str) -> None:
    key = await slow.key()
    payload = {"model": "slow", "messages": MESSAGES, "stream": True}
    short = {"model": "plain", "messages": MESSAGES}
    streams = [asyncio.ensure_future(exchange(slow.origin, chat(key, payload))) for _ in range(8)]

    async def all_deliver() -> bool | None:
        return sum(bool(r.call.first_byte_at) for r in slow.services.replies) == 8 or None

    await eventually(all_deliver)
    scope = account_scope_key(await slow.account_of(key))
    async with client_of(till_url) as client:
        await client.hset(scope, mapping={"held": 1, "open": 99, "uncommitted": -7, "posted": 1})
        # One hold is gone as well: its worker places it again.
        reply = next(iter(slow.services.replies))
        await client.delete(f"{reply.call.caller.scopes.hold_prefix}{reply.call.request_id}")
        rebuilding = asyncio.ensure_future(rebuild_at(slow.book_url, till_url, wait_ms=1500))

        async def refused() -> Outcome | None:
            answer = await exchange(slow.origin, chat(key, short))
            return answer if answer.status == 503 else None

        meanwhile = await eventually(refused)
        done = await rebuilding
        held = await client.hmget(scope, "held", "open", "uncommitted")
    after = await exchange(slow.origin, chat(key, short))
    answers = await asyncio.gather(*streams)
    await slow.at_rest()
    report = await run_audit(slow.book_url, till_url, True)

    assert json.loads(meanwhile.body)["error"]["code"] == "unavailable"
    assert after.status == 200
    assert done.wrong_scopes >= 1
    assert done.holds == 8
    assert held[1] == b"8"
    assert all(answer.frames()[-1] == "[DONE]" for answer in answers)
    receipts = await slow.receipts(9)
    assert {receipt["outcome"] for receipt in receipts} == {"complete"}
    assert report.is_clean, explain(report)


async def test_a_till_ahead_of_a_restored_book_is_seeded_from_it(
    gateway: Gateway, till_url: str
) -> None:
    key = await gateway.key(credits="1000")
    account_id = await gateway.account_of(key)
    payload = {"model": "plain", "messages": MESSAGES}
    assert (await exchange(gateway.origin, chat(key, payload))).status == 200
    await gateway.at_rest()
    async with client_of(till_url) as client:
        scope = account_scope_key(account_id)
        # As if the book that said this, and the epochs it knew of, had been lost.
        await client.hset(scope, mapping={"posted": 5, "version": 99, "epoch": 40})
        async for name in client.scan_iter("fb:{s??}:epoch", count=1000):
            await client.set(name, 40)
    before = await exchange(gateway.origin, chat(key, payload))

    done = await rebuild_at(gateway.book_url, till_url)
    after = await exchange(gateway.origin, chat(key, payload))
    await gateway.at_rest()
    report = await run_audit(gateway.book_url, till_url, True)

    assert (before.status, after.status, done.epoch) == (503, 200, 41)
    assert report.is_clean, explain(report)


async def test_a_rebuild_that_ends_half_way_keeps_nobody_out(
    slow: Gateway, till_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await slow.key()
    monkeypatch.setattr(till_rebuild, "TRIES", 0)

    with pytest.raises(RebuildRefused):
        await rebuild_at(slow.book_url, till_url)

    async def serves() -> bool | None:
        answer = await exchange(slow.origin, chat(key, {"model": "plain", "messages": MESSAGES}))
        return answer.status == 200 or None

    await eventually(serves)
    assert await slow.pool.fetchval("SELECT count(*) FROM workers") == 1
