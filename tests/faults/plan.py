"""What happens in a run, drawn from the campaign's seed and the run's number. Pure.

The kinds of faults come in shuffled rounds, each kind as often as its weight in a round, so that
in a long campaign every crash point has its turns, and any run can be repeated alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from tests.faults.points import POINTS, Point
from tests.support.upstream.answer import WORDS


class Kind(StrEnum):
    """What is done to the system."""

    NONE = "nothing"
    WORKER_POINT = "worker dies at a crash point"
    WORKER_KILLED = "worker killed"
    WORKER_FROZEN = "worker stands still"
    WORK_POINT = "sweeper dies at a crash point"
    TILL_KILLED = "till killed"
    TILL_FLUSHED = "till emptied"
    TILL_ROLLED_BACK = "till loses its last writes"
    BOOK_KILLED = "book killed"
    BOTH_AWAY = "till and book away"
    TILL_LINE = "line to the till"
    BOOK_LINE = "line to the book"
    PROVIDER_LINE = "line to the provider"


class Line(StrEnum):
    """What a line between two processes does for a while."""

    RESET = "reset"
    HALF_OPEN = "half-open"
    TRICKLE = "one byte at a time"
    LATENCY = "latency"
    CUT = "cut after so many bytes"


class Behaviour(StrEnum):
    """What a client does."""

    STAY = "stay"
    SLOW = "slow"
    LEAVE = "leave"
    """After some bytes of the answer."""
    VANISH = "vanish"
    """With part of the request unsent."""


# How often a kind stands in one round, beside one turn for each crash point.
WEIGHTS = {
    Kind.NONE: 1,
    Kind.WORKER_KILLED: 2,
    Kind.WORKER_FROZEN: 1,
    Kind.TILL_KILLED: 1,
    Kind.TILL_FLUSHED: 1,
    Kind.TILL_ROLLED_BACK: 1,
    Kind.BOOK_KILLED: 1,
    Kind.BOTH_AWAY: 1,
    Kind.TILL_LINE: 2,
    Kind.BOOK_LINE: 2,
    Kind.PROVIDER_LINE: 2,
}
LINES = {Kind.TILL_LINE, Kind.BOOK_LINE, Kind.PROVIDER_LINE}
PROMPT_WORDS = 12
# The gateway's timings that a judgement needs; world.py has the rest.
LEASE_S, RENEW_S = 1, 0.4
STARTS_MS = 700
FIRST_LATER, LATER_MAX = 800, 40
FAULT_MS, COMPANY_MS = (60, 1800), (250, 550)
# With the least a stream comes to the end of its credit.
CREDITS_LEAST, CREDITS_POOR, CREDITS_RICH = 2, 5, 1000


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the campaign and how the provider serves it."""

    name: str
    mode: str
    weight: int
    stream: bool | None = None
    """None: either way."""
    fails_first: str = ""
    """The mode of a route that is tried before."""


# The mode's parameters are the provider's; prompt= is added by the campaign.
MODELS = {
    model.name: model
    for model in (
        Model(name="quick", mode="plain:tokens=12", weight=8),
        Model(name="late", mode="plain:tokens=16,delay_ms=350", weight=3),
        Model(name="slow", mode="plain:tokens=40,chunk_delay_ms=18", weight=6),
        Model(name="long", mode="plain:tokens=160,chunk_delay_ms=15", weight=3),
        Model(name="silent", mode="no-usage:tokens=20,chunk_delay_ms=8", weight=3),
        Model(name="beyond", mode="above-max-tokens:tokens=30", weight=1),
        Model(name="broken", mode="cut:tokens=30,after=9,chunk_delay_ms=12", weight=2,
              stream=True),
        Model(name="wrong", mode="error-in-200:tokens=30,after=7,chunk_delay_ms=8",
              weight=1, stream=True),
        Model(name="failing", mode="status:500", weight=2),
        Model(name="second", mode="plain:tokens=14,chunk_delay_ms=5", weight=1,
              fails_first="status:503"),
        Model(name="stalling", mode="stall-body:tokens=30,after=5,chunk_delay_ms=8",
              weight=1, stream=True),
    )
}  # fmt: skip
# So that each crash point is passed, whatever else is drawn.
ALWAYS = (
    *(("quick", True, Behaviour.STAY), ("quick", True, Behaviour.STAY)),
    *(("quick", False, Behaviour.STAY), ("late", False, Behaviour.STAY)),
    *(("slow", True, Behaviour.STAY), ("slow", True, Behaviour.LEAVE)),
    *(("long", True, Behaviour.STAY), ("silent", True, Behaviour.STAY)),
    *(("failing", False, Behaviour.STAY), ("stalling", True, Behaviour.LEAVE)),
    ("second", True, Behaviour.STAY),
)
# Those of them that are sent with an Idempotency-Key, and once more when the fault is over.
ONCE = {0, 4}


@dataclass(frozen=True, kw_only=True)
class Order:
    """One request of a run. Its prompt is found nowhere else in the campaign."""

    name: str
    prompt: str
    model: str
    stream: bool
    wants_usage: bool
    behaviour: Behaviour
    start_ms: int
    leave_after: int = 0
    max_tokens: int | None = None
    idempotency_key: str = ""
    repeats: str = ""
    """The name of the request that this one repeats."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run."""

    number: int
    kind: Kind
    orders: Sequence[Order]
    later: Sequence[Order]
    """One after the other when the fault is over, until the system serves again."""
    repeats: Sequence[Order]
    """Then: what was sent with an Idempotency-Key, once more."""
    credits: int
    fault_ms: int
    fault_for_ms: int
    point: Point | None = None
    nth: int = 1
    line: Line | None = None
    line_bytes: int = 0

    @property
    def crash_at(self) -> str:
        return "" if self.point is None else f"{self.point.name}:{self.nth}"

    @property
    def crash_at_first(self) -> str:
        """For the run's first worker; who finds what it left may be the one that dies."""
        if self.kind is not Kind.WORKER_POINT or self.dies_second:
            return ""
        return self.crash_at

    @property
    def stands_still(self) -> bool:
        """Whether a worker is stopped until it is taken for dead, and goes on."""
        company = "" if self.point is None else self.point.company
        return self.kind is Kind.WORKER_FROZEN or company == "stands-still"

    @property
    def has_second(self) -> bool:
        """Whether another worker serves beside; where one is to die it gets all the work."""
        return self.kind not in {Kind.WORKER_POINT, Kind.WORK_POINT, Kind.WORKER_FROZEN}

    @property
    def dies_second(self) -> bool:
        """Whether the second worker of the run is the one that dies at its crash point."""
        return self.point is not None and self.point.company == "spooled"

    @property
    def needs_patience(self) -> bool:
        """Whether a worker may find no book when it starts, and has to be started again."""
        company = "" if self.point is None else self.point.company
        return self.kind is Kind.BOTH_AWAY or company in {"both-away", "spooled"}

    @property
    def fault(self) -> str:
        """The kind as the table names it."""
        if self.point is not None:
            return f"{self.kind}: {self.point.name}"
        return f"{self.kind}: {self.line}" if self.line is not None else str(self.kind)


def draw(seed: int, number: int) -> Plan:
    """The run of that number."""
    kind, point = _turn(seed, number)
    rng = random.Random(f"{seed}/{number}")
    orders = _orders(rng, number)
    credits = CREDITS_POOR if rng.random() < 0.25 else CREDITS_RICH
    if point is not None and point.company == "poor":
        credits = CREDITS_LEAST
    later = [
        _order(rng, number, FIRST_LATER + i, ("quick", i % 2 == 0, Behaviour.STAY))
        for i in range(LATER_MAX)
    ]
    line = rng.choice(list(Line)) if kind in LINES else None
    if point is not None and point.company == "slow-till":
        line = Line.LATENCY
    return Plan(
        number=number,
        kind=kind,
        orders=orders,
        later=later,
        repeats=[_repeat(order) for order in orders if order.idempotency_key],
        credits=credits,
        fault_ms=_fault_ms(rng, kind, point),
        fault_for_ms=rng.randint(50, 700),
        point=point,
        nth=1 if point is None else rng.randint(1, point.nth_max),
        line=line,
        line_bytes=rng.randint(1, 6000),
    )


def _fault_ms(rng: random.Random, kind: Kind, point: Point | None) -> int:
    """Most is open in the middle; a point that has company needs that."""
    if kind in {Kind.BOTH_AWAY, Kind.WORKER_FROZEN}:
        return rng.randint(*COMPANY_MS)
    is_early = point is not None and (point.company or point.role == "work")
    return rng.randint(*(COMPANY_MS if is_early else FAULT_MS))


def turns() -> list[tuple[Kind, Point | None]]:
    """One round."""
    at_points = {"worker": Kind.WORKER_POINT, "work": Kind.WORK_POINT}
    found: list[tuple[Kind, Point | None]] = [
        (at_points[point.role], point) for point in POINTS.values() for _ in range(point.turns)
    ]
    return found + [(kind, None) for kind, weight in WEIGHTS.items() for _ in range(weight)]


def _turn(seed: int, number: int) -> tuple[Kind, Point | None]:
    one_round = turns()
    at, place = divmod(number, len(one_round))
    random.Random(f"{seed}/round/{at}").shuffle(one_round)
    return one_round[place]


def _orders(rng: random.Random, number: int) -> list[Order]:
    more = rng.randint(2, 20)
    names = rng.choices(list(MODELS), [model.weight for model in MODELS.values()], k=more)
    chances = {Behaviour.STAY: 60, Behaviour.LEAVE: 25, Behaviour.SLOW: 10, Behaviour.VANISH: 5}
    wanted = [
        (name, rng.random() < 0.75, rng.choices(list(chances), list(chances.values()))[0])
        for name in names
    ]
    return [_order(rng, number, i, what) for i, what in enumerate([*ALWAYS, *wanted])]


def _order(rng: random.Random, number: int, index: int, what: tuple[str, bool, Behaviour]) -> Order:
    name, stream, behaviour = what
    model = MODELS[name]
    is_once = index in ONCE or (len(ALWAYS) <= index < FIRST_LATER and rng.random() < 0.15)
    vanishes = behaviour is Behaviour.VANISH
    return Order(
        name=f"run-{number}-{index}",
        prompt=_prompt(number, index),
        model=name,
        stream=stream if model.stream is None else model.stream,
        wants_usage=rng.random() < 0.5,
        behaviour=behaviour,
        start_ms=rng.randint(0, STARTS_MS) if index < FIRST_LATER else 0,
        leave_after=-rng.randint(1, 150) if vanishes else rng.choice((0, rng.randint(1, 4000))),
        max_tokens=rng.choice((None, 16, 60)) if name == "beyond" else None,
        idempotency_key=f"key-{number}-{index}" if is_once else "",
    )


def _repeat(order: Order) -> Order:
    name = f"{order.name}-again"
    return replace(order, name=name, repeats=order.name, behaviour=Behaviour.STAY, start_ms=0)


def _prompt(number: int, index: int) -> str:
    """Twelve words of one token each, in an order that belongs to this request alone."""
    value, words = number * 1000 + index, []
    for _ in range(PROMPT_WORDS):
        value, digit = divmod(value, len(WORDS))
        words.append(WORDS[digit])
    return " ".join(words)
