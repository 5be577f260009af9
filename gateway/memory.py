"""How much memory this process has, and how much there may be: Linux only.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/filesystems/proc.html
Failure: what cannot be read does not count; without any answer the functions say 0.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC, CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


def resident_bytes(proc: Path = PROC) -> int:
    """Memory that this process occupies now."""
    try:
        pages = int((proc / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The least of the machine's memory and the limits of the groups that this process is in."""
    limits = [number for file in _limit_files(proc, cgroups) if (number := _number(file))]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def give_back() -> None:
    """Return what was freed to the system, where the C library knows how to. Takes some time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _limit_files(proc: Path, cgroups: Path) -> Iterator[Path]:
    """The limits of our group and of all above it; in a container some of them are not there."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        yield from (root / above / name for above in (group, *group.parents))


def _number(file: Path) -> int:
    """0 for `max` and for what is not there."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
