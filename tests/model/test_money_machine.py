"""Random machines over real scripts, a real till and a real book; see machine.py and laws.py."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from billing.till import Scripts
from tests.model.machine import MoneyMachine
from tests.model.world import Stage
from tests.support.books import open_pool

STEPS = 50
MACHINES = 40
SEED = 4
# What a run of this size must have met, or it says little.
MET = ("admit admitted", "adjusted", "delivered late", "epoch new", "flush", "guessed", "kill")
MET_TOO = ("pause", "restart", "sweep recovered", "sweep voided", "sweeper met", "renew ok")


@contextmanager
def staged(
    book_url: str, till_url: str, scripts: Scripts | None = None
) -> Iterator[type[MoneyMachine]]:
    """A kind of machine that runs on these stores."""
    with asyncio.Runner() as runner:
        pools = open_pool(book_url)
        pool = runner.run(pools.__aenter__())
        stage = Stage(pool, till_url, scripts or Scripts())

        class Staged(MoneyMachine):
            pass

        Staged.stage, Staged.loop, Staged.counts = stage, runner.get_loop(), Counter()
        try:
            runner.run(stage.open())
            yield Staged
        finally:
            runner.run(stage.close())
            runner.run(pools.__aexit__(None, None, None))


def bounds(machines: int, **values: Any) -> settings:
    return settings(
        max_examples=machines,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **values,
    )


@pytest.mark.timeout(7200)
def test_money_survives_random_machines(
    fresh_book: str,
    fresh_till: str,
    machines: tuple[int, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    number, first = machines
    with staged(fresh_book, fresh_till) as kind:
        run_state_machine_as_test(seed(first or SEED)(kind), settings=bounds(number or MACHINES))

    with capsys.disabled():
        if number:
            print(json.dumps(kind.counts, indent=1, sort_keys=True))  # noqa: T201
    assert [what for what in (*MET, *MET_TOO) if not kind.counts[what]] == []
