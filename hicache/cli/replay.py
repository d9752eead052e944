"""``hicache replay``: a recorded trace through a sidecar, with every byte that is fetched verified.

Each request is looked up, read and verified, then its missing pages are stored and committed before the
next one asks: at most one Fetch, one Reserve and one Commit. Ids of the trace become 16-byte symbols of a
hash namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hicache.cli import config, link, report, sidecar, symbols, terminal, units
from hicache.cli.drive import Driver, Tally
from hicache.cli.settings import ServeConfig
from hicache.cli.stats import plain
from hicache.errors import ConfigError, InvalidArgumentError
from hicache.sim.traces import FORMAT_NAMES, Request, Trace, open_trace
from hicache.sim.traces.facts import TraceFacts, facts
from hicache.types import SymbolKind

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.rpc.client.results import CheckResult, Stats

EPILOG = """\
examples:
  hicache replay --trace conversation_trace.jsonl.zst                 with a sidecar of its own
  hicache replay --trace t.jsonl --host-bytes 64MiB --disk-bytes 1GiB --limit 2000
  hicache replay --trace t.jsonl --host-bytes 8MiB --disk-bytes 0     what a small cache loses
  hicache replay --trace t.jsonl --target unix:///run/hicache/hicache.sock --json result.json

The trace: any format of `hicache trace` (docs/TRACES.md). Pages are scaled down by --page-bytes, so that any
trace fits. The report sets the hit ratio beside that of an infinite cache, which follows from the trace alone.
exit codes: 0 all right; 1 a wrong byte, or a violated invariant; 3 the sidecar is not there.
"""

#: Tier flags of the sidecar that a replay may start.
OWN = ("device", "device_bytes", "host_bytes", "disk_bytes", "policy", "write_policy")
HOST_BYTES, DISK_BYTES = "256MiB", "4GiB"
WAIT_MS = 30_000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Drive a sidecar with a recorded trace and verify every byte that it serves."
    parser.epilog = EPILOG
    parser.add_argument("--trace", metavar="FILE", required=True, help="a trace, plain or compressed")
    parser.add_argument(
        "--format", choices=("auto", *FORMAT_NAMES), default="auto", help="default: told by its first lines"
    )
    parser.add_argument(
        "--limit", metavar="N", default="0", help="replay only the first N requests; default 0: all"
    )
    parser.add_argument("--page-bytes", metavar="SIZE", default="4KiB", help="bytes of a page; default 4KiB")
    parser.add_argument(
        "--salt",
        default="",
        help="cache salt; default: a new one each time, so that nothing is found from before",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON to FILE; '-': standard output"
    )
    link.add_flags(parser, without_target="a sidecar of its own, with the tiers and policy below")
    defaults = {
        "host_bytes": HOST_BYTES,
        "disk_bytes": f"{DISK_BYTES}, in a temporary folder; 0: no disk tier",
    }
    config.add_flags(parser, ServeConfig, only=OWN, defaults=defaults)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What the replay found."""

    trace: str
    facts: TraceFacts
    tally: Tally
    stats: Stats
    check: CheckResult
    took_ms: int

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "trace": self.trace,
            "right": not report.verdict(self.tally, self.check),
            "problems": report.verdict(self.tally, self.check),
            "facts": dataclasses.asdict(self.facts) | {"bound": round(self.facts.bound, 6)},
            "hit_ratio": round(self.tally.hit_ratio, 6),
            "hit_ratio_by_tier": {
                name: round(pages / self.tally.asked, 6) for name, pages in sorted(self.tally.hits.items())
            },
            "client": self.tally.as_json(),
            "sidecar": plain(self.stats),
            "check": plain(self.check),
            "took_s": self.took_ms / 1000,
        }


def run(arguments: argparse.Namespace) -> int:
    """Replay and print what was found."""
    if not arguments.limit.isdecimal():
        raise ConfigError(f"--limit: {arguments.limit!r} is not a whole number of 0 or more")
    console = terminal.console(stderr=arguments.json == "-")
    try:
        trace = open_trace(arguments.trace, format=arguments.format, strict=True)
        found = facts(islice(trace, int(arguments.limit) or None))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"--trace: {error.message}", hint=error.hint) from error
    console.print(
        f"{trace.name}: {found.requests:,} requests, {found.blocks:,} blocks, "
        f"{found.unique_blocks:,} of them different; an infinite cache hits {found.bound:.4f}",
        soft_wrap=True,
    )
    with _target(arguments, console) as target:
        outcome = _replay(arguments, target, trace, found, console)
    _print(console, outcome)
    if arguments.json == "-":
        print(json.dumps(outcome.as_json(), indent=2))
    elif arguments.json:
        Path(arguments.json).write_text(json.dumps(outcome.as_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if report.verdict(outcome.tally, outcome.check) else 0


@contextlib.contextmanager
def _target(arguments: argparse.Namespace, console: Console) -> Iterator[str]:
    """The sidecar's address: one that runs, or one of our own for as long as this lasts."""
    target = link.load(arguments).target
    own = config.flags_given(arguments, ServeConfig)
    own = {name: value for name, value in own.items() if name in OWN}
    if target:
        if own:
            given = ", ".join("--" + name.replace("_", "-") for name in own)
            raise ConfigError(f"{given}: tiers belong to the sidecar at --target, which runs already")
        yield target
        return
    config.load(ServeConfig, flags=own, variables={})  # a mistake is told before anything starts
    words = {"host_bytes": HOST_BYTES, "disk_bytes": DISK_BYTES} | own
    disk_bytes = str(words.pop("disk_bytes"))
    flags = [word for name, value in words.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with sidecar.temporary(flags, disk_bytes=disk_bytes if units.parse_size(disk_bytes) else "") as started:
        console.print(f"[dim]{started.ready_line}[/] (pid {started.pid})", soft_wrap=True)
        yield started.target


def _replay(
    arguments: argparse.Namespace, target: str, trace: Trace, found: TraceFacts, console: Console
) -> Outcome:
    from hicache.cli.payload import PageMaker
    from hicache.runtime.clock import Clock

    page_bytes = _page_bytes(arguments.page_bytes)
    salt = arguments.salt or f"replay-{os.getpid()}-{secrets.token_hex(4)}"
    clock = Clock()
    began_ms = clock.now_ms()
    with link.open_client(target, "replay", link.load(arguments)) as client:
        namespace = client.namespace(
            model=f"trace:{trace.name}",
            salt=salt,
            page_tokens=trace.block_tokens,
            page_bytes=page_bytes,
            symbol_kind=SymbolKind.HASHES,
            symbol_hash_bytes=symbols.SYMBOL_BYTES,
        )
        driver = Driver(namespace, PageMaker(page_bytes), clock, salt=salt, wait_ms=WAIT_MS)
        _drive(islice(trace, int(arguments.limit) or None), driver, found.requests, console)
        took_ms = clock.now_ms() - began_ms
        return Outcome(
            arguments.trace, found, driver.tally, client.admin.stats(), client.admin.check(), took_ms
        )


def _page_bytes(text: str) -> int:
    try:
        return units.parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"--page-bytes: {error.message}", hint=error.hint) from None


def _drive(trace: Iterable[Request], driver: Driver, requests: int, console: Console) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    known = symbols.Symbols("hicache-replay")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("replay", total=requests)
        for request in trace:
            prompt = known.of(request.blocks)
            driver.request(prompt, prompt)
            tally = driver.tally
            progress.update(task, advance=1, description=f"hit ratio {tally.hit_ratio:.4f}")


def _print(console: Console, outcome: Outcome) -> None:
    tally, facts = outcome.tally, outcome.facts
    console.print()
    report.print_report(console, tally, outcome.stats, outcome.check)
    by_tier = " + ".join(
        f"{pages / tally.asked:.4f} {name}" for name, pages in tally.hits.items() if tally.asked
    )
    console.print(
        f"hit ratio [bold]{tally.hit_ratio:.4f}[/] = {by_tier or '0'}; an infinite cache: {facts.bound:.4f}; "
        f"{tally.granted:,} of its {facts.hit_blocks:,} hits",
        soft_wrap=True,
    )
    rate = facts.requests / max(outcome.took_ms, 1) * 1000
    console.print(f"{facts.requests:,} requests in {outcome.took_ms / 1000:.1f} s, {rate:.0f} a second")
    console.print(report.verdict_line(tally, outcome.check))
