"""``hicache sim compare``: two results of one trace side by side, with intervals of their differences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hicache.errors import ConfigError, InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.sim.statistics import Interval

NAMES = {"hit_ratio": "hit ratio", "ttft_ms": "TTFT, mean (ms)", "computed_s": "prefill a request (s)"}
_BETTER_UP = {"hit_ratio"}


def run(words: Sequence[str], console: Console, *, as_json: bool) -> int:
    """Print the comparison. Raises ConfigError and InvalidArgumentError."""
    if words[0] != "compare" or len(words) != 3:
        raise ConfigError(
            f"`hicache sim compare` takes two results, not {len(words) - 1}"
            if words[0] == "compare"
            else f"hicache sim does not know {words[0]!r}",
            hint="write `hicache sim compare A.json B.json`, with files cell-*.json",
        )
    first, second = (_read(Path(word)) for word in words[1:])
    if first["trace"]["sha256"] != second["trace"]["sha256"]:
        raise InvalidArgumentError(
            "the two results are of different traces", hint="replay the same one twice"
        )
    if as_json:
        print(json.dumps({name: dataclasses.asdict(_gap(first, second, name)) for name in NAMES}, indent=1))
    else:
        _print(first, second, console)
    return 0


def _gap(first: dict[str, Any], second: dict[str, Any], measure: str) -> Interval:
    from hicache.sim import statistics

    return statistics.difference(first["rows"], second["rows"], first["columns"], measure)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no JSON ({error})"
        raise ConfigError(f"cannot read {path}: {why}") from None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, list):
        raise ConfigError(
            f"{path} holds {len(found)} results", hint="name two files cell-*.json of the folder"
        )
    if not isinstance(found, dict) or not {"rows", "columns", "trace", "config"} <= found.keys():
        raise ConfigError(f"{path} is not a result of hicache sim")
    return found


def _print(first: dict[str, Any], second: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    from hicache.sim import statistics

    same = {name for name, value in first["config"].items() if second["config"].get(name) == value}
    console.print(f"{first['trace']['name']}: {first['requests']:,} requests counted")
    for title, result in (("A", first), ("B", second)):
        told = ", ".join(f"{name} {value}" for name, value in result["config"].items() if name not in same)
        console.print(f"{title}: {told or 'the same settings'}", soft_wrap=True)
    if first["version"] != second["version"]:
        console.print(f"[yellow]other versions[/]: A {first['version']}, B {second['version']}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "A", "B", "A - B", "95 %", ""):
        table.add_column(title, justify="right" if title else "left")
    for measure, name in NAMES.items():
        gap = _gap(first, second, measure)
        values = [
            statistics.interval(each["rows"], each["columns"], measure).value for each in (first, second)
        ]
        better = "A" if (gap.value > 0) == (measure in _BETTER_UP) else "B"
        verdict = f"[green]{better} is better[/]" if gap.clear else "[dim]no clear difference[/]"
        bounds = f"{gap.low:+.4f} .. {gap.high:+.4f}"
        table.add_row(name, f"{values[0]:.4f}", f"{values[1]:.4f}", f"{gap.value:+.4f}", bounds, verdict)
    console.print(table)
    for name in ("p50", "p95", "p99"):
        console.print(f"TTFT {name}: A {first['ttft_ms'][name]:,.0f} ms, B {second['ttft_ms'][name]:,.0f} ms")
