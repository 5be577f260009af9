"""When new requests are refused: for being late for a while, never for one pause."""

import logging
from collections.abc import AsyncIterator

import pytest

from billing.errors import ReceiptsPending
from gateway.errors import ApiError
from gateway.memory import limit_bytes
from gateway.metrics import Metrics
from gateway.shedding import LagWatch, MemoryWatch, Shedding
from gateway.supervise import Tasks
from tests.support.gateway import eventually, make_settings


def late_after(lags: list[float], every_s: float = 0.25) -> list[bool]:
    """What a watch of 20 ms for 1 s says after each look; a look comes later by its lag."""
    watch, now, said = LagWatch(0.020, 1.0), 0.0, []
    for lag in lags:
        now += every_s + lag
        watch.look(now, lag)
        said.append(watch.is_late)
    return said


def test_one_pause_sheds_nothing_however_long_it_was() -> None:
    assert not any(late_after([0.0, 30.0, 0.0, 0.0, 5.0, 0.001, 0.0]))


def test_a_loop_that_is_late_for_a_second_sheds() -> None:
    assert late_after([0.021] * 5) == [False, False, False, False, True]
    assert late_after([0.020] * 50) == [False] * 50


def test_two_long_pauses_one_after_the_other_are_lateness() -> None:
    assert late_after([1.0, 1.0]) == [False, True]


def test_one_look_in_time_begins_anew() -> None:
    assert not any(late_after([0.03, 0.03, 0.03, 0.03, 0.0] * 10))


def test_it_ends_once_the_loop_was_in_time_for_as_long() -> None:
    said = late_after([0.03] * 5 + [0.0] * 3 + [0.03] + [0.0] * 5)

    assert said == [False] * 4 + [True] * 9 + [False]


def test_memory_is_shared_between_workers_and_ends_lower_than_it_began() -> None:
    share = limit_bytes() // 4
    watch = MemoryWatch(80, 4)

    said = []
    for percent in (79, 81, 79, 76, 74, 79):
        watch.judge(share * percent // 100)
        said.append(watch.is_over)

    assert said == [False, True, True, True, False, False]
    assert round(watch.ratio, 2) == 0.79


def test_memory_is_looked_at_once_a_second() -> None:
    watch = MemoryWatch(80, 1)

    assert [watch.look(now) for now in (10.0, 10.25, 10.9, 11.0, 11.9)] == [
        *(True, False, False, True, False)
    ]
    assert watch.ratio > 0
    assert not watch.is_over


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    tasks = Tasks()
    yield tasks
    await tasks.close()


async def test_a_reason_is_told_once_at_its_begin_and_once_at_its_end(
    tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    shedding = Shedding(make_settings("http://x.test", book__pending_age_max_s=5), metrics, tasks)
    caplog.set_level(logging.INFO, "gateway.shedding")

    for age_s in (0, 5.0, 5.1, 9.0):
        shedding.look(0, age_s)
    refusals = [shedding.refusal(), shedding.refusal()]
    during = metrics.render().decode()
    shedding.look(0, 0)

    assert all(isinstance(refusal, ReceiptsPending) for refusal in refusals)
    assert [(r.message, r.reason) for r in caplog.records] == [  # type: ignore[attr-defined]
        ("shedding.began", "pending_age"),
        ("shedding.ended", "pending_age"),
    ]
    assert shedding.reason == ""
    assert 'farebox_shed_requests_total{reason="pending_age"} 2.0' in during
    assert 'farebox_shedding_workers{reason="pending_age"} 1.0' in during
    assert 'farebox_shedding_workers{reason="pending_age"} 0.0' in metrics.render().decode()


async def test_a_worker_above_its_share_of_memory_refuses(tasks: Tasks) -> None:
    """So many workers that each has a share smaller than this process."""
    settings = make_settings("http://x.test", server__workers=1024, limits__memory_percent_max=1)
    metrics = Metrics()
    shedding = Shedding(settings, metrics, tasks)
    shedding.look(0, 0)
    refusal = shedding.refusal()

    assert shedding.reason == "memory"
    assert isinstance(refusal, ApiError)
    assert (refusal.status, refusal.code) == (503, "overloaded")
    assert dict(refusal.headers) == {b"retry-after": b"2"}
    assert 'farebox_shed_requests_total{reason="memory"} 1.0' in metrics.render().decode()

    async def given_back() -> bool | None:
        return not len(tasks) or None

    await eventually(given_back)
