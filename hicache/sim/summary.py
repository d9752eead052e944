"""Results put side by side: seeds joined, intervals, what a hit costs, and which LRU cache a policy is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hicache.sim import statistics
from hicache.sim.cell import SEED_WORD
from hicache.sim.curve import Curve
from hicache.sim.statistics import Interval

Result = Mapping[str, Any]
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """In US dollars an hour."""

    gpu_usd: float
    ram_gib_usd: float
    disk_gib_usd: float


@dataclasses.dataclass(slots=True)
class Line:
    """One policy at one capacity in one mode, over all its seeds."""

    policy: str
    capacity: str
    mode: str
    results: list[Result]
    hit_ratio: Interval
    rows: list[list[int]]
    against: Interval | None = None  # hit ratio minus that of the baseline at the same capacity
    equals_pages: int = -1  # LRU reaches the same hit ratio with so many pages; -1: never, or not asked
    usd_per_million: float = -1.0  # hit tokens; -1: the trace has no time
    usd_saved_per_hour: float = 0.0  # of GPU time, by not computing what was found
    usd_tiers_per_hour: float = 0.0

    @property
    def one(self) -> Result:
        """The first seed's result."""
        return self.results[0]

    def mean(self, *path: str) -> float:
        """Of one number of the results, over the seeds."""
        return sum(_at(result, path) for result in self.results) / len(self.results)

    @property
    def pages(self) -> int:
        """Of all tiers together."""
        return sum(int(tier["pages"]) for tier in self.one["tiers"])


def _at(result: Result, path: Sequence[str]) -> float:
    found: Any = result
    for name in path:
        found = found[name]
    return float(found)


def lines(results: Sequence[Result], *, baseline: str, curve: Curve | None, prices: Prices) -> list[Line]:
    """In the order of the results. ``curve``: the exact one of LRU, for what a policy is worth."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        config = result["config"]
        groups.setdefault((config["policy"], config["capacity"], config["mode"]), []).append(result)
    found = []
    for (policy, capacity, mode), members in groups.items():
        rows = _joined(members)
        interval = statistics.interval(rows, members[0]["columns"])
        line = Line(policy.replace(SEED_WORD, "*"), capacity, mode, members, interval, rows)
        if curve is not None and mode == "instant" and len(members[0]["tiers"]) == 1:
            line.equals_pages = curve.pages_for(interval.value)
        _price(line, prices)
        found.append(line)
    _compare(found, baseline)
    return found


def _joined(results: Sequence[Result]) -> list[list[int]]:
    """Rows of all seeds, added up stretch by stretch."""
    return [
        [sum(cells) for cells in zip(*stretches, strict=True)]
        for stretches in zip(*[result["rows"] for result in results], strict=True)
    ]


def _compare(found: Sequence[Line], baseline: str) -> None:
    base = {(line.capacity, line.mode): line for line in found if line.policy == baseline}
    for line in found:
        other = base.get((line.capacity, line.mode))
        if other is None or other is line:
            continue
        columns = line.one["columns"]
        line.against = statistics.difference(_each_seed(line), _each_seed(other), columns)


def _each_seed(line: Line) -> list[list[int]]:
    """Rows as of one seed, so that a line of many seeds pairs up with a line of one."""
    count = len(line.results)
    return [[value / count for value in row] for row in line.rows] if count > 1 else line.rows  # type: ignore[misc]


def _price(line: Line, prices: Prices) -> None:
    each = {"host": prices.ram_gib_usd, "disk": prices.disk_gib_usd}
    line.usd_tiers_per_hour = sum(
        tier["capacity_bytes"] / GIB * each.get(tier["name"], 0.0) for tier in line.one["tiers"]
    )
    span_s = line.mean("load", "span_s") if line.one["load"] else line.one["trace"]["span_ms"] / 1000
    hits = line.mean("hit_pages") * line.one["trace"]["block_tokens"]
    if span_s > 0:
        line.usd_saved_per_hour = line.mean("prefill", "saved_s") / span_s * prices.gpu_usd
        if hits:
            line.usd_per_million = line.usd_tiers_per_hour * span_s / 3600 / hits * 1e6
