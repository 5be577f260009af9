"""Line plots as inline SVG, without any script or outside file. Pure."""

import math
from collections.abc import Callable, Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44
COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
DASHES = ("", "5 3", "2 2")

Point = tuple[float, float]


class Line(msgspec.Struct, frozen=True):
    """One curve; equal colours belong together."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0


class Axis(msgspec.Struct, frozen=True):
    """Where a value stands between 0 and 1, and which values get a mark."""

    title: str
    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def linear(title: str, high: float) -> Axis:
    high = high or 1.0
    step = nice_step(high / 5)
    ticks = [(n * step, f"{n * step:g}") for n in range(int(high / step + 1e-9) + 1)]
    return Axis(title, lambda value: value / high, ticks)


def logarithmic(title: str, low: float, high: float) -> Axis:
    low_power = math.floor(math.log10(max(low, 1e-6)))
    high_power = max(math.ceil(math.log10(max(high, 1e-6))), low_power + 1)
    span = high_power - low_power
    ticks = [(10.0**power, f"{10.0**power:g}") for power in range(low_power, high_power + 1)]

    def place(value: float) -> float:
        return (math.log10(max(value, 10.0**low_power)) - low_power) / span

    return Axis(title, place, ticks)


def percentiles(title: str, nines: int = 4) -> Axis:
    """0, 90, 99, 99.9 ... at equal distances, where tails are seen."""

    def place(share: float) -> float:
        return min(-math.log10(max(1 - share, 10.0**-nines)) / nines, 1.0)

    shares = [1 - 10.0**-n for n in range(nines + 1)]
    return Axis(
        title,
        place,
        [(share, f"{share * 100:.{max(n - 2, 0)}f}") for n, share in enumerate(shares)],
    )


def nice_step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def plot(x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """An SVG element; the colours of text and axes follow the page."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(point: Point) -> str:
        across = LEFT + min(max(x.place(point[0]), 0), 1) * (right - LEFT)
        down = bottom - min(max(y.place(point[1]), 0), 1) * (bottom - TOP)
        return f"{across:.1f},{down:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11">']
    for value, text in x.ticks:
        across = at((value, 0)).partition(",")[0]
        parts.append(f'<line class="grid" x1="{across}" x2="{across}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{across}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    for value, text in y.ticks:
        down = bottom - min(max(y.place(value), 0), 1) * (bottom - TOP)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
    for line in lines:
        colour, dash = COLOURS[line.colour % len(COLOURS)], DASHES[line.dash % len(DASHES)]
        points = " ".join(at(point) for point in line.points)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
            f' points="{points}"><title>{escape(line.name)}</title></polyline>'
        )
        if len(line.points) < 4:
            parts += [
                '<circle cx="{}" cy="{}" r="3.5" fill="{}"/>'.format(*at(p).split(","), colour)
                for p in line.points
            ]
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>'
    )
    parts.append(
        f'<text x="14" y="{HEIGHT / 2 - 14}" text-anchor="middle"'
        f' transform="rotate(-90 14 {HEIGHT / 2 - 14})">{escape(y.title)}</text></svg>'
    )
    return "".join([*parts, _legend(lines)])


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<span><i style="border-top:3px {"dashed" if line.dash else "solid"}'
        f' {COLOURS[line.colour % len(COLOURS)]}"></i>{escape(line.name)}</span>'
        for line in lines
    )
    return f'<p class="legend">{items}</p>'
