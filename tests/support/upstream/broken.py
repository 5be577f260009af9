"""Modes that break or stretch the transport: they write to the connection themselves."""

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable

from . import answer, modes
from .answer import Facts
from .modes import DONE, JSON_TYPE, SSE_TYPE, Plan
from .wire import Reply

LETTERS = "é漢🙂ß字🚋"

Mode = Callable[[Facts, Reply, "tuple[tuple[str, str], ...]"], Awaitable[None]]
Fixed = tuple[tuple[str, str], ...]


async def deliver(plan: Plan, facts: Facts, reply: Reply, headers: Fixed) -> None:
    """Send a plan as it is, with the delays that were asked for."""
    streamed = plan.as_stream
    kind = plan.content_type or (SSE_TYPE if streamed else JSON_TYPE)
    headers = (*headers, ("content-type", kind), *plan.headers)
    if not streamed:
        await reply.whole(plan.status, headers, plan.body)
        return
    await reply.start(plan.status, headers)
    pause = _pause_s(facts, plan.frame_delay_ms)
    # [DONE] and the end of the body leave together: a client may close right after [DONE].
    for frame in plan.frames[:-1]:
        await reply.send(frame)
        if pause:
            await asyncio.sleep(pause)
    await reply.end(plan.frames[-1])


async def stall_head(facts: Facts, reply: Reply, headers: Fixed) -> None:
    await asyncio.sleep(facts.params.seconds)
    reply.cut()


async def stall_body(facts: Facts, reply: Reply, headers: Fixed) -> None:
    await _first_part(facts, reply, headers)
    await asyncio.sleep(facts.params.seconds)
    reply.cut()


async def cut(facts: Facts, reply: Reply, headers: Fixed) -> None:
    await _first_part(facts, reply, headers)
    reply.cut(reset=bool(facts.params.rst))


async def refuse_close(facts: Facts, reply: Reply, headers: Fixed) -> None:
    reply.cut(reset=bool(facts.params.rst))


async def one_byte(facts: Facts, reply: Reply, headers: Fixed) -> None:
    """Every byte is a chunk of its own; four tokens unless tokens= says otherwise."""
    await _in_pieces(modes.standard(facts), facts, reply, headers, _single_bytes)


async def split_utf8(facts: Facts, reply: Reply, headers: Fixed) -> None:
    """Text of multi-byte characters; every chunk but the last ends within one."""
    pieces = [LETTERS for _ in range(facts.visible_tokens)]
    plan = modes.standard(
        facts,
        doc=answer.document(facts, {"content": "".join(pieces)}),
        stream=answer.chunks(facts, ({"content": piece} for piece in pieces)),
    )
    await _in_pieces(plan, facts, reply, headers, _within_letters, default_ms=1)


async def endless(facts: Facts, reply: Reply, headers: Fixed) -> None:
    """Frames, or spaces before a JSON body that never comes, until the peer goes away."""
    kind = SSE_TYPE if facts.stream else JSON_TYPE
    await reply.start(200, (*headers, ("content-type", kind)))
    piece = answer.sse(answer.chunk(facts, {"content": " on"})) if facts.stream else b" " * 64
    pause, until = _pause_s(facts, 5), time.monotonic() + facts.params.seconds
    while time.monotonic() < until:
        await reply.send(piece)
        await asyncio.sleep(pause)
    reply.cut()


async def gzip(facts: Facts, reply: Reply, headers: Fixed) -> None:
    """Compressed whatever accept-encoding said; each frame is flushed."""
    plan = modes.standard(facts)
    packer = zlib.compressobj(wbits=31)
    parts = plan.frames if plan.as_stream else [plan.body]
    packed = [packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH) for part in parts]
    packed[-1] += packer.flush()
    plan.frames, plan.body = packed, packed[0]
    await deliver(plan, facts, reply, (*headers, ("content-encoding", "gzip")))


BROKEN: dict[str, Mode] = {
    "stall-head": stall_head,
    "stall-body": stall_body,
    "cut": cut,
    "refuse-close": refuse_close,
    "one-byte": one_byte,
    "split-utf8": split_utf8,
    "endless": endless,
    "gzip": gzip,
}
SMALL = frozenset(["one-byte", "split-utf8"])


async def _first_part(facts: Facts, reply: Reply, headers: Fixed) -> None:
    """after= pieces of text of a stream, or half of a body whose head promised all of it."""
    plan = modes.standard(facts)
    if not plan.as_stream:
        await reply.start(200, (*headers, ("content-type", JSON_TYPE)), len(plan.body))
        await reply.send(plan.body[: len(plan.body) // 2])
        return
    await reply.start(200, (*headers, ("content-type", SSE_TYPE)))
    for frame in modes.content_frames(facts, plan.frames):
        await reply.send(frame)
        await asyncio.sleep(_pause_s(facts, 0))


async def _in_pieces(
    plan: Plan,
    facts: Facts,
    reply: Reply,
    headers: Fixed,
    split: Callable[[bytes], list[bytes]],
    default_ms: float = 0,
) -> None:
    kind = SSE_TYPE if plan.as_stream else JSON_TYPE
    await reply.start(200, (*headers, ("content-type", kind)))
    pieces = split(b"".join(plan.frames[:-1]) if plan.as_stream else plan.body)
    for piece in pieces[:-1]:
        await reply.send(piece)
        await asyncio.sleep(_pause_s(facts, default_ms))
    if plan.as_stream:
        await reply.send(pieces[-1])
        for byte in split(DONE)[:-1]:
            await reply.send(byte)
        await reply.end(split(DONE)[-1])
    else:
        await reply.end(pieces[-1])


def _single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def _within_letters(data: bytes) -> list[bytes]:
    """Cut after the first byte of each character that has several."""
    cuts = [i + 1 for i, byte in enumerate(data) if byte >= 0xC0]
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _pause_s(facts: Facts, default_ms: float) -> float:
    wanted = facts.params.chunk_delay_ms
    return (default_ms if wanted is None else wanted) / 1000
