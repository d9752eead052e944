"""Sections of the report, each a heading, a sentence on how to read it, and a chart or a table."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

from hicache.sim.report.svg import Bar, Series, bars_chart, intervals_chart, lines_chart
from hicache.sim.summary import GIB, Line

COLOURS, DASHES = 10, 3


class Looks:
    """The class of each policy's line, the same in all charts; references are grey."""

    def __init__(self, policies: Sequence[str], references: Mapping[str, object]) -> None:
        names = list(dict.fromkeys(policies))
        self.fills = {name: f"f{at % COLOURS}" for at, name in enumerate(names)}
        self.all = {name: f"s{at % COLOURS} d{at // COLOURS % DASHES}" for at, name in enumerate(names)}
        self.all |= {name: reference_look(name) for name in references}


def reference_look(name: str) -> str:
    """Of a curve that is no policy's."""
    return "best" if name == "oracle" else "ref"


def point(line: Line) -> str:
    """A capacity and a mode, as the picker names it."""
    return f"{line.capacity} · {line.mode}"


def size(size_bytes: float) -> str:
    """For people."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def findings(lines: Sequence[Line], baseline: str, page_bytes: int) -> list[str]:
    """The answers in sentences."""
    found = []
    for name, members in _points(lines).items():
        best = max(members, key=lambda line: line.hit_ratio.value)
        text = f"<b>{html.escape(name)}</b>: {html.escape(best.policy)} hits {best.hit_ratio.value:.1%}"
        if best.against is not None:
            sure = "" if best.against.clear else " (not clear of chance)"
            text += f", {best.against.value * 100:+.1f} points against {html.escape(baseline)}{sure}"
        gain = best.against is not None and best.against.clear and best.against.value > 0
        if gain and best.equals_pages > 0 and best.policy != "lru":
            text += f"; LRU needs {size(best.equals_pages * page_bytes)} for that"
        if best.usd_saved_per_hour:
            text += (
                f"; it saves {best.mean('prefill', 'saved_s'):,.0f} s of prefill, "
                f"${best.usd_saved_per_hour:,.2f} an hour, with tiers at ${best.usd_tiers_per_hour:,.2f}"
            )
        found.append(text + ".")
    return found


def _points(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(point(line), []).append(line)
    return found


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{title}</h2><p class='soft'>{text}</p>{body}"


def _by_point(lines: Sequence[Line], chart: Callable[[list[Line]], str]) -> str:
    """The same chart for each capacity and mode; the picker shows one."""
    return "".join(
        f'<figure data-point="{html.escape(name)}">{chart(members)}'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, members in _points(lines).items()
    )


# --- curves


def curves(
    lines: Sequence[Line], references: Mapping[str, list[tuple[int, float]]], looks: Looks, page_bytes: int
) -> str:
    """Miss ratios over the capacity, one chart a mode."""
    charts = []
    for mode in dict.fromkeys(line.mode for line in lines):
        series = [
            Series(name, reference_look(name), [(pages, 1 - ratio) for pages, ratio in points])
            for name, points in references.items()
            if points
        ]
        for policy in dict.fromkeys(line.policy for line in lines):
            mine = sorted(
                (line for line in lines if line.policy == policy and line.mode == mode),
                key=lambda line: line.pages,
            )
            if mine:
                series.append(_policy_series(policy, mine, looks))
        chart = lines_chart(
            series,
            "capacity (blocks, all tiers together)",
            "miss ratio",
            lambda x: _capacity_tick(x, page_bytes),
        )
        charts.append(f"<figure>{chart}<figcaption>{html.escape(mode)}</figcaption></figure>")
    text = (
        "The share of blocks that had to be computed, over the capacity: lower is better. Grey: the exact curve of "
        "LRU, and what no cache of that size (oracle) or of any size (unbounded) can pass."
    )
    return _section("Miss ratio by capacity", text, "".join(charts))


def _policy_series(policy: str, mine: list[Line], looks: Looks) -> Series:
    tips = [
        f"{policy} at {line.capacity}\nhit {line.hit_ratio.value:.4f}  [{line.hit_ratio.low:.4f}, "
        f"{line.hit_ratio.high:.4f}]"
        for line in mine
    ]
    spots = [(float(line.pages), 1 - line.hit_ratio.value) for line in mine]
    return Series(policy, looks.all[policy], spots, tips, looks.fills[policy])


def _capacity_tick(pages: float, page_bytes: int) -> str:
    short = f"{pages / 1000:g}k" if pages >= 1000 else f"{pages:g}"
    return f"{short} ({size(pages * page_bytes)})"


# --- bars


def differences(lines: Sequence[Line], baseline: str, looks: Looks) -> str:
    """Paired differences against the baseline."""
    compared = [line for line in lines if line.against is not None]
    if not compared:
        return ""

    def chart(members: list[Line]) -> str:
        bars = []
        for line in sorted(members, key=lambda line: -line.hit_ratio.value):
            gap = line.against
            assert gap is not None, "only compared lines come here"
            value = f"{gap.value * 100:+.2f} points"
            tip = f"{line.policy}: {value}, 95 % [{gap.low * 100:+.2f}, {gap.high * 100:+.2f}]"
            bars.append(
                Bar(line.policy, [(gap.value, looks.fills[line.policy])], value, tip, gap.low, gap.high)
            )
        return intervals_chart(bars, "difference of hit ratio")

    text = f"Hit ratio minus that of {html.escape(baseline)} on the same requests, with 95 % intervals. What lies "
    return _section(
        "Against the baseline", text + "clear of the line is no chance.", _by_point(compared, chart)
    )


def tiers(lines: Sequence[Line]) -> str:
    """Hits stacked by the tier that served them."""
    names = list(dict.fromkeys(tier["name"] for line in lines for tier in line.one["tiers"]))

    def chart(members: list[Line]) -> str:
        bars = []
        for line in members:
            asked = line.one["asked_pages"] or 1
            own = [tier["name"] for tier in line.one["tiers"]]
            shares = [(name, line.one["hits_by_tier"][at] / asked) for at, name in enumerate(own)]
            parts = [(share, f"tier{names.index(name) % 4}") for name, share in shares]
            told = ", ".join(f"{name} {share:.4f}" for name, share in shares)
            late = line.one["late_pages"] / asked
            tip = f"{line.policy}: {told}" + (f"\nof these {late:.4f} came too late" if late else "")
            bars.append(Bar(line.policy, parts, told, tip))
        return bars_chart(bars, "hits by tier")

    key = " ".join(
        f'<svg width="14" height="10"><rect class="tier{at % 4}" width="14" height="10"/></svg> {html.escape(name)}'
        for at, name in enumerate(names)
    )
    return _section(
        "Hits by tier", f"Blocks served from each tier, over blocks asked for. {key}", _by_point(lines, chart)
    )


def moved(lines: Sequence[Line]) -> str:
    """What keeping pages costs in copies."""

    def chart(members: list[Line]) -> str:
        rows = []
        for line in members:
            hits = line.mean("hit_pages") or 1
            copied = line.one["moved"]["copied_bytes"]
            each = (
                ", ".join(f"{html.escape(way)} {size(count / hits)}" for way, count in copied.items())
                or "none"
            )
            disk = line.mean("moved", "disk_write_bytes")
            rows.append(
                f'<tr data-series="{html.escape(line.policy)}"><td>{html.escape(line.policy)}</td>'
                f"<td>{size(line.mean('moved', 'stored_bytes') / hits)}</td><td class='left'>{each}</td>"
                f"<td>{size(disk)}</td><td>{size(disk / hits)}</td>"
                f"<td>{line.mean('moved', 'dropped_pages'):,.0f}</td></tr>"
            )
        return (
            "<div class='table'><table><tr><th>policy</th><th>stored, a hit</th><th class='left'>copied between "
            "tiers, a hit</th><th>written to disk</th><th>written to disk, a hit</th><th>blocks dropped</th></tr>"
            f"{''.join(rows)}</table></div>"
        )

    text = "What was moved for each block that was found; the warm-up counts here."
    return _section("Bytes moved", text, _by_point(lines, chart))


def prefill(lines: Sequence[Line], looks: Looks) -> str:
    """Prefill not done."""

    def chart(members: list[Line]) -> str:
        bars = []
        for line in members:
            saved, computed = line.mean("prefill", "saved_s"), line.mean("prefill", "computed_s")
            share = saved / (saved + computed) if saved + computed else 0.0
            flops = line.mean("prefill", "saved_flops")
            value = f"{saved:,.0f} s ({share:.1%})"
            tip = f"{line.policy}: {value}, {flops:.3g} FLOPs not computed; {computed:,.0f} s computed"
            bars.append(Bar(line.policy, [(saved, looks.fills[line.policy])], value, tip))
        return bars_chart(bars, "prefill saved")

    text = "Seconds of prefill that hits have saved, and their share of all prefill; point at a bar for the FLOPs."
    return _section("Prefill saved", text, _by_point(lines, chart))


def first_tokens(lines: Sequence[Line], looks: Looks) -> str:
    """TTFT percentiles."""

    def chart(members: list[Line]) -> str:
        rows = []
        for line in members:
            times = "".join(
                f"<td>{line.mean('ttft_ms', name):,.0f}</td>" for name in ("mean", "p50", "p95", "p99")
            )
            rows.append(
                f'<tr data-series="{html.escape(line.policy)}"><td>{html.escape(line.policy)}</td>{times}</tr>'
            )
        bars = [
            Bar(
                line.policy,
                [(line.mean("ttft_ms", "p95"), looks.fills[line.policy])],
                f"p95 {line.mean('ttft_ms', 'p95'):,.0f} ms",
                f"{line.policy}: p50 {line.mean('ttft_ms', 'p50'):,.0f}, p95 {line.mean('ttft_ms', 'p95'):,.0f}, "
                f"p99 {line.mean('ttft_ms', 'p99'):,.0f} ms",
            )
            for line in members
        ]
        return bars_chart(bars, "TTFT p95") + (
            "<div class='table'><table><tr><th>policy</th><th>mean, ms</th><th>p50</th><th>p95</th><th>p99</th></tr>"
            f"{''.join(rows)}</table></div>"
        )

    text = (
        "Time to the first token by the model of the machine: waiting, loading and computing. In instant mode nobody "
        "waits for anybody; replay in trace time to see queues."
    )
    return _section("Time to first token", text, _by_point(lines, chart))


def money(lines: Sequence[Line], looks: Looks) -> str:
    """Cost of a hit."""
    priced = [line for line in lines if line.usd_per_million >= 0]
    if not priced:
        return ""

    def chart(members: list[Line]) -> str:
        return bars_chart(
            [
                Bar(
                    line.policy,
                    [(line.usd_per_million, looks.fills[line.policy])],
                    f"${line.usd_per_million:.4f}",
                    f"{line.policy}: tiers ${line.usd_tiers_per_hour:.2f} an hour, GPU time saved "
                    f"${line.usd_saved_per_hour:.2f} an hour",
                )
                for line in members
            ],
            "cost of a million hit tokens",
        )

    text = "What RAM and disk cost for a million tokens found in them, at the given prices and the trace's own pace."
    return _section("Cost of a hit", text, _by_point(priced, chart))


# --- tables


def equivalence(lines: Sequence[Line], page_bytes: int) -> str:
    """Which LRU cache a policy is worth."""
    known = [
        line
        for line in lines
        if line.mode == "instant" and len(line.one["tiers"]) == 1 and line.policy != "lru"
    ]
    if not known:
        return ""
    rows = []
    for line in known:
        equal = "more than any LRU reaches"
        factor = ""
        if line.equals_pages >= 0:
            equal = f"{line.equals_pages:,} blocks ({size(line.equals_pages * page_bytes)})"
            factor = f"{line.equals_pages / line.pages:.2f}x"
        rows.append(
            f'<tr data-series="{html.escape(line.policy)}"><td>{html.escape(line.policy)}</td>'
            f"<td>{html.escape(line.capacity)}</td><td>{line.pages:,} ({size(line.pages * page_bytes)})</td>"
            f"<td>{line.hit_ratio.value:.4f}</td><td>{equal}</td><td>{factor}</td></tr>"
        )
    body = (
        "<div class='table'><table><tr><th>policy</th><th>capacity</th><th>blocks</th><th>hit ratio</th>"
        f"<th>LRU reaches it with</th><th>worth</th></tr>{''.join(rows)}</table></div>"
    )
    return _section(
        "Capacity that a policy is worth", "From the exact curve of LRU over all capacities.", body
    )


def table(lines: Sequence[Line], baseline: str) -> str:
    """Everything in numbers."""
    rows = []
    for line in lines:
        ratio, gap = line.hit_ratio, line.against
        against = ""
        if gap is not None:
            look = ("up" if gap.value > 0 else "down") if gap.clear else ""
            against = f"<td class='{look}'>{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]</td>"
        rows.append(
            f'<tr data-series="{html.escape(line.policy)}"><td>{html.escape(line.policy)}</td>'
            f"<td>{html.escape(line.capacity)}</td><td>{html.escape(line.mode)}</td><td>{len(line.results)}</td>"
            f"<td>{ratio.value:.4f}</td><td>[{ratio.low:.4f}, {ratio.high:.4f}]</td>{against or '<td></td>'}"
            f"<td>{line.mean('prefill', 'saved_s'):,.0f}</td><td>{line.mean('ttft_ms', 'p50'):,.0f}</td>"
            f"<td>{line.mean('ttft_ms', 'p95'):,.0f}</td><td>{line.mean('ttft_ms', 'p99'):,.0f}</td>"
            f"<td>{line.mean('refused_stores'):,.0f}</td></tr>"
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "policy", "capacity", "mode", "seeds", "hit ratio", "95 %", f"against {html.escape(baseline)}",
            "prefill saved, s", "TTFT p50, ms", "p95", "p99", "stores refused",
        )
    )  # fmt: skip
    body = f"<div class='table'><table><tr>{head}</tr>{''.join(rows)}</table></div>"
    return _section("All cells", "Each policy, capacity and mode, over its seeds.", body)
