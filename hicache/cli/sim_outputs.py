"""What ``hicache sim`` leaves behind: a table to read, files for programs, and the report."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hicache.cli import units
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from hicache.sim.curve import Curve
    from hicache.sim.options import Settings
    from hicache.sim.packed import PackedTrace
    from hicache.sim.summary import Line, Prices
    from hicache.sim.sweep import Result

#: Lines of the table on the terminal; the report has all.
TABLE_LINES = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """Where results go, and what they are compared with."""

    folder: Path
    baseline: str
    command: str
    parquet: bool
    prices: Prices
    oracle: bool
    jobs: int


def require_parquet() -> None:
    """Raise ConfigError, before anything is run, where Parquet cannot be written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "--parquet needs pyarrow, which is not installed",
            hint="pip install pyarrow, or use results.csv or results.json, which hold the same",
        )


def write(
    wish: Wish, settings: Settings, trace: PackedTrace, results: list[Result], console: Console
) -> None:
    """Everything, and a word on where it is."""
    from hicache.sim import summary
    from hicache.sim.curve import lru_curve

    ids = (memoryview(row[5]).cast("q")[::2] for row in trace)
    warmup = int(settings.warmup * trace.facts.requests)
    curve = lru_curve(ids, counted_from=warmup)
    lines = summary.lines(results, baseline=wish.baseline, curve=curve, prices=wish.prices)
    print_table(lines, wish.baseline, console)
    best = _optimum(wish, trace, lines, console) if wish.oracle and not warmup else []
    folder = wish.folder
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for result in results:
        path = folder / f"cell-{_slug(result)}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [flat(line) for line in lines]
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if wish.parquet:
        _write_parquet(rows, folder / "results.parquet")
    _write_html(wish, settings, trace, lines, _references(lines, curve, best))
    console.print(
        f"{folder / 'report.html'}: the report; beside it results.csv, results.json and a JSON file a cell",
        soft_wrap=True,
    )


def _slug(result: Result) -> str:
    config: Any = result["config"]
    words = "-".join(str(config[name]) for name in ("policy", "capacity", "mode", "seed"))
    clean = "".join(letter if letter.isalnum() or letter in "-.%" else "_" for letter in words)
    return f"{clean}-{str(result['key'])[:6]}"


def flat(line: Line) -> dict[str, object]:
    """One line as plain columns."""
    one = line.one
    against = line.against
    return {
        "policy": line.policy,
        "capacity": line.capacity,
        "mode": line.mode,
        "seeds": len(line.results),
        "pages": line.pages,
        "capacity_bytes": sum(tier["capacity_bytes"] for tier in one["tiers"]),
        "requests": one["requests"],
        "hit_ratio": line.hit_ratio.value,
        "hit_ratio_low": line.hit_ratio.low,
        "hit_ratio_high": line.hit_ratio.high,
        "against_baseline": against.value if against else "",
        "against_low": against.low if against else "",
        "against_high": against.high if against else "",
        "equals_lru_pages": line.equals_pages if line.equals_pages >= 0 else "",
        "hits_by_tier": " ".join(
            f"{tier['name']}={pages}" for tier, pages in zip(one["tiers"], one["hits_by_tier"], strict=True)
        ),
        "late_pages": line.mean("late_pages"),
        "refused_stores": line.mean("refused_stores"),
        "prefill_saved_s": line.mean("prefill", "saved_s"),
        "prefill_computed_s": line.mean("prefill", "computed_s"),
        "flops_saved": line.mean("prefill", "saved_flops"),
        **{f"ttft_{name}_ms": line.mean("ttft_ms", name) for name in ("mean", "p50", "p95", "p99")},
        "disk_write_bytes": line.mean("moved", "disk_write_bytes"),
        "usd_per_million_hit_tokens": line.usd_per_million if line.usd_per_million >= 0 else "",
        "usd_saved_per_hour": line.usd_saved_per_hour,
        "usd_tiers_per_hour": line.usd_tiers_per_hour,
        "trace_sha256": one["trace"]["sha256"],
        "version": one["version"],
        "warmup_requests": one["warmup"]["requests"],
        "took_s": line.mean("took_s"),
    }


def _write_parquet(rows: list[dict[str, object]], path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    plain = [{name: None if value == "" else value for name, value in row.items()} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(plain), path)


def print_table(lines: Sequence[Line], baseline: str, console: Console) -> None:
    """The cells, a line each."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = _columns(lines)
    for title in shown:
        name = f"against {baseline}" if title == "against" else title
        table.add_column(name, justify="left" if title in {"policy", "mode"} else "right", no_wrap=True)
    for line in lines[:TABLE_LINES]:
        row = _row(line)
        table.add_row(*(row[title] for title in shown))
    console.print(table)
    if len(lines) > TABLE_LINES:
        console.print(f"[dim]and {len(lines) - TABLE_LINES} more lines, in the files[/]")


def _columns(lines: Sequence[Line]) -> list[str]:
    """Those that say something: a mode that all share, or refusals that there were none of, do not."""
    rows = [_row(line) for line in lines]
    dull = {"mode"} if len({line.mode for line in lines}) == 1 else set()
    dull |= {
        title for title in ("against", "= LRU at", "refused") if all(row[title] in {"", "0"} for row in rows)
    }
    return [title for title in rows[0] if title not in dull]


def _row(line: Line) -> dict[str, str]:
    gap = line.against
    against = ""
    if gap is not None:
        colour = ("green" if gap.value > 0 else "red") if gap.clear else "dim"
        against = f"[{colour}]{gap.value:+.4f}[/] ±{(gap.high - gap.low) / 2:.4f}"
    saved, computed = line.mean("prefill", "saved_s"), line.mean("prefill", "computed_s")
    times = {name: units.human_duration(line.mean("ttft_ms", name)) for name in ("p50", "p95", "p99")}
    return {
        "policy": line.policy,
        "capacity": line.capacity,
        "mode": line.mode,
        "hit ratio": f"[bold]{line.hit_ratio.value:.4f}[/]",
        "95 %": f"±{(line.hit_ratio.high - line.hit_ratio.low) / 2:.4f}",
        "against": against,
        "= LRU at": f"{line.equals_pages / line.pages:.2f}x"
        if line.equals_pages >= 0 and line.policy != "lru"
        else "",
        "saved": f"{saved / (saved + computed):.1%}" if saved + computed else "",
        "TTFT p50": times["p50"],
        "p95": times["p95"],
        "p99": times["p99"],
        "refused": f"{line.mean('refused_stores'):,.0f}",
    }


def _optimum(
    wish: Wish, trace: PackedTrace, lines: Sequence[Line], console: Console
) -> list[tuple[int, float]]:
    from hicache.sim.bounds import optimum

    with console.status("the offline optimum (--no-oracle leaves it out)"):
        found = optimum(trace, [line.pages for line in lines], wish.folder, jobs=wish.jobs)
    names = {line.pages: line.capacity for line in lines}
    told = ", ".join(f"{names[pages]} {ratio:.4f}" for pages, ratio in found)
    console.print(f"the offline optimum (Belady, all room in one tier): {told}", soft_wrap=True)
    return found


def _references(
    lines: Sequence[Line], curve: Curve, best: list[tuple[int, float]]
) -> dict[str, list[tuple[int, float]]]:
    """Curves beside the policies': exact LRU, the optimum, and what no cache can pass."""
    counts = sorted({line.pages for line in lines})
    low, high = max(counts[0] // 2, 1), max(counts[-1] * 2, 2)
    steps = sorted({max(1, round(low * (high / low) ** (at / 80))) for at in range(81)})
    found = {"lru, exact": curve.points(steps)}
    if best:
        found["oracle"] = best
    return found | {"unbounded": [(low, curve.bound), (high, curve.bound)]}


def _write_html(
    wish: Wish,
    settings: Settings,
    trace: PackedTrace,
    lines: Sequence[Line],
    references: dict[str, list[tuple[int, float]]],
) -> None:
    from hicache.sim.report import Story, render
    from hicache.version import __version__

    sources = {
        "model": f"{settings.model.name}, {settings.model.source}",
        "hardware": f"{settings.hardware.name}, {settings.hardware.source}",
        "prices": "RAM and disk: Google Cloud list prices of 2025 unless given; GPU as above unless given",
    }
    story = Story(
        trace.facts,
        lines,
        references,
        wish.baseline,
        settings.page_bytes(trace.facts.block_tokens),
        __version__,
        wish.command,
        sources,
    )
    (wish.folder / "report.html").write_text(render(story), encoding="utf-8")
