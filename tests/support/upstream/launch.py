"""Start the provider as its own process and ask it what it saw.

Failure: StartFailed after 10 s without a ready file; the process is stopped in any case.
"""

import base64
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .server import API_KEY

ROOT = Path(__file__).resolve().parents[3]


class StartFailed(Exception):
    """The provider did not become ready."""


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A running provider; base_url ends in /v1."""

    base_url: str
    pid: int
    api_key: str = API_KEY

    def stats(self) -> dict[str, Any]:
        return dict(self._ask("GET", "_stats"))

    def last(self) -> list[dict[str, Any]]:
        """Up to 50 requests, newest last; `body` as bytes, `headers` as pairs."""
        return [
            {**item, "body": base64.b64decode(item["body"])} for item in self._ask("GET", "_last")
        ]

    def reset(self) -> None:
        self._ask("POST", "_reset")

    def record(self) -> None:
        """As `reset`; from now on `last` gives all requests, with (time, text) of each write."""
        self._ask("POST", "_record")

    def wait(self, true_of: Callable[[dict[str, Any]], bool], timeout: float = 5) -> dict[str, Any]:
        """Stats as soon as true_of(stats) holds; blocks the thread between looks."""
        deadline = time.monotonic() + timeout
        while not true_of(stats := self.stats()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"upstream stats stayed {stats}")
            time.sleep(0.02)
        return stats

    def _ask(self, method: str, name: str) -> Any:
        url = self.base_url.removesuffix("v1") + name
        request = urllib.request.Request(url, method=method)  # noqa: S310 - loopback
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return json.load(answer)


@contextmanager
def running_upstream(folder: Path, port: int = 0) -> Iterator[Upstream]:
    """Run the provider until the block ends. Enter it on a thread that outlives it.

    On Linux the parent-death signal fires when the starting *thread* ends.
    """
    ready = folder / "upstream-ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.support.upstream"]
    command += ["--port", str(port), "--ready-file", str(ready)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 10
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise StartFailed(f"exit status {process.poll()}")
            time.sleep(0.01)
        yield Upstream(**json.loads(ready.read_text()))
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
