"""The fault of a run, done to the world while its clients are served."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.plan import LEASE_S, Kind, Line, Plan
from tests.faults.points import Point
from tests.faults.processes import Child
from tests.faults.world import World
from tests.support.faultproxy import FaultProxy, Mode

# Above the till's deadline for a call.
LATENCY_S = 0.12
# A worker that stands still for longer than its holds are its own.
FROZEN_S = LEASE_S + 2.5
FOR_EVER_S = 600
START_AGAIN_S = 0.2
# Longer than an answer waits for till and book, so that the spool is needed.
AWAY_S = 2.0


@dataclass(kw_only=True)
class Struck:
    """What was done. Times are time.monotonic()."""

    kills: list[str] = field(default_factory=list)
    stopped_at: float = 0
    """When the worker died, stood still or lost the till for the first time; 0: it did not."""

    def died_at(self, point: Point) -> bool:
        return point.name in self.kills

    def stop(self) -> None:
        self.stopped_at = self.stopped_at or time.monotonic()


async def strike(world: World, plan: Plan, struck: Struck) -> None:
    """Do it, and leave a world that can serve again."""
    company = "" if plan.point is None else plan.point.company
    if company == "slow-till":
        world.till_line.to_client.delay_s = LATENCY_S
    await asyncio.sleep(plan.fault_ms / 1000)
    match plan.kind:
        case Kind.NONE:
            pass
        case Kind.WORKER_POINT if company == "till-killed":
            await _kill_till(world, struck)
        case Kind.WORKER_POINT if company == "stands-still":
            await _freeze_worker(world, struck)
        case Kind.WORKER_POINT if company == "both-away":
            await _both_away(world, struck)
        case Kind.WORKER_POINT if company == "spooled":
            async with _away(world, struck):
                await asyncio.sleep(AWAY_S)
                _running(world).kill()
                await _running(world).ended()
        case Kind.WORKER_POINT:
            await asyncio.sleep(plan.fault_for_ms / 1000)
            world.till_line.heal()
        case Kind.WORKER_KILLED | Kind.WORK_POINT:
            _running(world).kill()
        case Kind.WORKER_FROZEN:
            await _freeze_worker(world, struck)
        case _:
            await _strike_stores(world, plan, struck)


async def keep_worker(world: World, plan: Plan, struck: Struck) -> None:
    """For ever: start the worker again when it was killed, as its supervisor does."""
    while True:
        worker = _running(world)
        status = await worker.ended(FOR_EVER_S)
        worker.close()
        if status == 1 and plan.needs_patience:
            await asyncio.sleep(START_AGAIN_S)  # it cannot begin without the book
        else:
            assert status == -signal.SIGKILL, f"status {status}: {worker.log_end()}"
            struck.stop()
            struck.kills.append(_name(plan, struck))
        world.start_worker(plan.crash_at if plan.dies_second and len(struck.kills) == 1 else "")


def _name(plan: Plan, struck: Struck) -> str:
    """What killed it."""
    point = plan.point
    if point is None:
        return "worker"
    if point.role == "work":
        return "worker, for the sweeper"
    return "worker, with a spool" if plan.dies_second and not struck.kills else point.name


async def keep_work(world: World, plan: Plan, struck: Struck) -> None:
    """For ever: start the sweeper again when it died at its crash point."""
    while True:
        assert world.work is not None
        status = await world.work.ended(FOR_EVER_S)
        assert plan.point is not None
        assert status == -signal.SIGKILL, f"status {status}: {world.work.log_end()}"
        struck.kills.append(plan.point.name)
        world.work.close()
        await world.start_work()


def _running(world: World) -> Child:
    assert world.worker is not None
    return world.worker


async def _strike_stores(world: World, plan: Plan, struck: Struck) -> None:
    for_s = plan.fault_for_ms / 1000
    match plan.kind:
        case Kind.TILL_KILLED:
            await _kill_till(world, struck)
        case Kind.TILL_ROLLED_BACK:
            struck.kills.append("till")
            await _roll_back_till(world, for_s)
        case Kind.TILL_FLUSHED:
            async with world.till() as till:
                await till.flushall()
        case Kind.BOTH_AWAY:
            await _both_away(world, struck)
        case Kind.BOOK_KILLED:
            struck.kills.append("book")
            await world.restart(world.postgres, world.book_line)
        case Kind.TILL_LINE:
            await _break(world.till_line, plan, for_s)
        case Kind.BOOK_LINE:
            await _break(world.book_line, plan, for_s)
        case Kind.PROVIDER_LINE:
            await _break(world.provider_line, plan, for_s)
        case _:
            raise AssertionError(plan.kind)


async def _freeze_worker(world: World, struck: Struck) -> None:
    worker = _running(world)
    worker.kill(signal.SIGSTOP)
    struck.stop()
    await asyncio.sleep(FROZEN_S)
    worker.kill(signal.SIGCONT)


@asynccontextmanager
async def _away(world: World, struck: Struck) -> AsyncIterator[None]:
    """Neither till nor book can be reached, so that no checkpoint is written down either."""
    struck.stop()
    world.till_line.refuse()
    world.book_line.refuse()
    try:
        yield
    finally:
        world.till_line.heal()
        world.book_line.heal()


async def _both_away(world: World, struck: Struck) -> None:
    async with _away(world, struck):
        await asyncio.sleep(AWAY_S)


async def _kill_till(world: World, struck: Struck) -> None:
    struck.kills.append("till")
    await world.restart(world.valkey, world.till_line)


async def _roll_back_till(world: World, for_s: float) -> None:
    """What it wrote last never reached the disk."""
    before = {path: path.stat().st_size for path in _appended(world)}
    await asyncio.sleep(for_s)

    def truncate() -> None:
        for path in _appended(world):
            os.truncate(path, before.get(path, 0))

    await world.restart(world.valkey, world.till_line, truncate)


def _appended(world: World) -> list[Path]:
    return sorted(world.valkey.data.glob("appendonlydir/*.incr.aof"))


async def _break(line: FaultProxy, plan: Plan, for_s: float) -> None:
    match plan.line:
        case Line.RESET:
            line.reset()
            return
        case Line.CUT:
            line.to_client.cut_after = line.to_server.cut_after = plan.line_bytes
        case Line.HALF_OPEN:
            line.half_open()
        case Line.TRICKLE:
            line.both(Mode.TRICKLE)
        case Line.LATENCY:
            line.to_client.delay_s = LATENCY_S
        case None:
            raise AssertionError("no line fault was drawn")
    await asyncio.sleep(for_s)
    if plan.line is Line.HALF_OPEN:
        line.cut()  # bytes were lost: no TCP would let the rest through
    line.heal()
