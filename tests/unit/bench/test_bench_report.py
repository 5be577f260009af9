"""From segments to figures, failures, tables, pages and gates."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.cpu import Cpu
from bench.files import NoReport, read_report, to_json
from bench.gates import GateError, judge, read_gate
from bench.histogram import Histogram
from bench.page import page_of
from bench.report import Account, Report, make_report
from bench.runner import Options, planned_s
from bench.segment import HISTOGRAMS, Segment
from bench.table import comparison_of, table_of


class Audit:
    violations = 0


def histogram(*values: int) -> Histogram:
    made = Histogram()
    for value in values:
        made.record(value)
    return made


def segment(arm: str, phase: str, number: int, latency_us: int, **more: Any) -> Segment:
    cpu = {"mock": Cpu(0.1, 0.1, 0.0, 0, 0)}
    if arm != "direct":
        cpu["gateway"] = Cpu(0.5 + number / 10, 0.4, 0.1, 100 << 20, 60 << 20)
    values: dict[str, Any] = {
        "load": "chat-1k",
        "arm": arm,
        "phase": phase,
        "round": number,
        "seconds": 2.0,
        "rate": 100.0 if phase == "open" else 0.0,
        "requests": 1000,
        "frames": 0,
        "all_requests": 1100,
        "errors": {},
        "cpu": cpu,
        "rss_mib": 100.0,
        "rss_worker_mib": 60.0,
        "late_p99_us": 200.0,
        "backlog_max": 0,
        "reference_us": 50.0,
        "histograms": {name: Histogram() for name in HISTOGRAMS}
        | {"latency": histogram(*[latency_us] * 100)},
    }
    return Segment(**values | more)


def report(**more: Any) -> Report:
    segments = more.pop("segments", None) or [
        segment(arm, phase, number, 200 if arm == "direct" else 700 + number)
        for number in range(3)
        for phase in ("peak", "open")
        for arm in ("direct", "gateway")
    ]
    account = Account(
        **{"served": 10, "receipts": 10, "served_tokens": 5, "billed_tokens": 5, **more}
    )
    accounts = {("chat-1k", "direct"): Account(served=9), ("chat-1k", "gateway"): account}
    return make_report(Options(loads=["chat-1k"]), segments, accounts, Audit(), 0)


def test_figures_are_medians_and_differences() -> None:
    made = report()
    one = made.find("chat-1k", "gateway")
    direct = made.find("chat-1k", "direct")

    assert one is not None
    assert direct is not None
    assert one.cpu_us_per_request == 600.0
    assert one.cpu_ratio_per_request == 12.0
    assert one.requests_per_s == 500.0
    assert one.added_p50_ms == pytest.approx(0.5, abs=0.01)
    assert (one.rss_mib, one.receipts, one.served) == (100.0, 10, 10)
    assert (direct.cpu_us_per_request, direct.added_p50_ms, direct.receipts) == (None, None, None)
    assert (made.failures, made.void) == ([], [])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"receipts": 9}, "9 receipts for 10 served"),
        ({"receipts": 11}, "11 receipts for 10 served"),
        ({"billed_tokens": 4}, "4 tokens billed for 5 served"),
        ({"segments": [segment("gateway", "peak", 0, 1, errors={"status 500": 1})]}, "status 500"),
    ],
)
def test_a_run_that_is_wrong_has_failed(more: dict[str, Any], said: str) -> None:
    segments = more.pop("segments", [])
    if segments:
        segments = [segment("direct", "peak", 0, 1), *segments]
    made = report(segments=segments, **more)

    assert len(made.failures) == 1
    assert said in made.failures[0]


def test_a_late_generator_voids_latencies_and_keeps_cpu() -> None:
    segments = [
        segment(arm, phase, number, 500, late_p99_us=5000.0)
        for number in range(2)
        for phase in ("peak", "open")
        for arm in ("direct", "gateway")
    ]
    made = report(segments=segments)
    one = made.find("chat-1k", "gateway")

    assert one is not None
    assert one.is_void
    assert one.added_p50_ms is None
    assert one.cpu_us_per_request is not None
    assert len(made.void) == 2
    assert "VOID" in table_of(made)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(to_json(report()))

    assert to_json(read_report(path)) == path.read_bytes()
    path.write_bytes(b'{"version": 1}')
    with pytest.raises(NoReport):
        read_report(path)


def test_the_page_needs_nothing_else() -> None:
    made = report()
    for one in made.figures:
        one.gap_ms = {"p50": 20.0}
        one.histograms["gap"] = histogram(20_000, 21_000, 40_000).to_plain()
        one.curve = [{"rate": 50.0, "p50": 1.0, "p99": 2.0}, {"rate": 100.0, "p50": 2.0, "p99": 9}]
    page = page_of(made)

    for title in ("latency by percentile", "latency against rate", "gaps between chunks"):
        assert f"chat-1k: {title}" in page
    assert page.count("<svg") == 3
    assert not any(word in page for word in ("http://", "https://", "<script", "src=", "nan,"))


def gated(gate: str, before: Report | None = None, now: Report | None = None) -> list[bool]:
    outcomes = judge([read_gate(gate)], now or report(), before)
    return [outcome.is_missed for outcome in outcomes]


def slower(factor: float) -> Report:
    made = report()
    one = made.find("chat-1k", "gateway")
    assert one is not None
    assert one.cpu_us_per_request is not None
    one.cpu_us_per_request *= factor
    return made


@pytest.mark.parametrize(
    ("gate", "factor", "missed"),
    [
        ("cpu_us_per_request>+10%", 1.2, True),
        ("cpu_us_per_request>+10%", 1.05, False),
        ("cpu_us_per_request>+10%", 0.5, False),
        ("cpu_us_per_request < -10%", 0.5, True),
        ("chat-1k:cpu_us_per_request>+50", 1.2, True),
        ("cpu_us_per_request>800", 1.2, False),
        ("latency_ms.p50>0.5", 1.0, True),
        ("requests_per_s<400", 1.0, False),
    ],
)
def test_gates_compare_with_a_run_or_a_number(gate: str, factor: float, missed: bool) -> None:
    assert gated(gate, before=report(), now=slower(factor)) == [missed]


@pytest.mark.parametrize("gate", ["x", "cpu>1", "cpu_us_per_request>10%", "cpu_us_per_request=1"])
def test_a_gate_that_makes_no_sense_is_refused(gate: str) -> None:
    with pytest.raises(GateError):
        read_gate(gate)


@pytest.mark.parametrize("gate", ["cpu_us_per_chunk>1", "mixed:rss_mib>1", "rss_mib>+1%"])
def test_a_gate_without_a_figure_is_no_success(gate: str) -> None:
    with pytest.raises(GateError):
        gated(gate)


def test_two_runs_stand_beside_each_other() -> None:
    said = comparison_of(report(), slower(1.5), "gateway")

    assert "+50.0%" in said
    assert "no load in common" in comparison_of(report(), report(), "nobody")


def test_the_progress_knows_its_end() -> None:
    options = Options(loads=["chat-1k", "paced-200"], rounds=2, seconds=3.0, rates=(0.5, 1.0))

    # Two arms; chat-1k has a peak and two rates, paced-200 only a peak.
    assert planned_s(options) == 2 * 2 * (3 + 1) * 3.0
    assert planned_s(msgspec.structs.replace(options, with_gateway=False)) == 24.0
