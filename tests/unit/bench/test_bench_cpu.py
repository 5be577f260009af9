"""CPU accounting against children whose CPU is known."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.cpu import MIB, all_stats, cpu_of, read_stat, tree, watch_groups

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Burns 0.3 s of CPU by its own clock, says so, and waits.
BUSY = """
import sys, time
until = time.process_time() + 0.3
while time.process_time() < until: pass
print(time.process_time(), flush=True)
sys.stdin.read()
"""
# The same in a child of its own, which has ended and was reaped when it says so.
BUSY_CHILD = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {BUSY!r}], stdin=subprocess.DEVNULL, check=True)
sys.stdin.read()
"""
HEAVY = "import sys; data = bytearray(b'x') * (64 << 20); print(len(data), flush=True)"
HEAVY += "; sys.stdin.read()"


@contextmanager
def running(script: str) -> Iterator[tuple[int, float]]:
    """(pid, the number it said)."""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.pid, float(process.stdout.readline())
        process.stdin.close()


def test_a_busy_process_is_accounted_for() -> None:
    with running(BUSY) as (pid, said_s):
        now = watch_groups({"busy": (pid, ())})["busy"]

    assert now.total_s == pytest.approx(said_s, abs=0.1)
    assert now.user_s + now.system_s == pytest.approx(said_s, abs=0.1)


def test_children_that_ended_are_accounted_for() -> None:
    with running(BUSY_CHILD) as (pid, said_s):
        now = watch_groups({"busy": (pid, ())})["busy"]

    assert now.total_s >= said_s


def test_a_tree_is_everybody_below_but_for_what_is_left_out() -> None:
    with running(BUSY) as (pid, _):
        stats = all_stats()
        below = {stat.pid for stat in tree(os.getpid(), stats)}
        without = {stat.pid for stat in tree(os.getpid(), stats, without=(pid,))}

    assert {os.getpid(), pid} <= below
    assert below - without == {pid}


def test_memory_is_that_of_the_largest_and_of_all() -> None:
    with running(HEAVY) as (pid, size):
        now = watch_groups({"heavy": (pid, ())})["heavy"]

    assert size < now.rss_largest <= now.rss < size + 64 * MIB


def test_the_cpu_between_two_looks_is_the_difference() -> None:
    groups: dict[str, tuple[int, tuple[int, ...]]] = {"me": (os.getpid(), ())}
    before, start = watch_groups(groups)["me"], time.process_time()
    while time.process_time() < start + 0.1:
        pass
    used = watch_groups(groups)["me"].since(before)

    assert used.total_s == pytest.approx(time.process_time() - start, abs=0.05)


def test_a_process_that_is_gone_counts_as_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    assert read_stat(process.pid) is None
    assert tree(process.pid, all_stats()) == []
    assert cpu_of([]).total_s == 0
