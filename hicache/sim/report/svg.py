"""Charts as SVG text. Colours are classes, so that a page's style decides them, by day and by night."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 64, 16, 14, 46
ROW = 22
NAMES = 190  # width of the names beside bars


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """A line: points (x, y), a class for its look, what to say at each point. Without tips it has no marks."""

    name: str
    look: str
    points: Sequence[tuple[float, float]]
    tips: Sequence[str] = ()
    fill: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """Parts side by side from zero, or a mark with an interval (``low``, ``high``)."""

    name: str
    parts: Sequence[tuple[float, str]]  # (length, class)
    value: str
    tip: str
    low: float = 0.0
    high: float = 0.0


def lines_chart(series: Sequence[Series], x_label: str, y_label: str, tick: Callable[[float], str]) -> str:
    """Lines over a logarithmic x axis; y starts where the data does, rounded down."""
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    low_x, high_x = math.log10(min(xs)), math.log10(max(xs))
    span = max(high_x - low_x, 1e-9)
    steps = nice_steps(min(ys), max(ys))
    low, high = steps[0], steps[-1]
    height = 420
    inner_w, inner_h = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (math.log10(x) - low_x) / span * inner_w
        return across, TOP + (high - y) / (high - low) * inner_h

    out = [_open(height, f"{y_label} over {x_label}")]
    for step in steps:
        _, y = place(min(xs), step)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{step:g}</text>')
    for x in log_ticks(min(xs), max(xs)):
        across, _ = place(x, low)
        out.append(
            f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        )
        label = _text(tick(x))
        out.append(f'<text x="{across:.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{label}</text>')
    out.append(
        f'<text x="{LEFT + inner_w / 2}" y="{height - 8}" text-anchor="middle">{_text(x_label)}</text>'
    )
    out.append(f'<text transform="translate(14 {TOP + inner_h / 2}) rotate(-90)" text-anchor="middle">'
               f"{_text(y_label)}</text>")  # fmt: skip
    out += [_line(each, place) for each in series]
    return "".join([*out, "</svg>"])


def _line(series: Series, place: Callable[[float, float], tuple[float, float]]) -> str:
    spots = [place(x, y) for x, y in series.points]
    path = " ".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(spots))
    marks = "".join(
        f'<circle class="{series.fill}" cx="{x:.1f}" cy="{y:.1f}" r="4" data-tip="{_text(tip)}">'
        f"<title>{_text(tip)}</title></circle>"
        for (x, y), tip in zip(spots, series.tips, strict=False)
    )
    return f'<g data-series="{_text(series.name)}"><path class="line {series.look}" d="{path}"/>{marks}</g>'


def bars_chart(bars: Sequence[Bar], label: str) -> str:
    """Horizontal bars from zero, one a row, with their values at the end."""
    most = max([sum(length for length, _ in bar.parts) for bar in bars] + [1e-12])
    scale = (WIDTH - NAMES - 130) / most
    out = [_open(len(bars) * ROW + 8, label)]
    for index, bar in enumerate(bars):
        y, across = index * ROW + 4, float(NAMES)
        out.append(_row_open(bar, y))
        for length, look in bar.parts:
            wide = max(length * scale, 0.0)
            out.append(
                f'<rect class="{look}" x="{across:.1f}" y="{y}" width="{wide:.1f}" height="{ROW - 7}"/>'
            )
            across += wide
        out.append(f'<text class="value" x="{across + 6:.1f}" y="{y + 12}">{_text(bar.value)}</text></g>')
    return "".join([*out, "</svg>"])


def intervals_chart(bars: Sequence[Bar], label: str) -> str:
    """Marks with their intervals around zero, one a row: what lies clear of the zero line is different."""
    reach = max([max(abs(bar.low), abs(bar.high)) for bar in bars] + [1e-9])
    middle = NAMES + (WIDTH - NAMES - 150) / 2
    scale = (WIDTH - NAMES - 150) / 2 / reach
    height = len(bars) * ROW + 8
    out = [_open(height, label), f'<line class="axis" x1="{middle}" x2="{middle}" y1="0" y2="{height}"/>']
    for index, bar in enumerate(bars):
        y = index * ROW + 4
        look = bar.parts[0][1]
        left, right, spot = (middle + value * scale for value in (bar.low, bar.high, bar.parts[0][0]))
        out.append(_row_open(bar, y))
        out.append(
            f'<line class="line {look.replace("f", "s", 1)}" x1="{left:.1f}" x2="{right:.1f}" y1="{y + 8}" '
            f'y2="{y + 8}"/><circle class="{look}" cx="{spot:.1f}" cy="{y + 8}" r="4.5"/>'
        )
        out.append(f'<text class="value" x="{WIDTH - 145}" y="{y + 12}">{_text(bar.value)}</text></g>')
    return "".join([*out, "</svg>"])


def _row_open(bar: Bar, y: int) -> str:
    name = _text(bar.name)
    return (
        f'<g data-series="{name}" data-tip="{_text(bar.tip)}"><title>{_text(bar.tip)}</title>'
        f'<text class="name" x="{NAMES - 8}" y="{y + 12}" text-anchor="end">{name[:34]}</text>'
    )


def _open(height: int, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(label)}">'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def nice_steps(low: float, high: float) -> list[float]:
    """Five to ten round numbers that hold all values."""
    span = max(high - low, 1e-6)
    raw = span / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(index * step, 10) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... within the bounds."""
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [factor * 10.0**power for factor in (1, 2, 5)]
    return [tick for tick in found if low <= tick <= high]
