"""Machines of a fixed number of steps, drawn evenly: more happens in them than in those that
hypothesis makes, which tries to keep things small. What they find is not made smaller.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis.stateful import Rule

from tests.model.machine import MoneyMachine
from tests.model.wire import Fate

ENDS = [Fate.OK, Fate.OK, Fate.LOST, Fate.MUTE, Fate.LATE, Fate.TWICE]
OFTEN = {"admit_and_forward": 5, "admit": 3, "finish": 3, "settle": 2, "deliver": 4, "renew": 2}
DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "slot": lambda r: r.randrange(2),
    "purse": lambda r: r.randrange(3),
    "hold": lambda r: r.choice([0, r.randrange(61), r.randrange(61)]),
    "pick": lambda r: r.randrange(12),
    "fates": lambda r: r.choices(ENDS, k=r.randrange(3)),
    "fate": lambda r: r.choice(ENDS),
    "later": lambda r: r.choice(ENDS),
    "shard_fate": lambda r: r.choice([Fate.OK, Fate.OK, Fate.LATE, Fate.MUTE]),
    "more": lambda r: r.choice([0, r.randrange(21), 60]),
    "tokens": lambda r: r.randrange(13),
    "share": lambda r: r.randrange(5),
    "size": lambda r: r.randint(1, 6),
    "credit": lambda r: r.randint(1, 30),
    "before": lambda r: r.randrange(4),
    "steps": lambda r: r.randrange(9),
    "does": lambda r: r.choice(["renew", "forward", "forward", "settle", "nothing"]),
}


def _flip(r: random.Random) -> bool:
    return r.random() < 0.5


def roam(kind: type[MoneyMachine], seeds: Iterable[int], steps: int) -> int:
    """Run a machine for each seed; returns how many steps they made. Raises AssertionError."""
    made = 0
    for each in seeds:
        try:
            made += _run(kind(), random.Random(each), steps)
        except AssertionError as exc:
            exc.add_note(f"the machine of seed {each}")
            raise
    return made


def _run(machine: MoneyMachine, drawn: random.Random, steps: int) -> int:
    machine.begin()
    try:
        machine.laws_hold()
        for _ in range(steps):
            _step(machine, drawn)
            machine.laws_hold()
    finally:
        machine.teardown()
    return steps


def _step(machine: MoneyMachine, drawn: random.Random) -> None:
    rules = [rule for rule in machine.rules if _is_enabled(machine, rule)]
    weights = [OFTEN.get(rule.function.__name__, 1) for rule in rules]
    (rule,) = drawn.choices(rules, weights)
    rule.function(machine, **{name: DRAWS.get(name, _flip)(drawn) for name in rule.arguments})


def _is_enabled(machine: MoneyMachine, rule: Rule) -> bool:
    return all(is_met(machine) for is_met in rule.preconditions)
