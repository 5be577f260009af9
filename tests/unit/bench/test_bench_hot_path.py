"""The micro-bench runs on today's relay, and tells a regression from noise."""

import sys

import pytest

from bench.hot_path import Measured, measure, read_recorded, regressed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CPU clocks differ elsewhere")


def test_twice_the_recorded_ratio_is_a_regression() -> None:
    now = [Measured("a", "request", 10, 0.9), Measured("b", "request", 10, 2.1)]

    assert regressed(now, {"a": 0.5, "b": 1.0}) == ["b: ratio 2.100, recorded 1.000"]


def test_a_stage_without_a_record_is_told() -> None:
    assert "run with --record" in regressed([Measured("new", "request", 1, 1)], {})[0]


async def test_every_stage_runs_and_is_recorded() -> None:
    now = await measure()

    assert {one.name for one in now} == set(read_recorded())
    assert all(one.ns > 0 and one.ratio > 0 for one in now)
