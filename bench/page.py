"""A report as one HTML page that needs nothing else: tables and inline SVG. Pure."""

from collections.abc import Iterable, Sequence
from html import escape

from bench.histogram import Histogram
from bench.loads import LOADS
from bench.report import Figures, Report
from bench.svg import Axis, Line, linear, logarithmic, percentiles, plot
from bench.table import COLUMNS, notes_of, number_text, value_of

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; }
svg .grid { stroke: currentColor; stroke-opacity: .15; }
.legend span { margin-right: 1rem; } .legend i { display: inline-block; width: 1.5rem;
margin-right: .4rem; vertical-align: middle; }
.bad { color: #dc2626; font-weight: 600; }
"""


def page_of(report: Report) -> str:
    """The whole page."""
    arms = list(dict.fromkeys(one.arm for one in report.figures))
    plots = [
        *_percentile_curves(report, arms),
        *_rate_curves(report, arms),
        *_gap_curves(report, arms),
    ]
    about = "".join(
        f"<li><b>{escape(name)}</b>: {escape(LOADS[name].about)}</li>"
        for name in dict.fromkeys(one.load for one in report.figures)
        if name in LOADS
    )
    notes = "".join(f"<li{_bad(note)}>{escape(note)}</li>" for note in notes_of(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Farebox bench</title>'
        f"<style>{STYLE}</style></head><body><h1>Farebox bench</h1><ul>{notes}</ul>"
        f'<div class="scroll">{_table(report)}</div>'
        f'<h2>Plots</h2><div class="plots">{"".join(plots)}</div>'
        f"<h2>Loads</h2><ul>{about}</ul>"
        "<p>CPU is user and system time of the gateway's processes. `direct` has no gateway;"
        " added values are differences to it in the same round, medians over the rounds."
        " Open-loop latencies count from the scheduled start.</p></body></html>\n"
    )


def _bad(note: str) -> str:
    return ' class="bad"' if note.startswith(("VOID", "FAILED")) else ""


def _table(report: Report) -> str:
    used = [c for c in COLUMNS if any(value_of(f, c[0]) is not None for f in report.figures)]
    head = "".join(f"<th>{escape(title)}</th>" for _, title in used)
    rows = "".join(
        f"<tr><td>{escape(one.load)}</td><td>{escape(one.arm)}</td>"
        + "".join(f"<td>{number_text(value_of(one, name))}</td>" for name, _ in used)
        + "</tr>"
        for one in report.figures
    )
    return f"<table><tr><th>load</th><th>arm</th>{head}</tr>{rows}</table>"


def _figure(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{plot(x, y, lines)}</figure>"


def _loads(report: Report) -> Iterable[tuple[str, list[Figures]]]:
    for name in dict.fromkeys(one.load for one in report.figures):
        yield name, [one for one in report.figures if one.load == name]


def _histogram(one: Figures, name: str) -> Histogram | None:
    plain = one.histograms.get(name)
    return None if plain is None else Histogram.from_plain(plain)


def _percentile_curves(report: Report, arms: list[str]) -> Iterable[str]:
    """Latency over percentile, for what was measured in an open loop or to the first chunk."""
    for load, figures in _loads(report):
        lines, values = [], []
        for one in figures:
            histogram = _histogram(one, "latency")
            if histogram is None or (one.rate is None and not one.gap_ms.get("p50")):
                continue
            points = [(at / histogram.count, us / 1000) for us, at in histogram.curve()]
            points.insert(0, (0.0, points[0][1]))
            values += [ms for _, ms in points]
            lines.append(Line(one.arm, points, arms.index(one.arm)))
        if lines:
            y = logarithmic("ms", max(min(values), 0.01), max(values))
            yield _figure(f"{load}: latency by percentile", percentiles("percentile"), y, lines)


def _rate_curves(report: Report, arms: list[str]) -> Iterable[str]:
    for load, figures in _loads(report):
        lines, values, rates = [], [], []
        for one in figures:
            for dash, label in enumerate(("p50", "p99")):
                points = [
                    (rate, ms)
                    for point in one.curve
                    if (rate := point["rate"]) is not None and (ms := point[label]) is not None
                ]
                if len(one.curve) < 2 or not points:
                    continue
                values += [ms for _, ms in points]
                rates += [rate for rate, _ in points]
                lines.append(Line(f"{one.arm} {label}", points, arms.index(one.arm), dash))
        if lines:
            x = linear("requests/s", max(rates) * 1.05)
            y = logarithmic("ms", max(min(values), 0.01), max(values))
            yield _figure(f"{load}: latency against rate", x, y, lines)


def _gap_curves(report: Report, arms: list[str]) -> Iterable[str]:
    for load, figures in _loads(report):
        lines, largest = [], 0.0
        for one in figures:
            histogram = _histogram(one, "gap")
            if histogram is None or not histogram.percentile(50):
                continue
            points = [(at / histogram.count, us / 1000) for us, at in histogram.curve()]
            largest = max(largest, points[-1][1])
            lines.append(Line(one.arm, points, arms.index(one.arm)))
        if lines:
            y = linear("ms between chunks", largest * 1.05)
            title = f"{load}: gaps between chunks by percentile"
            yield _figure(title, percentiles("percentile"), y, lines)
