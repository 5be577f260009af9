"""One server process of ours: start, wait until it serves, stop. Each store fills in the rest.

The server inherits a locked file of its folder, so the kernel says truly whether one still runs
there: a server that a killed parent left behind finishes its shutdown before the next one starts.
Call start() from a thread that lives as long as the server (normally the main one): Linux sends the
death signal when the parent *thread* ends, which rules out asyncio.to_thread.

Failure: StoreStartFailed with the end of the log; nothing of this start keeps running.
"""

import asyncio
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import anyio

from gateway.embedded.errors import StoreStartFailed
from gateway.embedded.identity import (
    LAUNCHER,
    Identity,
    let_through,
    usual_identity,
)

START_S = 30.0
STOP_S = 20.0
INTERVAL_S = 0.01
RETRY_S = 0.1
LOG_TAIL_BYTES = 2000
LOG_KEPT_BYTES = 4 << 20


class EmbeddedServer(ABC):
    """Base of both stores. Owns root: `data/`, `log`, `password` (0600) and `server.lock`."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(
        self,
        root: Path,
        *,
        settings: Mapping[str, str] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.root = root.absolute()
        self.data = self.root / "data"
        self.settings = dict(settings or {})
        self.port = 0
        self._identity = identity
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it serves, with the password. Valid after start()."""

    @property
    def local_url(self) -> str:
        """The cheapest way to it from this machine."""
        return self.url

    @abstractmethod
    async def _prepare(self, lock: int) -> None:
        """Make the data folder fit to be served; lock is held."""

    @abstractmethod
    def _command(self) -> tuple[Sequence[str | Path], bytes]:
        """Arguments and standard input of the server that listens on self.port."""

    @abstractmethod
    async def _serves(self) -> bool:
        """Whether our own process (not another on that port) answers now."""

    @property
    def identity(self) -> Identity:
        return self._identity or usual_identity()

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def password(self) -> str:
        return (self.root / "password").read_text(encoding="ascii")

    async def start(self) -> None:
        """Serve on a free port of 127.0.0.1. Cancelled or failed, it leaves no process behind."""
        assert self._process is None, f"{self.name} runs already"
        try:
            async with asyncio.timeout(START_S):
                await self._start()
        except TimeoutError as exc:
            await self.stop()
            raise self._failed(f"not ready after {START_S:.0f} s") from exc
        except OSError as exc:
            await self.stop()
            raise self._failed(str(exc)) from exc
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop and reap the process, even if the caller is cancelled meanwhile. Safe to repeat."""
        process, self._process = self._process, None
        if process is not None:
            await uninterrupted(_end(process, self.stop_signal))

    async def _start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        let_through(self.root, self.identity)
        with open_lock(self.root / "server.lock") as lock:
            await self._lock(lock.fileno())
            self._prepare_root()
            await self._prepare(lock.fileno())
            while True:
                if await self._attempt(lock.fileno()):
                    return
                await asyncio.sleep(RETRY_S)

    async def _attempt(self, lock: int) -> bool:
        """Start once; False when it ended because the port (or memory) was still taken."""
        self.port = free_port()
        command, stdin = self._command()
        process = self._process = self._spawn(command, stdin, lock)
        os.ftruncate(lock, 0)
        os.write(lock, str(process.pid).encode())
        while process.poll() is None:
            if await self._serves():
                return True
            await asyncio.sleep(INTERVAL_S)
        self._process = None
        if "in use" in self._log_tail():
            return False
        raise self._failed(f"ended with {process.returncode}")

    def _prepare_root(self) -> None:
        password = self.root / "password"
        if not password.exists():
            write_secret(password, secrets.token_hex(16))
        log = self.root / "log"
        if log.exists() and log.stat().st_size > LOG_KEPT_BYTES:
            log.replace(self.root / "log.1")

    @property
    @abstractmethod
    def binary(self) -> Path:
        """The server's executable."""

    async def _lock(self, lock: int) -> None:
        """Wait until no process of an earlier start holds the folder."""
        try:
            await until(lambda: locked(lock))
        except asyncio.CancelledError:
            holder = os.pread(lock, 20, 0).decode() or "unknown"
            self._log(f"farebox: {self.root} is still served by pid {holder}\n")
            raise

    def _spawn(
        self, command: Sequence[str | Path], stdin: bytes, lock: int
    ) -> "subprocess.Popen[bytes]":
        log = self.root / "log"
        self._log_start = log.stat().st_size if log.exists() else 0
        launch = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
        launch += [self.identity.value, str(int(self.stop_signal))]
        launch += [str(self.data), *map(str, command)]
        with open(log, "ab") as output:
            process = subprocess.Popen(
                launch,
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal must reach the gateway first
                pass_fds=(lock,),
            )
        feed(process, stdin)
        return process

    async def _run(self, command: Sequence[str | Path], lock: int) -> None:
        """Run a helper program (initdb) to its end like the server itself."""
        process = self._process = self._spawn(command, b"", lock)
        await until(lambda: process.poll() is not None)
        self._process = None
        if process.returncode != 0:
            raise self._failed(f"{Path(command[0]).name} ended with {process.returncode}")

    def _log(self, line: str) -> None:
        with open(self.root / "log", "a", encoding="utf-8") as log:
            self._log_start = log.tell()
            log.write(line)

    def _log_tail(self) -> str:
        """The end of what this start wrote."""
        try:
            with open(self.root / "log", "rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(min(self._log_start, end), end - LOG_TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def _failed(self, why: str) -> StoreStartFailed:
        return StoreStartFailed(self.name, f"{why}\n{self._log_tail()}".strip())


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Finish work whatever cancels the caller, then let the cancellation go on. work is bounded."""
    with anyio.CancelScope(shield=True):
        task = asyncio.ensure_future(work)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as exc:
                cancelled = exc
    task.result()
    if cancelled is not None:
        raise cancelled


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does; the caller sets the deadline."""
    while True:
        if condition():
            return
        await asyncio.sleep(INTERVAL_S)


async def _end(process: "subprocess.Popen[bytes]", stop_signal: signal.Signals) -> None:
    process.send_signal(stop_signal)
    try:
        async with asyncio.timeout(STOP_S):
            await until(lambda: process.poll() is not None)
    except TimeoutError:
        process.kill()
        process.wait(5)


def feed(process: "subprocess.Popen[bytes]", text: bytes) -> None:
    """Write less than the 64 KiB that fit into a pipe; a dead reader shows by poll()."""
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.close()
    except BrokenPipeError:
        pass


def open_lock(path: Path) -> IO[bytes]:
    """Open a file to lock; the holder notes its pid in it for error messages."""
    return open(path, "a+b")


def locked(file: int) -> bool:
    """Try for the exclusive lock. It belongs to the open file: children that inherit it keep it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_secret(path: Path, text: str) -> None:
    """Write a file of mode 0600 that is complete or absent."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
