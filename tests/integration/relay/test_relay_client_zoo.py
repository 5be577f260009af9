"""Odd clients: gone within the request, slow, half closed, idle. Nobody pays for what never was."""

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.support.gateway import eventually
from tests.support.rawclient import Ended, Leave, RawConnection, Reading, connect
from tests.support.relay import Relay, Tokens, frames_of, price_by_hand, text_of, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = 20_261_125
USED = "prompt=9,tokens=5"
LONG = "plain:prompt=9,tokens=900"
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
MODELS: dict[str, Any] = zoo(f"plain:{USED}", f"plain:chunk_delay_ms=60,{USED}")
MODELS |= zoo(LONG, output_tokens_max=1000)
OVERRIDES = {"timeouts__headers_s": 1.0, "timeouts__drain_s": 0.5}
SAMPLE, IDLE = 60, 150


async def until_closed(relay: Relay, before: int) -> None:
    """The gateway has let go of all connections but those that were there before."""

    async def look() -> bool | None:
        return len(asyncio.all_tasks()) <= before or None

    await eventually(look)
    await relay.at_rest()


async def leave_within(relay: Relay, data: bytes, sent: int) -> None:
    async with connect(relay.gateway.origin) as conn:
        await conn.send_raw(data[:sent])
        conn.close(Leave.RST if sent % 2 else Leave.CLOSE)


async def test_leaving_at_any_byte_of_the_request_costs_nothing(
    relay: Relay, key: str, upstream: Upstream, is_full: bool
) -> None:
    print(f"seed {SEED}")  # noqa: T201 - shown when it fails
    data = relay.chat(key, f"plain:{USED}", stream=True).encode("127.0.0.1")
    places = list(range(len(data)))
    if not is_full:
        head = data.index(b"\r\n\r\n")
        edges = [0, 1, head, head + 1, head + 3, head + 4, head + 5, len(data) - 1]
        places = [*edges, *random.Random(SEED).sample(places, SAMPLE)]
    before = len(asyncio.all_tasks())

    for start in range(0, len(places), 20):
        await asyncio.gather(*(leave_within(relay, data, at) for at in places[start : start + 20]))
    await until_closed(relay, before)

    await relay.receipts(key, 0)
    assert relay.services.bodies.bytes == 0
    assert upstream.stats()["requests"] == 0
    assert (await relay.call(key, f"plain:{USED}")).status == 200


async def test_a_slow_reader_gets_all_of_it(relay: Relay, key: str) -> None:
    reading = Reading(rcvbuf=4096, rate=150_000, size=2000)
    outcome = await relay.send(relay.chat(key, LONG, stream=True), reading=reading, deadline=30)
    receipt = await relay.only_receipt(key)

    assert outcome.ended is Ended.COMPLETE
    assert len(text_of(frames_of(outcome)).split()) == 900
    assert (receipt["outcome"], receipt["usage_source"]) == ("complete", "provider")
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=9, completion=900))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_who_ends_its_side_counts_as_gone_and_pays_by_the_providers_word(
    relay: Relay, key: str, stream: bool
) -> None:
    """From here a plain close looks the same."""
    request = relay.chat(key, f"plain:chunk_delay_ms=60,{USED}", stream=stream)
    outcome = await relay.send(request, half_close=True)
    receipt = await relay.only_receipt(key)

    assert outcome.status in {0, 200}
    assert receipt["outcome"] == "client_left"
    assert receipt["price_nanos"] == PRICE == await relay.spent(key)


async def test_idle_sockets_and_half_heads_hold_up_nobody_and_are_cut(
    relay: Relay, key: str
) -> None:
    async with AsyncExitStack() as stack:
        idle: list[RawConnection] = []
        for number in range(IDLE):
            conn = await stack.enter_async_context(connect(relay.gateway.origin, deadline=20))
            await conn.send_raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x"[: number % 40])
            idle.append(conn)
        outcomes = await asyncio.gather(*(relay.call(key, f"plain:{USED}") for _ in range(10)))
        ended = await asyncio.gather(*(conn.ended() for conn in idle))

    assert {outcome.status for outcome in outcomes} == {200}
    assert set(ended) <= {Ended.EOF, Ended.RESET}
    receipts = await relay.receipts(key, 10)
    assert {receipt["price_nanos"] for receipt in receipts} == {PRICE}
