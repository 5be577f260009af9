"""The parent of the workers: one listening socket, N processes, children stop last.

A worker that dies is started again; its open holds come back by their leases. The parent never
serves a request itself.
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
from gateway.embedded import launch

log = logging.getLogger("gateway.supervisor")

BACKLOG = 4096
START_S = 30.0
RESTART_PAUSE_S = 1.0
KILL_AFTER_S = 10.0
READY = b"ready\n"


class WorkersFailed(Exception):
    """A worker did not come up; its own log says why."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that the workers share; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
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

    def __init__(self, settings: Settings, sock: socket.socket, metrics_dir: str) -> None:
        self._settings = settings
        self._sock = sock
        self._metrics_dir = metrics_dir
        self._processes: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    async def start(self) -> None:
        """Start all workers and wait until each serves. Raises WorkersFailed."""
        places = range(self._settings.server.workers)
        await asyncio.gather(*(self._spawn(place) for place in places))
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep(place)) for place in places]

    async def _spawn(self, place: int) -> None:
        env = dict(os.environ)
        if self._metrics_dir:
            env["PROMETHEUS_MULTIPROC_DIR"] = self._metrics_dir
        # The launcher ties the worker's life to ours, also when we are killed.
        tie = (sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), "same")
        worker = (sys.executable, "-m", "gateway.worker", str(self._sock.fileno()))
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
        self._processes[place] = process
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
            process.kill() if process.returncode is None else None
            raise WorkersFailed
        log.info("worker.started", extra={"pid": process.pid, "place": place})

    async def _keep(self, place: int) -> None:
        """Replace the worker of a place whenever it dies."""
        while True:
            await self._processes[place].wait()
            if self._stopping:
                return
            status = self._processes[place].returncode
            log.error("worker.died", extra={"place": place, "status": status})
            await asyncio.sleep(RESTART_PAUSE_S)
            with contextlib.suppress(WorkersFailed):
                await self._spawn(place)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drain all workers; when hurry is set they settle what is open as it stands."""
        self._stopping = True
        self._signal_all()
        waits = asyncio.gather(*(process.wait() for process in self._processes.values()))
        hurrying = asyncio.ensure_future(hurry.wait())
        timeout_s = self._settings.server.drain_timeout_s + KILL_AFTER_S
        ended: set[asyncio.Future[Any]] = {waits, hurrying}
        await asyncio.wait(ended, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            self._signal_all()
            await asyncio.wait([waits], timeout=KILL_AFTER_S)
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
        await waits
        hurrying.cancel()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, hurrying, return_exceptions=True)

    def _signal_all(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()


@asynccontextmanager
async def running_workers(
    settings: Settings, sock: socket.socket, hurry: asyncio.Event
) -> AsyncIterator[Workers]:
    """Workers that serve as long as the context is open; drained at its end."""
    metrics_dir = tempfile.mkdtemp(prefix="farebox-") if settings.server.workers > 1 else ""
    workers = Workers(settings, sock, metrics_dir)
    try:
        try:
            await workers.start()
            yield workers
        finally:
            await workers.stop(hurry)
    finally:
        if metrics_dir:
            shutil.rmtree(Path(metrics_dir), ignore_errors=True)
