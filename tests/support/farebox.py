"""The command line as real processes: short commands, and a demo or a server that runs on.

Nothing of the caller's FAREBOX_* environment gets through, and the current folder is another one
than the project's. Whatever was started is stopped and reaped at the end.
Failure: NotReady with what the process said, when it ended or did not serve in time.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PEPPER = "0123456789abcdef" * 2 + "-of-the-tests"
START_S = 60
STOP_S = 30


class NotReady(Exception):
    """A process that was started does not serve."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


async def farebox(*args: str, cwd: Path, **env: str) -> Done:
    """Run one command to its end; env is added to a clean environment."""
    process = await asyncio.create_subprocess_exec(
        *command(*args),
        cwd=cwd,
        env=clean_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode is not None
    return Done(status=process.returncode, out=out.decode(), err=err.decode())


class Running:
    """A demo or a server that answers."""

    def __init__(self, process: "subprocess.Popen[bytes]", facts: dict[str, Any], cwd: Path):
        self.process = process
        self.facts = facts
        self.cwd = cwd
        self.base_url: str = facts["base_url"]
        self.origin = self.base_url.removesuffix("/v1")

    @property
    def api_key(self) -> str:
        return str(self.facts["api_key"])

    @property
    def log(self) -> str:
        """What the demo logged."""
        return (self.cwd / "data" / "farebox.log").read_text()

    async def cli(self, *args: str, **env: str) -> Done:
        """A command beside this demo."""
        return await farebox(*args, "--data-dir", "data", cwd=self.cwd, **env)

    async def exit_status(self) -> int:
        """Wait for the end."""
        return await asyncio.to_thread(self.process.wait, STOP_S)


@contextmanager
def running_demo(folder: Path, *args: str, **env: str) -> Iterator[Running]:
    """`farebox demo` with its data in folder/data, as long as the block runs."""
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    options = ("--port", "0", "--ready-file", str(ready), "--data-dir", "data", *args)

    def facts() -> dict[str, Any] | None:
        return json.loads(ready.read_text()) if ready.exists() else None

    with _running(folder, ("demo", *options), facts, env) as demo:
        yield demo


@contextmanager
def running_serve(folder: Path, *args: str, **env: str) -> Iterator[Running]:
    """`farebox serve` against the stores that env names."""

    def facts() -> dict[str, Any] | None:
        text = (folder / "stdout").read_text()
        return json.loads(text) if text.rstrip().endswith("}") else None

    with _running(folder, ("serve", "--port", "0", "--json", *args), facts, env) as server:
        yield server


@contextmanager
def running_work(folder: Path, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`farebox work` in a folder of its own; what it logs is in folder/stderr."""
    folder.mkdir()

    def facts() -> dict[str, Any] | None:
        text = (folder / "stdout").read_text()
        return json.loads(text) if text.rstrip().endswith("}") else None

    with _started(folder, ("work", "--json"), facts, env) as (process, _):
        yield process


@contextmanager
def _running(
    folder: Path,
    args: tuple[str, ...],
    facts: Callable[[], dict[str, Any] | None],
    env: Mapping[str, str],
) -> Iterator[Running]:
    with _started(folder, args, facts, env) as (process, found):
        yield Running(process, found, folder)


@contextmanager
def _started(
    folder: Path,
    args: tuple[str, ...],
    facts: Callable[[], dict[str, Any] | None],
    env: Mapping[str, str],
) -> Iterator[tuple["subprocess.Popen[bytes]", dict[str, Any]]]:
    began = time.monotonic()
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        process = subprocess.Popen(
            command(*args),
            cwd=folder,
            env=clean_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    try:
        while (found := facts()) is None:
            if process.poll() is not None or time.monotonic() - began > START_S:
                said = (folder / "stderr").read_text()
                raise NotReady(f"status {process.poll()}: {said}")
            time.sleep(0.01)
        yield process, found
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End it in order, or by force when that takes too long."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def command(*args: str) -> list[str]:
    # -P: as the installed `farebox`, it takes no package from the current folder.
    return [sys.executable, "-P", "-m", "gateway", *args]


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
    return {**kept, **more}


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody reaped has ended, too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
