"""One keep-alive connection of the load: a non-blocking socket and a parser. No event loop here.

Times are microseconds of CLOCK_MONOTONIC, the clock of the mock's frames.
"""

import re
import socket
import struct
import time

from bench.wire import BadAnswer, content_length, dechunk, is_chunked

READ_BYTES = 256 * 1024
SEND_BUFFER_BYTES = 1024 * 1024
# SO_TIMESTAMPNS_OLD of asm-generic/socket.h: the kernel says when a packet came, in seconds and
# nanoseconds of CLOCK_REALTIME (https://docs.kernel.org/networking/timestamping.html).
SO_TIMESTAMPNS = 35
STAMP = struct.Struct("@ll")
STAMP_BYTES = socket.CMSG_SPACE(STAMP.size)
MARK = re.compile(rb"@(\d{1,9}):(\d{1,18})@")


class Exchange:
    """One request and what came back; times are 0 until they are known."""

    __slots__ = (
        "chunks_wanted",
        "first_at",
        "frames",
        "is_done",
        "is_stream",
        "last_frame_at",
        "problem",
        "scheduled_at",
        "status",
    )

    def __init__(self, scheduled_at: int, is_stream: bool, chunks_wanted: int) -> None:
        self.scheduled_at = scheduled_at
        self.is_stream = is_stream
        self.chunks_wanted = chunks_wanted
        self.first_at = 0
        self.last_frame_at = 0
        self.frames = 0
        self.status = 0
        self.is_done = False
        self.problem = ""

    def judge(self) -> str:
        """What was wrong with a finished exchange; '' for nothing."""
        if self.problem:
            return self.problem
        if self.status != 200:
            return f"status {self.status}"
        if not self.is_stream:
            return ""
        if not self.is_done:
            return "no [DONE]"
        if self.frames != self.chunks_wanted:
            return "frames missing"
        return ""


class Connection:
    """Connects at once (loopback). `read` gives the frames that came; `exchange` is None then.

    stamped: `came_at` is the moment at which the kernel got what `read` took, so that it need not
    be read at once.
    """

    def __init__(self, host: str, port: int, *, stamped: bool = False) -> None:
        self.sock = socket.create_connection((host, port), timeout=5)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if stamped:
            self.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.sock.setblocking(False)
        self.is_stamped = stamped
        self.came_at = 0
        self.fd = self.sock.fileno()
        self.exchange: Exchange | None = None
        self.is_closed = False
        self._unsent = memoryview(b"")
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._tail = b""
        self._in_body = False
        self._is_chunked = False
        self._missing = 0
        self._until_close = False

    def send(self, request: bytes, exchange: Exchange) -> bool:
        """Begin an exchange; False when `send_rest` must be called on writability."""
        assert self.exchange is None
        self.exchange = exchange
        self._reset()
        self._unsent = memoryview(request)
        return self.send_rest()

    def send_rest(self) -> bool:
        """Send on; True when everything is out."""
        while self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as exc:
                self._fail(f"send: {type(exc).__name__}")
                return True
            self._unsent = self._unsent[sent:]
        return True

    def read(self, now: int) -> list[tuple[int, int]]:
        """Take what is there: (number, sent at) of each frame. The exchange may end by this."""
        self.came_at = now
        try:
            data = self._receive_stamped() if self.is_stamped else self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as exc:
            self._fail(f"receive: {type(exc).__name__}")
            return []
        exchange = self.exchange
        if not data or exchange is None:
            self._end_of_input(data)
            return []
        try:
            return self._take(exchange, data, now)
        except (BadAnswer, ValueError) as exc:
            self._fail(f"bad answer: {exc}")
            return []

    def _receive_stamped(self) -> bytes:
        data, ancillary, _, _ = self.sock.recvmsg(READ_BYTES, STAMP_BYTES)
        for level, kind, stamp in ancillary:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                whole, nanoseconds = STAMP.unpack(stamp[: STAMP.size])
                ago_ns = time.time_ns() - (whole * 1_000_000_000 + nanoseconds)
                self.came_at = (time.monotonic_ns() - ago_ns) // 1000
        return data

    def _end_of_input(self, data: bytes) -> None:
        """The peer closed; or it said something that nobody had asked for."""
        if self.exchange is None or (self._until_close and not data):
            self.close()
        else:
            self._fail("closed in the middle")

    def _take(self, exchange: Exchange, data: bytes, now: int) -> list[tuple[int, int]]:
        if not self._in_body:
            data = self._buffer + data
            if not self._take_head(exchange, data):
                return []
            data = self._buffer
            self._buffer = b""
            if not data:
                return []
        if not exchange.first_at:
            exchange.first_at = now
        if self._is_chunked:
            whole = self._buffer + data if self._buffer else data
            payload, end, is_over = dechunk(whole)
            self._buffer = whole[end:]
        else:
            payload = data
            self._missing -= len(data)
            is_over = self._missing <= 0 and not self._until_close
        frames = self._take_frames(exchange, payload) if exchange.is_stream else []
        if is_over:
            self.exchange = None
        return frames

    def _take_head(self, exchange: Exchange, data: bytes) -> bool:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = data
            return False
        lower = data[: end + 2].lower()
        exchange.status = int(lower[9:12])
        self._is_chunked = is_chunked(lower)
        length = content_length(lower)
        self._until_close = not self._is_chunked and length is None
        self._missing = length or 0
        self._in_body = True
        self._buffer = data[end + 4 :]
        if length == 0:
            self.exchange = None
        return True

    def _take_frames(self, exchange: Exchange, payload: bytes) -> list[tuple[int, int]]:
        text = self._tail + payload if self._tail else payload
        end = text.rfind(b"\n\n") + 2
        if end < 2:
            self._tail = text
            return []
        complete, self._tail = (text, b"") if end == len(text) else (text[:end], text[end:])
        frames = [(int(number), int(sent)) for number, sent in MARK.findall(complete)]
        for number, _ in frames:
            if number != exchange.frames:
                exchange.problem = "frames out of order"
            exchange.frames += 1
        if b"[DONE]" in complete:
            exchange.is_done = True
        elif b'"error"' in complete:
            exchange.problem = "error in the stream"
        return frames

    def _fail(self, problem: str) -> None:
        if self.exchange is not None:
            self.exchange.problem = problem
        self.close()

    def time_out(self) -> None:
        self._fail("timed out")

    def close(self) -> None:
        self.exchange = None
        self.is_closed = True
        self.sock.close()
