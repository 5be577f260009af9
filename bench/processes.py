"""Child processes of a run: tied to our life, stopped in order.

Failure: ChildFailed with the end of its stderr when a child does not come up or ends early.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.embedded import launch

STOP_S = 30.0
LINE_BYTES_MAX = 64 * 1024 * 1024
SAID_CHARS = 2000


class ChildFailed(Exception):
    """A process of the run is not there any more."""


class Child:
    """A process whose stderr goes to a file."""

    def __init__(self, name: str, process: Process, said: Path) -> None:
        self.name = name
        self.process = process
        self._said = said

    @property
    def pid(self) -> int:
        return self.process.pid

    async def line(self, timeout_s: float) -> bytes:
        """The next line of its stdout. Raises ChildFailed."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self.process.stdout.readline()
        except TimeoutError as exc:
            raise self.failed(f"said nothing for {timeout_s:.0f} s") from exc
        if not line:
            raise self.failed("ended")
        return line

    async def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        await self.process.stdin.drain()

    def failed(self, why: str) -> ChildFailed:
        said = self._said.read_text("utf-8", "replace")[-SAID_CHARS:]
        return ChildFailed(f"{self.name} {why}\n{said}".strip())


@asynccontextmanager
async def child(
    name: str,
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Child]:
    """A Python process with these arguments, as long as the context is open.

    It is in a session of its own (a Ctrl-C is for us, who then stop it) and gets SIGTERM from the
    kernel when we are killed.
    """
    said = folder / f"{name}.stderr"
    tie = (sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), "same")
    with said.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *tie,
            str(int(signal.SIGTERM)),
            os.getcwd(),
            sys.executable,
            *command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=stderr,
            start_new_session=True,
            env=None if env is None else dict(env),
            limit=LINE_BYTES_MAX,
        )
    try:
        yield Child(name, process, said)
    finally:
        await _stop(process)


async def _stop(process: Process) -> None:
    """SIGTERM, a bounded wait, SIGKILL. A second cancellation goes straight to the latter."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
    await process.wait()
    transport = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
