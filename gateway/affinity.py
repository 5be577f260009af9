"""Which processors the workers get for themselves, with `server.pin_workers`.

A worker wakes the till, the till wakes the worker: on few processors the kernel often puts both on
the same one while another is idle. Whatever we start besides the workers (the parent, the embedded
stores) stays off their processors; processes of others do not.
"""

import logging
import os
from collections.abc import Collection

import msgspec

log = logging.getLogger("gateway.affinity")


class Places(msgspec.Struct, frozen=True):
    """A processor for each worker, and the others for everything else. Empty: no pinning."""

    workers: tuple[int, ...] = ()
    others: tuple[int, ...] = ()

    def of_worker(self, place: int) -> int | None:
        return self.workers[place] if self.workers else None


def places_for(workers: int, allowed: Collection[int]) -> Places:
    """The first processors of those allowed; at least one must be left for everything else."""
    if workers >= len(allowed):
        return Places()
    cpus = sorted(allowed)
    return Places(tuple(cpus[:workers]), tuple(cpus[workers:]))


def allowed_cpus() -> set[int]:
    """The processors that this process may use; none where the system does not tell (macOS)."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    return os.sched_getaffinity(0)


def choose_places(workers: int) -> Places:
    """Places on this machine; says so in the log when there are too few processors."""
    allowed = allowed_cpus()
    places = places_for(workers, allowed)
    if not places.workers:
        log.warning("workers.not_pinned", extra={"workers": workers, "cpus": len(allowed)})
    return places


def move(pid: int, cpus: Collection[int]) -> None:
    """Let a process of ours run on these processors only; 0 is ourselves, no cpus is no change.

    Its threads begin where the thread that starts them is. A process that has ended is left alone.
    """
    if not cpus:
        return
    try:
        os.sched_setaffinity(pid, cpus)
    except ProcessLookupError:
        return
    except OSError as exc:  # a processor was taken from us since
        log.warning("workers.not_pinned", extra={"pid": pid, "error": str(exc)})
