"""From segments to the figures of a run: medians over rounds, differences to `direct`. Pure."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from bench.histogram import Histogram, merged
from bench.loads import LOADS
from bench.segment import HISTOGRAMS, LATE_P99_MAX_US, Segment

if TYPE_CHECKING:
    from bench.runner import Options

VERSION = 1
PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
ERRORS_SHOWN = 10
STREAMED = frozenset(name for name, load in LOADS.items() if load.is_stream)


class Account(msgspec.Struct, kw_only=True):
    """What the mock served through one arm under one load, and what was billed for it."""

    served: int = 0
    receipts: int | None = None
    voided: int = 0
    served_tokens: int = 0
    billed_tokens: int = 0


class Figures(msgspec.Struct, kw_only=True):
    """One arm under one load. None: not measured, or no sense. `added_` is above `direct`."""

    load: str
    arm: str
    cpu_us_per_request: float | None = None
    cpu_us_per_chunk: float | None = None
    requests_per_s: float | None = None
    added_p50_ms: float | None = None
    added_p99_ms: float | None = None
    rss_mib: float | None = None
    receipts: int | None = None
    served: int = 0
    cpu_ratio_per_request: float | None = None
    """CPU by the fixed loop of reference.py: what to compare when the machine was noisy."""
    cpu_ratio_per_chunk: float | None = None
    chunks_per_s: float | None = None
    cpu_us_per_request_open: float | None = None
    user_share: float | None = None
    till_us_per_request: float | None = None
    book_us_per_request: float | None = None
    mock_us_per_request: float | None = None
    rss_worker_mib: float | None = None
    rate: float | None = None
    latency_ms: dict[str, float | None] = {}
    added_ms: dict[str, float | None] = {}
    gap_ms: dict[str, float | None] = {}
    transit_ms: dict[str, float | None] = {}
    added_transit_ms: dict[str, float | None] = {}
    late_p99_ms: float | None = None
    void_rounds: int = 0
    is_void: bool = False
    voided: int = 0
    errors: dict[str, int] = {}
    curve: list[dict[str, float | None]] = []
    rounds: list[dict[str, Any]] = []
    histograms: dict[str, dict[str, Any]] = {}


class Report(msgspec.Struct, kw_only=True):
    """A run. `failures` empty and `void` empty: it counts."""

    version: int = VERSION
    made_at: str
    environment: dict[str, Any]
    options: dict[str, Any]
    figures: list[Figures]
    audit_violations: int | None
    drift_nanos: int | None
    failures: list[str]
    void: list[str]

    def find(self, load: str, arm: str) -> Figures | None:
        return next((f for f in self.figures if (f.load, f.arm) == (load, arm)), None)


def make_report(
    options: "Options",
    segments: Sequence[Segment],
    accounts: Mapping[tuple[str, str], Account],
    audit: Any,
    drift_nanos: int | None,
) -> Report:
    """Figures of every load and arm, and what went wrong."""
    figures = [
        _figures([s for s in segments if (s.load, s.arm) == key], segments, account)
        for key, account in accounts.items()
    ]
    violations = None if audit is None else audit.violations
    return Report(
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment() | _disturbances(segments),
        options=msgspec.to_builtins(options),
        figures=figures,
        audit_violations=violations,
        drift_nanos=drift_nanos,
        failures=_failures(figures, accounts, violations, drift_nanos),
        void=[
            f"{f.load} {f.arm}: the generator was late itself (p99 {f.late_p99_ms} ms)"
            for f in figures
            if f.is_void
        ],
    )


def _failures(
    figures: Sequence[Figures],
    accounts: Mapping[tuple[str, str], Account],
    violations: int | None,
    drift_nanos: int | None,
) -> list[str]:
    found = []
    for one in figures:
        account = accounts[one.load, one.arm]
        where = f"{one.load} {one.arm}"
        if one.arm in {"direct", "gateway"} and one.errors:
            found.append(f"{where}: errors {one.errors}")
        if one.receipts is not None and one.receipts != one.served:
            found.append(f"{where}: {one.receipts} receipts for {one.served} served")
        if one.receipts is not None and account.billed_tokens != account.served_tokens:
            billed, served = account.billed_tokens, account.served_tokens
            found.append(f"{where}: {billed} tokens billed for {served} served")
    if violations:
        found.append(f"the audit found {violations} violations")
    if drift_nanos:
        found.append(f"the ledger drifted by {drift_nanos} nanos")
    return found


def _figures(mine: Sequence[Segment], everyone: Sequence[Segment], account: Account) -> Figures:
    first = mine[0]
    peaks = [s for s in mine if s.phase == "peak"]
    opens = [s for s in mine if s.phase == "open"]
    basis = peaks or opens
    sound = [s for s in opens if not s.is_void]
    timed = sound if opens else peaks
    # A chunk of a load that is not all streams would carry the cost of the other requests.
    in_chunks = basis if first.load in STREAMED else []
    errors: dict[str, int] = {}
    for segment in mine:
        for name, count in segment.errors.items():
            errors[name] = errors.get(name, 0) + count
    made = Figures(
        load=first.load,
        arm=first.arm,
        cpu_us_per_request=_us_each(basis, "gateway", lambda s: s.requests),
        cpu_us_per_chunk=_us_each(in_chunks, "gateway", lambda s: s.frames),
        cpu_ratio_per_request=_ratio_each(basis, lambda s: s.requests),
        cpu_ratio_per_chunk=_ratio_each(in_chunks, lambda s: s.frames),
        requests_per_s=_median([s.requests / s.seconds for s in basis]),
        chunks_per_s=_median([s.frames / s.seconds for s in basis if s.frames]),
        cpu_us_per_request_open=_us_each(opens, "gateway", lambda s: s.requests),
        user_share=_median([s.cpu["gateway"].user_s / t for s in basis if (t := _both(s))]),
        till_us_per_request=_us_each(basis, "till", lambda s: s.requests),
        book_us_per_request=_us_each(basis, "book", lambda s: s.requests),
        mock_us_per_request=_us_each(basis, "mock", lambda s: s.requests),
        rss_mib=max((s.rss_mib for s in mine), default=0.0) or None,
        rss_worker_mib=max((s.rss_worker_mib for s in mine), default=0.0) or None,
        rate=opens[0].rate if opens else None,
        served=account.served,
        receipts=account.receipts,
        voided=account.voided,
        errors=dict(sorted(errors.items(), key=lambda item: -item[1])[:ERRORS_SHOWN]),
        late_p99_ms=_ms(_median([s.late_p99_us for s in opens])),
        void_rounds=len(opens) - len(sound),
        is_void=bool(opens) and len(sound) * 2 < len(opens),
        rounds=[_round(segment) for segment in mine],
    )
    _add_latencies(made, timed, [s for s in everyone if s.arm == "direct"])
    made.curve = _curve([s for s in mine if s.phase in {"open", "curve"}])
    return made


def _add_latencies(made: Figures, timed: Sequence[Segment], direct: Sequence[Segment]) -> None:
    whole = {name: merged(s.histograms[name] for s in timed) for name in HISTOGRAMS}
    made.histograms = {name: h.to_plain() for name, h in whole.items() if h.count}
    made.latency_ms = _percentiles(whole["latency"])
    made.gap_ms = _percentiles(whole["gap"])
    made.transit_ms = _percentiles(whole["transit"])
    if made.arm == "direct":
        return
    made.added_ms = _added(timed, direct, "latency")
    made.added_transit_ms = _added(timed, direct, "transit")
    made.added_p50_ms, made.added_p99_ms = made.added_ms["p50"], made.added_ms["p99"]


def _added(
    timed: Sequence[Segment], direct: Sequence[Segment], name: str
) -> dict[str, float | None]:
    """Median over rounds of the difference to `direct` in the same round and phase."""
    by_place = {(s.load, s.phase, s.round): s for s in direct if not s.is_void}
    made: dict[str, float | None] = {}
    for label, percent in PERCENTILES.items():
        differences = []
        for segment in timed:
            other = by_place.get((segment.load, segment.phase, segment.round))
            mine = segment.histograms[name].percentile(percent)
            theirs = other.histograms[name].percentile(percent) if other is not None else None
            if mine is not None and theirs is not None:
                differences.append(mine - theirs)
        made[label] = _ms(_median(differences))
    return made


def _curve(opens: Sequence[Segment]) -> list[dict[str, float | None]]:
    """Latency against rate, over all rounds."""
    points = []
    for rate in sorted({s.rate for s in opens}):
        sound = [s for s in opens if s.rate == rate and not s.is_void]
        found = _percentiles(merged(s.histograms["latency"] for s in sound))
        points.append({"rate": round(rate, 1), **found})
    return points


def _round(segment: Segment) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(
        {
            name: getattr(segment, name)
            for name in Segment.__struct_fields__
            if name not in {"histograms", "cpu", "load", "arm"}
        }
    )
    plain["cpu_s"] = {name: round(cpu.total_s, 4) for name, cpu in segment.cpu.items()}
    plain["latency_p50_us"] = segment.histograms["latency"].percentile(50)
    return plain


def _us_each(
    segments: Sequence[Segment], group: str, count: Callable[[Segment], int]
) -> float | None:
    return _rounded(
        _median(
            [
                s.cpu[group].total_s * 1e6 / number
                for s in segments
                if group in s.cpu and (number := count(s))
            ]
        ),
        2,
    )


def _ratio_each(segments: Sequence[Segment], count: Callable[[Segment], int]) -> float | None:
    found = [
        s.cpu["gateway"].total_s * 1e6 / number / s.reference_us
        for s in segments
        if "gateway" in s.cpu and s.reference_us and (number := count(s))
    ]
    return _rounded(_median(found), 4)


def _both(segment: Segment) -> float:
    cpu = segment.cpu.get("gateway")
    return 0.0 if cpu is None else cpu.user_s + cpu.system_s


def _percentiles(histogram: Histogram) -> dict[str, float | None]:
    return {name: _ms(histogram.percentile(value)) for name, value in PERCENTILES.items()}


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _ms(microseconds: float | None) -> float | None:
    return None if microseconds is None else round(microseconds / 1000, 3)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _disturbances(segments: Sequence[Segment]) -> dict[str, Any]:
    """How much of the machine was not ours while we measured: the reason for most noise."""
    return {
        "others_share": _rounded(_median([s.others_share for s in segments]), 3),
        "reference_us": _rounded(_median([s.reference_us for s in segments]), 2),
        "stolen_share": _rounded(_median([s.stolen_share for s in segments]), 3),
    }


def environment() -> dict[str, Any]:
    """What a reader must know of the machine; nothing that names it or its owner."""
    model = ""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "late_p99_max_us": LATE_P99_MAX_US,
    }
