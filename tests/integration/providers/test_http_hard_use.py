"""Many at once, and answers spoilt at random: never another's bytes, never a part as the whole."""

import asyncio
import gc
import os
import random
from collections import Counter
from itertools import pairwise

import pytest

from gateway.providers.http import HttpClient
from gateway.providers.upstream import UpstreamFailed
from tests.integration.providers.peer import (
    CHUNKED,
    END,
    WAIT_S,
    Asked,
    Do,
    Peer,
    Step,
    ask,
    chunks,
    post,
    read_all,
    running_peer,
    sized,
    turns,
    until,
)

SEED = 20_260_101


def echo(asked: Asked) -> bytes:
    if len(asked.body) % 2:
        return sized(asked.body)
    half = len(asked.body) // 2
    return CHUNKED + chunks(asked.body[:half], asked.body[half:]) + END


async def test_each_of_many_gets_its_own_answer(client: HttpClient, peer: Peer) -> None:
    peer.make = echo
    for turn in range(3):
        bodies = [b"%d-%d." % (turn, i) * (i + 1) for i in range(200)]
        assert await asyncio.gather(*(ask(client, peer, body) for body in bodies)) == bodies

    assert peer.connections <= 200


async def test_each_gets_its_own_answer_while_others_give_up(
    client: HttpClient, peer: Peer
) -> None:
    peer.make = echo
    rng = random.Random(SEED)

    async def one(number: int) -> None:
        body = b"<%d>" % number * 50
        async with asyncio.timeout(WAIT_S):
            reply = await post(client, peer, body)
            if number % 3 == 0:
                assert await read_all(reply) == body
            reply.close()

    async def spoil(task: asyncio.Task[None]) -> None:
        for _ in range(rng.randrange(8)):
            await asyncio.sleep(0)
        task.cancel()

    for turn in range(20):
        tasks = [asyncio.create_task(one(turn * 40 + i)) for i in range(40)]
        await asyncio.gather(*(spoil(task) for task in tasks if rng.random() < 0.5))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = Counter(type(result) for result in results)
        assert set(kinds) <= {type(None), asyncio.CancelledError}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
async def test_nothing_stays_open_in_the_end() -> None:
    await _wear_out()  # the loop opens files of its own
    before = len(os.listdir("/proc/self/fd"))
    await _wear_out()

    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def _wear_out() -> None:
    async with running_peer() as peer:
        client = HttpClient(5.0)
        scripts: tuple[tuple[Step, ...], ...] = (
            (sized(b"ok"),),
            (sized(b"ok")[:-1], Do.CLOSE),
            (CHUNKED + b"zz\r\n", Do.HOLD),
            (Do.RESET,),
        )
        for number in range(81):
            peer.scripts = [scripts[number % 4]]
            await asyncio.gather(ask(client, peer), return_exceptions=True)
        pool = client.target(peer.url(), {}).pool
        assert len(pool._idle) == 1
        await client.close()

        assert pool.is_empty
        await until(lambda: peer.left == peer.connections)


async def test_an_answer_is_freed_without_the_collector(client: HttpClient, peer: Peer) -> None:
    peer.says(CHUNKED + chunks(b"ok") + END)
    await ask(client, peer)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(50):
            await ask(client, peer)
        peer.asked.clear()
        assert len(gc.get_objects()) - before < 50
    finally:
        gc.enable()


BODY = bytes(range(32, 127)) * 3
SOUND = {
    "sized": sized(BODY, b"content-type: text/plain", b"x-a: b"),
    "chunked": CHUNKED + chunks(BODY[:10], BODY[10:11], BODY[11:]) + END,
    "trailed": CHUNKED + b"11d;a=b\r\n" + BODY + b"\r\n0\r\nx: y\r\n\r\n",
}
TOKENS = [b"\r\n", b"\n", b"\r", b"\0", b"0", b"0\r\n\r\n", b":", b" ", b"content-length: 3\r\n"]
TOKENS += [b"transfer-encoding: chunked\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\xff", b"-", b"f" * 20]


def spoilt(rng: random.Random, wire: bytes) -> bytes:
    """One to three bytes or tokens removed, put in or changed."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(wire))
        match rng.randrange(4):
            case 0:
                wire = wire[:at] + wire[at + rng.randint(1, 9) :]
            case 1:
                wire = wire[:at] + rng.choice(TOKENS) + wire[at:]
            case 2:
                wire = wire[:at] + bytes([rng.randrange(256)]) + wire[at + 1 :]
            case _:
                wire = wire[:at] + wire[max(at - 9, 0) :]
        wire = wire or b"x"
    return wire


def in_pieces(rng: random.Random, wire: bytes) -> list[bytes]:
    cuts = sorted({0, len(wire), *(rng.randrange(len(wire) + 1) for _ in range(rng.randrange(3)))})
    return [wire[a:b] for a, b in pairwise(cuts)]


@pytest.mark.parametrize("turn", range(10))
async def test_spoilt_answers_neither_hang_nor_mix(
    client: HttpClient, peer: Peer, turn: int
) -> None:
    """The peer closes behind each; the next request on whatever is left gets its own answer.

    What a spoilt answer that is still sound says is its own affair, but a cut one is never whole.
    """
    rng = random.Random(SEED + turn)
    for number in range(50):
        wire = spoilt(rng, rng.choice(list(SOUND.values())))
        end = rng.choice([Do.CLOSE, Do.RESET, Do.CUT])
        mine = sized(b"answer %d" % number)
        peer.scripts = [(*in_pieces(rng, wire), end), (mine,)]
        (got,) = await asyncio.gather(ask(client, peer), return_exceptions=True)
        assert isinstance(got, bytes | UpstreamFailed), f"seed {SEED + turn}, {number}: {wire!r}"
        await until(lambda: peer.left == peer.connections)
        await turns()  # uvloop closes a turn later
        assert await ask(client, peer) == b"answer %d" % number, f"seed {SEED + turn}: {wire!r}"
        peer.scripts = [(Do.CUT,)]
        await asyncio.gather(ask(client, peer), return_exceptions=True)


@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("name", SOUND)
async def test_a_spoilt_end_is_never_a_whole_answer(
    client: HttpClient, peer: Peer, name: str, turn: int
) -> None:
    """The head is sound, so the body is the one that was sent or none."""
    rng = random.Random(SEED * 7 + turn)
    start, _, rest = SOUND[name].partition(b"\r\n\r\n")
    for _ in range(20):
        wire = start + b"\r\n\r\n" + rest[: rng.randrange(len(rest))]
        peer.scripts = [(*in_pieces(rng, wire), rng.choice([Do.CLOSE, Do.RESET, Do.CUT]))]
        (got,) = await asyncio.gather(ask(client, peer), return_exceptions=True)

        assert isinstance(got, UpstreamFailed), f"seed {SEED * 7 + turn}: {wire!r}"
