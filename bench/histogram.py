"""A log-linear histogram: every value is kept to better than 1 %, whatever its size. Pure.

The idea is HdrHistogram's: 128 equal steps in each power of two. Values are whole numbers of one
unit (here microseconds), so two histograms merge exactly and travel as JSON.
"""

from collections.abc import Iterable, Mapping
from typing import Any

STEPS_BITS = 7
STEPS = 1 << STEPS_BITS
EXACT_BELOW = STEPS * 2
VALUE_MAX = (1 << 40) - 1


def bucket_of(value: int) -> int:
    if value < EXACT_BELOW:
        return value
    shift = value.bit_length() - STEPS_BITS - 1
    return shift * STEPS + (value >> shift)


def middle_of(bucket: int) -> float:
    """The value in the middle of a bucket."""
    if bucket < EXACT_BELOW:
        return float(bucket)
    shift = bucket // STEPS - 1
    low = (bucket - shift * STEPS) << shift
    return low + ((1 << shift) - 1) / 2


class Histogram:
    """Counts of values; negative values count as 0."""

    __slots__ = ("count", "counts", "largest", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0
        self.total = 0
        self.largest = 0

    def record(self, value: int) -> None:
        value = min(max(value, 0), VALUE_MAX)
        bucket = bucket_of(value)
        counts = self.counts
        counts[bucket] = counts.get(bucket, 0) + 1
        self.count += 1
        self.total += value
        self.largest = max(self.largest, value)

    def merge(self, other: "Histogram") -> None:
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    def percentile(self, percent: float) -> float | None:
        """The smallest value that at least percent % of all are not above; None when empty."""
        if not self.count:
            return None
        wanted = max(percent / 100 * self.count, 1)
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            # A quotient like 99.9 / 100 * 1000 may lie a hair above its whole number.
            if seen >= wanted - 1e-9:
                return min(middle_of(bucket), float(self.largest))
        return float(self.largest)

    def curve(self) -> list[tuple[float, int]]:
        """(value, how many are not above it), in order."""
        points, seen = [], 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            points.append((middle_of(bucket), seen))
        return points

    def to_plain(self) -> dict[str, Any]:
        buckets = sorted(self.counts)
        return {
            "count": self.count,
            "total": self.total,
            "largest": self.largest,
            "buckets": buckets,
            "counts": [self.counts[bucket] for bucket in buckets],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Histogram":
        made = cls()
        made.counts = dict(zip(plain["buckets"], plain["counts"], strict=True))
        made.count, made.total = plain["count"], plain["total"]
        made.largest = plain["largest"]
        return made


def merged(histograms: Iterable[Histogram]) -> Histogram:
    made = Histogram()
    for histogram in histograms:
        made.merge(histogram)
    return made
