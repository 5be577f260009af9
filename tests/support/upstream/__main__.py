"""Command line of the test provider: loopback only, gone when its parent is."""

import argparse
import asyncio
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from .server import Server

PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.upstream")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready-file", type=Path)
    options = parser.parse_args()
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    asyncio.run(_serve(options.port, options.ready_file, parent))


async def _serve(port: int, ready_file: Path | None, parent: int) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server()
    port = await server.start(port)
    ready = json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "pid": os.getpid()})
    if ready_file is None:
        sys.stdout.write(ready + "\n")
        sys.stdout.flush()
    else:
        _write_at_once(ready_file, ready)
    while not stop.is_set() and os.getppid() == parent:
        # The parent may have died before prctl, or there is no prctl: so look twice a second.
        try:
            await asyncio.wait_for(stop.wait(), 0.5)
        except TimeoutError:
            continue
    await server.close()


def _write_at_once(path: Path, text: str) -> None:
    """Nobody who waits for the file sees half of it."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    main()
