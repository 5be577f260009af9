"""Many runs, one after the other, and the table of what they showed."""

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.faults.plan import draw
from tests.faults.points import POINTS
from tests.faults.processes import NotStarted
from tests.faults.run import run
from tests.faults.verdict import Evidence, Loss, Verdict, judge
from tests.faults.world import World

RUN_S = 120


@dataclass(kw_only=True)
class Tally:
    """What a campaign has shown so far."""

    seed: int
    runs: int = 0
    requests: int = 0
    receipts: int = 0
    recovered: int = 0
    lost: int = 0
    minted: int = 0
    overcharged: int = 0
    uncertain: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    """Crash points: how often they were passed, and how often a process died there."""
    died: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    losses: dict[str, Loss] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, evidence: Evidence, verdict: Verdict) -> None:
        plan = evidence.plan
        self.runs += 1
        self.requests += verdict.requests
        self.receipts += verdict.receipts
        self.recovered += verdict.recovered
        self.lost += verdict.lost
        self.minted += verdict.minted
        self.overcharged += verdict.overcharged
        self.uncertain += verdict.uncertain
        self.faults[plan.fault if plan.point is None else str(plan.kind)] += 1
        for kill in evidence.struck.kills:
            (self.died if kill in POINTS else self.kills)[kill] += 1
        for why, loss in verdict.losses.items():
            mine = self.losses.setdefault(why, Loss())
            mine.requests += loss.requests
            if loss.worst > mine.worst:
                mine.worst, mine.bound = loss.worst, loss.bound
        if verdict.problems:
            self.fail(plan.number, plan.fault, verdict.problems)

    def fail(self, number: int, fault: str, problems: Iterable[str]) -> None:
        said = "\n    ".join(problems)
        self.failures.append(f"run {number} ({fault})\n    {said}\n    {repeat(self.seed, number)}")


def repeat(seed: int, number: int) -> str:
    """The command that does one run alone."""
    return f"uv run pytest -m faults tests/faults --runs 1 --seed {seed} --only {number}"


async def campaign(
    world: World, seed: int, numbers: Iterable[int], tell: Callable[[str], None]
) -> Tally:
    """Do the runs; one that fails does not end the others."""
    tally = Tally(seed=seed)
    for number in numbers:
        plan = draw(seed, number)
        try:
            async with asyncio.timeout(RUN_S):
                evidence = await run(world, plan)
        except (TimeoutError, AssertionError, NotStarted, OSError, ExceptionGroup) as exc:
            tally.fail(number, plan.fault, traceback.format_exception(exc))
            tell(f"run {number}: {plan.fault}: did not come to its end")
            await world.reset()
            continue
        tally.passed.update(world.forge.hit_counts())
        verdict = judge(evidence)
        tally.add(evidence, verdict)
        mark = "FAILED" if verdict.problems else "ok"
        killed = ", ".join(evidence.struck.kills) or "nothing"
        worst = max((loss.worst for loss in verdict.losses.values()), default=0)
        tell(
            f"run {number}: {plan.fault}; killed {killed}; {verdict.requests} requests,"
            f" {verdict.receipts} receipts, {verdict.recovered} recovered,"
            f" worst loss {worst:,}: {mark}"
        )
    return tally


def table(tally: Tally) -> list[str]:
    """The result, as Markdown."""
    totals = [
        ("runs", tally.runs),
        ("requests", tally.requests),
        ("receipts", tally.receipts),
        ("recovered receipts", tally.recovered),
        ("nanos lost beyond the bounds", tally.lost),
        ("nanos minted", tally.minted),
        ("nanos overcharged", tally.overcharged),
        ("nanos for prompts that were about to be sent", tally.uncertain),
        ("runs with a finding", len(tally.failures)),
    ]
    points = [(name, tally.passed[name], tally.died[name]) for name in POINTS]
    losses = [(why, n.requests, n.worst, n.bound) for why, n in sorted(tally.losses.items())]
    return [
        f"Seed {tally.seed}.",
        "",
        *_rows(("campaign", "count"), totals),
        "",
        *_rows(("crash point", "passed", "died there"), points),
        "",
        *_rows(("fault", "runs"), sorted(tally.faults.items())),
        "",
        *_rows(("killed otherwise", "times"), sorted(tally.kills.items())),
        "",
        *_rows(("why the operator got less", "requests", "worst, nanos", "its bound"), losses),
    ]


def _rows(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    def line(cells: tuple[object, ...]) -> str:
        return f"| {' | '.join(f'{c:,}' if isinstance(c, int) else str(c) for c in cells)} |"

    return [line(head), f"|{'---|' * len(head)}", *map(line, rows)]
