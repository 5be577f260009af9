"""`python -m bench.load`: a process that makes load. One job a line on stdin, one result a line.

Open loop: Poisson arrivals; every latency counts from the scheduled moment, so a slow server
cannot hide its queue. How late the generator itself was is part of the result. Closed loop: N
connections, the next request when the last one ended.
Failure: a request that failed is counted with its reason; a job always ends, at most `grace_s`
after its `end_at`.
"""

import contextlib
import gc
import os
import random
import select
import sys
import time
from collections import Counter, deque

import msgspec

from bench.client import Connection, Exchange
from bench.cpu import raise_file_limit
from bench.histogram import Histogram
from bench.shape import Shape, chat_body

CHECK_EVERY_US = 250_000
# Above this rate of plain calls the kernel's time stamps tell when an answer came, and answers are
# read when the next request is due, at most so much later: waking for each would take time from
# whoever is measured on the same processors.
STAMPED_RATE = 500.0
READ_LATER_US = 2_000


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One sort of request in a job; weight is its share."""

    prompt_bytes: int
    stream: bool = False
    weight: int = 1
    shape: Shape = Shape()


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one process shall do. Moments are seconds of CLOCK_MONOTONIC."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    model: str
    kinds: list[Kind]
    rate: float = 0.0
    """Arrivals a second; 0: closed loop."""
    connections: int
    once: bool = False
    """Closed loop: every connection makes one request only."""
    start_at: float
    warm_until: float
    end_at: float
    ramp_s: float = 0.0
    grace_s: float = 10.0
    timeout_s: float = 30.0
    seed: int = 1


class Result(msgspec.Struct, kw_only=True):
    """What happened between warm_until and end_at, and the problems of the whole job."""

    requests: int = 0
    frames: int = 0
    errors: dict[str, int] = {}
    latency: dict[str, object] = {}
    whole: dict[str, object] = {}
    gap: dict[str, object] = {}
    transit: dict[str, object] = {}
    late: dict[str, object] = {}
    backlog_max: int = 0
    all_requests: int = 0


def microseconds() -> int:
    return time.monotonic_ns() // 1000


class Load:
    """One job under way: a loop around epoll, for a framework's timers wake up to 1 ms late."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rng = random.Random(job.seed)
        self.epoll = select.epoll()
        self.open: dict[int, Connection] = {}
        self.busy: dict[int, tuple[Connection, Exchange]] = {}
        self.idle: list[Connection] = []
        self.backlog: deque[int] = deque()
        self.errors: Counter[str] = Counter()
        self.latency, self.whole = Histogram(), Histogram()
        self.gap, self.transit, self.late = Histogram(), Histogram(), Histogram()
        self.requests = self.frames = self.all_requests = self.backlog_max = 0
        self.start, self.warm, self.end = (
            int(moment * 1_000_000) for moment in (job.start_at, job.warm_until, job.end_at)
        )
        # Frames of a stream are told apart by when they were read.
        self.is_stamped = job.rate >= STAMPED_RATE and not any(k.stream for k in job.kinds)
        self.prepared = [self._prepare(kind) for kind in job.kinds]
        self.weights = [kind.weight for kind in job.kinds]
        self.next_check = 0

    def _prepare(self, kind: Kind) -> tuple[bytes, Kind]:
        job = self.job
        body = chat_body(
            job.model, kind.prompt_bytes, kind.shape, stream=kind.stream, seed=job.seed
        )
        lines = [
            f"POST {job.path} HTTP/1.1",
            f"host: {job.host}:{job.port}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in job.headers.items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body, kind

    def run(self) -> Result:
        try:
            for _ in range(self.job.connections):
                self.idle.append(self._connect())
            self._open_loop() if self.job.rate else self._closed_loop()
        finally:
            for connection in self.open.values():
                connection.sock.close()
            self.epoll.close()
        return Result(
            requests=self.requests,
            frames=self.frames,
            errors=dict(self.errors),
            latency=self.latency.to_plain(),
            whole=self.whole.to_plain(),
            gap=self.gap.to_plain(),
            transit=self.transit.to_plain(),
            late=self.late.to_plain(),
            backlog_max=self.backlog_max,
            all_requests=self.all_requests,
        )

    def _open_loop(self) -> None:
        interval_us = 1_000_000 / self.job.rate
        due = self.start + self.rng.expovariate(1) * interval_us
        while due < self.end:
            now = microseconds()
            while due <= now and due < self.end:
                if due >= self.warm:
                    self.late.record(int(now - due))
                self._launch(int(due))
                due += self.rng.expovariate(1) * interval_us
            self._poll(due)
        self._drain()

    def _closed_loop(self) -> None:
        places = list(self.idle)
        self.idle = []
        step = self.job.ramp_s * 1_000_000 / len(places)
        for number, connection in enumerate(places):
            due = self.start + int(number * step)
            while microseconds() < due:
                self._poll(due)
            self.idle.append(connection)
            self._launch(microseconds())
        while (now := microseconds()) < self.end and self.busy:
            self._poll(min(self.end, now + CHECK_EVERY_US))
        self._drain()

    def _drain(self) -> None:
        """No new request; wait for those under way."""
        until = self.end + int(self.job.grace_s * 1_000_000)
        while self.busy or self.backlog:
            now = microseconds()
            if now >= until:
                break
            self._poll(min(until, now + CHECK_EVERY_US))
        self.errors["unfinished"] += len(self.busy) + len(self.backlog)
        self.errors = +self.errors

    def _connect(self) -> Connection:
        connection = Connection(self.job.host, self.job.port, stamped=self.is_stamped)
        self.open[connection.fd] = connection
        self.epoll.register(connection.fd, select.EPOLLIN)
        return connection

    def _launch(self, scheduled_at: int) -> None:
        while self.idle:
            connection = self.idle.pop()
            if not connection.is_closed:
                self._send(connection, scheduled_at)
                return
        if len(self.open) < self.job.connections * 2:
            try:
                connection = self._connect()
            except OSError as exc:
                self.errors[f"connect: {type(exc).__name__}"] += 1
                return
            self._send(connection, scheduled_at)
            return
        self.backlog.append(scheduled_at)
        self.backlog_max = max(self.backlog_max, len(self.backlog))

    def _send(self, connection: Connection, scheduled_at: int) -> None:
        request, kind = (
            self.prepared[0]
            if len(self.prepared) == 1
            else self.rng.choices(self.prepared, self.weights)[0]
        )
        exchange = Exchange(scheduled_at, kind.stream, kind.shape.chunks)
        self.busy[connection.fd] = (connection, exchange)
        self.all_requests += 1
        if not connection.send(request, exchange):
            self.epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT)
        if connection.is_closed:
            self._ended(connection, exchange, microseconds())

    def _poll(self, until: float) -> None:
        """Handle what happens until then, or until something did."""
        events = self.epoll.poll(0)
        if not events:
            # epoll waits in whole milliseconds; select on the epoll itself in microseconds.
            wait_us = until - microseconds()
            if self.is_stamped and 0 < wait_us <= READ_LATER_US and not self.backlog:
                time.sleep(wait_us / 1_000_000)
            elif wait_us > 0:
                select.select([self.epoll.fileno()], [], [], wait_us / 1_000_000)
            events = self.epoll.poll(0)
        for fd, event in events:
            # One that an earlier event of this turn closed is gone already.
            if (connection := self.open.get(fd)) is not None:
                self._happened(connection, event)
        now = microseconds()
        if now >= self.next_check:
            self.next_check = now + CHECK_EVERY_US
            self._time_out(now)

    def _happened(self, connection: Connection, event: int) -> None:
        is_sent = event & select.EPOLLOUT and connection.send_rest()
        if is_sent and not connection.is_closed:
            self.epoll.modify(connection.fd, select.EPOLLIN)
        if event & ~select.EPOLLOUT or connection.is_closed:
            self._readable(connection)

    def _readable(self, connection: Connection) -> None:
        now = microseconds()
        entry = self.busy.get(connection.fd)
        frames = [] if connection.is_closed else connection.read(now)
        if entry is None:
            if connection.is_closed:
                self._forget(connection)
            return
        exchange = entry[1]
        if frames:
            self._note_frames(exchange, frames, now)
        if connection.exchange is None:
            self._ended(connection, exchange, connection.came_at)

    def _note_frames(self, exchange: Exchange, frames: list[tuple[int, int]], now: int) -> None:
        if not exchange.last_frame_at and self.warm <= exchange.scheduled_at < self.end:
            self.latency.record(now - exchange.scheduled_at)
        if self.warm <= now < self.end:
            self.frames += len(frames)
            if exchange.last_frame_at:
                self.gap.record(now - exchange.last_frame_at)
                for _ in frames[1:]:
                    self.gap.record(0)
            for _, sent in frames:
                self.transit.record(now - sent)
        exchange.last_frame_at = now

    def _ended(self, connection: Connection, exchange: Exchange, now: int) -> None:
        del self.busy[connection.fd]
        problem = exchange.judge()
        if problem:
            self.errors[problem] += 1
        elif self.warm <= now < self.end:
            self.requests += 1
        if not problem and self.warm <= exchange.scheduled_at < self.end:
            self.whole.record(now - exchange.scheduled_at)
            if not exchange.is_stream:
                self.latency.record(now - exchange.scheduled_at)
        if connection.is_closed:
            self._forget(connection)
        self._go_on(connection, now)

    def _go_on(self, connection: Connection, now: int) -> None:
        if not connection.is_closed:
            self.idle.append(connection)
        if self.backlog:
            self._launch(self.backlog.popleft())
        elif not self.job.rate and not self.job.once and now < self.end:
            self._launch(now)

    def _forget(self, connection: Connection) -> None:
        # The kernel takes a closed socket out of the epoll; its number may be in use again.
        if self.open.get(connection.fd) is connection:
            del self.open[connection.fd]

    def _time_out(self, now: int) -> None:
        oldest = now - int(self.job.timeout_s * 1_000_000)
        for connection, exchange in list(self.busy.values()):
            last = max(exchange.last_frame_at, exchange.scheduled_at)
            if last < oldest and connection.exchange is not None:
                connection.time_out()
                self._ended(connection, exchange, now)


def take_priority(is_timed: bool) -> None:
    """Whoever keeps the time must not wait for a processor that the gateway keeps busy.

    Without the right to it (root has it) a busy machine makes more rounds void.
    """
    policy, priority = (os.SCHED_RR, 1) if is_timed else (os.SCHED_OTHER, 0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(priority))


def main() -> None:
    """Jobs until stdin ends. The garbage collector would be our own lateness."""
    raise_file_limit()
    read = msgspec.json.Decoder(Job)
    for line in sys.stdin.buffer:
        job = read.decode(line)
        gc.collect()
        gc.disable()
        take_priority(bool(job.rate))
        result = Load(job).run()
        gc.enable()
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
