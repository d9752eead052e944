"""The disk tier beside the alternatives: its own pipeline with other codecs, LMCache's and SGLang's file backends.

    python bench/disk.py [--pages 128] [--repetitions 9] [--no-peers] [--kind minilm] [--folder FOLDER]

All contenders move the same pages (real K/V, see ``kv.py``) in turn; figures are raw bytes a second (what the pages are
worth to an engine) and CPU seconds a GB, process time of all threads. Needs the project's environment, for the peers
``bench/peers/setup.sh lmcache sglang``, for real pages ``bench/peers/setup.sh kv``. Writes ``bench/results/disk.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402
import kv  # noqa: E402

from hicache.cli.sidecar import Sidecar  # noqa: E402

OURS = ("default", "fast", "zstd1", "raw")
PEERS = {
    "lmcache fs": ("lmcache", "fs"),
    "lmcache fs_native": ("lmcache", "fs_native"),
    "sglang file": ("sglang", ""),
}
CASES = ("demote", "demote_sync", "promote", "promote_cold", "decode_bare")
READERS = 2


def gb_per_s(row: Mapping[str, Any], page_bytes: int) -> float:
    return page_bytes / row["wall_us"] / 1e3


def cpu_s_per_gb(row: Mapping[str, Any], page_bytes: int) -> float:
    return row["cpu_us"] / 1e6 / page_bytes * 1e9


class Figures:
    """Rows by case and contender, and the ratios that the bars ask for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], page_bytes: int) -> None:
        self.rows = {(row["case"], row["contender"]): row for row in rows if "error" not in row}
        self.page_bytes = page_bytes

    def speed(self, case: str, contender: str) -> float | None:
        row = self.rows.get((case, contender))
        return gb_per_s(row, self.page_bytes) if row else None

    def ratio(self, case: str, ours: str, other: str) -> float | None:
        mine, theirs = self.speed(case, ours), self.speed(case, other)
        return mine / theirs if mine and theirs else None

    def space(self, contender: str) -> float | None:
        row = self.rows.get(("promote_cold", contender))
        return row["disk_over_raw"] if row else None

    def cpu(self, case: str, contender: str) -> float | None:
        row = self.rows.get((case, contender))
        return cpu_s_per_gb(row, self.page_bytes) if row else None

    def bars(self) -> list[dict[str, Any]]:
        """What was asked for, and what was reached."""
        asked: list[tuple[str, float | None, float, bool]] = []
        for ours in ("default", "fast"):
            bare = self.speed("decode_bare", ours)
            cached = self.speed("promote", ours)
            mine = self.space(ours)
            asked += [
                (
                    f"{ours}: demotion over zstd-1 in its place",
                    self.ratio("demote", ours, "zstd1"),
                    1.4,
                    True,
                ),
                (f"{ours}: demotion, synced, over raw", self.ratio("demote_sync", ours, "raw"), 1.0, True),
                (
                    f"{ours}: cached promotion over bare decode x {READERS}",
                    cached / bare / READERS if cached and bare else None,
                    0.9,
                    True,
                ),
                (f"{ours}: cached promotion over zstd-1", self.ratio("promote", ours, "zstd1"), 1.9, True),
                (f"{ours}: cold promotion over raw", self.ratio("promote_cold", ours, "raw"), 1.05, True),
            ]
            for peer in PEERS:
                theirs = self.space(peer)
                asked.append(
                    (f"{ours}: cold load over {peer}", self.ratio("promote_cold", ours, peer), 1.3, True)
                )
                space = mine / theirs if mine and theirs else None
                asked.append((f"{ours}: disk space over {peer}", space, 0.70, False))
        asked.append(
            ("whole path: CPU s a GB stored durably", self.cpu("store_durable", "whole path"), 1.3, False)
        )
        asked.append(
            ("whole path: CPU s a GB fetched from disk", self.cpu("fetch_cold", "whole path"), 0.6, False)
        )
        return [
            {"what": what, "value": value, "bar": bar, "reached": value >= bar if at_least else value <= bar}
            for what, value, bar, at_least in asked
            if value is not None
        ]


def table(rows: Sequence[Mapping[str, Any]], page_bytes: int) -> None:
    """GB/s and CPU s a GB, one line a case and contender."""
    print(f"\n{'case':<14} {'contender':<20} {'raw GB/s':>9} {'CPU s/GB':>9} {'disk/raw':>9}")
    for row in rows:
        if "error" in row:
            print(f"{row['case']:<14} {row['contender']:<20} failed: {row['error']}")
            continue
        space = f"{row['disk_over_raw']:9.3f}" if "disk_over_raw" in row else ""
        print(
            f"{row['case']:<14} {row['contender']:<20} {gb_per_s(row, page_bytes):9.2f}"
            f" {cpu_s_per_gb(row, page_bytes):9.3f} {space}"
        )


def through(
    stack: ExitStack, work: Path, pages_path: Path, hints: dict[str, Any], repetitions: int
) -> list[dict[str, Any]]:
    """The whole path, client and sidecar."""
    size = pages_path.stat().st_size
    folder = work / "sidecar"
    folder.mkdir()
    flags = ["--host-bytes", str(size + (192 << 20)), "--disk-path", str(folder / "disk")]
    flags += ["--disk-bytes", str(size * 4)]  # so that rounds run in the steady state, evicting
    sidecar = stack.enter_context(Sidecar(folder, flags))
    spec = {
        "target": sidecar.target,
        "server_pid": sidecar.pid,
        "pages_path": str(pages_path),
        "hints": hints,
    }
    command = [sys.executable, str(HERE / "contenders" / "hicache_through.py")]
    with harness.Process(command, spec, label="whole path") as contender:
        return harness.compare([contender], (), repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=128, help="pages of 2 MiB in a sample (default 128)")
    parser.add_argument("--repetitions", type=int, default=9, help="samples a case, at least 7 (default 9)")
    parser.add_argument("--kind", choices=kv.KINDS, default="minilm", help="which pages (default minilm)")
    parser.add_argument("--no-peers", action="store_true", help="without LMCache and SGLang")
    parser.add_argument("--cases", nargs="*", default=[], help=f"only these of {', '.join(CASES)}")
    parser.add_argument("--folder", type=Path, help="where the stores write (default: bench/.data)")
    options = parser.parse_args()
    page_bytes = 2 << 20
    form = kv.shape(options.kind)
    hints = {"layers": form.layers, "kv_heads": form.kv_heads, "head_size": form.head_size}
    pages = kv.pages(options.kind, page_bytes, options.pages)
    base = options.folder or kv.data_folder()
    base.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disk-", dir=base)))
        pages_path = work / "pages.npy"
        kv.np.save(pages_path, pages)
        spec = {"pages_path": str(pages_path), "hints": hints}
        contenders = []
        for name in OURS:
            command = [sys.executable, str(HERE / "contenders" / "hicache_disk.py")]
            mine = {**spec, "codec": name, "folder": str(work / name)}
            contenders.append(stack.enter_context(harness.Process(command, mine, label=name)))
        for label, (environment, codec) in {} if options.no_peers else PEERS.items():
            command = [str(harness.venv_python(environment)), str(HERE / "peers" / f"{environment}_disk.py")]
            theirs = {**spec, "codec": codec, "folder": str(work / label.replace(" ", "-"))}
            contenders.append(stack.enter_context(harness.Process(command, theirs, label=label)))
        infos = [contender.info for contender in contenders]
        rows = harness.compare(contenders, options.cases or CASES, options.repetitions)
        if not options.cases:
            rows += through(stack, work, pages_path, hints, options.repetitions)
    table(rows, page_bytes)
    bars = Figures(rows, page_bytes).bars()
    print()
    for bar in bars:
        print(
            f"{bar['what']:<52} {bar['value']:6.2f}  (bar {bar['bar']})  {'' if bar['reached'] else 'NOT REACHED'}"
        )
    if not options.cases:
        harness.write(
            "disk",
            {
                "pages": options.pages,
                "page_bytes": page_bytes,
                "kind": options.kind,
                "contenders": infos,
                "rows": rows,
                "bars": bars,
            },
            ["lmdb", "zstandard", "numpy"],
        )


if __name__ == "__main__":
    harness.run(main)
