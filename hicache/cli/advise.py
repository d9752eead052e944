"""``hicache advise``: what more or less room, or another policy, would do for a running sidecar."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hicache.cli import link, terminal, units
from hicache.cli.stats import plain

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.rpc.client.results import Advice, SizeAdvice, Stats

EPILOG = """\
examples:
  hicache advise                          of the sidecar on the default socket
  hicache advise --json | jq .sizes

The sidecar notes a small share of the pages that are looked up. From these `advise` estimates, for each tier, what
share of all pages LRU would serve if the tier had another size (the other tiers as they are), and what each policy
would have hit on the same sample. An estimate for the recent past, good to a few hundredths: for an exact answer record
(`hicache serve --record FILE`) and replay (`hicache sim --trace FILE`). exit codes: 0 fine; 3 the sidecar is not there.
"""

#: A policy is worth a word when it hits so much more.
CLEAR_GAIN = 0.02


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Ask a running sidecar what other sizes and policies would have done."
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON")
    link.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask, and say what it means."""
    with link.connect(arguments, "advise") as client:
        advice, stats = client.admin.advice(), client.admin.stats()
    if arguments.json:
        print(json.dumps(plain(advice), indent=2))
    else:
        _print(advice, stats, terminal.console())
    return 0


def _print(advice: Advice, stats: Stats, console: Console) -> None:
    seen = f"{advice.uses:,} page look-ups in the sample, 1 page of {1 / max(advice.rate, 1e-9):.0f}, over the last "
    console.print(seen + units.human_duration(advice.span_ms), soft_wrap=True)
    if not advice.sizes:
        console.print(
            "too few to say anything yet: ask again when the sidecar has served more", soft_wrap=True
        )
        return
    for tier in dict.fromkeys(each.tier for each in advice.sizes):
        console.print()
        _print_sizes([each for each in advice.sizes if each.tier == tier], console)
    console.print(f"a cache without end would serve {advice.unbounded:.1%}", soft_wrap=True)
    console.print()
    _print_policies(advice, console)
    dropped = sum(tier.dropped_pages for tier in stats.tiers)
    if not dropped:
        console.print(
            "nothing has been dropped yet: all that was stored still fits; more room in the upper tiers only brings "
            "hits nearer",
            soft_wrap=True,
        )


def _print_sizes(sizes: Sequence[SizeAdvice], console: Console) -> None:
    from rich.table import Table

    now = next(each.hit_ratio for each in sizes if each.factor == 1.0)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (f"{sizes[0].tier} at", "of now", "serves, with the tiers above", "change"):
        table.add_column(title, justify="right")
    for each in sizes:
        change = "as it is" if each.factor == 1.0 else f"{(each.hit_ratio - now) * 100:+.1f} points"
        style = "bold" if each.factor == 1.0 else ""
        size = units.human_size(each.capacity_bytes)
        table.add_row(size, f"{each.factor:g}x", f"{each.hit_ratio:.1%}", change, style=style)
    console.print(table)


def _print_policies(advice: Advice, console: Console) -> None:
    current = next(each for each in advice.policies if each.current)
    best = advice.policies[0]
    console.print("policies on the same sample, all tiers as one:")
    for each in advice.policies[:5]:
        console.print(f"  {each.name:<20} {each.hit_ratio:.1%}{'  (in use)' if each.current else ''}")
    if not any(each.current for each in advice.policies[:5]):
        console.print(f"  {current.name:<20} {current.hit_ratio:.1%}  (in use)")
    if best.hit_ratio > current.hit_ratio + CLEAR_GAIN:
        gain = (best.hit_ratio - current.hit_ratio) * 100
        console.print(
            f"{best.name} would have hit about {gain:.1f} points more: try `--policy {best.name}`",
            soft_wrap=True,
        )
    else:
        console.print(f"no policy is clearly better than {current.name}", soft_wrap=True)
