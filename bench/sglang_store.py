"""SGLang's storage path over its own file backend and over hicache: one controller, one kind of pool, in turn.

    python bench/sglang_store.py [--pages 32] [--repetitions 9] [--folder /dev/shm]

Needs the project's environment, and ``tests/engines/venvs/setup sglang``. Pages of 2 MiB; the file backend writes to
a folder in memory, so that both are compared in RAM. CPU time counts the sidecar's, too. ``harm``: what the file
backend gives for a page with one flipped bit, and for one that was cut. Writes ``bench/results/sglang_store.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402

from hicache.cli.doctor_engine import sglang_config  # noqa: E402
from hicache.cli.sidecar import Sidecar  # noqa: E402

PYTHON = HERE.parent / ".venv-sglang" / "bin" / "python"
PEER = HERE / "peers" / "sglang_store.py"
PAGE = {"page_size": 64, "layers": 8, "heads": 8, "head_size": 128, "pool": "mha", "model": "bench"}
PAGE_BYTES = 2 * 64 * 8 * 8 * 128 * 2
#: Contender: the layout of its pool and its allocator; the file backend keeps SGLang's own default layout, too.
POOLS = {"page_first": "shm", "layer_first": "default"}


def spec_of(pages: int, layout: str, allocator: str, extra: dict[str, Any]) -> dict[str, Any]:
    """What the contender's process makes."""
    return {
        **PAGE,
        "pages": pages,
        "tokens": 2 * pages * PAGE["page_size"],  # type: ignore[operator]
        "layout": layout,
        "allocator": allocator,
        "backend": "dynamic" if extra else "file",
        "extra": extra,
        "pid": 0,
        "folder": "",
    }


def contenders(pages: int, target: str, pid: int, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for layout, allocator in POOLS.items():
        found[f"file {layout}"] = spec_of(pages, layout, allocator, {}) | {"folder": f"{folder}/{layout}"}
        ours = spec_of(pages, layout, allocator, sglang_config(target))
        found[f"hicache {layout}"] = ours | {"pid": pid}
    return found


def harm(pages: int, folder: str) -> dict[str, str]:
    """What SGLang's file backend does with a page that is not what was stored."""
    spec = spec_of(pages, "page_first", "shm", {}) | {"folder": f"{folder}/harm"}
    command = [str(PYTHON), str(PEER), "harm", json.dumps(spec)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment(), timeout=300
    )
    if done.returncode:
        raise harness.BenchError(f"harm: {done.stderr[-500:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--folder", default="/dev/shm", help="where the file backend's folder is made")
    parser.add_argument("--name", default="sglang_store")
    asked = parser.parse_args()
    if not PYTHON.exists():
        raise harness.BenchError("no environment .venv-sglang: run tests/engines/venvs/setup sglang")
    host_bytes = 4 * asked.pages * PAGE_BYTES
    with (
        tempfile.TemporaryDirectory(prefix="hc-") as home,
        tempfile.TemporaryDirectory(dir=asked.folder) as folder,
    ):
        sidecar = Sidecar(Path(home), ["--host-bytes", str(host_bytes)])
        sidecar.start()
        try:
            measure(asked, sidecar, folder)
        finally:
            sidecar.stop()


def measure(asked: argparse.Namespace, sidecar: Sidecar, folder: str) -> None:
    rows = []
    specs = contenders(asked.pages, sidecar.target, sidecar.pid, folder)
    for layout in POOLS:
        pair = [f"file {layout}", f"hicache {layout}"]
        processes = [
            harness.Process([str(PYTHON), str(PEER)], specs[name], name, environment()) for name in pair
        ]
        with processes[0], processes[1]:
            rows += harness.compare(processes, repetitions=asked.repetitions)
    found = ratios(rows)
    for row in found:
        print(f"{row['case']:<8} {row['layout']:<12} wall x{row['wall']:.2f}  cpu x{row['cpu']:.2f}")
    report = {"pages": asked.pages, "page_bytes": PAGE_BYTES, "rows": rows, "file_over_hicache": found}
    harness.write(asked.name, report | {"harm": harm(asked.pages, folder)}, ("numpy", "xxhash"))


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The file backend's time over ours: above 1, ours is faster."""
    taken = {(row["case"], row["contender"]): row for row in rows if "error" not in row}
    return [
        {
            "case": case,
            "layout": layout,
            "wall": taken[case, f"file {layout}"]["wall_us"] / taken[case, f"hicache {layout}"]["wall_us"],
            "cpu": taken[case, f"file {layout}"]["cpu_us"] / taken[case, f"hicache {layout}"]["cpu_us"],
        }
        for layout in POOLS
        for case in ("set", "get", "exists")
        if (case, f"file {layout}") in taken and (case, f"hicache {layout}") in taken
    ]


if __name__ == "__main__":
    harness.run(main)
