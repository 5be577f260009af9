"""Prometheus metrics. Labels come from bounded sets only: never an account, never a key.

With several workers each writes its own files (PROMETHEUS_MULTIPROC_DIR), and any of them answers
for all.
"""

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)

from billing.receipts import ChargeReceipt

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OVERHEAD_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
TTFT_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
NANOS_PER_USD = 1_000_000_000
LAG_EVERY_S = 0.25


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
        self.overhead = Histogram(
            "farebox_overhead_seconds",
            "Time that Farebox itself took.",
            buckets=OVERHEAD_S,
            registry=reg,
        )
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
        self._settlements = Counter(
            "farebox_settlements", "Receipts on their way into the book.", ["result"], registry=reg
        )
        self.settlements_pending = _gauge(
            reg, "livesum", "settlements_pending", "Receipts that the book does not have yet."
        )
        self.settlement_oldest = _gauge(
            reg, "livemax", "settlement_oldest_seconds", "Age of the oldest of them."
        )
        self.loop_lag = _gauge(reg, "livemax", "event_loop_lag_seconds", "Event loop lag.")
        build = _gauge(reg, "livemax", "build_info", "Version.", "version")
        build.labels(version("farebox")).set(1)
        self._children: dict[tuple[object, ...], Counter] = {}

    def count_request(self, route: str, status: int, code: str) -> None:
        """route and code come from our own tables, so their number is bounded."""
        self._child(self._requests, route, str(status), code).inc()

    def count_receipt(self, receipt: ChargeReceipt) -> None:
        model = receipt.requested_model
        self._child(self._tokens, model, "input").inc(receipt.input_tokens)
        self._child(self._tokens, model, "output").inc(receipt.output_tokens)
        if receipt.cached_tokens:
            self._child(self._tokens, model, "cached").inc(receipt.cached_tokens)
        if receipt.reasoning_tokens:
            self._child(self._tokens, model, "reasoning").inc(receipt.reasoning_tokens)
        self._revenue.inc(receipt.price_nanos / NANOS_PER_USD)
        self._cost.inc(receipt.provider_cost_nanos / NANOS_PER_USD)
        if receipt.overrun_nanos:
            self._overrun.inc(receipt.overrun_nanos / NANOS_PER_USD)
        self._child(
            self._receipts, receipt.outcome, receipt.usage_source, receipt.cost_source
        ).inc()

    def ttft(self, provider: str, model: str, seconds: float) -> None:
        self._ttft.labels(provider, model).observe(seconds)

    def count_settlements(self, result: str, count: int) -> None:
        self._child(self._settlements, result).inc(count)

    def render(self) -> bytes:
        """The text format, of all workers."""
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


async def watch_loop(metrics: Metrics, sample: Callable[[], None]) -> None:
    """Measure the event loop's lag for ever, and call sample each time."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        metrics.loop_lag.set(max(loop.time() - due, 0))
        sample()
