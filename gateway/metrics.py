"""Prometheus metrics. Labels come from bounded sets only: never an account, never a key.

What each request counts is kept in plain numbers and folded into prometheus_client's, which lock,
when it is read. With several workers each writes its own files (PROMETHEUS_MULTIPROC_DIR), and any
of them answers for all: what the others counted is up to `LAG_EVERY_S` old.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from billing.figures import Figures
from billing.receipts import ChargeReceipt

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OVERHEAD_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
TTFT_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
NANOS_PER_USD = 1_000_000_000
LAG_EVERY_S = 0.25


class Observed:
    """Observations of one histogram that it does not have yet."""

    __slots__ = ("_bounds", "_counts", "_histogram", "_sum")

    def __init__(self, histogram: Histogram, bounds: Sequence[float]) -> None:
        """bounds: the histogram's own, without the last one, which is infinite."""
        self._histogram = histogram
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def fold(self) -> None:
        # The library has no other way to take several observations at once.
        for at, count in enumerate(self._counts):
            if count:
                self._histogram._buckets[at].inc(count)
                self._counts[at] = 0
        self._histogram._sum.inc(self._sum)
        self._sum = 0.0


class _Tokens:
    """Tokens of one model since the last fold."""

    __slots__ = ("cached", "input", "output", "reasoning")

    def __init__(self) -> None:
        self.input = self.output = self.cached = self.reasoning = 0


class Metrics:
    """All metrics of a worker. Labelled children are looked up once and kept."""

    def __init__(self, multiprocess_dir: str = "") -> None:
        self._multiprocess_dir = multiprocess_dir
        disable_created_metrics()  # type: ignore[no-untyped-call]
        # In multiprocess mode the values live in files and a fresh registry collects them.
        self.registry = CollectorRegistry()
        reg = None if multiprocess_dir else self.registry
        self._requests = Counter(
            "farebox_http_requests", "Answers by route.", ["route", "status", "code"], registry=reg
        )
        overhead = Histogram(
            "farebox_overhead_seconds",
            "Time that Farebox itself took.",
            buckets=OVERHEAD_S,
            registry=reg,
        )
        self.overhead = Observed(overhead, OVERHEAD_S)
        self._ttft = Histogram(
            "farebox_upstream_ttft_seconds",
            "Time to the provider's first byte.",
            ["provider", "model"],
            buckets=TTFT_S,
            registry=reg,
        )
        self.inflight = _gauge(reg, "livesum", "inflight_requests", "Open requests.")
        self._tokens = Counter("farebox_tokens", "Tokens billed.", ["model", "type"], registry=reg)
        self._revenue = Counter("farebox_revenue_usd", "Prices charged.", registry=reg)
        self._cost = Counter("farebox_provider_cost_usd", "What providers bill.", registry=reg)
        self._overrun = Counter("farebox_overrun_usd", "Provider excess above holds.", registry=reg)
        self._receipts = Counter(
            "farebox_receipts",
            "Receipts by how the request ended.",
            ["outcome", "usage_source", "cost_source"],
            registry=reg,
        )
        self._upstream_failures = Counter(
            "farebox_upstream_failures",
            "Attempts at providers that failed before anything of an answer was sent.",
            ["provider", "reason"],
            registry=reg,
        )
        self._settlements = Counter(
            "farebox_settlements", "Receipts on their way into the book.", ["result"], registry=reg
        )
        self.settlements_pending = _gauge(
            reg, "livesum", "settlements_pending", "Receipts that the book does not have yet."
        )
        self.settlement_oldest = _gauge(
            reg, "livemax", "settlement_oldest_seconds", "Age of the oldest of them."
        )
        self._make_guards(reg)
        self.loop_lag = _gauge(reg, "livemax", "event_loop_lag_seconds", "Event loop lag.")
        build = _gauge(reg, "livemax", "build_info", "Version.", "version")
        build.labels(version("farebox")).set(1)
        self._children: dict[tuple[object, ...], Counter] = {}
        # Since the last fold. The keys of _ended are the labels, joined.
        self._answers: dict[tuple[str, int, str], int] = {}
        self._billed: dict[str, _Tokens] = {}
        self._ended: dict[str, int] = {}
        self._ttfts: dict[tuple[str, str], Observed] = {}
        self._price_nanos = self._cost_nanos = self._overrun_nanos = 0

    def _make_guards(self, reg: CollectorRegistry | None) -> None:
        """What tells of trouble: the spool and shedding."""
        self._spooled = Counter(
            "farebox_spool_receipts", "Receipts to and from the spool.", ["result"], registry=reg
        )
        self.spool_uncommitted = _gauge(
            reg, "livesum", "spool_uncommitted", "Receipts that only a spool has."
        )
        self._shed = Counter(
            "farebox_shed_requests", "Requests refused to protect others.", ["reason"], registry=reg
        )
        self.shedding = _gauge(
            reg, "livesum", "shedding_workers", "Workers that refuse new requests.", "reason"
        )
        self.memory_share = _gauge(
            reg, "livemax", "memory_share_ratio", "Memory over a worker's share of the limit."
        )

    def count_request(self, route: str, status: int, code: str) -> None:
        """route and code come from our own tables, so their number is bounded."""
        key = (route, status, code)
        self._answers[key] = self._answers.get(key, 0) + 1

    def count_receipt(self, receipt: ChargeReceipt) -> None:
        model = receipt.requested_model
        tokens = self._billed.get(model)
        if tokens is None:
            tokens = self._billed[model] = _Tokens()
        tokens.input += receipt.input_tokens
        tokens.output += receipt.output_tokens
        tokens.cached += receipt.cached_tokens
        tokens.reasoning += receipt.reasoning_tokens
        self._price_nanos += receipt.price_nanos
        self._cost_nanos += receipt.provider_cost_nanos
        self._overrun_nanos += receipt.overrun_nanos
        # Joined, because an enum's members are slow to hash.
        labels = "|".join((receipt.outcome, receipt.usage_source, receipt.cost_source))
        self._ended[labels] = self._ended.get(labels, 0) + 1

    def ttft(self, provider: str, model: str, seconds: float) -> None:
        observed = self._ttfts.get((provider, model))
        if observed is None:
            histogram = self._ttft.labels(provider, model)
            observed = self._ttfts[(provider, model)] = Observed(histogram, TTFT_S)
        observed.observe(seconds)

    def fold(self) -> None:
        """Hand what was counted since the last time to the metrics that are shown."""
        for (route, status, code), count in self._answers.items():
            self._child(self._requests, route, str(status), code).inc(count)
        for model, tokens in self._billed.items():
            self._fold_tokens(model, tokens)
        for labels, count in self._ended.items():
            self._child(self._receipts, *labels.split("|")).inc(count)
        for observed in (self.overhead, *self._ttfts.values()):
            observed.fold()
        self._revenue.inc(self._price_nanos / NANOS_PER_USD)
        self._cost.inc(self._cost_nanos / NANOS_PER_USD)
        self._overrun.inc(self._overrun_nanos / NANOS_PER_USD)
        self._answers.clear()
        self._billed.clear()
        self._ended.clear()
        self._price_nanos = self._cost_nanos = self._overrun_nanos = 0

    def _fold_tokens(self, model: str, tokens: _Tokens) -> None:
        self._child(self._tokens, model, "input").inc(tokens.input)
        self._child(self._tokens, model, "output").inc(tokens.output)
        if tokens.cached:
            self._child(self._tokens, model, "cached").inc(tokens.cached)
        if tokens.reasoning:
            self._child(self._tokens, model, "reasoning").inc(tokens.reasoning)

    def count_upstream_failure(self, provider: str, reason: str) -> None:
        """provider comes from the config and reason from our own words: both are bounded."""
        self._child(self._upstream_failures, provider, reason).inc()

    def count_settlements(self, result: str, count: int) -> None:
        self._child(self._settlements, result).inc(count)

    def count_spool(self, result: str, count: int) -> None:
        self._child(self._spooled, result).inc(count)

    def count_shed(self, reason: str) -> None:
        self._child(self._shed, reason).inc()

    def render(self) -> bytes:
        """The text format, of all workers."""
        self.fold()
        return self.text()

    def text(self) -> bytes:
        """What was folded by now. It takes long when there are many models; any thread may ask."""
        registry = self.registry
        if self._multiprocess_dir:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, self._multiprocess_dir)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _child(self, metric: Counter, *labels: str) -> Counter:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class _Shown(NamedTuple):
    name: str
    documentation: str
    field: str
    per_unit: int = 1


# What one process finds out for all: whichever worker is asked says the same.
_SHOWN = (
    _Shown(
        "ledger_drift_nanos", "Nanos that till, ledger and balances disagree by.", "drift_nanos"
    ),
    _Shown("holds_usd", "Held for open requests.", "held_nanos", NANOS_PER_USD),
    _Shown("liabilities_usd", "What accounts have left.", "liabilities_nanos", NANOS_PER_USD),
    _Shown("open_holds", "Holds in the till.", "holds"),
    _Shown("oldest_hold_seconds", "Age of the oldest of them.", "oldest_hold_s"),
    _Shown("outbox_entries", "Receipts in the till that wait for the book.", "outbox"),
    _Shown("oldest_outbox_seconds", "Age of the oldest of them.", "oldest_outbox_s"),
)


class _Published(Collector):
    def __init__(self, figures: Figures, age_ms: int) -> None:
        self._figures = figures
        self._age_ms = age_ms

    def collect(self) -> Iterator[Metric]:
        for name, documentation, field, per_unit in _SHOWN:
            value = getattr(self._figures, field) / per_unit
            yield GaugeMetricFamily(f"farebox_{name}", documentation, value)
        age = GaugeMetricFamily("farebox_figures_age_seconds", "Age of these figures.")
        age.add_metric([], self._age_ms / 1000)
        yield age
        swept = CounterMetricFamily(
            "farebox_swept_holds", "Holds of dead workers that were ended.", labels=["outcome"]
        )
        for outcome in ("recovered", "voided"):
            swept.add_metric([outcome], getattr(self._figures, outcome))
        yield swept


def figures_text(published: tuple[Figures, int] | None) -> bytes:
    """What the work process published and how old it is (ms), in the text format."""
    if published is None:
        return b""
    registry = CollectorRegistry()
    registry.register(_Published(*published))
    return generate_latest(registry)


def _gauge(
    registry: CollectorRegistry | None,
    several_workers: Literal["livesum", "livemax"],
    name: str,
    documentation: str,
    *labels: str,
) -> Gauge:
    """A gauge; several_workers says what the value of all of them is."""
    return Gauge(
        f"farebox_{name}",
        documentation,
        labels,
        registry=registry,
        multiprocess_mode=several_workers,
    )


async def watch_loop(metrics: Metrics, sample: Callable[[float], None]) -> None:
    """For ever: measure the event loop's lag, call sample with it, fold what was counted."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            due = loop.time() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            lag_s = max(loop.time() - due, 0)
            metrics.loop_lag.set(lag_s)
            sample(lag_s)
            metrics.fold()
    finally:
        metrics.fold()
