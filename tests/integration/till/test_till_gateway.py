"""A till that fails under a running gateway: refused quickly, nothing forwarded or charged."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import redis.asyncio

from tests.support.faultproxy import FaultProxy, Mode, running_proxy
from tests.support.gateway import Gateway, eventually, running_gateway
from tests.support.upstream.launch import Upstream

BODY = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
REFUSED_MS = 150


@asynccontextmanager
async def behind_a_proxy(
    book_url: str, till_url: str, upstream: Upstream
) -> AsyncIterator[tuple[FaultProxy, Gateway]]:
    async with (
        running_proxy(till_url) as (proxy, url),
        running_gateway(book_url, url, upstream.base_url) as gateway,
    ):
        yield proxy, gateway
        proxy.heal()
        await gateway.at_rest()


@asynccontextmanager
async def client_of(gateway: Gateway, key: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=gateway.base_url, headers=headers) as client:
        yield client


async def open_holds(till_url: str) -> list[str]:
    client = redis.asyncio.from_url(till_url, decode_responses=True)
    async with client:
        holds = [key async for key in client.scan_iter("fb:*:h:*", count=1000)]
        for key in [key async for key in client.scan_iter("fb:*:a:*", count=1000)]:
            fields = await client.hgetall(key)
            assert int(fields.get("held", 0)) == int(fields.get("open", 0)) == 0
            assert int(fields.get("uncommitted", 0)) == 0
        outboxes = [key async for key in client.scan_iter("fb:*:outbox", count=1000)]
        return holds + outboxes


@pytest.mark.parametrize("fault", ["refuse", "stall", "half_open", "swallow"])
async def test_an_unreachable_till_refuses_at_once_and_nothing_is_forwarded(
    book_url: str, till_url: str, upstream: Upstream, fault: str
) -> None:
    async with behind_a_proxy(book_url, till_url, upstream) as (proxy, gateway):
        key = await gateway.key(credits="1000")
        async with client_of(gateway, key) as client:
            assert (await client.post("/chat/completions", json=BODY)).status_code == 200
            await gateway.at_rest()
            upstream.reset()
            if fault == "refuse":
                proxy.refuse()
            elif fault == "half_open":
                proxy.half_open()
            elif fault == "stall":
                proxy.both(Mode.STALL)
            else:
                proxy.to_client.mode = Mode.SWALLOW
            took_ms = []
            for _ in range(7):
                started = time.perf_counter()
                answer = await client.post("/chat/completions", json=BODY)
                took_ms.append((time.perf_counter() - started) * 1000)
                assert answer.status_code == 503
                assert "not charged" in answer.json()["error"]["message"]
            assert upstream.stats()["requests"] == 0
            proxy.heal()
            await gateway.at_rest()

            async def served() -> bool | None:
                answer = await client.post("/chat/completions", json=BODY)
                return True if answer.status_code == 200 else None

            await eventually(served)
            await gateway.at_rest()
        charged = await gateway.pool.fetchval(
            "SELECT count(*) FROM charge_receipts WHERE price_nanos > 0"
        )
        ledger = await gateway.pool.fetchval(
            "SELECT count(*) FROM credit_ledger WHERE reason = 'charge'"
        )

    assert charged == ledger == 2
    assert sorted(took_ms)[3] < REFUSED_MS, took_ms
    assert await open_holds(till_url) == []


async def test_a_hold_whose_answer_was_lost_ends_in_one_voided_receipt(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    async with behind_a_proxy(book_url, till_url, upstream) as (proxy, gateway):
        key = await gateway.key(credits="1000")
        async with client_of(gateway, key) as client:
            assert (await client.post("/chat/completions", json=BODY)).status_code == 200
            await gateway.at_rest()
            upstream.reset()
            proxy.to_client.mode = Mode.SWALLOW
            answer = await client.post("/chat/completions", json=BODY)
            proxy.heal()
            await gateway.at_rest()
            rows = await gateway.receipts(2)

    assert answer.status_code == 503
    assert upstream.stats()["requests"] == 0
    assert sorted(row["outcome"] for row in rows) == ["complete", "voided"]
    assert {row["price_nanos"] for row in rows if row["outcome"] == "voided"} == {0}
    assert await open_holds(till_url) == []


async def test_a_till_that_goes_away_mid_call_costs_nobody_anything(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    """Admitted, forwarded, then the till is gone: the book alone ends the call."""
    async with behind_a_proxy(book_url, till_url, upstream) as (proxy, gateway):
        account_id = await gateway.account("1000")
        key = await gateway.key(account_id)
        body = {**BODY, "stream": True}
        async with client_of(gateway, key) as client:
            async with client.stream("POST", "/chat/completions", json=body) as answer:
                lines = answer.aiter_lines()
                first = await anext(lines)
                proxy.refuse()
                rest = [line async for line in lines]
            (row,) = await gateway.receipts(1)
            proxy.heal()
            await gateway.at_rest()

    assert first.startswith("data:")
    assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
    assert row["outcome"] == "complete"
    assert row["price_nanos"] > 0
    assert await open_holds(till_url) == []


async def flap(proxy: FaultProxy) -> None:
    """Cut the connections after every few kilobytes of answers."""
    while True:
        before = proxy.to_client.bytes

        async def busy(before: int = before) -> bool | None:
            return proxy.to_client.bytes - before > 3000 or None

        await eventually(busy)
        proxy.cut()


async def test_many_calls_through_a_flapping_till_leave_nothing_open(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    async with behind_a_proxy(book_url, till_url, upstream) as (proxy, gateway):
        key = await gateway.key(credits="100000")
        async with client_of(gateway, key) as client:
            flapping = asyncio.ensure_future(flap(proxy))
            calls = (client.post("/chat/completions", json=BODY) for _ in range(150))
            answers = await asyncio.gather(*calls)
            flapping.cancel()
            await asyncio.wait([flapping])
            await gateway.at_rest()
        served = [a.headers["x-receipt-id"] for a in answers if a.status_code == 200]
        refused = [a for a in answers if a.status_code == 503]
        complete = await gateway.pool.fetchval(
            "SELECT count(*) FROM charge_receipts WHERE outcome = 'complete'"
        )

    assert len(served) + len(refused) == 150
    assert complete == len(set(served))
    assert len(served) > 0
    assert await open_holds(till_url) == []
