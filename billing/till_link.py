"""One auto-pipelined connection to Valkey/Redis: all calls of a loop tick leave as one write.

Replies come back in order; each call has a deadline; a reply that comes too late is dropped at
its place in the order. A connection that answers nothing for `stall_timeout_s` is closed.
Failure: TillUnavailable at once while there is no connection; reconnecting goes on in the
background for as long as the link is open.
"""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import hiredis
import msgspec

from billing.errors import TillRefused, TillUnavailable
from billing.till_address import Address
from billing.till_wire import Packed, word
from config.clock import Seconds, seconds

log = logging.getLogger("billing.till")

Arg = bytes | str | int
CONNECT_TIMEOUT_S = seconds(2000)
RETRY_FIRST_S, RETRY_LAST_S = seconds(10), seconds(500)
# Timers may fire a little early; a deadline is checked a little after it.
TIMER_SLACK_S = seconds(1)
# Shorter-lived connections do not reset the pause between attempts.
LIVED_S = seconds(1000)
# Answers that say "not now": the server is starting, is no primary (any more), or cannot write.
NOT_PRIMARY = ("READONLY", "MASTERDOWN")
NOT_NOW = (
    *NOT_PRIMARY,
    *("LOADING", "TRYAGAIN", "CLUSTERDOWN", "OOM", "MISCONF", "NOREPLICAS", "BUSY"),
)


class Script:
    """A Lua script by its digest; the server is taught it again whenever it forgot."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        # SHA-1 is the protocol's name for a script, not a protection.
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        self.by_sha = f"{word('EVALSHA')}{word(self.sha)}".encode()
        self.by_source = f"{word('EVAL')}{word(source)}".encode()


class _Call(msgspec.Struct, eq=False):
    future: asyncio.Future[Any]
    sent_at: Seconds
    deadline: Seconds
    script: Script | None = None
    packed: Packed | None = None
    # A refusal is logged here: nobody may await the answer.
    tells: bool = False


class TillLink:
    """The connection of one worker. `start` once, `close` once; in between it mends itself."""

    def __init__(
        self,
        url: str,
        scripts: Iterable[Script],
        *,
        call_timeout_s: Seconds,
        stall_timeout_s: Seconds,
        pending_max: int,
    ) -> None:
        self._address = Address.read(url)
        self._scripts = list(scripts)
        self.call_timeout_s = call_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._pending_max = pending_max
        self._connection: _Connection | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.last_error = ""
        self.generation = 0
        """Counts connections: whoever was served by another one may find another server."""

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    def start(self) -> None:
        """Begin connecting in the background."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    async def wait_up(self, timeout_s: Seconds) -> bool:
        """True as soon as there is a connection, False when there was none for that long."""
        if self._connection is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._up.wait()
        return self._connection is not None

    async def close(self) -> None:
        """Close; calls without an answer fail with TillUnavailable. Idempotent."""
        connection = self._connection
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if connection is not None:
            await connection.closed

    def run(self, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> asyncio.Future[Any]:
        """Run a script. The future fails with TillUnavailable or TillRefused."""
        tail = (len(keys), *keys, *args)
        packed = hiredis.pack_command(tail)  # type: ignore[arg-type]
        return self.send(script, Packed(len(tail), packed[packed.index(b"\n") + 1 :]))

    def send(self, script: Script, packed: Packed, *, tells: bool = False) -> asyncio.Future[Any]:
        """As `run`, with words that are packed already; tells: log when the till refuses it."""
        head = b"*%d\r\n%b" % (packed.count + 2, script.by_sha)
        return self._send(head, packed.words, (script, packed, tells))

    def command(self, args: tuple[Arg, ...]) -> asyncio.Future[Any]:
        """Send one command with the next write; its future fails as `run` says."""
        return self._send(hiredis.pack_command(args), b"", ())  # type: ignore[arg-type]

    def _send(self, head: bytes, rest: bytes, more: tuple[Any, ...]) -> asyncio.Future[Any]:
        connection = self._connection
        if connection is None or len(connection.pending) >= self._pending_max:
            future = asyncio.get_running_loop().create_future()
            _fail(future, TillUnavailable(asked=False))
            return future
        return connection.send(head, rest, self.call_timeout_s, more)

    def flush(self) -> None:
        """Write what is waiting now instead of at the end of this tick."""
        if self._connection is not None:
            self._connection.flush()

    def flushed(self) -> asyncio.Future[None]:
        """Done when what was sent until now was handed to the transport, or there is none."""
        if self._connection is not None:
            return self._connection.flushed()
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = RETRY_FIRST_S
        while True:
            connection: _Connection | None = None
            started_at = loop.time()
            try:
                connection = await self._connect()
                # Before any call of this connection learns that it failed: its second try must
                # wait for the next connection.
                connection.closed.add_done_callback(self._lost)
                self._connection = connection
                self.generation += 1
                self._up.set()
                log.info("till.connected")
                await asyncio.wait([connection.closed])  # unlike await, it cancels nothing
                log.warning("till.disconnected")
            except (OSError, UnicodeError, TillRefused, TillUnavailable) as exc:
                self._say_once(exc)
            finally:
                if connection is not None:
                    connection.abort()
            if connection is not None and loop.time() - started_at > LIVED_S:
                delay_s = RETRY_FIRST_S
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_LAST_S)

    def _lost(self, _: object) -> None:
        self._connection = None
        self._up.clear()

    def _say_once(self, exc: Exception) -> None:
        error = f"{type(exc).__name__}: {getattr(exc, 'reply', exc)}"
        if error != self.last_error:
            log.warning("till.connect_failed", extra={"error": error})
        self.last_error = error

    async def _connect(self) -> "_Connection":
        address = self._address
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await self._open()
            try:
                for args in address.hello():
                    await connection.command(args, CONNECT_TIMEOUT_S)
                loads = [("SCRIPT", "LOAD", script.source) for script in self._scripts]
                await asyncio.gather(*(connection.command(a, CONNECT_TIMEOUT_S) for a in loads))
            except BaseException:
                connection.abort()
                raise
        self.last_error = ""
        return connection

    async def _open(self) -> "_Connection":
        loop, address = asyncio.get_running_loop(), self._address
        connection = _Connection(self._stall_timeout_s)
        if address.path:
            await loop.create_unix_connection(lambda: connection, address.path)
        else:
            tls = address.tls or None
            await loop.create_connection(lambda: connection, address.host, address.port, ssl=tls)
        return connection


class _Connection(asyncio.Protocol):
    """Commands out, replies back in the same order."""

    def __init__(self, stall_timeout_s: Seconds) -> None:
        self._loop = asyncio.get_running_loop()
        self._stall_timeout_s = stall_timeout_s
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._flushes: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: Seconds = 0
        self._waiting: deque[_Call] = deque()
        # All that was sent and has no reply, those included whose callers gave up.
        self.pending: deque[_Call] = deque()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting.clear()
        if not self.closed.done():
            self.closed.set_result(None)
        pending, self.pending = self.pending, deque()
        for call in pending:
            if not call.future.done():
                _fail(call.future, TillUnavailable())

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def command(self, args: tuple[Arg, ...], timeout_s: Seconds) -> asyncio.Future[Any]:
        return self.send(hiredis.pack_command(args), b"", timeout_s, ())  # type: ignore[arg-type]

    def send(
        self, head: bytes, rest: bytes, timeout_s: Seconds, more: tuple[Any, ...]
    ) -> asyncio.Future[Any]:
        """more: the fields of the call beyond its times."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None:  # lost; the link learns it within this tick
            _fail(future, TillUnavailable(asked=False))
        else:
            now = self._loop.time()
            self._enqueue(head, rest, _Call(future, now, now + timeout_s, *more))
        return future

    def _enqueue(self, head: bytes, rest: bytes, call: _Call) -> None:
        out = self._out
        if not out:
            self._loop.call_soon(self.flush)
        out.append(head)
        out.append(rest)
        self.pending.append(call)
        self._waiting.append(call)
        due = min(call.deadline, call.sent_at + self._stall_timeout_s)
        if self._timer is None or due + TIMER_SLACK_S < self._timer_at:
            self._check_by(due)

    def flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            if self._transport is not None:
                self._transport.write(b"".join(out))
                # crash-point: link.written
        if self._flushes:
            flushes, self._flushes = self._flushes, []
            for future in flushes:
                if not future.done():
                    future.set_result(None)

    def flushed(self) -> asyncio.Future[None]:
        """Done when nothing that was sent until now waits any more."""
        future: asyncio.Future[None] = self._loop.create_future()
        if self._out:
            self._flushes.append(future)
        else:
            future.set_result(None)
        return future

    def data_received(self, data: bytes) -> None:
        # crash-point: link.answered
        self._reader.feed(data)
        while True:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError:
                log.exception("till.protocol_error")
                self.abort()
                return
            if reply is False:
                return
            if not self.pending:  # an answer to nothing: the order is lost
                self.abort()
                return
            self._resolve(self.pending.popleft(), reply)

    def _resolve(self, call: _Call, reply: Any) -> None:
        future = call.future
        if not isinstance(reply, hiredis.ReplyError):
            if not future.done():
                future.set_result(reply)
            return
        text = str(reply)
        packed, script = call.packed, call.script
        if script is not None and packed is not None and _is_unknown(text) and not future.done():
            # EVAL teaches the server the script again; SCRIPT FLUSH costs one round trip. Not for
            # a caller who gave up: run late, the script could bring back what is settled by now.
            now = self._loop.time()
            again = _Call(future, now, now + (call.deadline - call.sent_at), tells=call.tells)
            head = b"*%d\r\n%b" % (packed.count + 2, script.by_source)
            self._enqueue(head, packed.words, again)
        elif not future.done():
            self._refuse(call, text)
        if text.startswith(NOT_PRIMARY):
            self.abort()  # the name may lead to the new primary by now

    def _refuse(self, call: _Call, text: str) -> None:
        if text.startswith(NOT_NOW):
            _fail(call.future, TillUnavailable())
            return
        _fail(call.future, TillRefused(text))
        if call.tells:
            log.error("till.refused", extra={"reply": text})

    def _check_by(self, when: Seconds) -> None:
        """Look at the deadlines at that time, or before."""
        when += TIMER_SLACK_S
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._check_deadlines)

    def _check_deadlines(self) -> None:
        """Fail what is overdue. The deadlines of a connection are in the order of its calls."""
        self._timer = None
        now = self._loop.time()
        waiting = self._waiting
        while waiting and (waiting[0].future.done() or waiting[0].deadline <= now):
            future = waiting.popleft().future
            if not future.done():
                _fail(future, TillUnavailable())
        if not self.pending:
            return
        stalled_at = self.pending[0].sent_at + self._stall_timeout_s
        if stalled_at <= now:
            log.warning("till.stalled", extra={"pending": len(self.pending)})
            self.abort()
            return
        self._check_by(min(waiting[0].deadline, stalled_at) if waiting else stalled_at)


def _is_unknown(text: str) -> bool:
    """True when the server does not know a script."""
    return text.startswith("NOSCRIPT")


def _fail(future: asyncio.Future[Any], exc: Exception) -> None:
    """Fail a call whose caller may not look: a receipt goes to the book all the same."""
    future.set_exception(exc)
    future.exception()
