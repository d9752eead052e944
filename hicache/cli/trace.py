"""``hicache trace``: statistics of traces, conversions between formats, and traces made from a seed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hicache.cli import terminal
from hicache.errors import ConfigError, InvalidArgumentError
from hicache.sim.traces import FORMAT_NAMES, Request, Trace, generated, open_trace
from hicache.sim.traces.arrivals import PROCESSES
from hicache.sim.traces.presets import PRESETS
from hicache.sim.traces.writers import WRITABLE, coarser, write

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\
examples:
  hicache trace stats conversation_trace.jsonl.zst            what a cache could find in it, as tables
  hicache trace stats t.jsonl --json stats.json --plot stats.html
  hicache trace convert recording.hcrec t.jsonl.zst           a recording as Mooncake's JSON lines
  hicache trace convert qwen_traceA.jsonl t.hcrec --coarser 32     blocks of 512 tokens instead of 16
  hicache trace generate --preset agent-like --requests 20000 --seed 7 t.jsonl.zst

Formats are told by a file's first lines: Mooncake, Qwen-Bailian, LMCache look-up logs, token ids, text (with
--tokenizer), and recordings of `hicache serve --record`; plain or packed (zst, gz, xz, bz2). What is written
follows the ending: .hcrec is a recording, anything else Mooncake's lines; .zst, .gz, .xz and .bz2 pack it.
Bad lines are counted and named; --strict stops at the first. exit codes: 0 fine; 1 there were bad lines; 2 bad
usage, or a file that is no trace.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their flags."""
    parser.description = "Look at traces, convert them, make them."
    parser.epilog = EPILOG
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, help="stats, convert or generate"
    )
    stats = actions.add_parser(
        "stats", help="what a cache could find, reuse, sharing, lengths", allow_abbrev=False
    )
    stats.add_argument("file", metavar="FILE")
    _add_reading(stats)
    stats.add_argument("--json", metavar="FILE", help="write all of it as JSON to FILE; '-': standard output")
    stats.add_argument("--plot", metavar="FILE", help="write a page with plots (HTML, nothing loaded)")
    convert = actions.add_parser("convert", help="write a trace in another format", allow_abbrev=False)
    convert.add_argument("file", metavar="IN")
    convert.add_argument("out", metavar="OUT")
    _add_reading(convert)
    convert.add_argument("--to", choices=("auto", *WRITABLE), default="auto", help="default: by OUT's ending")
    convert.add_argument(
        "--coarser", metavar="N", default="1", help="write blocks N times as large; finer ones cannot be made"
    )
    generate = actions.add_parser("generate", help="make a trace from a seed", allow_abbrev=False)
    generate.add_argument("out", metavar="OUT")
    _add_generating(generate)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("auto", *FORMAT_NAMES), default="auto", help="default: told by its first lines"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad line")
    parser.add_argument(
        "--block-tokens", metavar="N", default="0", help="tokens of a block, where the file does not say"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", default="", help="for text: tokenizer.json, or a hub name"
    )
    parser.add_argument(
        "--limit", metavar="N", default="0", help="read only the first N requests; default 0: all"
    )


def _add_generating(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="conversation-like", help="default conversation-like"
    )
    parser.add_argument("--requests", metavar="N", default="0", help="default: the preset's")
    parser.add_argument("--seed", metavar="N", default="1", help="default 1")
    parser.add_argument("--block-tokens", metavar="N", default="0", help="default: 512")
    parser.add_argument("--arrivals", choices=PROCESSES, help="how sessions begin; default: the preset's")
    parser.add_argument("--every-ms", metavar="MS", default="0", help="mean gap between sessions' begins")
    parser.add_argument("--to", choices=("auto", *WRITABLE), default="auto", help="default: by OUT's ending")


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    if arguments.action == "generate":
        return _generate(arguments)
    trace = open_trace(
        arguments.file,
        format=arguments.format,
        strict=arguments.strict,
        block_tokens=_count(arguments, "block_tokens"),
        tokenizer=arguments.tokenizer,
    )
    return _stats(arguments, trace) if arguments.action == "stats" else _convert(arguments, trace)


def _count(arguments: argparse.Namespace, name: str) -> int:
    text = str(getattr(arguments, name))
    if not text.isdecimal():
        raise ConfigError(f"--{name.replace('_', '-')}: {text!r} is not a whole number of 0 or more")
    return int(text)


def _stats(arguments: argparse.Namespace, trace: Trace) -> int:
    from hicache.cli import trace_report
    from hicache.sim.traces.stats import trace_stats

    console = terminal.console(stderr=arguments.json == "-")
    for flag in ("json", "plot"):  # before minutes of reading
        _check_folder(f"--{flag}", getattr(arguments, flag) or "-")
    with _progress(console, "reading", 0) as progress:
        found = trace_stats(progress.over(_limited(arguments, trace)))
    trace_report.print_stats(console, trace, found)
    if arguments.json:
        told = {
            "trace": trace.name,
            "sha256": trace.sha256() if not trace.problems else "",
            "block_tokens": trace.block_tokens,
            "bad_lines": trace.problems.total,
            "bound": round(found.bound, 6),
            **dataclasses.asdict(found),
        }
        text = json.dumps(told, indent=2) + "\n"
        if arguments.json == "-":
            print(text, end="")
        else:
            Path(arguments.json).write_text(text, encoding="utf-8")
    if arguments.plot:
        Path(arguments.plot).write_text(trace_report.page(trace, found), encoding="utf-8")
    return _report_problems(console, trace)


def _check_folder(flag: str, name: str) -> None:
    folder = Path(name).parent
    if name != "-" and not folder.is_dir():
        raise ConfigError(f"{flag}: cannot write {name}: there is no folder {folder}")


def _limited(arguments: argparse.Namespace, trace: Iterable[Request]) -> Iterator[Request]:
    from itertools import islice

    return islice(trace, _count(arguments, "limit") or None)


def _convert(arguments: argparse.Namespace, trace: Trace) -> int:
    factor = _count(arguments, "coarser")
    if factor < 1:
        raise ConfigError("--coarser must be at least 1", hint="blocks can be made larger, not smaller")
    if Path(arguments.out).resolve() == Path(arguments.file).resolve():
        raise InvalidArgumentError("IN and OUT are the same file")
    console = terminal.console()
    block_tokens = trace.block_tokens * factor
    with _progress(console, "converting", 0) as progress:
        requests: Iterable[Request] = progress.over(_limited(arguments, trace))
        if factor > 1:
            requests = coarser(requests, factor)
        count = write(
            Path(arguments.out), requests, block_tokens=block_tokens, form=arguments.to, origin=trace.name
        )
    console.print(f"{count:,} requests in blocks of {block_tokens} tokens: {arguments.out}", soft_wrap=True)
    return _report_problems(console, trace)


def _generate(arguments: argparse.Namespace) -> int:
    trace = generated(
        arguments.preset,
        requests=_count(arguments, "requests"),
        seed=_count(arguments, "seed"),
        block_tokens=_count(arguments, "block_tokens"),
        process=arguments.arrivals or "",
        every_ms=_count(arguments, "every_ms"),
    )
    console = terminal.console()
    with _progress(console, "generating", trace.mix.requests) as progress:
        count = write(
            Path(arguments.out),
            progress.over(trace),
            block_tokens=trace.block_tokens,
            form=arguments.to,
            origin=trace.name,
        )
    console.print(f"{count:,} requests of {trace.name}: {arguments.out}", soft_wrap=True)
    return 0


class _Progress:
    """A bar on a terminal, or a count where the end is not known."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(what, total=total or None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def over(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests, counted."""
        done = 0
        for done, request in enumerate(requests, 1):
            if not done % 512:
                self._bar.update(self._task, completed=done)
            yield request
        self._bar.update(self._task, completed=done)


def _progress(console: Console, what: str, total: int) -> _Progress:
    return _Progress(console, what, total)


def _report_problems(console: Console, trace: Trace) -> int:
    problems = trace.problems
    if not problems.total:
        return 0
    console.print(f"[yellow]{problems.total:,} lines could not be used[/]:")
    for problem in problems[:10]:
        console.print(f"  {trace.name}:{problem.line}: {problem.text}", soft_wrap=True, markup=False)
    if problems.total > 10:
        console.print("  ...")
    return 1
