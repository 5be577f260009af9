"""How a body reaches its reader: by read, by pump, held back, and inflated."""

import asyncio
import zlib
from collections.abc import Callable

import pytest

from gateway.providers.http import HttpClient
from gateway.providers.http_reply import BUFFER_BYTES_MAX, HttpReply
from gateway.providers.upstream import UpstreamFailed
from tests.integration.providers.peer import (
    CHUNKED,
    END,
    WAIT_S,
    Do,
    Peer,
    ask,
    chunks,
    head,
    post,
    read_all,
    sized,
    turns,
    until,
)

Pieces = list[bytes]


def keep(pieces: Pieces, most: int = 1_000_000) -> Callable[[bytes], bool]:
    """A take that says False to the last of `most`."""

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return len(pieces) < most

    return take


async def pumped(reply: HttpReply, pieces: Pieces, most: int = 1_000_000) -> bool:
    async with asyncio.timeout(WAIT_S):
        return await reply.pump(keep(pieces, most))


async def test_a_burst_of_chunks_is_one_piece(client: HttpClient, peer: Peer) -> None:
    burst = asyncio.Event()
    parts = [b"frame %d\n\n" % i for i in range(50)]
    peer.says(CHUNKED + chunks(b"first"), burst, chunks(*parts) + END)
    reply = await post(client, peer)
    pieces: Pieces = []
    pumping = asyncio.ensure_future(pumped(reply, pieces))
    await until(lambda: pieces == [b"first"])
    burst.set()

    assert await pumping is False
    assert pieces == [b"first", b"".join(parts)]


@pytest.mark.parametrize("wire", [sized(b"abcdef"), CHUNKED + chunks(b"abcdef") + END])
async def test_a_pump_hands_over_what_came_before_it(
    client: HttpClient, peer: Peer, wire: bytes
) -> None:
    peer.says(wire)
    reply = await post(client, peer)
    pieces: Pieces = []

    assert await pumped(reply, pieces) is False
    assert pieces == [b"abcdef"]
    assert await pumped(reply, pieces) is False
    assert await reply.read() == b""


async def test_a_pump_that_has_enough_leaves_the_rest(client: HttpClient, peer: Peer) -> None:
    steps = [chunks(b"%d" % i) for i in range(6)]
    peer.says(CHUNKED, *steps, END)
    reply = await post(client, peer)
    pieces: Pieces = []

    assert await pumped(reply, pieces, 1) is True
    seen = b"".join(pieces)
    assert await pumped(reply, pieces, 2) is True
    assert b"".join(pieces).startswith(seen)
    assert b"".join(pieces) + await read_all(reply) == b"012345"


async def test_a_pump_that_has_enough_of_the_last_piece(client: HttpClient, peer: Peer) -> None:
    late = asyncio.Event()
    peer.scripts = [(CHUNKED, late, chunks(b"last") + END), (sized(b"next"),)]
    reply = await post(client, peer)
    pieces: Pieces = []
    pumping = asyncio.ensure_future(pumped(reply, pieces, 1))
    await turns()
    late.set()

    assert await pumping is True
    assert (pieces, await reply.read()) == ([b"last"], b"")
    assert await ask(client, peer) == b"next"
    assert peer.connections == 1


async def test_a_take_may_close_the_reply(client: HttpClient, peer: Peer) -> None:
    late = asyncio.Event()
    peer.says(CHUNKED, late, chunks(b"last") + END)
    reply = await post(client, peer)

    def take(piece: bytes) -> bool:
        reply.close()
        return False

    pumping = asyncio.ensure_future(reply.pump(take))
    await turns()
    late.set()

    assert await pumping is True
    await until(lambda: peer.left == 1)


async def test_a_pump_tells_of_a_break_after_all_that_came(client: HttpClient, peer: Peer) -> None:
    peer.says(CHUNKED + chunks(b"some"), chunks(b"more"), Do.CUT)
    reply = await post(client, peer)
    pieces: Pieces = []

    with pytest.raises(UpstreamFailed, match="broke off: the connection was closed"):
        await pumped(reply, pieces)

    assert b"".join(pieces) == b"somemore"


@pytest.mark.parametrize("way", ["read", "pump"])
async def test_cancelling_loses_no_bytes(client: HttpClient, peer: Peer, way: str) -> None:
    """Cancelled before, while and after bytes arrive."""
    gates = [asyncio.Event() for _ in range(20)]
    steps: list[bytes | asyncio.Event] = []
    for i, gate in enumerate(gates):
        steps += [gate, chunks(b"<%d>" % i)]
    peer.says(CHUNKED, *steps, END)
    reply = await post(client, peer)
    pieces: Pieces = []
    for i, gate in enumerate(gates):
        waiting = asyncio.ensure_future(reply.pump(keep(pieces)) if way == "pump" else reply.read())
        await turns(1 + i % 3)
        gate.set()
        await turns(i % 7)
        waiting.cancel()
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        if isinstance(outcome, bytes):
            pieces.append(outcome)
    pieces.append(await read_all(reply))

    assert b"".join(pieces) == b"".join(b"<%d>" % i for i in range(20))


async def test_a_reader_that_is_slow_holds_the_peer_back(client: HttpClient, peer: Peer) -> None:
    size = 32 * 1024 * 1024
    peer.says(head(b"content-length: %d" % size), b"x" * size, Do.HOLD)
    reply = await post(client, peer)
    await until(lambda: reply._is_paused)
    await turns(50)

    assert BUFFER_BYTES_MAX < reply._size < BUFFER_BYTES_MAX + 1024 * 1024
    total = 0
    while piece := await reply.read():
        total += len(piece)
    assert total == size


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_that_waited_comes_whole_and_the_connection_lives(
    client: HttpClient, peer: Peer, chunked: bool
) -> None:
    body = bytes(range(256)) * 4096
    peer.scripts = [(CHUNKED + chunks(body) + END if chunked else sized(body),), (sized(b"ok"),)]
    reply = await post(client, peer)
    await until(lambda: reply._is_paused)
    pieces: Pieces = []

    assert await pumped(reply, pieces) is False
    assert b"".join(pieces) == body
    assert await ask(client, peer) == b"ok"
    assert peer.connections == 1


async def test_a_body_that_ends_while_held_back_leaves_the_connection_reading(
    client: HttpClient, peer: Peer
) -> None:
    peer.scripts = [(sized(b"x" * 300 * 1024),), (sized(b"ok"),)]
    reply = await post(client, peer)
    await until(lambda: reply._source is None)

    assert await ask(client, peer) == b"ok"
    assert len(await read_all(reply)) == 300 * 1024
    assert peer.connections == 1


@pytest.mark.parametrize("way", ["read", "pump"])
async def test_bytes_between_a_cancellation_and_its_effect_are_kept(
    client: HttpClient, peer: Peer, way: str
) -> None:
    peer.says(CHUNKED, Do.HOLD)
    reply = await post(client, peer)
    (connection,) = client.target(peer.url(), {}).pool._open
    pieces: Pieces = []
    waiting = asyncio.ensure_future(reply.pump(keep(pieces)) if way == "pump" else reply.read())
    await turns()
    waiting.cancel()
    connection.data_received(chunks(b"kept") + END)
    await asyncio.gather(waiting, return_exceptions=True)

    assert waiting.cancelled()
    assert pieces == []
    assert await read_all(reply) == b"kept"


@pytest.mark.parametrize("size", [64 * 1024, 64 * 1024 + 1, 8 * 1024 * 1024])
async def test_large_requests_arrive_as_they_are(client: HttpClient, peer: Peer, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"!" * (size % 256)
    peer.says(sized(b"ok"))

    assert await ask(client, peer, body) == b"ok"
    assert peer.asked[0].body == body
    assert await ask(client, peer) == b"ok"
    assert peer.connections == 1


def packed(body: bytes, wbits: int = 31) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(body) + packer.flush()


TEXT = b"".join(b"data: %d\n\n" % i for i in range(2000))


@pytest.mark.parametrize(("name", "wbits"), [(b"gzip", 31), (b"X-GZIP", 31), (b"deflate", 15)])
@pytest.mark.parametrize("way", ["read", "pump"])
async def test_a_compressed_body_is_inflated(
    client: HttpClient, peer: Peer, way: str, name: bytes, wbits: int
) -> None:
    wire = sized(packed(TEXT, wbits), b"content-encoding: " + name)
    peer.says(*(wire[i : i + 97] for i in range(0, len(wire), 97)))
    reply = await post(client, peer)
    pieces: Pieces = []
    if way == "pump":
        assert await pumped(reply, pieces) is False
    else:
        pieces.append(await read_all(reply))

    assert b"".join(pieces) == TEXT


@pytest.mark.parametrize("at", range(0, len(packed(b"some text")), 3))
@pytest.mark.parametrize("way", ["read", "pump"])
async def test_a_compressed_body_that_ends_early_is_not_whole(
    client: HttpClient, peer: Peer, way: str, at: int
) -> None:
    peer.says(sized(packed(b"some text")[:at], b"content-encoding: gzip"))
    reply = await post(client, peer)

    with pytest.raises(UpstreamFailed, match="the answer cannot be read"):
        await (pumped(reply, []) if way == "pump" else read_all(reply))


async def test_a_bomb_comes_in_bounded_pieces(client: HttpClient, peer: Peer) -> None:
    peer.says(sized(packed(b"\0" * 20_000_000), b"content-encoding: gzip"))
    reply = await post(client, peer)
    sizes = []
    while piece := await reply.read():
        sizes.append(len(piece))

    assert sum(sizes) == 20_000_000
    assert max(sizes) <= 1024 * 1024


@pytest.mark.parametrize("extra", [b"\0" * 8, packed(b"more"), b"x"])
async def test_bytes_behind_the_compressed_end_are_no_answer(
    client: HttpClient, peer: Peer, extra: bytes
) -> None:
    peer.says(sized(packed(b"some") + extra, b"content-encoding: gzip"))

    with pytest.raises(UpstreamFailed, match="bytes follow its compressed end"):
        await ask(client, peer)


async def test_compressed_nothing_without_end_is_no_answer(client: HttpClient, peer: Peer) -> None:
    empty_blocks = b"\x00\x00\x00\xff\xff" * 4000
    start = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
    peer.says(head(b"content-encoding: gzip") + start, *[empty_blocks] * 8, Do.HOLD)

    with pytest.raises(UpstreamFailed, match="badly compressed"):
        await ask(client, peer)


async def test_an_unknown_encoding_is_taken_as_it_is(client: HttpClient, peer: Peer) -> None:
    peer.says(sized(b"data", b"content-encoding: none"))

    assert await ask(client, peer) == b"data"


@pytest.mark.parametrize("wire", [sized(b"abcdef"), CHUNKED + chunks(b"abc", b"def") + END])
async def test_a_body_that_came_with_its_head_is_taken_at_once_and_once(
    client: HttpClient, peer: Peer, wire: bytes
) -> None:
    peer.says(wire)
    reply = await post(client, peer)
    await until(lambda: reply._source is None)

    assert reply.whole() == b"abcdef"
    assert reply.whole() is None
    assert await reply.read() == b""


async def test_a_body_that_is_not_all_there_or_broke_off_is_no_whole_one(
    client: HttpClient, peer: Peer
) -> None:
    rest = asyncio.Event()
    peer.says(head(b"content-length: 6") + b"abc", rest, b"def")
    reply = await post(client, peer)
    await until(lambda: bool(reply._pieces))
    assert reply.whole() is None
    rest.set()
    assert await read_all(reply) == b"abcdef"

    peer.says(head(b"content-length: 6") + b"abc", Do.CLOSE)
    reply = await post(client, peer)
    await until(lambda: reply._source is None)
    assert reply.whole() is None
    with pytest.raises(UpstreamFailed):
        await read_all(reply)
