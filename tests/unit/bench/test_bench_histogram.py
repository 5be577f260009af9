"""The histogram against a sorted list."""

import math
import random

import pytest

from bench.histogram import VALUE_MAX, Histogram, bucket_of, merged, middle_of

PERCENTS = (0.0, 1.0, 50.0, 90.0, 95.0, 99.0, 99.9, 100.0)


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


def oracle(values: list[int], percent: float) -> int:
    rank = max(math.ceil(percent / 100 * len(values) - 1e-9), 1)
    return sorted(values)[rank - 1]


@pytest.mark.parametrize("seed", range(8))
def test_percentiles_are_within_one_percent_of_the_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    values = [int(rng.lognormvariate(6, 3)) for _ in range(rng.choice([1, 2, 10, 1000, 5000]))]
    histogram = filled(values)

    for percent in PERCENTS:
        exact = oracle(values, percent)
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.01, abs=0.5), percent
    assert (histogram.count, histogram.total) == (len(values), sum(values))
    assert histogram.largest == max(values)


def test_small_values_are_exact() -> None:
    histogram = filled(list(range(256)))

    assert histogram.percentile(50) == 127
    assert histogram.curve()[200] == (200.0, 201)


def test_buckets_are_in_order_and_hold_their_middle() -> None:
    values = sorted({value + d for power in range(40) for d in (-1, 0, 1) if (value := 1 << power)})
    buckets = [bucket_of(value) for value in values if 0 <= value <= VALUE_MAX]

    assert buckets == sorted(buckets)
    assert all(bucket_of(int(middle_of(bucket))) == bucket for bucket in buckets)


def test_merging_equals_recording_together() -> None:
    rng = random.Random(1)
    parts = [[rng.randrange(10**6) for _ in range(500)] for _ in range(3)]
    together = filled([value for part in parts for value in part])

    assert merged(filled(part) for part in parts).to_plain() == together.to_plain()


def test_it_travels_as_json() -> None:
    histogram = filled([3, 5, 80_000, 80_001, 123_456_789])

    assert Histogram.from_plain(histogram.to_plain()).to_plain() == histogram.to_plain()


def test_nothing_has_no_percentile_and_nonsense_is_bounded() -> None:
    assert Histogram().percentile(50) is None
    assert filled([-5]).percentile(50) == 0
    assert filled([1 << 60]).largest == VALUE_MAX
