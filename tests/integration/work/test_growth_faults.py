"""A till that is away while streams grow."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from billing.audit import audit
from billing.till_scan import open_till
from gateway.relay.reply import Reply
from tests.support.audit_world import explain
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import Outcome, chat, exchange
from tests.support.relay import MESSAGES, Tokens, price_by_hand
from tests.support.upstream.launch import Upstream

SLOW = "plain:prompt=20,tokens=300,chunk_delay_ms=5"


@pytest.fixture
async def world(
    book_url: str, till_url: str, upstream: Upstream
) -> AsyncIterator[tuple[Gateway, FaultProxy]]:
    settings = make_settings(
        upstream.base_url,
        {"slow": zoo_model(SLOW, stream_window_tokens=64)},
        till__renew_every_s=0.2,
        till__rebuild_wait_ms=300,
    )
    async with (
        running_proxy(till_url) as (proxy, through),
        running_gateway(book_url, through, upstream.base_url, settings) as gateway,
    ):
        yield gateway, proxy


def start(gateway: Gateway, key: str) -> asyncio.Future[Outcome]:
    payload = {"model": "slow", "messages": MESSAGES, "stream": True}
    return asyncio.ensure_future(exchange(gateway.origin, chat(key, payload)))


async def reply_at(gateway: Gateway, tokens: int) -> Reply:
    """Our side of the stream, once so many tokens came."""

    async def found() -> Reply | None:
        return next((r for r in gateway.services.replies if r.seen.bytes > tokens * 250), None)

    return await eventually(found)


async def assert_clean(gateway: Gateway, till_url: str) -> None:
    async def at_rest() -> bool | None:
        async with gateway.pool.acquire() as conn, open_till(till_url) as till:
            return (await audit(conn, till, at_rest=True)).is_clean or None

    try:
        await eventually(at_rest)
    except TimeoutError:
        async with gateway.pool.acquire() as conn, open_till(till_url) as till:
            report = await audit(conn, till, at_rest=True)
        raise AssertionError(explain(report)) from None


@pytest.mark.parametrize("fault", ["refuse", "half_open"])
async def test_a_stream_goes_on_and_is_paid_when_the_till_is_back(
    world: tuple[Gateway, FaultProxy], till_url: str, fault: str
) -> None:
    gateway, proxy = world
    answer = start(gateway, await gateway.key())
    reply = await reply_at(gateway, 20)
    held = reply.call.hold_nanos
    getattr(proxy, fault)()
    await reply_at(gateway, 120)
    # Beyond its window, and nobody could be asked.
    assert reply.call.hold_nanos == held
    proxy.heal()
    proxy.cut()
    outcome = await answer
    await gateway.at_rest()

    assert outcome.frames()[-1] == "[DONE]"
    (receipt,) = await gateway.receipts(1)
    assert receipt["outcome"] == "complete"
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=20, completion=300))
    await assert_clean(gateway, till_url)


async def test_what_nobody_could_hold_is_the_operators_and_never_the_users(
    world: tuple[Gateway, FaultProxy], till_url: str
) -> None:
    gateway, proxy = world
    answer = start(gateway, await gateway.key())
    reply = await reply_at(gateway, 5)
    held = reply.call.hold_nanos
    proxy.refuse()
    outcome = await answer
    (receipt,) = await gateway.receipts(1)

    assert outcome.frames()[-1] == "[DONE]"
    assert receipt["price_nanos"] == receipt["hold_nanos"] == held
    whole = price_by_hand(Tokens(prompt=20, completion=300))
    overrun = await gateway.pool.fetchval("SELECT overrun_nanos FROM charge_receipts")
    assert overrun == whole - held > 0
    proxy.heal()
    await gateway.at_rest()
    await assert_clean(gateway, till_url)
