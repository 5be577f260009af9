"""JSON log lines: the message is an event name, facts are fields. Never prompts, never secrets.

`EventLog` is for events of every request: their lines are encoded at once and written together,
at most `FLUSH_EVERY_S` later. Everything else goes through `logging` and is written at once, after
what waits: one order for all.
Failure: a sink that takes nothing makes nobody wait; above `WAITING_BYTES_MAX` the oldest lines are
dropped, and `log.dropped` says how many.
"""

import asyncio
import logging
import os
import select
import stat
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from config.settings import Log

log = logging.getLogger("gateway.log")

FLUSH_EVERY_S = 0.02
# When a line finds the one before it waiting for this long, its timer will not come any more.
LATE_NS = 100_000_000
FLUSH_BYTES = 64 * 1024
WAITING_BYTES_MAX = 8 * 1024 * 1024
# So much more is dropped each time: taking from the front of the buffer moves all of it.
DROPPED_AT_ONCE = 1024 * 1024
# What is written to a pipe in pieces of this size does not mix with other workers' lines, and a
# pipe that `poll` calls writable takes it without waiting.
PIECE_BYTES = select.PIPE_BUF
# How long the last lines of a process wait for a sink that is full.
LAST_WAIT_MS = 1000

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_encoder = msgspec.json.Encoder(enc_hook=str)


class EventLog:
    """The frequent events of one logger, as structs instead of records."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)
        self._name = _encoder.encode(name)
        self._second = -1
        self._head = b""

    @property
    def is_on(self) -> bool:
        """False when the log level leaves these events out."""
        return self._log.isEnabledFor(logging.INFO)

    def info(self, event: str, facts: msgspec.Struct) -> None:
        """Log an event whose fields are those of a struct, which must have some.

        event: letters, dots and underscores only.
        """
        if not self.is_on:
            return
        lines = _current
        if lines is None:
            self._log.info(event, extra=msgspec.structs.asdict(facts))
            return
        now_ns = time.time_ns()
        second, rest_ns = divmod(now_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._head = self._head_of(second)
        head = self._head % (rest_ns // 1_000_000, event.encode())
        lines.put(b"%b%b\n" % (head, _encoder.encode(facts)[1:]), now_ns)

    def _head_of(self, second: int) -> bytes:
        moment = datetime.fromtimestamp(second, UTC).isoformat()
        text = b'{"time":"%b.%%03d%b","level":"info","logger":%b,"event":"%%b",'
        return text % (moment[:-6].encode(), moment[-6:].encode(), self._name)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                line[name] = value
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return _encoder.encode(line).decode()


class LineHandler(logging.Handler):
    """Lines to a file, or to stderr when path is empty, in the order in which they came.

    Used from any thread. `logging` closes it at the end of the process.
    """

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._fd = os.open(path, flags, 0o666) if path else 2
        self._is_own = bool(path)
        self._is_file = _is_file(self._fd)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._waiting = bytearray()
        self._timed_by: asyncio.AbstractEventLoop | None = None
        self._late_at_ns = 0
        self._dropped = 0

    def put(self, line: bytes, now_ns: int) -> None:
        """Take a line that may wait a little for others."""
        self.acquire()
        try:
            if not self._waiting:
                self._flush_soon(now_ns)
            self._waiting += line
            if now_ns >= self._late_at_ns or len(self._waiting) >= FLUSH_BYTES:
                self.flush()
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            self.handleError(record)
            return
        self._waiting += line + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the sink takes it without making us wait."""
        self.acquire()
        try:
            self._write(0)
            if len(self._waiting) > WAITING_BYTES_MAX:
                self._drop_oldest()
            if self._waiting:
                self._flush_soon(time.time_ns())
            elif self._dropped:
                dropped, self._dropped = self._dropped, 0
                log.warning("log.dropped", extra={"lines": dropped})
        finally:
            self.release()

    def close(self) -> None:
        global _current  # noqa: PLW0603 - there is one log in a process
        self.acquire()
        try:
            if _current is self:
                _current = None
            self.flush()
            self._write(LAST_WAIT_MS)
            if self._is_own:
                os.close(self._fd)
                # The number may be another file's from now on.
                self._is_own, self._fd = False, -1
        finally:
            self.release()
        super().close()

    def _flush_soon(self, now_ns: int) -> None:
        """Let the running loop flush once; without a loop the next line flushes, or this one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._late_at_ns = now_ns
            return
        self._late_at_ns = now_ns + LATE_NS
        if self._timed_by is not loop:
            self._timed_by = loop
            loop.call_later(FLUSH_EVERY_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timed_by = None
        if self._waiting:
            self.flush()

    def _write(self, wait_ms: int) -> None:
        waiting = self._waiting
        try:
            while waiting:
                size = len(waiting)
                if not self._is_file:
                    if not self._poll.poll(wait_ms):
                        return
                    size = waiting.rfind(b"\n", 0, PIECE_BYTES) + 1 or PIECE_BYTES
                del waiting[: os.write(self._fd, waiting[:size])]
        except OSError:
            # The disk is full, or nobody reads any more: tried again with the next lines.
            return

    def _drop_oldest(self) -> None:
        """Make room. The first line stays: part of it may have been written."""
        waiting = self._waiting
        start = waiting.find(b"\n") + 1
        excess = len(waiting) - WAITING_BYTES_MAX + DROPPED_AT_ONCE
        end = waiting.find(b"\n", min(start + excess, len(waiting) - 1)) + 1
        self._dropped += waiting.count(b"\n", start, end)
        del waiting[start:end]


# Where EventLog writes; None until `set_up_logging` ran.
_current: LineHandler | None = None


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:  # a process without stderr
        return False


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for what the server says of a request that was cut off on purpose."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def set_up_logging(settings: Log) -> None:
    """Send everything to stderr or to the file, as JSON lines."""
    global _current  # noqa: PLW0603 - there is one log in a process
    if settings.path:
        Path(settings.path).parent.mkdir(parents=True, exist_ok=True)
    handler = _current = LineHandler(settings.path)
    # What no line of ours shows is not looked up for every record: caller, thread, process.
    # https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    # Frameworks below warning tell what our own events tell better.
    for name in ("uvicorn", "uvicorn.error", "asyncio", "litestar"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
