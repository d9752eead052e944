"""The engine's own cost: whole events, without tiers, threads or RPC.

    python bench/engine.py [--repetitions 9] [--cases fetch_8k_20_runs ...]

Writes ``bench/results/engine.json``. Bars: a Fetch of 8k resident tokens in at most 20 runs under 60 us (median);
evicting 64 tokens with 100k leaves at most 1.5x the time with 10k. Exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness

HERE = Path(__file__).resolve().parent
FETCH_BAR_US = 60.0
GROWTH_BAR = 1.5


def main() -> None:
    """Run all cases, then hold them against the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="samples a case, at least 7 (default 9)")
    parser.add_argument("--cases", nargs="*", default=[], help="only these cases")
    parser.add_argument("--name", default="engine", help="name of the result file")
    options = parser.parse_args()
    command = [sys.executable, str(HERE / "contenders" / "hicache_engine.py")]
    with harness.Process(command, {}) as contender:
        rows = harness.compare([contender], options.cases, options.repetitions)
        info = contender.info
    bars = verdicts(rows)
    for bar in bars:
        print(
            f"{bar['bar']:<44} {bar['value']:>8.2f}  at most {bar['most']:g}  {'met' if bar['met'] else 'MISSED'}"
        )
    harness.write(options.name, {"contenders": [info], "rows": rows, "bars": bars})
    if not all(bar["met"] for bar in bars):
        raise harness.BenchError("a bar was missed")


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars that the cases taken allow to judge."""
    cpu = {row["case"]: row["cpu_us"] for row in rows if "cpu_us" in row}
    found = []
    if "fetch_8k_20_runs" in cpu:
        found.append(("Fetch, 8k tokens in 20 runs, us", cpu["fetch_8k_20_runs"], FETCH_BAR_US))
    if {"evict64_10k_leaves", "evict64_100k_leaves"} <= cpu.keys():
        growth = cpu["evict64_100k_leaves"] / cpu["evict64_10k_leaves"]
        found.append(("evict 64 tokens, 100k leaves over 10k", growth, GROWTH_BAR))
    return [{"bar": bar, "value": value, "most": most, "met": value <= most} for bar, value, most in found]


if __name__ == "__main__":
    harness.run(main)
