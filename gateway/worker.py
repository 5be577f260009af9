"""`python -m gateway.worker FD`: one serving process. Settings come on stdin, with their secrets.

It says "ready" on stdout when it accepts requests.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import socket
import sys
from types import TracebackType

from billing.errors import BillingError
from gateway.log import set_up_logging
from gateway.supervisor import METRICS_DIR, READY, decode_settings

log = logging.getLogger("gateway.worker")

GC_ALLOCATIONS = 20_000


def main() -> int:
    """Serve until told to stop. Exit code 1 when the worker could not start."""
    # Most of a start: done while the parent starts the stores, whose addresses come on stdin.
    import uvloop

    from gateway.server import run_worker

    settings = decode_settings(sys.stdin.buffer.read())
    set_up_logging(settings.log)
    sys.excepthook = log_crash
    raise_file_limit()
    sock = socket.socket(fileno=int(sys.argv[1]))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run_worker(settings, sock, say_ready, os.environ.get(METRICS_DIR, "")))
    except BillingError as exc:
        log.critical("worker.failed", extra={"error": str(exc), "cause": repr(exc.__cause__)})
        return 1
    return 0


def log_crash(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    """What nobody caught goes where everything else is told."""
    log.critical("worker.crashed", exc_info=(kind, exc, trace))


def say_ready() -> None:
    settle_memory()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()


def settle_memory() -> None:
    """Leave what is there for good out of every later garbage collection, and collect less often.

    A request makes little that needs the cycle collector; at the usual thresholds it walked all
    of the libraries' objects again and again, at a tenth of a request's CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 50)


def raise_file_limit() -> None:
    """A stream needs two descriptors; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
