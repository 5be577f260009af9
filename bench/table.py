"""A report as text: one line for each load and arm. Pure."""

from collections.abc import Sequence

from bench.report import Figures, Report

Column = tuple[str, str]

COLUMNS: tuple[Column, ...] = (
    ("cpu_us_per_request", "CPU us/request"),
    ("cpu_us_per_chunk", "CPU us/chunk"),
    ("cpu_ratio_per_request", "ratio/request"),
    ("cpu_ratio_per_chunk", "ratio/chunk"),
    ("requests_per_s", "requests/s"),
    ("chunks_per_s", "chunks/s"),
    ("rate", "at rate/s"),
    ("latency_ms.p50", "p50 ms"),
    ("latency_ms.p99", "p99 ms"),
    ("added_p50_ms", "added p50"),
    ("added_p99_ms", "added p99"),
    ("gap_ms.p99", "gap p99 ms"),
    ("rss_mib", "RSS MiB"),
    ("receipts", "receipts"),
    ("served", "served"),
)


def value_of(figures: Figures, name: str) -> float | None:
    """A figure by its name; `gap_ms.p99` reaches into a table. Raises AttributeError."""
    outer, _, inner = name.partition(".")
    value = getattr(figures, outer)
    if inner:
        value = value.get(inner)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def number_text(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def lines_of(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Rows with their columns aligned; the first `left` columns are text."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table_of(report: Report) -> str:
    """The figures, then everything that makes them worth less."""
    used = [c for c in COLUMNS if any(value_of(f, c[0]) is not None for f in report.figures)]
    rows = [["load", "arm", *(title for _, title in used)]]
    for one in report.figures:
        rows.append([one.load, one.arm, *(number_text(value_of(one, name)) for name, _ in used)])
    said = lines_of(rows) if report.figures else ["nothing was measured"]
    return "\n".join([*said, "", *notes_of(report)])


def notes_of(report: Report) -> list[str]:
    env = report.environment
    shares = ", ".join(
        f"{name} {env[key]:.0%}"
        for key, name in (("others_share", "used by others"), ("stolen_share", "stolen by host"))
        if env.get(key) is not None
    )
    notes = [
        f"{env['cpus']} CPUs ({shares}), Python {env['python']}, {report.made_at};"
        f" ratio: CPU by that of a fixed loop ({env.get('reference_us')} us)"
    ]
    if report.drift_nanos is not None:
        notes.append(
            f"receipts compared with served; drift {report.drift_nanos} nanos;"
            f" audit: {report.audit_violations} violations"
        )
    notes += [f"VOID    {reason}" for reason in report.void]
    notes += [f"FAILED  {reason}" for reason in report.failures]
    return notes


COMPARED = (
    "cpu_us_per_request",
    "cpu_ratio_per_request",
    "cpu_us_per_chunk",
    "cpu_ratio_per_chunk",
    "requests_per_s",
    "added_p50_ms",
    "added_p99_ms",
    "rss_mib",
)


def comparison_of(before: Report, after: Report, arm: str) -> str:
    """What changed, figure by figure, for the loads that both runs have."""
    rows = [["load", "figure", "before", "after", "change"]]
    for one in after.figures:
        old = before.find(one.load, one.arm)
        if one.arm != arm or old is None:
            continue
        for name in COMPARED:
            a, b = value_of(old, name), value_of(one, name)
            if a is not None and b is not None:
                change = f"{(b - a) / abs(a):+.1%}" if a else "-"
                rows.append([one.load, name, number_text(a), number_text(b), change])
    if len(rows) == 1:
        return f"the two runs have no load in common for arm '{arm}'"
    return "\n".join(lines_of(rows))
