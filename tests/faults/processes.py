"""The campaign's side of the forge: start processes of the product, watch them end.

Failure: NotStarted with the end of the process's log.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.crash import CRASH_AT, HITS_FILE, ROOT
from tests.support.gateway import eventually

START_S, STOP_S = 30, 20
LOG_SHOWN = 2000


class NotStarted(Exception):
    """A process of the product did not come up."""


class Child:
    """One process that the forge forked."""

    def __init__(self, pid: int, exits: Path, log: Path, stdout: int) -> None:
        self.pid = pid
        self.log = log
        self._exit = exits / str(pid)
        self._stdout = stdout
        self._said = b""

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return int(self._exit.read_text()) if self._exit.exists() else None

    async def said(self, line: bytes) -> None:
        """Wait until it has written that line. Raises NotStarted when it ends before."""

        async def look() -> bool | None:
            with suppress(BlockingIOError):
                self._said += os.read(self._stdout, 4096)
            if line not in self._said and self.status is not None:
                raise NotStarted(f"status {self.status}: {self.log_end()}")
            return line in self._said or None

        await eventually(look, START_S)

    async def ended(self, timeout_s: float = STOP_S) -> int:
        async def look() -> int | None:
            return self.status

        return int(await eventually(look, timeout_s))

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def stop(self) -> int:
        """Ask it to end and wait; by force when that takes too long."""
        self.kill(signal.SIGTERM)
        try:
            return await self.ended()
        except TimeoutError:
            self.kill()
            return await self.ended()
        finally:
            self.close()

    def close(self) -> None:
        if self._stdout >= 0:
            os.close(self._stdout)
            self._stdout = -1

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_SHOWN:]


class Forge:
    """Starts processes. `hits` counts the crash points that any of them passed."""

    def __init__(self, folder: Path, orders: socket.socket) -> None:
        self._folder = folder
        self._orders = orders
        self._number = 0
        self._hits_read = 0
        self.hits = folder / "hits"

    def launch(
        self,
        role: str,
        *,
        stdin: bytes,
        kept: Sequence[int] = (),
        crash_at: str = "",
        args: Sequence[str] = (),
    ) -> Child:
        """kept: descriptors that the process gets as its first arguments."""
        self._number += 1
        log = self._folder / f"{self._number:05}-{role}.log"
        env = {CRASH_AT: crash_at, HITS_FILE: str(self.hits)}
        order = json.dumps({"role": role, "args": list(args), "env": env}).encode()
        settings, feed = os.pipe()
        said, told = os.pipe()
        os.set_blocking(said, False)
        with open(log, "wb") as errors:
            os.write(feed, stdin)
            os.close(feed)
            socket.send_fds(self._orders, [order], [settings, told, errors.fileno(), *kept])
            os.close(settings)
            os.close(told)
        pid = int(self._orders.recv(64))
        return Child(pid, self._folder / "exits", log, said)

    def hit_counts(self) -> Mapping[str, int]:
        """How often each crash point was passed since the last call."""
        counts: dict[str, int] = {}
        if self.hits.exists():
            with open(self.hits, "rb") as file:
                file.seek(self._hits_read)
                text = file.read()
            self._hits_read += len(text)
            for name in text.decode().split():
                counts[name] = counts.get(name, 0) + 1
        return counts


@contextmanager
def running_forge(folder: Path) -> Iterator[Forge]:
    """A forge as long as the block runs; what it started ends with it."""
    exits = folder / "exits"
    exits.mkdir(parents=True)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(START_S)
        command = [sys.executable, "-m", "tests.faults.forge", str(theirs.fileno()), str(exits)]
        env = {name: value for name, value in os.environ.items() if "FAREBOX" not in name}
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        try:
            if ours.recv(64) != b"ready":
                raise NotStarted("the forge did not come up")
            yield Forge(folder, ours)
        finally:
            ours.close()
            process.terminate()
            process.wait(STOP_S)


async def all_ended(children: Sequence[Child]) -> None:
    await asyncio.gather(*(child.ended() for child in children))
