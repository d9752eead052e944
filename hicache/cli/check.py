"""``hicache check``: verify a disk folder that no sidecar has open, page by page."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hicache.cli import terminal, units
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from hicache.tier.inspect import FolderReport, Progress

EXIT_FINE, EXIT_PROBLEMS = 0, 1
_KEYS_SHOWN = 20

EPILOG = """\
examples:
  hicache check /var/lib/hicache
  hicache check /var/lib/hicache --disk-bytes 100GiB      is the bound kept, too?
  hicache check /var/lib/hicache --json | jq .faults
  hicache check /var/lib/hicache --repair                 take out what is bad

what it looks at: every record is decoded and its checksums verified, every row of metadata is compared with
its page's key, and parents are looked up. Nothing is changed without --repair; a bad page is a miss for a
sidecar, never wrong bytes. --repair takes bad pages out, as a sidecar would when it meets one.

kinds of bad pages:
  truncated    the record is shorter than it says     no-row        a record without metadata
  foreign      not a record of hicache's              bad-row       metadata of another page, or none at all
  old-version  a record of another version            no-record     metadata without a record
  swapped      a sound record of another page         no-namespace  its namespace is not stored
  corrupt      a checksum says no

exit codes: 0 fine; 1 problems were found; 2 could not look (no such folder, in use by a sidecar, newer
format).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Verify a disk folder that no sidecar has open; changes nothing without --repair."
    parser.epilog = EPILOG
    parser.add_argument("dir", metavar="DIR", help="the folder, as given to --disk-path")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--repair", action="store_true", help="take bad pages out of the folder")
    parser.add_argument(
        "--disk-bytes", metavar="SIZE", default="0", help="the bound to check the folder's size against"
    )


def run(arguments: argparse.Namespace) -> int:
    """Look, say what was found; 0 fine, 1 problems."""
    from hicache.tier.inspect import hold_folder, inspect_folder

    path, bound = Path(arguments.dir), size_of(arguments.disk_bytes, "--disk-bytes")
    with hold_folder(path), shown_progress() as progress:
        report = inspect_folder(path, bodies=True, progress=progress)
        problems = report.problems(bound)
        repaired = _repair(path, report) if arguments.repair and problems else []
    if arguments.json:
        print(json.dumps(as_json(report, problems) | {"repaired": repaired}, indent=2))
    else:
        _print(report, problems, bound)
        for line in repaired:
            print(f"repaired: {line}")
    return EXIT_PROBLEMS if problems else EXIT_FINE


def _repair(path: Path, report: FolderReport) -> list[str]:
    from hicache.tier.repair import repair

    return repair(path, report)


def size_of(text: str, flag: str) -> int:
    """A size given to a flag. Raises ConfigError that names it."""
    try:
        return units.parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error.message}", hint=error.hint) from None


@contextlib.contextmanager
def shown_progress() -> Generator[Progress, None, None]:
    """A bar on standard error; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _name, _done, _of: None
        return
    from rich.progress import Progress as Bars

    with Bars(console=terminal.console(stderr=True), transient=True, auto_refresh=False) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, of: int) -> None:
            task = tasks.get(name) or tasks.setdefault(name, bars.add_task(name))
            bars.update(task, completed=done, total=of)
            bars.refresh()  # by hand: the reader is a forked process, and no thread of ours may run beside that

        yield show


def as_json(report: FolderReport, problems: list[str]) -> dict[str, object]:
    """The report as plain values."""
    return {
        "path": report.path,
        "format_version": report.format_version,
        "problems": problems,
        "pages": report.pages,
        "reachable_pages": report.reachable_pages,
        "stranded_pages": report.stranded_pages,
        "rootless_pages": report.rootless_pages,
        "disk_bytes": report.disk_bytes,
        "quarantine": {"files": report.quarantine_files, "bytes": report.quarantine_bytes},
        "faults": dict(report.faults),
        "bad_pages": [
            {"shard": shard.name, "key": bad.key.hex(), "kind": bad.fault.value, "detail": bad.detail}
            for shard in report.shards
            for bad in shard.bad
        ],
        "shards": [shard_json(shard) for shard in report.shards],
        "namespaces": [
            {
                "fingerprint": space.hex(),
                "model": report.namespaces[space].model if space in report.namespaces else "",
                "tenant": report.namespaces[space].tenant if space in report.namespaces else "",
                "pages": count.pages,
                "raw_bytes": count.raw_bytes,
                "stored_bytes": count.stored_bytes,
            }
            for space, count in sorted(report.by_namespace.items())
        ],
    }


def shard_json(shard: Any) -> dict[str, object]:
    """One environment as plain values."""
    names = (
        "name",
        "problem",
        "size_class_bytes",
        "entries",
        "sound_pages",
        "raw_bytes",
        "stored_bytes",
        "charge_bytes",
        "undercharged",
        "pages_in_pieces",
        "file_bytes",
        "used_bytes",
        "free_bytes",
    )
    return {name: getattr(shard, name) for name in names}


def _print(report: FolderReport, problems: list[str], bound: int) -> None:
    console = terminal.console()
    console.print(f"[bold]{report.path}[/], format {report.format_version}")
    console.print(shard_table(report))
    console.print(
        f"pages: {report.pages:,} sound; {report.reachable_pages:,} reachable, "
        f"{report.stranded_pages:,} stranded (their parent is not stored), {report.rootless_pages:,} without a place"
    )
    charged, taken = (sum(getattr(s, n) for s in report.shards) for n in ("charge_bytes", "used_bytes"))
    console.print(f"charges: {units.human_size(charged)} for {units.human_size(taken)} in use")
    limit = f" of {units.human_size(bound)}" if bound else ""
    console.print(
        f"size: {units.human_size(report.disk_bytes)}{limit}; quarantine {report.quarantine_files:,} records, "
        f"{units.human_size(report.quarantine_bytes)}"
    )
    shown = [(shard.name, bad) for shard in report.shards for bad in shard.bad][:_KEYS_SHOWN]
    for name, bad in shown:
        print(f"  {name} {bad.key.hex()} {bad.fault.value}{f': {bad.detail}' if bad.detail else ''}")
    if report.faults.total() > len(shown):
        print(f"  and {report.faults.total() - len(shown):,} more (--json lists all)")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print("check: fine" if not problems else f"check: {count}")


def shard_table(report: FolderReport) -> Any:
    """One row an environment."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("shard", "pages up to", "pages", "bad", "raw", "stored", "ratio", "in use", "file", "free"):
        table.add_column(title, justify="left" if title == "shard" else "right")
    size = units.human_size
    for shard in report.shards:
        table.add_row(
            shard.name,
            size(shard.size_class_bytes) if shard.size_class_bytes else "any size",
            f"{shard.sound_pages:,}",
            f"{len(shard.bad):,}" + ("+" if shard.problem else ""),
            size(shard.raw_bytes),
            size(shard.stored_bytes),
            f"{shard.raw_bytes / shard.stored_bytes:.2f}" if shard.stored_bytes else "",
            size(shard.used_bytes),
            size(shard.file_bytes),
            f"{shard.free_bytes / shard.file_bytes:.0%}" if shard.file_bytes else "",
        )
    return table
