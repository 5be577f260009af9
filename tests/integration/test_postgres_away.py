"""Postgres away under traffic: warm accounts go on, nothing is lost, nobody is charged twice."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from billing.audit import audit
from billing.till_scan import open_till
from config.ids import id_text
from tests.support.books import open_pool
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import Outcome, chat, exchange
from tests.support.upstream.launch import Upstream

AWAY_S = 4.0
CALLERS = 8
MODELS = {"paced": zoo_model("plain:tokens=12,chunk_delay_ms=5")}
# An answer of the book about a key gets old many times while it is away.
IMPATIENT: dict[str, Any] = {
    "keys__cache_ttl_ms": 300,
    "book__statement_timeout_ms": 500,
    "book__connect_timeout_s": 1,
    # A busy machine is no reason to refuse a call.
    "till__call_timeout_ms": 5000,
}


@asynccontextmanager
async def behind_a_proxy(
    book_url: str, till_url: str, upstream: Upstream, **more: Any
) -> AsyncIterator[tuple[FaultProxy, Gateway]]:
    settings = make_settings(upstream.base_url, MODELS, **{**IMPATIENT, **more})
    async with (
        running_proxy(book_url) as (proxy, url),
        running_gateway(url, till_url, upstream.base_url, settings) as gateway,
    ):
        yield proxy, gateway
        proxy.heal()
        await at_rest(gateway)


async def at_rest(gateway: Gateway) -> None:
    """With the patience that connections need which nobody told that they are gone."""

    async def idle() -> bool | None:
        services = gateway.services
        return (services.open_calls == 0 and services.settler.is_idle) or None

    await eventually(idle, 40)


def harm(proxy: FaultProxy, fault: str) -> None:
    if fault == "refuse":
        proxy.refuse()
    else:
        proxy.half_open()


async def call(gateway: Gateway, key: str, *, stream: bool = False) -> Outcome:
    payload = {"model": "paced", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    return await exchange(gateway.base_url, chat(key, payload), deadline=30)


async def traffic(gateway: Gateway, keys: list[str], for_s: float) -> list[Outcome]:
    """Streams and plain calls in turn, from several callers at once."""
    loop, answers = asyncio.get_running_loop(), []
    ends = loop.time() + for_s

    async def one(number: int) -> None:
        turn = number
        while loop.time() < ends:
            turn += 1
            answers.append(await call(gateway, keys[number % len(keys)], stream=turn % 2 == 0))

    await asyncio.gather(*(one(number) for number in range(CALLERS)))
    return answers


async def check_books(book_url: str, till_url: str, answers: list[Outcome]) -> None:
    """One receipt for each answer, no other one, and everything adds up."""
    async with open_pool(book_url, 1) as pool:
        rows = await pool.fetch("SELECT request_id, outcome FROM charge_receipts")
        charges = await pool.fetchval("SELECT count(*) FROM credit_ledger WHERE reason = 'charge'")
    told = [answer.head.get("x-receipt-id") for answer in answers if answer.head is not None]
    assert Counter(f"rcpt_{id_text(row['request_id'])}" for row in rows) == Counter(told)
    assert {row["outcome"] for row in rows} == {"complete"}
    assert charges == len(answers)
    conn = await asyncpg.connect(book_url)
    async with open_till(till_url) as till:
        report = await audit(conn, till, at_rest=True)
    await conn.close()
    assert report.is_clean, [check for check in report.checks if check.violations]


@pytest.mark.parametrize("fault", ["refuse", "half_open"])
async def test_warm_accounts_go_on_and_every_answer_has_its_receipt(
    book_url: str, till_url: str, upstream: Upstream, fault: str
) -> None:
    async with behind_a_proxy(book_url, till_url, upstream) as (proxy, gateway):
        keys = [await gateway.key() for _ in range(4)]
        cold = await gateway.key()
        before = [await call(gateway, key) for key in keys]
        await at_rest(gateway)
        harm(proxy, fault)
        answers, refused = await asyncio.gather(traffic(gateway, keys, AWAY_S), call(gateway, cold))
        pending = gateway.services.settler.pending
        proxy.heal()
        after = await traffic(gateway, [*keys, cold], 0.5)
        await at_rest(gateway)

    statuses = Counter(answer.status for answer in answers)
    assert statuses == {200: len(answers)}
    assert pending == len(answers) > 100
    for answer in answers:
        if answer.head is not None and "event-stream" in (answer.head.get("content-type") or ""):
            assert answer.frames()[-1] == "[DONE]"
    error = refused.json()["error"]
    assert (refused.status, error["code"]) == (503, "unavailable")
    assert "cannot be looked up right now" in error["message"]
    assert "not charged" in error["message"]
    # Right after the healing a cold account may still meet a connection that is dead.
    served = [answer for answer in after if answer.status == 200]
    assert {answer.status for answer in after} <= {200, 503}
    await check_books(book_url, till_url, [*before, *answers, *served])


async def test_receipts_that_wait_for_too_long_close_the_door(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    aged = {"book__pending_age_max_s": 1}
    async with behind_a_proxy(book_url, till_url, upstream, **aged) as (proxy, gateway):
        key = await gateway.key()
        answers = [await call(gateway, key)]
        await at_rest(gateway)
        proxy.refuse()

        async def status(wanted: int) -> Outcome | None:
            answer = await call(gateway, key)
            if answer.status == 200:
                answers.append(answer)
            return answer if answer.status == wanted else None

        refused = await eventually(lambda: status(503))
        proxy.heal()
        await eventually(lambda: status(200))
        await at_rest(gateway)

    assert refused.head.get("retry-after") == "1"
    assert "waiting to be recorded" in json.dumps(refused.json())
    await check_books(book_url, till_url, answers)


async def test_too_many_receipts_that_wait_close_the_door(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    few = {"book__receipts_pending_max": 20}
    async with behind_a_proxy(book_url, till_url, upstream, **few) as (proxy, gateway):
        key = await gateway.key()
        answers = [await call(gateway, key)]
        await at_rest(gateway)
        proxy.refuse()
        tried = [await call(gateway, key) for _ in range(20)]
        proxy.heal()
        await at_rest(gateway)
        answers.append(await call(gateway, key))
        await at_rest(gateway)

    assert [answer.status for answer in tried] == [200] * 16 + [503] * 4
    await check_books(book_url, till_url, [*answers, *tried[:16]])
