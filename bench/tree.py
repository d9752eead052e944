"""hicache's tree beside SGLang's Rust tree core, in one run.

    python bench/tree.py [--repetitions 9] [--cases match_flat_8k ...] [--only peer|ours] [--page-tokens 16]

Writes ``bench/results/tree.json``. The peer needs ``bench/peers/setup.sh sglang`` once.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import workloads

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run both sides, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="samples a case, at least 7 (default 9)")
    parser.add_argument("--cases", nargs="*", default=[], help="only these cases")
    parser.add_argument("--only", choices=("peer", "ours"), help="one side alone")
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--name", default="tree", help="name of the result file")
    options = parser.parse_args()
    spec = workloads.TreeSpec(page_tokens=options.page_tokens).to_json()
    commands = {}
    if options.only != "peer":
        commands["hicache"] = [sys.executable, str(HERE / "contenders" / "hicache_tree.py")]
    if options.only != "ours":
        commands["sglang"] = [str(harness.venv_python("sglang")), str(HERE / "peers" / "sglang_tree.py")]
    with ExitStack() as stack:
        contenders = [stack.enter_context(harness.Process(command, spec)) for command in commands.values()]
        rows = harness.compare(contenders, options.cases, options.repetitions)
        found = harness.ratios(rows, "hicache", "sglang")
    harness.print_ratios(found)
    harness.write(
        options.name,
        {"spec": spec, "contenders": [c.info for c in contenders], "rows": rows, "ratios": found},
    )


if __name__ == "__main__":
    harness.run(main)
