"""``hicache stats``: what a running sidecar holds and does, once or as a live table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hicache.cli import link, terminal, units
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from hicache.rpc.client import Client
    from hicache.rpc.client.results import DeviceStats, Stats, TierStats

EPILOG = """\
examples:
  hicache stats                           live, until Ctrl-C
  hicache stats --once                    one table
  hicache stats --json | jq .tiers        one JSON object
  hicache stats --interval 5s --target unix:///run/hicache/hicache.sock
"""

_UNIX_MS = 1_000_000_000_000  # September 2001; no sidecar has been up for 31 years
_GAUGES = ("sessions", "leases", "reservations", "waiting", "copies_in_flight", "namespaces")
_STREAMS = frozenset(
    {"rpc/Attach", "rpc/WatchEvents"}
)  # calls that last as long as their session: no latency
_BAR_CELLS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Show what a running sidecar holds and does: tiers, counters, latencies."
    parser.epilog = EPILOG
    parser.add_argument("--once", action="store_true", help="print once and end; default: live until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON object and end")
    parser.add_argument(
        "--interval", metavar="DURATION", default="1s", help="time between updates; default 1s"
    )
    link.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print, once or until interrupted."""
    interval_ms = units.parse_duration_ms(arguments.interval)
    if interval_ms < 1:
        raise ConfigError("--interval must be at least 1ms")
    with link.connect(arguments, "stats") as client:
        if arguments.json:
            print(json.dumps(plain(client.admin.stats()), indent=2))
        elif arguments.once:
            terminal.console().print(render(client.admin.stats(), None))
        else:
            with contextlib.suppress(KeyboardInterrupt):  # the way to end it
                _watch(client, interval_ms)
    return 0


def _watch(client: Client, interval_ms: int) -> None:
    import threading

    from rich.live import Live

    before: Stats | None = None
    never = threading.Event()
    with Live(auto_refresh=False) as live:
        while True:
            now = client.admin.stats()
            live.update(render(now, before), refresh=True)
            before = now
            never.wait(interval_ms / 1000)


def plain(result: object) -> dict[str, object]:
    """A result of the client (a dataclass) as plain values, ready for JSON."""
    record: Any = result
    return dataclasses.asdict(record)


def render(stats: Stats, before: Stats | None) -> RenderableType:
    """Tables of one moment; with ``before``, rates since then as well."""
    from rich.console import Group
    from rich.markup import escape

    head = (
        f"[bold]hicache {stats.server_version}[/] {stats.state}, up {units.human_duration(stats.uptime_ms)}; "
        f"{stats.tree_pages:,} pages in {stats.tree_runs:,} runs of {stats.tree_nodes:,} nodes"
    )
    news = [f"[red]{escape(ill(tier))}[/]" for tier in stats.tiers if tier.state != "ok"]
    news += [f"[red]{escape(given_up(device))}[/]" for device in stats.devices if device.problem]
    news += filter(None, [recovery_line(stats)])
    gauges = ", ".join(f"{name.replace('_', ' ')} {getattr(stats, name):,}" for name in _GAUGES)
    return Group(
        head,
        *news,
        gauges,
        "",
        tiers_table(stats, before),
        "",
        *devices_tables(stats.devices),
        _calls_table(stats),
        "",
        _counters(stats, before),
    )


def ill(tier: TierStats) -> str:
    """What is wrong with a tier, in words: what it does not do now, since when, and why."""
    lost = "neither takes pages nor gives any" if tier.state == "off" else "takes no pages"
    since = f"for {units.human_duration(tier.degraded_ms)} now"
    return f"tier {tier.name} is degraded: it {lost}, {since}: {tier.reason or 'reason unknown'}"


def given_up(device: DeviceStats) -> str:
    """What is wrong with a device, in words."""
    return f"device {device.name} of tier {device.tier} was given up: {device.problem}"


def recovery_line(stats: Stats) -> str:
    """How far the durable tier's recovery is; empty when there is none."""
    if not stats.counters.get("recovering"):
        return ""
    total, read = stats.counters.get("recovery_total_pages", 0), stats.counters.get("recovery_read_pages", 0)
    back = stats.counters.get("recovered_pages", 0)
    return f"recovering: {back:,} pages are back, {read:,} of {total:,} read"


#: What is told of a tier. "written/hit": bytes written to it for each byte served from it.
_TIER_ROWS = (
    "state",
    "filled",
    "used",
    "capacity",
    "pages",
    "hits",
    "in",
    "out",
    "evicted",
    "dropped",
    "corrupt",
    "refused",
    "written/hit",
)


def tiers_table(stats: Stats, before: Stats | None = None) -> Table:
    """One column a tier, so that it fits a narrow terminal."""
    table = _table("tier", *(tier.name for tier in stats.tiers))
    earlier = {tier.name: tier for tier in before.tiers} if before else {}
    seconds = (stats.uptime_ms - before.uptime_ms) / 1000 if before else 0.0
    columns = [_tier_cells(tier, earlier.get(tier.name), seconds) for tier in stats.tiers]
    for title, cells in zip(_TIER_ROWS, zip(*columns, strict=True), strict=bool(columns)):
        table.add_row(title, *cells)
    return table


def _tier_cells(tier: TierStats, before: TierStats | None, seconds: float) -> list[str]:
    def moved(name: str) -> str:
        total = getattr(tier, name)
        shown = units.human_size(total)
        if before is None or seconds <= 0:
            return shown
        return f"{shown} ({units.human_size((total - getattr(before, name)) / seconds)}/s)"

    share = tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0
    colour = "red" if tier.state != "ok" else "green"
    return [
        f"[{colour}]{tier.state}[/]",
        bar(share),
        units.human_size(tier.used_bytes),
        units.human_size(tier.capacity_bytes),
        f"{tier.pages:,}",
        f"{tier.hit_pages:,}",
        moved("bytes_in"),
        moved("bytes_out"),
        f"{tier.evicted_pages:,}",
        f"{tier.dropped_pages:,}",
        f"{tier.corrupt_pages:,}",
        f"{tier.refused_pages:,}",
        f"{tier.written_per_hit:.2f}" if tier.hit_bytes else "-",
    ]


#: What is told of a device.
_DEVICE_ROWS = ("state", "copy engine", "copied directly", "bounced", "registered", "faults")


def devices_tables(devices: Sequence[DeviceStats]) -> list[RenderableType]:
    """One column a device; then, where copy engines were measured, what was found. Each with an empty line after it."""
    if not devices:
        return []
    table = _table("device", *(device.name for device in devices))
    for title, cells in zip(_DEVICE_ROWS, zip(*map(_device_cells, devices), strict=True), strict=True):
        table.add_row(title, *cells)
    measured = _table("copies", "pages of", "engine", "GB/s", "others")
    for device in devices:
        for choice in device.choices:
            rest = sorted((-speed, name) for name, speed in choice.gb_per_s.items() if name != choice.engine)
            measured.add_row(
                f"{device.name}, {choice.rows} {choice.direction}",
                units.human_size(choice.page_bytes),
                choice.engine,
                f"{choice.gb_per_s.get(choice.engine, 0.0):.1f}",
                ", ".join(f"{name} {-speed:.1f}" for speed, name in rest),
            )
    return [table, "", measured, ""] if measured.row_count else [table, ""]


def _device_cells(device: DeviceStats) -> list[str]:
    return [
        "[red]given up[/]" if device.problem else "[green]ok[/]",
        "measured" if device.copy_engine == "auto" else device.copy_engine,
        units.human_size(device.direct_bytes),
        units.human_size(device.bounced_bytes),
        units.human_size(device.registered_bytes),
        f"{device.faults:,}",
    ]


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A share of 1 as a bar of fixed width."""
    filled = round(max(0.0, min(1.0, share)) * cells)
    return "█" * filled + "░" * (cells - filled)


def _calls_table(stats: Stats) -> Table:
    table = _table("call", "count", "p50", "p99")
    for latency in stats.latencies:
        if latency.call in _STREAMS:
            continue
        p50, p99 = units.human_duration(latency.p50_ms), units.human_duration(latency.p99_ms)
        table.add_row(latency.call, f"{latency.count:,}", p50, p99)
    return table


def _counters(stats: Stats, before: Stats | None) -> Table:
    table = _table("counter", "total", *(["change"] if before else []))
    for name, value in sorted(stats.counters.items()):
        change = [f"{value - before.counters.get(name, 0):+,}"] if before else []
        title, shown = counter_cells(name, value)
        table.add_row(title, shown, *change)
    return table


def counter_cells(name: str, value: int) -> tuple[str, str]:
    """A counter as people read it: what it counts, and the value with its unit."""
    words = name.replace("_", " ")
    if name.endswith("_bytes"):
        return words.removesuffix(" bytes"), units.human_size(value)
    if name.endswith("_ms"):
        words = words.removesuffix(" ms")
        if value > _UNIX_MS:  # a moment, not a duration
            moment = datetime.datetime.fromtimestamp(value / 1000, datetime.UTC)
            return words, f"{moment:%Y-%m-%d %H:%M:%S} UTC"
        return words, units.human_duration(value) if value else "0"
    return words, f"{value:,}"


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="left" if title in {"state", "filled"} else "right")
    return table
