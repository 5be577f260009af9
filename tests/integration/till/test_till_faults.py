"""The connection through a proxy that stalls, cuts, delays and swallows."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from billing.errors import TillUnavailable
from billing.till import Till
from billing.till_link import TillLink
from config.ids import id_text, new_id
from tests.support.faultproxy import FaultProxy, Mode, running_proxy
from tests.support.gateway import eventually
from tests.support.tills import (
    Said,
    admit,
    confirmation,
    look,
    nothing_unseen,
    running_link,
    running_till,
    settle,
)

CALL_S = 0.05


@pytest.fixture(autouse=True)
async def unseen() -> AsyncIterator[None]:
    async with nothing_unseen():
        yield


@asynccontextmanager
async def proxied_link(url: str, **more: Any) -> AsyncIterator[tuple[FaultProxy, TillLink]]:
    async with running_proxy(url) as (proxy, through), running_link(through, **more) as link:
        yield proxy, link


@asynccontextmanager
async def proxied_till(url: str, said: Said, **more: Any) -> AsyncIterator[tuple[FaultProxy, Till]]:
    async with running_proxy(url) as (proxy, through), running_till(through, said, **more) as till:
        yield proxy, till


async def is_true(probe: Any) -> None:
    async def probed() -> bool | None:
        return probe() or None

    await eventually(probed)


async def timed_out_after(link: TillLink) -> float:
    started = time.monotonic()
    with pytest.raises(TillUnavailable) as caught:
        await link.command(("PING",))
    assert caught.value.asked
    return time.monotonic() - started


async def test_every_call_has_its_own_deadline(till_url: str) -> None:
    """Only the first call of a silent connection had one: the next waited for the stall."""
    async with proxied_link(till_url, call_s=CALL_S) as (proxy, link):
        proxy.to_client.mode = Mode.STALL
        waits = [await timed_out_after(link) for _ in range(6)]

        async def later(turns: int) -> float:
            for _ in range(turns * 100):
                await asyncio.sleep(0)
            return await timed_out_after(link)

        waits += await asyncio.gather(*(later(turns) for turns in range(20)))

    assert min(waits) >= CALL_S
    assert sorted(waits)[len(waits) // 2] < 2 * CALL_S
    assert max(waits) < 6 * CALL_S


async def test_late_replies_are_dropped_in_their_place(till_url: str) -> None:
    async with running_proxy(till_url) as (proxy, url):
        async with running_link(url, call_s=CALL_S) as link:
            proxy.to_client.mode = Mode.STALL
            for number in range(3):
                with pytest.raises(TillUnavailable):
                    await link.command(("ECHO", f"late {number}"))
            proxy.heal()
            answers = await asyncio.gather(*(link.command(("ECHO", n)) for n in range(100)))

        assert answers == [b"%d" % n for n in range(100)]
        assert proxy.accepted == 1


async def test_slow_answers_within_the_deadline_are_answers(till_url: str) -> None:
    async with running_proxy(till_url) as (proxy, url), running_link(url, call_s=2) as link:
        proxy.to_client.delay_s = 0.05
        answers = await asyncio.gather(*(link.command(("ECHO", n)) for n in range(10)))

    assert answers == [b"%d" % n for n in range(10)]


@pytest.mark.parametrize("direction", ["to_server", "to_client", "both"])
async def test_a_silent_connection_is_closed_and_made_anew(till_url: str, direction: str) -> None:
    async with proxied_link(till_url, call_s=CALL_S, stall_s=0.3) as (proxy, link):
        if direction == "both":
            proxy.half_open()
        else:
            getattr(proxy, direction).mode = Mode.SWALLOW
        started = time.monotonic()
        await timed_out_after(link)
        await is_true(lambda: not link.is_up)
        stalled_s = time.monotonic() - started
        proxy.heal()
        assert await link.wait_up(5)
        assert await link.command(("ECHO", "back")) == b"back"

    assert 0.3 <= stalled_s < 1
    assert proxy.accepted >= 2


async def test_a_cut_fails_what_was_asked_at_once(till_url: str) -> None:
    async with running_proxy(till_url) as (proxy, url), running_link(url, call_s=5) as link:
        proxy.to_client.mode = Mode.STALL
        calls = [link.command(("PING",)) for _ in range(50)]
        await is_true(lambda: proxy.to_server.bytes > 50 * 10)
        started = time.monotonic()
        proxy.refuse()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failed_s = time.monotonic() - started
        proxy.heal()
        assert await link.wait_up(5)
        assert await link.command(("PING",)) == b"PONG"

    assert {type(answer) for answer in answers} == {TillUnavailable}
    assert failed_s < 1


async def test_a_link_that_flaps_reconnects_with_pauses(till_url: str) -> None:
    async with proxied_link(till_url, call_s=CALL_S) as (proxy, link):
        for _ in range(5):
            proxy.cut()
            await is_true(lambda: not link.is_up)
            assert await link.wait_up(5)
        accepted = proxy.accepted
        assert await link.command(("PING",)) == b"PONG"

    assert accepted == 6
    assert proxy.open == 0


async def test_close_does_not_wait_for_a_silent_server(till_url: str) -> None:
    async with proxied_link(till_url, call_s=60, stall_s=60) as (proxy, link):
        proxy.half_open()
        calls = [link.command(("PING",)) for _ in range(10)]
        started = time.monotonic()
        await link.close()
        answers = await asyncio.gather(*calls, return_exceptions=True)

    assert time.monotonic() - started < 1
    assert {type(answer) for answer in answers} == {TillUnavailable}


async def admitted_after(till: Till, proxy: FaultProxy, nanos: int) -> tuple[float, bool]:
    said = till.link
    assert said.call_timeout_s == CALL_S
    scopes = Said().account(0)
    started = time.monotonic()
    with pytest.raises(TillUnavailable) as caught:
        await till.admit(scopes, id_text(new_id()), nanos, b"{}")
    return time.monotonic() - started, caught.value.asked


@pytest.mark.parametrize("fault", ["stall", "half_open", "refuse", "cut"])
async def test_no_admission_takes_longer_than_two_calls(till_url: str, fault: str) -> None:
    said = Said()
    async with proxied_till(till_url, said, call_s=CALL_S) as (proxy, till):
        await admit(till, said.account(10), 1)
        if fault == "stall":
            proxy.both(Mode.STALL)
        elif fault == "half_open":
            proxy.half_open()
        else:
            proxy.refuse()
            if fault == "refuse":
                await is_true(lambda: not till.link.is_up)
        tries = [await admitted_after(till, proxy, 1) for _ in range(7)]

    assert sorted(seconds for seconds, _ in tries)[3] < 0.13
    if fault == "refuse":
        assert not any(asked for _, asked in tries)
    if fault in {"stall", "half_open"}:
        assert all(asked for _, asked in tries)


async def test_an_admission_survives_one_cut(till_url: str) -> None:
    said = Said()
    scopes = said.account(10_000)
    async with proxied_till(till_url, said, call_s=1) as (proxy, till):
        await admit(till, scopes, 1)
        for _ in range(5):
            proxy.to_client.mode = Mode.SWALLOW
            before = proxy.to_server.bytes
            admission = asyncio.ensure_future(admit(till, scopes, 1))
            await is_true(lambda before=before: proxy.to_server.bytes > before)
            proxy.cut()
            proxy.heal()
            await admission
    seen = await look(till_url, scopes)
    assert (seen.open, seen.held) == (6, 6)
    seen.check()


async def test_a_script_that_nobody_waits_for_any_more_is_not_run_late(till_url: str) -> None:
    """Told NOSCRIPT after its caller gave up, the link ran the script all the same: a hold that
    its request had already ended came back."""
    said = Said()
    scopes = said.account(1000)
    request_id = id_text(new_id())
    async with proxied_till(till_url, said, call_s=CALL_S) as (proxy, till):
        await admit(till, scopes, 1)
        await till.link.command(("SCRIPT", "FLUSH"))
        proxy.to_client.mode = Mode.STALL
        with pytest.raises(TillUnavailable):
            await admit(till, scopes, 5, request_id)
        proxy.heal()
        assert await till.link.command(("ECHO", "x")) == b"x"
        assert await till.link.command(("ECHO", "y")) == b"y"
        seen = await look(till_url, scopes)

    assert request_id not in seen.holds


async def test_a_settle_without_answer_is_confirmed_all_the_same(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with proxied_till(till_url, said, call_s=CALL_S) as (proxy, till):
        request_id = await admit(till, scopes, 300)
        proxy.to_client.mode = Mode.STALL
        with pytest.raises(TillUnavailable):
            await settle(till, scopes, request_id, 100)
        state = said.put(scopes.account_id, 900, 2)
        with pytest.raises(TillUnavailable):
            await till.confirm(confirmation(state, scopes, request_id))
        proxy.heal()
        await till.confirm(confirmation(state, scopes, request_id))

    seen = await look(till_url, scopes)
    assert (seen.available, seen.holds, seen.outbox, seen.open) == (900, {}, {}, 0)


async def test_forwarded_is_on_the_wire_and_never_waited_for(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with proxied_till(till_url, said, call_s=CALL_S) as (proxy, till):
        request_id = await admit(till, scopes, 300)
        proxy.to_client.mode = Mode.SWALLOW
        till.forwarded(scopes, request_id)
        async with running_link(till_url) as other:

            async def state() -> bool | None:
                key = scopes.hold_prefix + request_id
                return await other.command(("HGET", key, "state")) == b"F" or None

            await eventually(state)
        proxy.refuse()
        await is_true(lambda: not till.link.is_up)
        till.forwarded(scopes, request_id)
