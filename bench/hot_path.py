"""CPU of each stage of a request by itself: a regression is seen without a quiet machine.

Every stage runs with the gateway's own objects and no I/O: the till's connection is replaced by
one that packs the command and has answered. Figures are ratios to a fixed loop measured next to
each stage; the recorded ones stand in hot_path.json.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import msgspec

from bench.hot_path_world import World, open_world
from bench.reference import reference_ns

RECORDED = Path(__file__).with_name("hot_path.json")
TOLERATED = 2.0
REPEATS = 7
BATCH_S = 0.004
EXIT_REGRESSED = 99

T = TypeVar("T")
Say = Callable[[str], object]


class Stage(msgspec.Struct, frozen=True):
    """One piece of the hot path; run does it once. each: how often a request needs it."""

    name: str
    run: Callable[[], object]
    each: str = "request"


class Measured(msgspec.Struct, frozen=True):
    """CPU of a stage: nanoseconds, and as a ratio to the reference loop."""

    name: str
    each: str
    ns: float
    ratio: float


def at_once(coro: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never has to wait."""
    try:
        coro.send(None)
    except StopIteration as stopped:
        result: T = stopped.value
        return result
    coro.close()
    raise AssertionError("a stage of the hot path waited for something")


def stages(world: World) -> list[Stage]:
    """In the order of a request."""
    return [
        Stage("authenticate", lambda: at_once(world.authenticate())),
        Stage("read_facts_1k", world.read_facts),
        Stage("read_facts_32k", world.read_facts_long),
        Stage("prepare", world.prepare),
        Stage("admit", lambda: at_once(world.admit())),
        Stage("upstream_body", world.upstream_body, "stream"),
        Stage("meter_body", world.meter_body),
        Stage("meter_chunk", world.meter_chunk, "chunk"),
        Stage("meter_end", world.meter_end, "stream"),
        Stage("bill", world.bill),
        Stage("receipt", world.encode_receipt),
        Stage("settle", world.settle),
        Stage("usage_patch", world.patch_usage),
        Stage("record", world.record),
    ]


async def measure() -> list[Measured]:
    """All stages, several times in turn."""
    # A file of its own takes the log lines: writing them is part of the stage.
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        root = logging.getLogger()
        before = root.handlers[:], root.level
        try:
            async with open_world(Path(folder)) as world:
                return await _measure(world)
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers[:], root.level = before


async def _measure(world: World) -> list[Measured]:
    every = stages(world)
    counts = {stage.name: _calibrate(stage) for stage in every}
    looks: dict[str, list[tuple[float, float]]] = {stage.name: [] for stage in every}
    for _ in range(REPEATS):
        for stage in every:
            reference = reference_ns(3)
            looks[stage.name].append((_look(stage, counts[stage.name]), reference))
            world.forget()
            await asyncio.sleep(0)
    return [
        Measured(
            stage.name,
            stage.each,
            round(median(ns for ns, _ in looks[stage.name])),
            round(median(ns / reference for ns, reference in looks[stage.name]), 4),
        )
        for stage in every
    ]


def _look(stage: Stage, count: int) -> float:
    run = stage.run
    start = time.thread_time_ns()
    for _ in range(count):
        run()
    return (time.thread_time_ns() - start) / count


def _calibrate(stage: Stage) -> int:
    """How often a stage runs in one look; also warms it up."""
    return max(int(BATCH_S * 1e9 / max(_look(stage, 20), 1)), 1)


def regressed(now: Sequence[Measured], recorded: dict[str, float]) -> list[str]:
    """What costs more than twice its recorded ratio, or has no recorded ratio."""
    found = []
    for one in now:
        before = recorded.get(one.name)
        if before is None:
            found.append(f"{one.name}: no recorded ratio; run with --record")
        elif one.ratio > before * TOLERATED:
            found.append(f"{one.name}: ratio {one.ratio:.3f}, recorded {before:.3f}")
    return found


def main(*, check: bool, record: bool, as_json: bool, say: Say) -> int:
    """Measure and say; exit code 99 when check finds a regression twice in a row."""
    recorded = read_recorded()
    now = asyncio.run(measure())
    say(msgspec.json.encode(now).decode() if as_json else table_of(now, recorded))
    if record:
        ratios = {one.name: one.ratio for one in now}
        RECORDED.write_bytes(msgspec.json.format(msgspec.json.encode(ratios)) + b"\n")
    elif check and regressed(now, recorded):
        # Once may be the machine; twice is the code.
        found = regressed(asyncio.run(measure()), recorded)
        for line in found:
            say(f"farebox: regressed: {line}")
        return EXIT_REGRESSED if found else 0
    return 0


def read_recorded() -> dict[str, float]:
    if not RECORDED.exists():
        return {}
    return msgspec.json.decode(RECORDED.read_bytes(), type=dict[str, float])


def table_of(now: Sequence[Measured], recorded: dict[str, float]) -> str:
    from bench.table import lines_of

    rows = [["stage", "for each", "CPU ns", "ratio", "recorded"]]
    for one in now:
        before = recorded.get(one.name)
        said = "-" if before is None else f"{before:.3f}"
        rows.append([one.name, one.each, f"{one.ns:,.0f}", f"{one.ratio:.3f}", said])
    total = sum(one.ns for one in now if one.each == "request" and one.name in PLAIN_REQUEST)
    rows.append(["sum", "1 KB request", f"{total:,.0f}", "", ""])
    return "\n".join(lines_of(rows))


# admit contains a first receipt, settle a second one: the line of its own is not added.
PLAIN_REQUEST = (
    *("authenticate", "read_facts_1k", "prepare", "admit", "meter_body"),
    *("bill", "settle", "usage_patch", "record"),
)
