"""CPU and memory of process trees, from /proc. Linux only.

The time of a process comes from its CPU clock (nanoseconds, all threads, ended ones too), what
its reaped children used from /proc in clock ticks: a child that ends moves from one to the other.
Failure: a process that ended between two looks counts as nothing; OSError when there is no /proc.
"""

import contextlib
import os
import resource
import time
from collections.abc import Iterable
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024


class Stat(NamedTuple):
    """One line of /proc/<pid>/stat; times in clock ticks."""

    pid: int
    name: str
    parent: int
    user: int
    system: int
    children: int
    rss_pages: int


class Cpu(NamedTuple):
    """CPU of some processes up to now, in seconds; their memory now, in bytes."""

    total_s: float
    user_s: float
    system_s: float
    rss: int
    rss_largest: int

    def since(self, before: "Cpu") -> "Cpu":
        return Cpu(
            self.total_s - before.total_s,
            self.user_s - before.user_s,
            self.system_s - before.system_s,
            self.rss,
            self.rss_largest,
        )


NO_CPU = Cpu(0.0, 0.0, 0.0, 0, 0)


def read_stat(pid: int) -> Stat | None:
    """The stat of a process; None when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A name may contain spaces and brackets; the fields after the last bracket are numbers.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Stat(
        pid=pid,
        name=head.partition("(")[2],
        parent=int(fields[1]),
        user=int(fields[11]),
        system=int(fields[12]),
        children=int(fields[13]) + int(fields[14]),
        rss_pages=int(fields[21]),
    )


def all_stats() -> list[Stat]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [stat for pid in pids if (stat := read_stat(pid)) is not None]


def tree(root: int, stats: Iterable[Stat], without: Iterable[int] = ()) -> list[Stat]:
    """root and all below it, except the trees of `without`."""
    children: dict[int, list[Stat]] = {}
    by_pid = {}
    for stat in stats:
        children.setdefault(stat.parent, []).append(stat)
        by_pid[stat.pid] = stat
    left_out = set(without)
    found, pending = [], [by_pid[root]] if root in by_pid else []
    while pending:
        stat = pending.pop()
        if stat.pid not in left_out:
            found.append(stat)
            pending.extend(children.get(stat.pid, ()))
    return found


def cpu_of(stats: Iterable[Stat]) -> Cpu:
    total_s = user = system = 0.0
    rss = rss_largest = 0
    for stat in stats:
        total_s += _clock_s(stat) + stat.children / TICKS_PER_S
        user += stat.user
        system += stat.system
        size = stat.rss_pages * os.sysconf("SC_PAGE_SIZE")
        rss += size
        rss_largest = max(rss_largest, size)
    return Cpu(total_s, user / TICKS_PER_S, system / TICKS_PER_S, rss, rss_largest)


def _clock_s(stat: Stat) -> float:
    try:
        # The CPU clock of another process, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime((~stat.pid << 3) | 2)
    except OSError:
        return (stat.user + stat.system) / TICKS_PER_S


def members(root: int, without: Iterable[int] = ()) -> list[Stat]:
    """The processes of a group as it is now."""
    return tree(root, all_stats(), without)


def watch_groups(groups: dict[str, tuple[int, tuple[int, ...]]]) -> dict[str, Cpu]:
    """CPU now by group name; a group is the tree of a pid without some other trees.

    It looks at every process of the machine: some milliseconds.
    """
    stats = all_stats()
    return {name: cpu_of(tree(root, stats, without)) for name, (root, without) in groups.items()}


def machine_ticks() -> tuple[int, int, int]:
    """(all, idle, stolen by the host) ticks of all processors since boot."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(field) for field in file.readline().split()[1:9]]
    return sum(fields), fields[3] + fields[4], fields[7]


def raise_file_limit() -> None:
    """As many descriptors as we may have: a thousand streams need more than the usual 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
