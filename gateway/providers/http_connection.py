"""One connection: sends a request, hands its answer to a reply, and knows whether it is reusable.

A byte that comes when none is due, before a request or behind an answer, ends the connection: it
must never become part of another request's answer.
Failure: whatever goes wrong closes the connection and reaches whoever waits as UpstreamFailed.
"""

import asyncio
import select
import ssl
from enum import IntEnum
from typing import Protocol, cast

from gateway.providers.http_parse import (
    HEAD_BYTES_MAX,
    UNTIL_EOF,
    BadAnswer,
    ChunkedBody,
    Head,
    parse_head,
)
from gateway.providers.http_reply import HttpReply
from gateway.providers.upstream import UpstreamFailed

# A larger body is not copied to stand behind its head.
JOINED_BYTES_MAX = 64 * 1024
INFORMATIONAL_MAX = 16
_START = b"HTTP/1."


class Phase(IntEnum):
    """What is due next."""

    IDLE = 0
    """Nothing: no request is under way."""
    HEAD = 1
    SIZED = 2
    CHUNKED = 3
    UNTIL_EOF = 4
    DEAD = 5


class Owner(Protocol):
    """Who keeps the connection between its requests."""

    def gain(self, connection: "HttpConnection") -> None: ...

    def keep(self, connection: "HttpConnection") -> None: ...

    def lose(self, connection: "HttpConnection") -> None: ...


class HttpConnection(asyncio.Protocol):
    """`send` while it is idle; one request at a time."""

    __slots__ = (
        "_chunks",
        "_head",
        "_informational",
        "_keeps_alive",
        "_left",
        "_loop",
        "_owner",
        "_phase",
        "_poll",
        "_reply",
        "_transport",
        "_waiter",
        "idle_since",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Owner) -> None:
        self._loop = loop
        self._owner = owner
        self._transport: asyncio.Transport
        self._poll = select.poll()
        self._phase = Phase.IDLE
        self._waiter: asyncio.Future[HttpReply] | None = None
        self._reply: HttpReply | None = None
        self._head = b""
        self._informational = 0
        self._keeps_alive = False
        self._left = 0
        self._chunks: ChunkedBody | None = None
        self.idle_since = 0.0

    def is_sound(self) -> bool:
        """Whether a request may go out on it.

        The kernel is asked too: what arrived since the loop last looked, the peer's close above
        all, must not meet the next request.
        """
        is_idle = self._phase is Phase.IDLE and not self._transport.is_closing()
        return is_idle and not self._poll.poll(0)

    def is_open(self) -> bool:
        return self._phase is not Phase.DEAD and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes) -> "asyncio.Future[HttpReply]":
        """Send head (up to the length of the body) and body; the future ends when a head came.

        It fails with UpstreamFailed. Whoever stops awaiting it must `give_up`.
        """
        assert self._phase is Phase.IDLE
        self._phase = Phase.HEAD
        self._informational = 0
        waiter = self._waiter = self._loop.create_future()
        start = b"%b%d\r\n\r\n" % (head, len(body))
        if len(body) <= JOINED_BYTES_MAX:
            self._transport.write(start + body)
        else:
            self._transport.writelines((start, body))
        return waiter

    def give_up(self, waiter: "asyncio.Future[HttpReply]") -> None:
        """The answer is not wanted. Does nothing to a connection that serves another by now."""
        if self._waiter is waiter:
            self._waiter = None
            self.drop()
        elif not waiter.cancelled() and waiter.exception() is None:
            waiter.result().close()

    def pause(self) -> None:
        if self.is_open():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.is_open():
            self._transport.resume_reading()

    def drop(self) -> None:
        """Close at once; who has the reply knows."""
        self._phase = Phase.DEAD
        self._reply = self._chunks = None
        self._transport.abort()

    def abort(self, why: str) -> None:
        """Close at once; whoever waits gets UpstreamFailed."""
        waiter, reply = self._waiter, self._reply
        self._waiter = None
        self.drop()
        if waiter is not None and not waiter.done():
            waiter.set_exception(UpstreamFailed(f"no answer: {why}", may_have_billed=True))
        if reply is not None:
            reply.fail(why)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._owner.gain(self)

    def data_received(self, data: bytes) -> None:
        match self._phase:
            case Phase.HEAD:
                self._feed_head(data)
            case Phase.SIZED:
                self._feed_sized(data)
            case Phase.CHUNKED:
                self._feed_chunked(data)
            case Phase.UNTIL_EOF:
                assert self._reply is not None
                self._reply.feed(data)
            case _:
                self.abort("bytes came that nobody asked for")

    def eof_received(self) -> None:
        if self._phase is Phase.UNTIL_EOF and self._is_clean_eof():
            self._finish(is_reusable=False)
        else:
            self.abort("the connection was closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort("the connection was closed" if exc is None else type(exc).__name__)
        self._owner.lose(self)

    def _feed_head(self, data: bytes) -> None:
        start = max(len(self._head) - 3, 0)
        if self._head:
            data = self._head + data
        while (end := data.find(b"\r\n\r\n", start)) >= 0:
            end += 4
            try:
                head = parse_head(data[:end])
            except BadAnswer as exc:
                self.abort(str(exc))
                return
            data, start = data[end:], 0
            if head.status >= 200:
                self._head = b""
                self._begin(head, data)
                return
            self._informational += 1
        self._head = data
        if not data.startswith(_START[: len(data)]):
            self.abort("its head is no HTTP/1.1")
        elif len(data) > HEAD_BYTES_MAX or self._informational > INFORMATIONAL_MAX:
            self.abort("its head is too large")

    def _begin(self, head: Head, data: bytes) -> None:
        waiter, self._waiter = self._waiter, None
        assert waiter is not None
        if waiter.done():  # cancelled; its task has not run yet
            self.drop()
            return
        reply = self._reply = HttpReply(self._loop, head, self)
        waiter.set_result(reply)
        self._keeps_alive = head.keeps_alive
        if head.chunks is not None:
            self._phase = Phase.CHUNKED
            self._chunks = head.chunks
            if data:
                self._feed_chunked(data)
        elif head.length != UNTIL_EOF:
            self._phase = Phase.SIZED
            self._left = head.length
            self._feed_sized(data)
        else:
            self._phase = Phase.UNTIL_EOF
            if data:
                reply.feed(data)

    def _feed_sized(self, data: bytes) -> None:
        reply = self._reply
        assert reply is not None
        self._left = left = self._left - len(data)
        body = data if left >= 0 else data[:left]
        if body:
            reply.feed(body)
        if left <= 0:
            self._finish(is_reusable=left == 0)

    def _feed_chunked(self, data: bytes) -> None:
        reply, chunks = self._reply, self._chunks
        assert reply is not None
        assert chunks is not None
        if body := chunks.feed(data):
            reply.feed(body)
        if chunks.is_complete:
            self._finish(is_reusable=chunks.is_clean)
        elif chunks.fault:
            self.abort(chunks.fault)

    def _finish(self, *, is_reusable: bool) -> None:
        """The answer is whole."""
        reply, self._reply, self._chunks = self._reply, None, None
        if reply is None:  # closed by the very reader that took its last piece
            return
        reply.end()
        # An answer may come before the request is all written: what is left would never be read.
        is_written = self._transport.get_write_buffer_size() == 0
        if is_reusable and self._keeps_alive and is_written and not self._transport.is_closing():
            self._phase = Phase.IDLE
            self.idle_since = self._loop.time()
            self._owner.keep(self)
        else:
            self.drop()

    def _is_clean_eof(self) -> bool:
        """Over TLS anybody on the way can close the connection, but only the peer say so."""
        secured = self._transport.get_extra_info("ssl_object")
        if secured is None:
            return True
        try:
            return bool(secured.read(1) == b"")
        except ssl.SSLError:
            return False
