"""HTTP/1.1 on raw asyncio streams: the least that lets a mode also break it.

Failure: a peer that leaves sets `Wire.gone`; the connection's owner then cancels the mode.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

MAX_HEAD_BYTES = 1 << 20
MAX_BODY_BYTES = 64 << 20
REASONS: dict[int, str] = {known.value: known.phrase for known in HTTPStatus}

Headers = Sequence[tuple[str, str]]
Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class BadRequest(Exception):
    """The request is not HTTP that this server understands."""


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str:
        return _find(self.headers, name)


class Wire(asyncio.StreamReaderProtocol):
    """A stream protocol that tells when the peer has closed, even while nobody reads.

    A half-closed peer counts as gone: a plain close() looks the same from here.
    """

    def __init__(self, reader: asyncio.StreamReader, accept: Accept) -> None:
        super().__init__(reader, accept)
        self.gone = asyncio.Event()

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        super().connection_lost(exc)


class Reply:
    """One response: `start`, then `send` as often as wanted, then `end`.

    `written` has the bytes of the body as they went out, each with its time.monotonic(), when
    it is a list; None keeps nothing.
    """

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        on_stream: Callable[[], None],
        written: list[tuple[float, bytes]] | None = None,
    ) -> None:
        self.written = written
        self._writer = writer
        self._on_stream = on_stream
        self._chunked = False
        self.finished = False
        self.was_cut = False

    async def start(self, status: int, headers: Headers, length: int | None = None) -> None:
        """Send the head. Without length the body is chunked."""
        self._chunked = length is None
        framing = (
            ("transfer-encoding", "chunked") if length is None else ("content-length", f"{length}")
        )
        reason = REASONS.get(status, "Unknown")
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines += [f"{name}: {value}" for name, value in (*headers, framing)]
        if "event-stream" in _find(headers, "content-type"):
            self._on_stream()
        self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        await self._writer.drain()

    async def send(self, data: bytes) -> None:
        if data:
            self._note(data)
            self._writer.write(self._frame(data))
            await self._writer.drain()

    async def end(self, data: bytes = b"") -> None:
        """Send the last bytes and the terminator in one write, so that no peer sees only half."""
        last = self._frame(data) if data else b""
        self.finished = True
        self._note(data)
        self._writer.write(last + (b"0\r\n\r\n" if self._chunked else b""))
        await self._writer.drain()

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        await self.start(status, headers, len(body))
        await self.end(body)

    def cut(self, *, reset: bool = False) -> None:
        """Close the connection here and now; reset sends RST, which may also drop sent bytes."""
        self.finished = self.was_cut = True
        if reset:
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()

    def _note(self, data: bytes) -> None:
        if self.written is not None:
            self.written.append((time.monotonic(), data))

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request | None:
    """Read one request; None when the peer closed between two of them."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise BadRequest("connection closed within the head") from exc
        return None
    except asyncio.LimitOverrunError as exc:
        raise BadRequest("head too large") from exc
    first, *rest = head[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3:
        raise BadRequest(f"request line {first!r}")
    headers = [
        (name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in rest)
    ]
    if _find(headers, "expect").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        body = await _read_body(reader, headers)
    except (asyncio.IncompleteReadError, ValueError) as exc:
        raise BadRequest("body incomplete or badly framed") from exc
    return Request(method=parts[0], target=parts[1], headers=headers, body=body)


async def _read_body(reader: asyncio.StreamReader, headers: list[tuple[str, str]]) -> bytes:
    if "chunked" in _find(headers, "transfer-encoding").lower():
        pieces = bytearray()
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            _refuse_huge(len(pieces) + size)
            pieces += (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return bytes(pieces)
    length = int(_find(headers, "content-length") or 0)
    _refuse_huge(length)
    return await reader.readexactly(length)


def _refuse_huge(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise BadRequest("body too large")


def _find(headers: Headers, name: str) -> str:
    return next((value for key, value in headers if key.lower() == name), "")
