"""A fixed piece of work: how fast this machine runs Python right now. Pure but for the CPU clock.

Shared caches, hyper-threads and neighbours change what a microsecond of CPU buys, by a factor of
two on a busy machine. Whatever is divided by this loop's time of the same moment can be compared
with another moment and, roughly, with another machine. Never change it: old ratios depend on it.
"""

import time
from statistics import median

LOOPS = 8


def fixed_work() -> int:
    """Dicts, bytes, small objects and calls, as in the relay; some 30 us."""
    table: dict[bytes, tuple[int, str]] = {}
    total = 0
    for number in range(48):
        key = b"header-%d" % number
        table[key] = (number, f"value {number}")
        total += len(key.partition(b"-")[2]) + _inner(number, key)
    for key, (number, text) in sorted(table.items()):
        total += number + len(text) + key.find(b"r")
    return total


def _inner(number: int, key: bytes) -> int:
    return number % 7 if key.startswith(b"header") else -1


def reference_ns(repeats: int = 5) -> float:
    """CPU nanoseconds of one piece of work: the median of a few short looks."""
    looks = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        for _ in range(LOOPS):
            fixed_work()
        looks.append((time.thread_time_ns() - start) / LOOPS)
    return median(looks)
