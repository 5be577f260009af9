"""A whole run: mock, arms and load up, all segments in turn, everything down again.

Arms alternate within each round, so that what else the machine does hits all of them. After each
segment the receipts are compared with what the mock served; at the end the books are audited.
Failure: ChildFailed or a store's error when something does not come up; what was measured wrongly
(receipts, drift, errors) is in the report as a failure.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import msgspec

from bench.arms import Arm, Gateway, Receipts, arm_at, running_gateway, running_mock
from bench.loads import LOADS, Load, stream_s
from bench.mock import Counts
from bench.processes import Child, child
from bench.report import Account, Report, make_report
from bench.segment import Plan, Segment, run_segment
from gateway.affinity import allowed_cpus, move, places_for

Progress = Callable[[float, str], None]
RATE_WITHOUT_PEAK = 100.0
GENTLE = 0.5


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to run."""

    loads: Sequence[str]
    rounds: int = 3
    seconds: float = 3.0
    warm_s: float = 0.7
    rate: float = 0.0
    """Arrivals a second of the open phases; 0: half of the lowest peak but direct's."""
    rates: Sequence[float] = (1.0,)
    """Shares of that rate; the figures are those of share 1, the others are for the curve."""
    loaders: int = 1
    workers: int = 1
    pin: bool = False
    """`server.pin_workers`, and the load off those processors, if there are enough of them."""
    seed: int = 1
    mock_port: int = 0
    budget_s: float = 0.0
    """No further round when it would end after that; 0: all rounds."""
    peers: Sequence[Arm] = ()
    with_gateway: bool = True


class Run:
    """The state of a run."""

    def __init__(self, options: Options, folder: Path, progress: Progress) -> None:
        self.options = options
        self.folder = folder
        self.progress = progress
        self.loads = [LOADS[name] for name in options.loads]
        self.segments: list[Segment] = []
        self.accounts: dict[tuple[str, str], Account] = {}
        self.rates: dict[str, float] = {}
        self.arms: list[Arm] = []
        self.gateway: Gateway | None = None
        self.loaders: list[Child] = []
        self.mock_url = ""
        self.mock_pid = 0
        self.cpus = allowed_cpus()
        self.began = time.monotonic()
        self.round_s = 0.0

    async def start(self, stack: AsyncExitStack) -> None:
        options, folder = self.options, self.folder
        self.progress(0, "starting")
        mock, self.mock_url = await stack.enter_async_context(
            running_mock(folder, options.seed, options.mock_port)
        )
        self.mock_pid = mock.pid
        self.arms.append(arm_at("direct", f"{self.mock_url}/v1"))
        if options.with_gateway:
            self.gateway = await stack.enter_async_context(
                running_gateway(folder, self.mock_url, options.workers, pin=options.pin)
            )
            self.arms.append(self.gateway.arm)
        self.arms.extend(options.peers)
        for number in range(options.loaders):
            loader = child(f"load{number}", ("-m", "bench.load"), folder)
            self.loaders.append(await stack.enter_async_context(loader))
        if options.pin:
            stack.callback(move, 0, self.cpus)
            # Clients and providers are elsewhere: here, off the processors of the workers.
            others = places_for(options.workers, self.cpus).others
            for pid in (0, mock.pid, *(loader.pid for loader in self.loaders)):
                move(pid, others)

    async def measure(self) -> None:
        for number in range(self.options.rounds):
            began = time.monotonic()
            if number and self._is_late(began):
                return
            for load in self.loads:
                for phase, share in self._phases(load):
                    # Every second round in the other order: nobody always comes first.
                    arms = self.arms if number % 2 == 0 else self.arms[::-1]
                    for arm in arms:
                        await self._segment(load, arm, phase, share, number)
            self.round_s = time.monotonic() - began

    def _is_late(self, now: float) -> bool:
        """Whether one more round of the same length would break the budget."""
        budget_s = self.options.budget_s
        return bool(budget_s) and now + self.round_s > self.began + budget_s

    def _phases(self, load: Load) -> list[tuple[str, float]]:
        phases = [("peak", 0.0)] if load.has_peak else []
        if load.has_open:
            shares = self.options.rates if load.has_curve else (1.0,)
            phases += [("open" if share == 1 else "curve", share) for share in shares]
        return phases

    async def _segment(self, load: Load, arm: Arm, phase: str, share: float, number: int) -> None:
        long_s = stream_s(load)
        plan = Plan(
            load=load,
            arm=arm,
            phase=phase,
            round=number,
            seconds=segment_s(self.options, load),
            warm_s=max(self.options.warm_s, min(long_s, load.ramp_s)),
            rate=self._rate(load) * share if share else 0.0,
            seed=self.options.seed + number,
        )
        self.progress(segment_s(self.options, load), f"{load.name} {phase}: {arm.name}")
        groups = dict(arm.groups) | {"mock": (self.mock_pid, ())}
        groups |= {f"load{i}": (loader.pid, ()) for i, loader in enumerate(self.loaders)}
        served = self._served()
        billed = await self._receipts()
        segment = await run_segment(plan, self.loaders, groups)
        self.segments.append(segment)
        await self._compare(load, arm, served, billed)

    def _rate(self, load: Load) -> float:
        """Fixed by the first round: all rounds and arms are asked the same."""
        if self.options.rate:
            return self.options.rate * load.rate_share
        if load.name not in self.rates:
            basis = load.name if load.has_peak else "chat-1k"
            peaks: dict[str, list[float]] = {}
            for segment in self.segments:
                is_rated = segment.arm != "direct" or len(self.arms) == 1
                if segment.load == basis and segment.phase == "peak" and is_rated:
                    peaks.setdefault(segment.arm, []).append(segment.requests / segment.seconds)
            lowest = min((median(rates) for rates in peaks.values()), default=0.0)
            self.rates[load.name] = lowest * GENTLE * load.rate_share or RATE_WITHOUT_PEAK
        return self.rates[load.name]

    def _served(self) -> Counts:
        address = urlsplit(self.mock_url)
        connection = HTTPConnection(str(address.hostname), address.port, timeout=10)
        try:
            connection.request("GET", "/mock/stats")
            return msgspec.json.decode(connection.getresponse().read(), type=Counts)
        finally:
            connection.close()

    async def _receipts(self) -> Receipts | None:
        return None if self.gateway is None else await self.gateway.receipts()

    async def _compare(self, load: Load, arm: Arm, served: Counts, billed: Receipts | None) -> None:
        """Add up what the mock served and what was billed for it in this segment."""
        now = self._served()
        account = self.accounts.setdefault((load.name, arm.name), Account())
        account.served += now.served - served.served
        account.served_tokens += _tokens(now) - _tokens(served)
        if self.gateway is None or billed is None or arm is not self.gateway.arm:
            return
        wanted = billed.billed + now.served - served.served
        found = await self.gateway.receipts_at_rest(lambda r: r.billed >= wanted)
        account.receipts = (account.receipts or 0) + found.billed - billed.billed
        account.voided += found.voided - billed.voided
        account.billed_tokens += _billed_tokens(found) - _billed_tokens(billed)

    async def finish(self) -> Report:
        self.progress(0, "audit")
        move(0, self.cpus)
        audit, drift = None, None
        if self.gateway is not None:
            drift = await self.gateway.drift_nanos()
            audit = await self.gateway.audit()
        return make_report(self.options, self.segments, self.accounts, audit, drift)


def _tokens(counts: Counts) -> int:
    return counts.input_tokens + counts.output_tokens


def _billed_tokens(receipts: Receipts) -> int:
    return receipts.input_tokens + receipts.output_tokens


def segment_s(options: Options, load: Load) -> float:
    """How long a segment of a load is measured."""
    return max(stream_s(load) - load.ramp_s, 1.0) if load.once else options.seconds


def planned_s(options: Options) -> float:
    """The sum of all that is measured: what 100 % of the progress are."""
    total_s = 0.0
    arms = 1 + options.with_gateway + len(options.peers)
    for load in (LOADS[name] for name in options.loads):
        phases = load.has_peak + load.has_open * (len(options.rates) if load.has_curve else 1)
        total_s += phases * arms * options.rounds * segment_s(options, load)
    return total_s


async def run(options: Options, progress: Progress) -> Report:
    """Run it all in a folder of its own that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as name:
        folder = Path(name)
        measured = Run(options, folder, progress)
        async with AsyncExitStack() as stack:
            await measured.start(stack)
            await measured.measure()
            return await measured.finish()


def run_blocking(options: Options, progress: Progress) -> Report:
    return asyncio.run(run(options, progress))
