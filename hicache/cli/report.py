"""Tables that the demo and the replay share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hicache.cli import stats as stats_command
from hicache.cli import units

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.cli.drive import Tally
    from hicache.rpc.client.results import CheckResult, Stats

#: What the sidecar counts that a reader of the report wants beside the tiers.
COUNTERS = ("unsaved_dropped_pages", "refused_calls", "waited_calls", "expired_leases", "stranded_pages")


def print_report(console: Console, tally: Tally, stats: Stats, check: CheckResult) -> None:
    """Everything: tiers, pages, latencies, the sidecar's own check."""
    from rich.table import Table

    console.print(stats_command.tiers_table(stats))
    console.print()
    pages = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("pages", "count", "share"):
        pages.add_column(title, justify="left" if title == "pages" else "right")
    for label, count, of in _page_rows(tally, stats):
        pages.add_row(label, f"{count:,}", f"{count / of:.1%}" if of else "")
    console.print(pages)
    console.print()
    calls = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("seen by the client", "calls", "p50", "p99"):
        calls.add_column(title, justify="left" if title.startswith("seen") else "right")
    for call, found in tally.percentiles().items():
        p50, p99 = units.human_duration(found["p50_ms"]), units.human_duration(found["p99_ms"])
        calls.add_row(call, f"{found['count']:,.0f}", p50, p99)
    console.print(calls)
    console.print()
    console.print(f"sidecar's own check: {'fine' if check.ok else f'[red]VIOLATION[/] {check.problem}'}")


def _page_rows(tally: Tally, stats: Stats) -> Sequence[tuple[str, int, int]]:
    served = [(f"hits in {tier.name}", tally.hits.get(tier.name, 0), tally.asked) for tier in stats.tiers]
    counted = [
        (name.replace("_", " "), stats.counters[name], 0) for name in COUNTERS if name in stats.counters
    ]
    return (
        ("asked for", tally.asked, 0),
        *served,
        ("read, all tiers", tally.granted, tally.asked),
        ("matched, not readable in time", tally.short, tally.asked),
        ("stored", tally.stored, 0),
        ("already present", tally.present, 0),
        ("stores refused", tally.refused, 0),
        ("dropped (left the last tier)", sum(tier.dropped_pages for tier in stats.tiers), 0),
        *counted,
    )


def verdict(tally: Tally, check: CheckResult) -> list[str]:
    """What was wrong; empty: nothing."""
    wrong = []
    if tally.wrong_bytes:
        wrong.append(f"{tally.wrong_bytes:,} wrong bytes")
    if tally.corrupt_reads:
        wrong.append(f"{tally.corrupt_reads:,} reads with differing checksums")
    if not check.ok:
        wrong.append("the sidecar's own check found a violation")
    return wrong


def verdict_line(tally: Tally, check: CheckResult) -> str:
    """The report in one sentence, as rich markup."""
    wrong = verdict(tally, check)
    if wrong:
        return f"[red bold]WRONG[/]: {', '.join(wrong)}"
    read, written = units.human_size(tally.verified_bytes), units.human_size(tally.written_bytes)
    return f"[green bold]right[/]: 0 wrong bytes in {read} read and verified; {written} written"
