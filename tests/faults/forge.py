"""The launcher: it has imported the product with its crash points, and forks for every process.

`python -m tests.faults.forge FD EXITS` reads orders from the socket FD: {role, args, env} as JSON
with the descriptors for stdin, stdout and stderr, and those whose numbers must stay. It answers
with the pid. A new process goes on where the product's own would: its `main`, settings on stdin.
Forking costs milliseconds where a start of Python with all imports costs most of a second.
When a process ends its status is written into the file EXITS/PID; all end when the forge does.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.faults import crash

PR_SET_PDEATHSIG = 1
# Role: the module that has its main. The sweeper's command reads settings another way.
ROLES = {"worker": "gateway.worker", "work": "tests.faults.work"}
IMPORTED = ("uvloop", "asyncpg", "gateway.server", *ROLES.values())
ORDER_BYTES_MAX, DESCRIPTORS_MAX = 65_536, 8


def main(descriptor: int, exits: Path) -> None:
    _die_with_parent(signal.SIGKILL)
    crash.install()
    for name in IMPORTED:
        import_module(name)
    from billing.tokens import count_tokens

    count_tokens("the tokenizer is read once, too")
    orders = socket.socket(fileno=descriptor)
    # A signal may come just before a call that blocks: only a descriptor is never missed.
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    orders.send(b"ready")
    while True:
        ready, _, _ = select.select([orders, awake], [], [])
        if awake in ready:
            awake.recv(4096)
            _reap(exits)
        if orders not in ready:
            continue
        order, descriptors, _, _ = socket.recv_fds(orders, ORDER_BYTES_MAX, DESCRIPTORS_MAX)
        if not order:
            return
        pid = os.fork()
        if pid == 0:
            orders.close()
            os._exit(_become(json.loads(order), descriptors))
        for number in descriptors:
            os.close(number)
        # In a long campaign process ids come round again: this one's end is not the old one's.
        (exits / str(pid)).unlink(missing_ok=True)
        orders.send(str(pid).encode())


def _reap(exits: Path) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            draft = exits / f"{pid}.part"
            draft.write_text(str(os.waitstatus_to_exitcode(status)))
            draft.replace(exits / str(pid))


def _become(order: dict[str, Any], descriptors: list[int]) -> int:
    """Be that process to its end; its exit status."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent(signal.SIGKILL)
    os.setsid()
    for number, place in zip(descriptors, (0, 1, 2), strict=False):
        os.dup2(number, place)
        os.close(number)
    os.environ.update(order["env"])
    crash.arm_by_environment()
    kept = [str(number) for number in descriptors[3:]]
    sys.argv = [order["role"], *kept, *order["args"]]
    try:
        return int(import_module(ROLES[order["role"]]).main() or 0)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _die_with_parent(number: signal.Signals) -> None:
    """The campaign may be killed, too: nothing of it stays behind."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
