"""An HTTP/1.1 client on a bare loopback socket: it sees every byte and can leave at any of them.

`exchange` does one request and says everything that came back; `RawConnection` is for tests that
act in between. Each connection has one deadline for all it does.

Failure: TimeoutError past the deadline, Broken for an answer that is no HTTP. A peer that closes
or resets is no error: `Outcome.ended` tells. The socket is closed in every case.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

READ_SIZE = 65_536


class Broken(Exception):
    """The answer is not HTTP/1.1, or its framing is wrong."""


class Leave(StrEnum):
    """How a connection is given up."""

    RST = "rst"
    """SO_LINGER 0: the peer gets a reset."""
    CLOSE = "close"
    """A plain close. Linux still resets when received bytes were not read."""


class Ended(StrEnum):
    """Why reading stopped."""

    COMPLETE = "complete"
    """The body came to the end that its framing promised (or the peer closed an unframed one)."""
    EOF = "eof"
    """The peer closed before that."""
    RESET = "reset"
    """The peer reset the connection, while reading or while sending."""
    CUT = "cut"
    """We left, as asked by cut_after_bytes."""


@dataclass(frozen=True, kw_only=True)
class RawRequest:
    """Sent as it stands; content-length and host are added unless given."""

    method: str = "POST"
    target: str = "/v1/chat/completions"
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""

    def encode(self, host: str) -> bytes:
        given = {name.lower() for name, _ in self.headers}
        headers = [] if "host" in given else [("host", host)]
        headers += self.headers
        if not given & {"content-length", "transfer-encoding"}:
            headers.append(("content-length", str(len(self.body))))
        lines = [f"{self.method} {self.target} HTTP/1.1", *(f"{k}: {v}" for k, v in headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + self.body


def chat(key: str, payload: dict[str, Any], headers: Sequence[tuple[str, str]] = ()) -> RawRequest:
    """A chat completion with this JSON."""
    fixed = [("authorization", f"Bearer {key}"), ("content-type", "application/json")]
    return RawRequest(headers=[*fixed, *headers], body=json.dumps(payload).encode())


@dataclass(frozen=True, kw_only=True)
class Head:
    status: int
    reason: str
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Body bytes (chunk framing removed) and when they came, on time.monotonic()."""

    at: float
    data: bytes


@dataclass(kw_only=True)
class Outcome:
    head: Head | None = None
    pieces: list[Piece] = field(default_factory=list)
    ended: Ended = Ended.EOF
    sent_at: float = 0
    raw_bytes: int = 0

    @property
    def body(self) -> bytes:
        return b"".join(piece.data for piece in self.pieces)

    @property
    def status(self) -> int:
        return self.head.status if self.head else 0

    def json(self) -> Any:
        return json.loads(self.body)

    def frames(self) -> list[str]:
        """The data of each server-sent event, [DONE] included; comments left out."""
        text = self.body.decode().replace("\r\n", "\n")
        blocks = (block.splitlines() for block in text.split("\n\n"))
        found = ([ln[5:].strip() for ln in block if ln.startswith("data:")] for block in blocks)
        return ["\n".join(lines) for lines in found if lines]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How fast to read: rcvbuf is set before connecting, rate is bytes a second."""

    rcvbuf: int | None = None
    rate: int | None = None
    size: int = READ_SIZE


async def exchange(
    base_url: str,
    request: RawRequest,
    *,
    cut_after_bytes: int | None = None,
    leave: Leave = Leave.RST,
    half_close: bool = False,
    reading: Reading | None = None,
    deadline: float = 10,
) -> Outcome:
    """One request on a connection of its own.

    cut_after_bytes counts from the first byte of the response, head and framing included; 0 leaves
    as soon as the request is written, -n with the last n bytes of the request unsent.
    """
    async with connect(base_url, reading=reading, deadline=deadline) as conn:
        outcome = Outcome()
        try:
            await conn.send(request, unsent=max(0, -(cut_after_bytes or 0)))
            outcome.sent_at = time.monotonic()
            if cut_after_bytes is None or cut_after_bytes > 0:
                conn.budget = cut_after_bytes
                if half_close:
                    conn.half_close()
                outcome.head = await conn.head()
                async for piece in conn.body():
                    outcome.pieces.append(piece)
                outcome.ended = Ended.COMPLETE
            else:
                raise _Stopped(Ended.CUT)
        except _Stopped as stop:
            outcome.ended = stop.ended
        outcome.raw_bytes = conn.received
        if outcome.ended is Ended.CUT:
            conn.close(leave)
        return outcome


@asynccontextmanager
async def connect(
    base_url: str, *, reading: Reading | None = None, deadline: float = 10
) -> AsyncIterator["RawConnection"]:
    """A connection to the host of base_url; past deadline seconds the block gets TimeoutError."""
    parts = urlsplit(base_url)
    assert parts.hostname in {"127.0.0.1", "localhost"}, "loopback only"
    reading = reading or Reading()
    async with asyncio.timeout(deadline):
        with RawConnection(parts.netloc, reading) as conn:
            address = ("127.0.0.1", parts.port or 80)
            await asyncio.get_running_loop().sock_connect(conn.sock, address)
            yield conn


class RawConnection:
    """One socket; `head` and `body` may alternate for several requests on it."""

    def __init__(self, host: str, reading: Reading) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if reading.rcvbuf is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, reading.rcvbuf)
        self.received = 0
        self.budget: int | None = None
        self._host = host
        self._reading = reading
        self._buffer = b""
        self._head: Head | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()

    async def send(self, request: RawRequest, *, unsent: int = 0) -> None:
        data = request.encode(self._host)
        await self.send_raw(data[: max(0, len(data) - unsent)])

    async def send_raw(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self.sock, data)
        except (BrokenPipeError, ConnectionResetError):
            # The answer to a refused body may still be there to read: the reader decides.
            return

    def half_close(self) -> None:
        """End our direction; the answer can still be read."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self, leave: Leave = Leave.CLOSE) -> None:
        if leave is Leave.RST:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def head(self) -> Head:
        """The next final response head; 1xx are skipped."""
        while True:
            raw = await self._until(b"\r\n\r\n")
            first, *rest = raw.decode("latin-1").split("\r\n")
            version, _, more = first.partition(" ")
            code, _, reason = more.partition(" ")
            if not (version.startswith("HTTP/1.") and code.isdigit()):
                raise Broken(f"status line {first!r}")
            pairs = (line.partition(":") for line in rest)
            headers = [(name, value.strip()) for name, _, value in pairs]
            self._head = Head(status=int(code), reason=reason, headers=headers)
            if self._head.status >= 200:
                return self._head

    async def body(self) -> AsyncIterator[Piece]:
        """Body bytes as they come; returns at the end that the framing promised."""
        head = self._head
        assert head is not None, "read the head first"
        length = head.get("content-length")
        if head.status in {204, 304}:
            return
        if "chunked" in (head.get("transfer-encoding") or ""):
            async for piece in self._chunked():
                yield piece
        elif length is not None:
            async for piece in self._counted(int(length)):
                yield piece
        else:
            async for piece in self._to_the_end():
                yield piece

    async def ended(self) -> Ended:
        """Wait until the peer closes or resets; bytes that come before are dropped."""
        try:
            while True:
                await self._more()
                self._buffer = b""
        except _Stopped as stop:
            return stop.ended

    async def _chunked(self) -> AsyncIterator[Piece]:
        while True:
            line = await self._until(b"\r\n")
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError as exc:
                raise Broken(f"chunk size {line!r}") from exc
            if size == 0:
                while await self._until(b"\r\n"):
                    pass
                return
            async for piece in self._counted(size):
                yield piece
            if await self._until(b"\r\n"):
                raise Broken("chunk longer than its size")

    async def _counted(self, length: int) -> AsyncIterator[Piece]:
        while length:
            if not self._buffer:
                await self._more()
            data, self._buffer = self._buffer[:length], self._buffer[length:]
            length -= len(data)
            yield Piece(at=time.monotonic(), data=data)

    async def _to_the_end(self) -> AsyncIterator[Piece]:
        while True:
            data, self._buffer = self._buffer, b""
            if data:
                yield Piece(at=time.monotonic(), data=data)
            try:
                await self._more()
            except _Stopped as stop:
                if stop.ended is Ended.EOF:
                    return
                raise

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            await self._more()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    async def _more(self) -> None:
        """Read once into the buffer, within budget and rate."""
        size = self._reading.size
        if self.budget is not None:
            size = min(size, self.budget - self.received)
            if size <= 0:
                raise _Stopped(Ended.CUT)
        try:
            data = await asyncio.get_running_loop().sock_recv(self.sock, size)
        except ConnectionResetError as exc:
            raise _Stopped(Ended.RESET) from exc
        if not data:
            raise _Stopped(Ended.EOF)
        self.received += len(data)
        self._buffer += data
        if self._reading.rate is not None:
            await asyncio.sleep(len(data) / self._reading.rate)


class _Stopped(Exception):
    """Reading ends here."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self.ended = ended
