"""One segment: one arm under one load for a few seconds, with CPU and memory beside it.

The processes of the load keep the time by CLOCK_MONOTONIC, which is the same for all of us, so
the CPU is read at the same moments between which they count.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

import msgspec

from bench.arms import Arm
from bench.cpu import (
    MIB,
    NO_CPU,
    TICKS_PER_S,
    Cpu,
    cpu_of,
    machine_ticks,
    members,
    read_stat,
    watch_groups,
)
from bench.histogram import Histogram, merged
from bench.load import Job, Result
from bench.loads import Load, stream_s
from bench.processes import Child
from bench.reference import reference_ns

CONNECT_S = 0.15
OPEN_CONNECTIONS_FACTOR = 4
CONNECT_EACH_S = 0.0005
SAMPLE_S = 0.25
GRACE_S = 10.0
LATE_P99_MAX_US = 1000
HISTOGRAMS = ("latency", "whole", "gap", "transit", "late")


class Segment(msgspec.Struct, kw_only=True):
    """What one segment measured. CPU is in seconds by group, memory the largest seen."""

    load: str
    arm: str
    phase: str
    round: int
    seconds: float
    rate: float
    requests: int
    frames: int
    all_requests: int
    errors: dict[str, int]
    cpu: dict[str, Cpu]
    rss_mib: float
    rss_worker_mib: float
    late_p99_us: float
    backlog_max: int
    reference_us: float = 0.0
    """CPU of the fixed loop of reference.py during the segment."""
    others_share: float = 0.0
    """Of all processors of the machine, by others than us."""
    stolen_share: float = 0.0
    """Of them, taken by the host of a virtual machine."""
    histograms: dict[str, Histogram] = {}

    @property
    def is_void(self) -> bool:
        """The generator was late itself: its latencies say nothing. Its CPU figures hold."""
        return self.phase == "open" and self.late_p99_us > LATE_P99_MAX_US


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One segment to run; rate 0 is the closed loop."""

    load: Load
    arm: Arm
    phase: str
    round: int
    seconds: float
    warm_s: float
    rate: float
    seed: int


async def run_segment(
    plan: Plan, loaders: Sequence[Child], groups: dict[str, tuple[int, tuple[int, ...]]]
) -> Segment:
    """Raises ChildFailed when a process of the load did not answer."""
    start = time.monotonic() + CONNECT_S + _connections(plan) * CONNECT_EACH_S
    warm = start + plan.warm_s
    end = warm + plan.seconds
    grace_s = GRACE_S + stream_s(plan.load)
    for number, loader in enumerate(loaders):
        job = _job(plan, number, len(loaders), (start, warm, end), grace_s)
        await loader.write(msgspec.json.encode(job) + b"\n")
    await asyncio.sleep(warm - time.monotonic())
    before, ticks = watch_groups(groups), machine_ticks()
    peak, looks = await (_watch_quietly(groups, end) if plan.rate else _watch(groups, end))
    after, ticks_after = watch_groups(groups), machine_ticks()
    looks = looks or [reference_ns(repeats=3)]
    wait_s = grace_s + 20.0
    lines = [await loader.line(wait_s) for loader in loaders]
    results = [msgspec.json.decode(line, type=Result) for line in lines]
    segment = _segment(plan, results, before, after, peak)
    every, idle, stolen = (after - before for after, before in zip(ticks_after, ticks, strict=True))
    ours = sum(cpu.total_s for cpu in segment.cpu.values()) * TICKS_PER_S
    segment.others_share = round(max(every - idle - stolen - ours, 0) / max(every, 1), 3)
    segment.reference_us = round(median(looks) / 1000, 2)
    segment.stolen_share = round(stolen / max(every, 1), 3)
    return segment


def _connections(plan: Plan) -> int:
    """In the open loop enough for a queue: making one takes as long as ten requests."""
    return plan.load.connections * (OPEN_CONNECTIONS_FACTOR if plan.rate else 1)


def _job(
    plan: Plan, number: int, of: int, moments: tuple[float, float, float], grace_s: float
) -> Job:
    arm, load = plan.arm, plan.load
    return Job(
        host=arm.host,
        port=arm.port,
        path=arm.path,
        headers=arm.headers,
        model=arm.model,
        kinds=load.kinds,
        rate=plan.rate / of,
        connections=max(_connections(plan) // of, 1),
        once=load.once,
        start_at=moments[0],
        warm_until=moments[1],
        end_at=moments[2],
        ramp_s=load.ramp_s if not plan.rate else 0.0,
        grace_s=grace_s,
        seed=plan.seed * 100 + number,
    )


async def _watch(
    groups: dict[str, tuple[int, tuple[int, ...]]], until: float
) -> tuple[dict[str, Cpu], list[float]]:
    """The state of each group when it was largest; how long the reference loop took meanwhile."""
    peak: dict[str, Cpu] = {}
    looks: list[float] = []
    while (left_s := until - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, SAMPLE_S))
        looks.append(reference_ns(repeats=3))
        for name, now in watch_groups(groups).items():
            if now.rss >= peak.get(name, NO_CPU).rss:
                peak[name] = now
    return peak, looks


async def _watch_quietly(
    groups: dict[str, tuple[int, tuple[int, ...]]], until: float
) -> tuple[dict[str, Cpu], list[float]]:
    """Memory only, of the processes that are there now: where latencies count.

    All of /proc and the reference loop take some 5 ms of a processor each time. Four times a
    second, that alone is more than a hundredth of the requests.
    """
    pids = {name: [stat.pid for stat in members(*group)] for name, group in groups.items()}
    peak: dict[str, Cpu] = {}
    while (left_s := until - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, SAMPLE_S))
        for name, known in pids.items():
            now = cpu_of(stat for pid in known if (stat := read_stat(pid)) is not None)
            if now.rss >= peak.get(name, NO_CPU).rss:
                peak[name] = now
    return peak, []


def _segment(
    plan: Plan,
    results: list[Result],
    before: dict[str, Cpu],
    after: dict[str, Cpu],
    peak: dict[str, Cpu],
) -> Segment:
    histograms = {
        name: merged(Histogram.from_plain(getattr(result, name)) for result in results)
        for name in HISTOGRAMS
    }
    errors: Counter[str] = Counter()
    for result in results:
        errors.update(result.errors)
    gateway = peak.get("gateway", NO_CPU)
    return Segment(
        load=plan.load.name,
        arm=plan.arm.name,
        phase=plan.phase,
        round=plan.round,
        seconds=plan.seconds,
        rate=plan.rate,
        requests=sum(result.requests for result in results),
        frames=sum(result.frames for result in results),
        all_requests=sum(result.all_requests for result in results),
        errors=dict(errors),
        cpu={name: cpu.since(before.get(name, NO_CPU)) for name, cpu in after.items()},
        rss_mib=round(gateway.rss / MIB, 1),
        rss_worker_mib=round(gateway.rss_largest / MIB, 1),
        late_p99_us=histograms["late"].percentile(99) or 0.0,
        backlog_max=max(result.backlog_max for result in results),
        histograms=histograms,
    )
