"""What ``hicache trace stats`` shows: tables, and a page with plots that loads nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hicache.sim.traces import Trace
from hicache.sim.traces.stats import Spread, TraceStats
from hicache.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = (1, 10, 25, 50, 75, 90, 99)


def spreads(found: TraceStats) -> list[tuple[str, Spread]]:
    """The distributions, with the names people see."""
    return [
        ("input tokens", found.input_tokens),
        ("output tokens", found.output_tokens),
        ("blocks of a request", found.blocks_each),
        ("of them found (infinite cache)", found.hits_each),
        ("turns of a session", found.turns),
        ("ms between requests", found.arrival_gap_ms),
        ("ms since the deepest hit's last use", found.reuse_gap_ms),
        ("reuse distance, blocks", found.reuse_distance),
    ]


def print_stats(console: Console, trace: Trace, found: TraceStats) -> None:
    """Tables."""
    from rich.table import Table

    console.print(
        f"[bold]{trace.name}[/]: {found.requests:,} requests, {found.blocks:,} blocks of "
        f"{trace.block_tokens} tokens, {found.unique_blocks:,} of them different, {found.span_ms / 1000:,.0f} s; "
        f"an infinite cache hits [bold]{found.bound:.4f}[/]",
        soft_wrap=True,
    )
    if found.unchained_blocks:
        console.print(
            f"[yellow]{found.unchained_blocks:,} ids stand at different places: they are not prefix-chained[/]"
        )
    table = Table(
        "", "count", "mean", "1 %", "10 %", "25 %", "median", "75 %", "90 %", "99 %", "largest", box=None
    )
    for name, spread in spreads(found):
        if spread.count:
            cells = [f"{spread.percentiles[at]:,}" for at in (*SHOWN, 100)]
            table.add_row(name, f"{spread.count:,}", f"{spread.mean:,.1f}", *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    uses = ", ".join(f"{name}: {share:.3f}" for name, share in found.uses)
    console.print(f"\nshare of different blocks by uses   {uses}", soft_wrap=True)
    _print_sharing(console, found)


def _print_sharing(console: Console, found: TraceStats) -> None:
    from rich.table import Table

    table = Table("depth", "requests", "different blocks", "used again", "fan-out", box=None)
    for row in found.sharing:
        table.add_row(
            f"{row.depth}",
            f"{row.requests:,}",
            f"{row.blocks:,}",
            f"{row.shared_blocks:,}",
            f"{row.fan_out:.2f}",
        )
    for column in table.columns:
        column.justify = "right"
    console.print(table)


# --- the page

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 300, 58, 44, 14
_COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea")

Points = Sequence[tuple[float, float]]


def _log(value: float) -> float:
    return math.log10(max(value, 1.0))


def _plot(title: str, x_name: str, lines: Sequence[tuple[str, Points]], y_name: str) -> str:
    """One chart, x on a logarithmic scale, y from 0 to 1."""
    largest = max((_log(x) for _, points in lines for x, _ in points), default=1.0)
    decades = max(1, math.ceil(largest))
    right, bottom = _WIDTH - 22, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> str:
        across = _LEFT + _log(x) / decades * (right - _LEFT)
        return f"{across:.1f},{bottom - y * (bottom - _TOP):.1f}"

    parts = []
    for step in range(6):
        height = bottom - step / 5 * (bottom - _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" class="g"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{step / 5:.1f}</text>')
    for decade in range(decades + 1):
        across = _LEFT + decade / decades * (right - _LEFT)
        parts.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{_TOP}" y2="{bottom}" class="g"/>')
        parts.append(
            f'<text x="{across:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(10**decade)}</text>'
        )
    legend = []
    for number, (name, points) in enumerate(lines):
        color = _COLORS[number % len(_COLORS)]
        path = " ".join(at(x, y) for x, y in points)
        legend.append(f'<span style="color:{color}">{html.escape(name)}</span>')
        parts.append(f'<polyline points="{path}" stroke="{color}" class="l"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x_name)}</text>')
    upright = f'transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {upright}>{html.escape(y_name)}</text>")
    return (
        f"<figure><figcaption>{html.escape(title)} {' '.join(legend)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg></figure>'
    )


def _short(value: int) -> str:
    for size, mark in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value // size}{mark}"
    return str(value)


def _cumulative(spread: Spread) -> Points:
    return [(float(value), share / 100) for share, value in enumerate(spread.percentiles)]


def page(trace: Trace, found: TraceStats) -> str:
    """A self-contained HTML page."""
    uses = max(found.blocks, 1)
    curve: Points = [(float(capacity), share) for capacity, share in found.hit_curve]
    bound: Points = [(1.0, found.bound), (float(max(found.unique_blocks, 1)), found.bound)]
    reached: Points = [(float(row.depth), row.requests / max(found.requests, 1)) for row in found.sharing]
    shared: Points = [(float(row.depth), row.shared_blocks / max(row.blocks, 1)) for row in found.sharing]
    figures = [
        _plot(
            "What LRU finds, block by block",
            "capacity, blocks",
            [("LRU (reuse distance)", curve), ("infinite prefix cache", bound)],
            "hit ratio",
        ),
        _plot(
            "Time",
            "ms",
            [
                ("between requests", _cumulative(found.arrival_gap_ms)),
                ("since the deepest hit's last use", _cumulative(found.reuse_gap_ms)),
            ],
            "share of requests up to",
        ),
        _plot(
            "Lengths",
            "tokens",
            [("input", _cumulative(found.input_tokens)), ("output", _cumulative(found.output_tokens))],
            "share of requests up to",
        ),
        _plot(
            "Shared prefixes",
            "depth, blocks",
            [("requests that reach it", reached), ("its blocks that are used again", shared)],
            "share",
        ),
    ]
    head = (
        f"{found.requests:,} requests, {found.blocks:,} blocks of {trace.block_tokens} tokens "
        f"({found.unique_blocks:,} different), infinite cache {found.bound:.4f}; "
        f"{found.unique_blocks / uses:.3f} different blocks a block"
    )
    return _PAGE.format(
        title=html.escape(trace.name), head=html.escape(head), figures="".join(figures), version=__version__
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1180px; margin: 24px auto; padding: 0 16px }}
h1 {{ font-size: 22px; margin: 0 }} figure {{ margin: 0 }} figcaption {{ font-weight: 600; margin: 12px 0 4px }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 8px 28px }}
svg {{ width: 100%; font-size: 12px; fill: #4b5563 }}
figcaption span {{ font-weight: 400; font-size: 13px; margin-left: 14px }} .g {{ stroke: #e5e7eb }}
.l {{ fill: none; stroke-width: 2 }}
footer {{ color: #6b7280; font-size: 13px; margin-top: 20px }}
</style></head><body><h1>{title}</h1><p>{head}</p><main>{figures}</main>
<footer>hicache {version}</footer></body></html>
"""
