"""One answer: its head, and its body on the way from the connection to whoever reads it.

Bytes that nobody reads yet are kept; above BUFFER_BYTES_MAX the connection is told to wait.
Failure: UpstreamFailed from read and pump, after all bytes that came before it.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from gateway.providers.http_inflate import BadCompression, inflater_for
from gateway.providers.http_parse import Head
from gateway.providers.upstream import UpstreamFailed

BUFFER_BYTES_MAX = 256 * 1024


class Source(Protocol):
    """Where the body comes from."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def drop(self) -> None:
        """Close: the rest of the body is not wanted."""


class HttpReply:
    """An UpstreamReply. `feed`, `end` and `fail` are the connection's."""

    __slots__ = (
        "_fault",
        "_head",
        "_inflater",
        "_is_paused",
        "_loop",
        "_pieces",
        "_size",
        "_source",
        "_take",
        "_waiter",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, head: Head, source: Source) -> None:
        self.status = head.status
        self._loop = loop
        self._head = head
        # Until the last byte came or the body broke off; then the connection is another's.
        self._source: Source | None = source
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_paused = False
        self._fault = ""
        self._take: Callable[[bytes], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._inflater = inflater_for(head.header("content-encoding"))

    def header(self, name: str) -> str | None:
        return self._head.header(name)

    def whole(self) -> bytes | None:
        is_whole = self._source is None and not self._fault and self._inflater is None
        return self._gathered() if is_whole and self._pieces else None

    async def read(self) -> bytes:
        if self._inflater is not None:
            return await self._read_inflated()
        while not self._pieces:
            if self._source is None:
                return self._ended()
            await self._wait()
        return self._gathered()

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        if self._inflater is not None:
            while piece := await self._read_inflated():
                if not take(piece):
                    return True
            return False
        if self._pieces and not take(self._gathered()):
            return True
        # take may have closed us, but nothing else can have happened since.
        if self._source is None:
            return bool(self._ended())
        self._take = take
        try:
            await self._wait()
            return self._has_refused() or bool(self._ended())
        finally:
            self._take = None

    def close(self) -> None:
        source = self._source
        if source is not None:
            self.fail("it was closed before its end")
            source.drop()

    def feed(self, data: bytes) -> None:
        """Some of the body."""
        waiter = self._waiter
        # A cancelled reader is gone although its task has not run yet.
        is_awaited = waiter is not None and not waiter.done()
        if is_awaited and self._take is not None:
            if not self._take(data):
                self._take = None
                self._wake()
            return
        self._pieces.append(data)
        self._size += len(data)
        if is_awaited:
            self._wake()
        elif self._size > BUFFER_BYTES_MAX and not self._is_paused and self._source is not None:
            self._is_paused = True
            self._source.pause()

    def end(self) -> None:
        """The body is complete."""
        source, self._source = self._source, None
        if self._is_paused and source is not None:
            self._is_paused = False
            source.resume()
        self._wake()

    def fail(self, fault: str) -> None:
        """The body broke off; fault says how, and holds no secret."""
        if self._source is not None:
            self._source = None
            self._fault = fault
            self._wake()

    def _has_refused(self) -> bool:
        """Whether take said False while the pump waited."""
        return self._take is None

    def _gathered(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        if self._is_paused:
            self._is_paused = False
            if self._source is not None:
                self._source.resume()
        return data

    async def _read_inflated(self) -> bytes:
        inflater = self._inflater
        assert inflater is not None
        if inflater.has_more:
            await asyncio.sleep(0)  # a bomb has very many pieces
        try:
            while not (piece := inflater.next()):
                while not self._pieces and self._source is not None:
                    await self._wait()
                if not self._pieces:
                    self._ended()
                    inflater.end()
                    return b""
                inflater.feed(self._gathered())
        except BadCompression as exc:
            reason = f"the answer cannot be read: {exc}"
            raise UpstreamFailed(reason, may_have_billed=True) from exc
        return piece

    def _ended(self) -> bytes:
        if self._fault:
            raise UpstreamFailed(f"the answer broke off: {self._fault}", may_have_billed=True)
        return b""

    async def _wait(self) -> None:
        assert self._waiter is None, "one read or pump at a time"
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
