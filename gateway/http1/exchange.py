"""One request on a connection of ours, and its answer.

Writing never waits and never raises: what a client does not take gathers in the transport, and
`is_blocked` says so; what is written for a client that left is dropped. A whole answer leaves as
one write, the head of a stream together with its first bytes.
"""

import asyncio
import http
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from gateway.http1.protocol import Protocol

Header = tuple[bytes, bytes]

# A body that nobody has taken yet is read this far.
UNREAD_BYTES_MAX = 64 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class BadAnswer(Exception):
    """An answer that would not be HTTP: a bug of ours, caught before it gets out."""


class Exchange:
    """Made by the protocol when a head is complete. `gone` is True once the client has left."""

    __slots__ = (
        "_body_left",
        "_head",
        "_is_invited",
        "_parts",
        "_protocol",
        "_unread_bytes",
        "_waiters",
        "gone",
        "head_bytes",
        "headers",
        "is_chunked",
        "is_over",
        "is_started",
        "is_whole",
        "keep_alive",
        "method",
        "on_gone",
        "target",
    )

    def __init__(
        self,
        protocol: "Protocol",
        method: bytes,
        target: bytes,
        headers: list[Header],
        *,
        keep_alive: bool,
        head_bytes: int,
    ) -> None:
        """headers: names in lower case. head_bytes: at least as much as the head took."""
        self._protocol = protocol
        self.method = method
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.head_bytes = head_bytes
        self.on_gone: Callable[[], None] | None = None
        """Called once when the client leaves before its answer is complete."""
        self.gone = False
        self.is_whole = False
        """All of the request's body has come."""
        self.is_started = False
        self.is_over = False
        """The answer is complete, or nobody is there any more to get it."""
        self.is_chunked = False
        self._parts: list[bytes] = []
        self._unread_bytes = 0
        self._head = b""
        self._body_left = 0
        self._is_invited = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def path(self) -> str:
        """The target's path, decoded."""
        return unquote(self.raw_path.decode("ascii"))

    @property
    def raw_path(self) -> bytes:
        target = self.target
        if not target.startswith(b"/"):  # absolute form, as proxies want it, or `*`
            return urlsplit(target).path or b"/"
        return target.partition(b"?")[0].partition(b"#")[0]

    @property
    def peer(self) -> tuple[str, int] | None:
        return self._protocol.peer()

    # The request's body

    def take_body(self) -> bytes:
        """What has come since the last time."""
        parts, self._parts = self._parts, []
        if self._unread_bytes > UNREAD_BYTES_MAX:
            self._protocol.resume_reading()
        self._unread_bytes = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def more_body(self) -> None:
        """Wait until more of the body has come, all of it has, or the client has left."""
        if self._parts or self.is_whole or self.gone:
            return
        if not self.is_started and self._waits_for_invitation():
            # Once: some clients give up at the sixth.
            self._is_invited = True
            self._protocol.write(CONTINUE)
        await self._wait()

    def feed(self, part: bytes) -> None:
        self._is_invited = True
        if self.is_over:
            return
        self._parts.append(part)
        self._unread_bytes += len(part)
        if self._unread_bytes > UNREAD_BYTES_MAX:
            self._protocol.pause_reading()
        self.wake()

    def feed_end(self) -> None:
        self.is_whole = True
        self.wake()

    def _waits_for_invitation(self) -> bool:
        """The client said `expect: 100-continue`, and neither of us has gone on since."""
        return not self._is_invited and any(name == b"expect" for name, _ in self.headers)

    # The answer

    def start(self, status: int, headers: Iterable[Header]) -> None:
        """Begin the answer; its head leaves with the first bytes of the body.

        Without a content-length the body goes out in chunks. Raises BadAnswer.
        """
        assert not self.is_started
        has_length = status in {204, 304}
        lines = []
        for name, value in headers:
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                has_length = True
                self._body_left = int(value)
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
        if not self.is_whole and self._waits_for_invitation():
            # It may send the body now or leave it out: what comes next could be either.
            self.keep_alive = False
        fields = b"".join(lines)
        # A line break inside a value would begin a header, or an answer, of somebody else's making.
        if not (fields.count(b"\n") == fields.count(b"\r") == len(lines)) or b"\0" in fields:
            raise BadAnswer("a header's value has a line break")
        framing = b"\r\n"
        if not has_length:
            self.is_chunked = True
            framing = b"transfer-encoding: chunked\r\n\r\n"
        if not self.keep_alive:
            framing = b"connection: close\r\n" + framing
        self.is_started = True
        self._head = STATUS_LINES[status] + self._protocol.default_lines() + fields + framing

    def write(self, data: bytes) -> None:
        """Send a part of the body. Raises BadAnswer beyond the content-length."""
        if self.is_over:
            return
        if self.is_chunked and not self._head and data and self.method != b"HEAD":
            self._protocol.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._protocol.write(self._framed(data))

    def end(self, data: bytes = b"") -> None:
        """Send the last part. Raises BadAnswer when it does not fill the content-length."""
        if self.is_over:
            return
        framed = self._framed(data)
        if self._body_left and self.method != b"HEAD":
            raise BadAnswer("the body is shorter than its content-length")
        if self.is_chunked and self.method != b"HEAD":
            framed += b"0\r\n\r\n"
        self.is_over = True
        self._parts.clear()
        self.wake()
        self._protocol.write(framed)
        self._protocol.answered(self)

    def _framed(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        if self.method == b"HEAD":
            return head
        if self.is_chunked:
            return b"%b%x\r\n%b\r\n" % (head, len(data), data) if data else head
        self._body_left -= len(data)
        if self._body_left < 0:
            raise BadAnswer("the body is longer than its content-length")
        return head + data if head else data

    @property
    def is_blocked(self) -> bool:
        """The client does not read as fast as we write: wait with `drained`."""
        return self._protocol.is_blocked

    async def drained(self) -> None:
        """Wait until the client has taken most of what was written, or has left."""
        while self._protocol.is_blocked and not self.gone:
            await self._wait()

    async def closed(self) -> None:
        """Wait until the client has left or its answer is complete."""
        while not self.is_over:
            await self._wait()

    def abort(self) -> None:
        """Drop the connection with all that is still unsent."""
        self._protocol.abort()

    # Called by the protocol

    def lose(self) -> None:
        """The client has left. Nothing more is sent."""
        if self.is_over:
            return
        self.gone = self.is_over = True
        self.wake()
        if self.on_gone is not None:
            self.on_gone()

    def wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def _wait(self) -> None:
        waiter = self._protocol.loop.create_future()
        self._waiters.append(waiter)
        await waiter
