"""The relay's own part of pumping, with a provider that does what a test says in each turn."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from config.settings import Settings
from gateway.relay.stream import _StreamRelay
from gateway.relay.watchdog import DeadlineMissed, Watchdogs

FRAME = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
LARGE = b"".join(FRAME % (b"%05d" % number) for number in range(4000))
LAST = FRAME % b"last"


class Exchange:
    """A client that takes everything; its head was sent."""

    is_started, gone, is_blocked = True, False, False

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


class Provider:
    """Does one of its turns in each pump, the last one again and again."""

    def __init__(self, *turns: Callable[[Callable[[bytes], bool]], bool]) -> None:
        self._turns = list(turns)

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        turn = self._turns.pop(0) if len(self._turns) > 1 else self._turns[0]
        return turn(take)


def relay_of(provider: Provider, total_s: float) -> tuple[Any, Exchange]:
    """A relay between them; its calls and client are as much as it looks at."""
    exchange = Exchange()

    async def body(data: bytes) -> None:
        exchange.write(data)

    reply: Any = SimpleNamespace(
        services=SimpleNamespace(settings=Settings()),
        client=SimpleNamespace(exchange=exchange, head_sent=True, gone=False, body=body),
        call=SimpleNamespace(
            facts=SimpleNamespace(wants_usage=False),
            first_byte_at=None,
            upstream_wait_s=0.0,
            hold_nanos=0,
            hold_max_nanos=0,
        ),
        dog=Watchdogs(scan_s=0.01).watch(total_s),
        upstream=provider,
    )
    return _StreamRelay(reply), exchange


async def pump_on(relay: Any) -> None:
    """As `run` does."""
    while await relay._pump():
        pieces, relay.pieces = relay.pieces, []
        for piece in pieces:
            await relay._deliver(piece)


async def test_what_came_with_the_deadline_is_not_overtaken() -> None:
    """Found: with a comment line's time up in the same turn, what came next left first."""

    def refused_and_bitten(take: Callable[[bytes], bool]) -> bool:
        assert not take(LARGE)
        raise DeadlineMissed

    provider = Provider(refused_and_bitten, lambda take: not take(LAST))
    relay, exchange = relay_of(provider, 60)
    while LAST not in exchange.written:
        await relay._pump()
        for piece in relay.pieces:
            await relay._deliver(piece)
        relay.pieces = []

    assert exchange.written.startswith(LARGE + LAST)


async def test_a_provider_that_always_has_more_does_not_outlive_the_deadline() -> None:
    """Found: without a wait there was nothing that the deadline could interrupt."""
    relay, exchange = relay_of(Provider(lambda take: not take(LARGE)), 0.1)

    async with asyncio.timeout(10):
        with pytest.raises(DeadlineMissed):
            await pump_on(relay)

    assert exchange.written


async def test_the_first_byte_is_noted_although_a_comment_line_left_before_it() -> None:
    """Found: on a receipt it was the last one when the provider was silent at first."""
    relay, exchange = relay_of(Provider(lambda take: not take(LAST)), 60)

    assert relay._take(LAST)

    assert exchange.written == LAST
    assert relay.reply.call.first_byte_at is not None
