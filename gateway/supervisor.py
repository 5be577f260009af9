"""The parent of the workers: one listening socket, N processes, children stop last.

A worker's imports take as long as the stores' start, so it is launched first and gets its settings
when the stores are there. A worker that dies is started again; what it had open is ended by the
sweeper (gateway/work.py). The parent never serves a request itself.
Failure: WorkersFailed when the workers cannot be brought up.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from config.secret import Secret
from config.settings import Settings
from gateway.affinity import Places, allowed_cpus, choose_places, move
from gateway.embedded.identity import LAUNCHER

log = logging.getLogger("gateway.supervisor")

BACKLOG = 4096
START_S = 30.0
RESTART_PAUSE_S = 1.0
KILL_AFTER_S = 10.0
READY = b"ready\n"
# The name is prometheus_client's: where the workers' values meet.
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"


class WorkersFailed(Exception):
    """A worker did not come up."""

    def __init__(self, log_path: str) -> None:
        super().__init__(f"a worker did not come up; why stands in {log_path or 'its own output'}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that the workers share; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio sets TCP_NODELAY only on sockets that say they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def encode_settings(settings: Settings) -> bytes:
    """Settings with their secrets, for the stdin of a worker and nowhere else."""
    return msgspec.json.encode(settings, enc_hook=_reveal)


def decode_settings(data: bytes) -> Settings:
    return msgspec.json.decode(data, type=Settings, dec_hook=_conceal)


def _reveal(value: object) -> object:
    if isinstance(value, Secret):
        return value.reveal()
    raise NotImplementedError(type(value))


def _conceal(kind: type, value: object) -> object:
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise NotImplementedError(kind)


class Workers:
    """N worker processes on one socket."""

    def __init__(
        self,
        settings: Settings,
        sock: socket.socket,
        metrics_dir: str,
        cpus: Places | None = None,
    ) -> None:
        self._settings = settings
        self._cpus = cpus or Places()
        self._places = range(settings.server.workers)
        self._sock = sock
        self._metrics_dir = metrics_dir
        self._processes: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    async def launch(self) -> None:
        """Begin with all processes; they wait for their settings."""
        for place in self._places:
            await self._launch(place)

    async def start(self, settings: Settings) -> None:
        """Hand out the settings and wait until each worker serves. Raises WorkersFailed."""
        self._settings = settings
        ready = await asyncio.gather(*map(self._hand_over, self._places), return_exceptions=True)
        for failure in ready:
            if failure is not None:
                raise failure
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep(place)) for place in self._places]

    async def _launch(self, place: int) -> None:
        env = {name: value for name, value in os.environ.items() if name != METRICS_DIR}
        if self._metrics_dir:
            env[METRICS_DIR] = self._metrics_dir
        # The launcher ties the worker's life to ours, also when we are killed.
        tie = (sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), "same")
        # -P: a config.py in the current folder is not our package of that name.
        worker = (sys.executable, "-P", "-m", "gateway.worker", str(self._sock.fileno()))
        process = await asyncio.create_subprocess_exec(
            *tie,
            str(int(signal.SIGTERM)),
            "/",
            *worker,
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=[self._sock.fileno()],
            # A Ctrl-C in the terminal is for the parent, who then stops us in order.
            start_new_session=True,
            env=env,
        )
        cpu = self._cpus.of_worker(place)
        # Before it has any threads: they stay where it is.
        move(process.pid, () if cpu is None else (cpu,))
        self._processes[place] = process

    async def _hand_over(self, place: int) -> None:
        process = self._processes[place]
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(encode_settings(self._settings))
            await process.stdin.drain()
            process.stdin.close()
        try:
            async with asyncio.timeout(START_S):
                line = await process.stdout.readline()
        except TimeoutError:
            line = b""
        if line != READY:
            _signal(process, signal.SIGKILL)
            raise WorkersFailed(self._settings.log.path)
        log.info("worker.started", extra={"pid": process.pid, "place": place})

    async def _keep(self, place: int) -> None:
        """Replace the worker of a place whenever it dies."""
        while True:
            process = self._processes[place]
            status = await process.wait()
            facts = {"pid": process.pid, "place": place, "status": status}
            log.error("worker.died", extra=facts)
            self._forget_gauges(process.pid)
            await asyncio.sleep(RESTART_PAUSE_S)
            try:
                await self._launch(place)
                await self._hand_over(place)
            except (WorkersFailed, OSError) as exc:
                log.error("worker.start_failed", extra={"place": place, "error": str(exc)})

    def _forget_gauges(self, pid: int) -> None:
        """What a dead worker last said of its open requests is not true any more."""
        if self._metrics_dir:
            for file in Path(self._metrics_dir).glob(f"gauge_live*_{pid}.db"):
                file.unlink(missing_ok=True)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drain all workers; when hurry is set they settle what is open as it stands. Idempotent.

        A worker that still waits for its settings has nothing to drain.
        """
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # As long as anybody listens, new connections would wait for an answer that never comes.
        self._sock.close()
        self._signal_all(signal.SIGTERM)
        waits = asyncio.gather(*(process.wait() for process in self._processes.values()))
        hurrying = asyncio.ensure_future(hurry.wait())
        timeout_s = self._settings.server.drain_timeout_s + KILL_AFTER_S
        ended: set[asyncio.Future[Any]] = {waits, hurrying}
        await asyncio.wait(ended, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            # Another signal than the first: two of a kind at once would arrive as one.
            self._signal_all(signal.SIGINT)
            await asyncio.wait([waits], timeout=KILL_AFTER_S)
        self._signal_all(signal.SIGKILL)
        await waits
        hurrying.cancel()
        await asyncio.gather(hurrying, return_exceptions=True)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            _signal(process, number)


def _signal(process: Process, number: signal.Signals) -> None:
    """Process.send_signal would look for the exit status and take it from asyncio's watcher."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


@asynccontextmanager
async def launched_workers(
    settings: Settings, sock: socket.socket, hurry: asyncio.Event
) -> AsyncIterator[Workers]:
    """Processes that are ready for `start`; whoever starts them stops them before the stores."""
    metrics_dir = tempfile.mkdtemp(prefix="farebox-") if settings.server.workers > 1 else ""
    before = allowed_cpus()
    cpus = choose_places(settings.server.workers) if settings.server.pin_workers else Places()
    workers = Workers(settings, sock, metrics_dir, cpus)
    try:
        # The stores begin where we are.
        move(0, cpus.others)
        try:
            await workers.launch()
            yield workers
        finally:
            await workers.stop(hurry)
    finally:
        if cpus.others:
            move(0, before)
        if metrics_dir:
            shutil.rmtree(Path(metrics_dir), ignore_errors=True)
