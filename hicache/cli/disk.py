"""``hicache disk``: look into, compact, export or import a disk folder that no sidecar has open."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hicache.cli import terminal, units
from hicache.cli.check import as_json, shard_table, shown_progress, size_of
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from hicache.tier.inspect import FolderReport
    from hicache.types import Namespace

EPILOG = """\
examples:
  hicache disk stats /var/lib/hicache
  hicache disk stats /var/lib/hicache --json | jq .ages
  hicache disk compact /var/lib/hicache                       give free room back to the file system
  hicache disk export /var/lib/hicache pages.hkv              everything, as one portable file
  hicache disk export /var/lib/hicache - --namespace llama-3 | ssh other 'cat > pages.hkv'
  hicache disk import /var/lib/hicache pages.hkv --disk-bytes 100GiB

Stop the sidecar first: each refuses a folder that one has open, and says which process it is.
`hicache disk ACTION --help` tells more. exit codes: 0 fine; 1 done, but something was bad and left out; 2
nothing was done.
"""

_STATS = """\
Counts by namespace and by shard: pages, raw bytes and what they take, the room inside the files that is
free, how long ago pages were last used, quarantine. Reads no page bodies; `hicache check` verifies them.
"""
_COMPACT = """\
Files of the disk tier never shrink by themselves. This copies each shard without its free pages and puts
the copy in its place once it is whole and synced; it may be interrupted at any time. Meanwhile the folder
takes more: the room of one copy beside the original.
"""
_EXPORT = """\
Writes namespaces and pages as one file, pages compressed as they are stored, every record with a checksum
(docs/DISK.md describes the format). Pages are verified on the way; bad ones are left out and counted.
FILE '-' is standard output.
"""
_IMPORT = """\
Verifies the whole file first, then every page, and stores what the folder does not have yet, parents before
children, until the capacity is reached. Doing it again changes nothing. The folder is made if it is absent.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their flags."""
    parser.description = "Look into, compact, export or import a disk folder, offline."
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, help="what to do")
    for name, text, short in (
        ("stats", _STATS, "what the folder holds"),
        ("compact", _COMPACT, "give free room back to the file system"),
        ("export", _EXPORT, "write pages to a portable file"),
        ("import", _IMPORT, "store pages from a portable file"),
    ):
        action = actions.add_parser(
            name,
            help=short,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_argument("dir", metavar="DIR", help="the folder, as given to --disk-path")
        if name in {"export", "import"}:
            action.add_argument("file", metavar="FILE", help="the portable file")
        if name == "export":
            action.add_argument(
                "--namespace",
                metavar="NAME",
                default="",
                help="only this one: its model's name, or the beginning of its fingerprint; default all",
            )
        if name == "import":
            action.add_argument(
                "--disk-bytes",
                metavar="SIZE",
                required=True,
                help="the folder's capacity, as for `hicache serve`",
            )
        action.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Do it, say what was found."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "stats": _stats,
        "compact": _compact,
        "export": _export,
        "import": _import,
    }
    return actions[arguments.action](arguments)


# -- stats


def _stats(arguments: argparse.Namespace) -> int:
    from hicache.runtime.clock import Clock
    from hicache.tier.inspect import hold_folder, inspect_folder

    path = Path(arguments.dir)
    with hold_folder(path), shown_progress() as progress:
        report = inspect_folder(path, bodies=False, progress=progress)
    problems = report.problems()
    ages = report.ages(int(Clock().wall_s() * 1000))
    if arguments.json:
        aged = [{"last_used": name, "pages": pages, "stored_bytes": stored} for name, pages, stored in ages]
        print(json.dumps(as_json(report, problems) | {"ages": aged}, indent=2))
    else:
        _print_stats(report, problems, ages)
    return 1 if problems else 0


def _print_stats(report: FolderReport, problems: list[str], ages: list[tuple[str, int, int]]) -> None:
    console = terminal.console()
    size = units.human_size
    console.print(
        f"[bold]{report.path}[/], format {report.format_version}, {size(report.disk_bytes)} on disk"
    )
    console.print(_namespace_table(report))
    console.print()
    console.print(shard_table(report))
    console.print(
        f"quarantine: {report.quarantine_files:,} records, {size(report.quarantine_bytes)}; "
        f"stranded: {report.stranded_pages:,} pages"
    )
    shown = [f"{name} ago {pages:,} ({size(stored)})" for name, pages, stored in ages[:-1] if pages]
    shown += [f"unknown {pages:,} ({size(stored)})" for _, pages, stored in ages[-1:] if pages]
    print(f"last used: {', '.join(shown) or 'no pages'}")
    for problem in problems:
        print(f"PROBLEM: {problem}")


def _namespace_table(report: FolderReport) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("namespace", "model", "tenant", "page", "pages", "raw", "stored", "ratio"):
        left = title in {"namespace", "model", "tenant"}
        table.add_column(title, justify="left" if left else "right")
    size = units.human_size
    for space, count in sorted(report.by_namespace.items(), key=lambda item: -item[1].stored_bytes):
        namespace = report.namespaces.get(space)
        table.add_row(
            space.hex()[:12] or "none",
            namespace.model if namespace else "",
            namespace.tenant if namespace else "",
            size(namespace.page_bytes) if namespace else "",
            f"{count.pages:,}",
            size(count.raw_bytes),
            size(count.stored_bytes),
            f"{count.raw_bytes / count.stored_bytes:.2f}" if count.stored_bytes else "",
        )
    return table


# -- compact


def _compact(arguments: argparse.Namespace) -> int:
    from hicache.tier.compact import compact
    from hicache.tier.inspect import hold_folder

    path = Path(arguments.dir)
    with hold_folder(path), shown_progress() as progress:
        done = list(compact(path, progress=progress))
    if arguments.json:
        names = ("name", "before_bytes", "after_bytes", "problem")
        print(json.dumps([{name: getattr(each, name) for name in names} for each in done], indent=2))
    else:
        for each in done:
            was, now = units.human_size(each.before_bytes), units.human_size(each.after_bytes)
            print(f"{each.name}: {f'left as it is: {each.problem}' if each.problem else f'{was} -> {now}'}")
        given = sum(each.before_bytes - each.after_bytes for each in done)
        print(f"given back: {units.human_size(given)}")
    return 1 if any(each.problem for each in done) else 0


# -- export and import


def _export(arguments: argparse.Namespace) -> int:
    from hicache.tier.inspect import hold_folder
    from hicache.tier.transfer import export_pages

    path, name = Path(arguments.dir), str(arguments.namespace)

    def wanted(fingerprint: bytes, namespace: Namespace) -> bool:
        return not name or namespace.model == name or (len(name) >= 4 and fingerprint.hex().startswith(name))

    with hold_folder(path), _output(arguments.file) as out, shown_progress() as progress:
        found = export_pages(path, out, wanted=wanted, progress=progress)
        if name and not found.namespaces:
            raise ConfigError(
                f"--namespace: the folder has none named {name!r}", hint="`hicache disk stats` lists them"
            )
    told = sys.stderr if arguments.file == "-" else sys.stdout
    facts = {
        name: getattr(found, name) for name in ("namespaces", "pages", "file_bytes", "bad_pages", "problems")
    }
    if arguments.json:
        print(json.dumps(facts, indent=2), file=told)
    else:
        size = units.human_size(found.file_bytes)
        print(f"exported {found.pages:,} pages of {found.namespaces:,} namespaces, {size}", file=told)
        if found.bad_pages:
            print(f"PROBLEM: {found.bad_pages:,} bad pages were left out (`hicache check` tells)", file=told)
        for problem in found.problems:
            print(f"PROBLEM: {problem}", file=told)
    return 1 if found.bad_pages or found.problems else 0


@contextlib.contextmanager
def _output(name: str) -> Generator[BinaryIO, None, None]:
    """The file to write; it gets its name when it is whole. '-' is standard output."""
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name)
    new = path.with_name(f"{path.name}.part")
    try:
        with new.open("wb") as file:
            yield file
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"FILE: cannot write {path}: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)


def _import(arguments: argparse.Namespace) -> int:
    from hicache.tier.portable import StreamFile
    from hicache.tier.transfer import Importer

    capacity = size_of(arguments.disk_bytes, "--disk-bytes")
    try:
        stream = StreamFile(Path(arguments.file))
    except OSError as error:
        raise ConfigError(f"FILE: cannot read {arguments.file}: {error.strerror}") from error
    with (
        contextlib.closing(stream),
        shown_progress() as progress,
        contextlib.closing(Importer(Path(arguments.dir), capacity)) as importer,
    ):
        found = importer.run(stream, progress=progress)
    facts = {
        name: getattr(found, name) for name in ("imported", "present", "full", "parentless", "bad", "reasons")
    }
    wiped = importer.wiped
    if arguments.json:
        print(json.dumps(facts | {"wiped": wiped}, indent=2))
    else:
        if wiped:
            print(f"the folder's older contents were not kept: {wiped}")
        print(f"imported {found.imported:,} pages; {found.present:,} were there already")
        above = "follow pages that did not fit, or" if found.full else ""
        for count, why in (
            (found.full, "did not fit into --disk-bytes"),
            (found.parentless, f"{above} have no parent in the file or the folder".strip()),
            (found.bad, "are bad"),
        ):
            if count:
                print(f"PROBLEM: {count:,} pages {why}")
        for reason, count in found.reasons.most_common(10):
            print(f"  {count:,}: {reason}")
    return 1 if found.full or found.parentless or found.bad else 0
