"""What a request of a real trace costs the serving engine: one instant slotted tier, the events of a serving shell.

    python bench/replay.py [--trace FILE ...] [--share 0.1] [--policy lru|all ...] [--limit N] [--repeat N]
                           [--apart] [--peer PYTHON]

Each request is what a serving engine sends: Fetch that reserves what it does not find (``--apart``: Fetch, then
Reserve); Commit of that, with the CopyDone that the copy's end brings; ReleaseLeases. The tier holds ``--share`` of the
trace's unique blocks. ``--repeat``: so many copies of the trace one after the other, each with ids and times of its
own, to see whether time grows with what was seen. Prompts are packed and the collector is as the sidecar has it; only
the engine's own time is taken (thread CPU time). The trace is cut into ``--slices`` parts: the figure is the median of
their means, so that warm-up and drift are seen.

``--peer``: the interpreter of an environment with libcachesim 0.3.5; its Python per-block API and its C replay run on
the same blocks beside it, LRU, one after the other in this run. Policies (``all``: those of the zoo) run after LRU,
which is run again before each: ``over_lru`` is the ratio of the two medians. Writes ``bench/results/replay.json``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import types
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402

from hicache.engine import Engine, EngineOptions  # noqa: E402
from hicache.engine import actions as act  # noqa: E402
from hicache.engine import events as ev  # noqa: E402
from hicache.keys import fingerprint  # noqa: E402
from hicache.policy.ghosts import GhostTable  # noqa: E402
from hicache.policy.registry import ZOO  # noqa: E402
from hicache.sim.packed import symbols  # noqa: E402
from hicache.sim.traces import open_trace  # noqa: E402
from hicache.types import Namespace, Residency, SymbolKind, TierKind, TierSpec  # noqa: E402

SHARED = HERE.parent.parent / "shared" / "traces"
#: Microseconds a request: what must be reached, and what is aimed at.
BARS_US = {"mooncake_conversation": (60.0, 20.0), "claudecode_v6_512": (100.0, 30.0)}
PAGE_BYTES, WIDTH = 64, 16
BAR_BYTES_PER_PAGE, BAR_BYTES_PER_GHOST, BAR_OVER_LRU = 200, 64, 3
_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType)


def load(path: Path, limit: int) -> list[tuple[int, bytes, array[int]]]:
    """The requests: when, the prompt in 16-byte symbols, the block ids."""
    found = []
    for request in itertools.islice(open_trace(path), limit or None):
        found.append((request.at_ms, symbols(request.blocks), request.blocks))
    return found


def repeated(
    requests: list[tuple[int, bytes, array[int]]], times: int
) -> list[tuple[int, bytes, array[int]]]:
    """The requests so many times over; blocks of one copy are of that copy only."""
    found = list(requests)
    span_ms = requests[-1][0] - requests[0][0] + 1000
    for copy in range(1, times):
        for at_ms, _, ids in requests:
            own = array("q", [one + (copy << 40) for one in ids])
            found.append((at_ms + copy * span_ms, symbols(own), own))
    return found


class Shell:
    """An engine with one tier whose copies are done at once."""

    def __init__(self, pages: int, policy: str, *, apart: bool = False) -> None:
        self.apart = apart
        size = pages * PAGE_BYTES
        spec = TierSpec("host", TierKind.HOST, size, segment_bytes=size, client_readable=True)
        self.engine = Engine(EngineOptions((spec,), policy=policy, free_low_fraction=0.0))
        space = Namespace("bench", 512, PAGE_BYTES, symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=WIDTH)
        self.engine.handle(ev.NamespaceOpened(1, space, fingerprint(space)), 0)
        self.engine.handle(ev.SessionOpened(1, "default"), 0)
        self.numbers = itertools.count(1)

    def request(self, now: int, prompt: bytes) -> int:
        """One request; how many of its pages were there."""
        handle, numbers = self.engine.handle, self.numbers
        fetched = _result(handle(ev.Fetch(next(numbers), 1, 1, prompt, reserve_missing=not self.apart), now))
        pages = len(prompt) // WIDTH
        if fetched.matched_pages < pages:
            room = fetched.reserved
            if room is None:
                room = _result(handle(ev.Reserve(next(numbers), 1, 1, prompt), now))
            if room.reservation:
                pieces = ((room.present_pages, room.missing_pages),)
                event = ev.Commit(next(numbers), 1, room.reservation, pieces, None, last=True)
                for action in handle(event, now):
                    if type(action) is act.CopyIn:
                        handle(ev.CopyDone(action.copy), now)
        if fetched.lease:
            handle(ev.ReleaseLeases(1, (fetched.lease,)), now)
        matched: int = fetched.matched_pages
        return matched


def _result(actions: Sequence[act.Action]) -> Any:
    for action in reversed(actions):
        if type(action) is act.Reply:
            assert not isinstance(action.result, act.Failure), action.result
            return action.result
    raise AssertionError("no answer")


def replay(
    requests: Sequence[tuple[int, bytes, array[int]]], shell: Shell, policy: str, slices: int
) -> dict[str, Any]:
    """Microseconds a request by slice, percentiles over single requests, hits."""
    taken = array("d")
    hits = start = 0
    clock = time.perf_counter_ns
    means = []
    gc.collect()
    gc.freeze()
    for part in range(slices):
        end = len(requests) * (part + 1) // slices
        began = time.thread_time_ns()
        for now, prompt, _ in requests[start:end]:
            tick = clock()
            hits += shell.request(now, prompt)
            taken.append((clock() - tick) / 1e3)
        means.append((time.thread_time_ns() - began) / 1e3 / max(end - start, 1))
        start = end
    gc.unfreeze()
    ordered = sorted(taken)
    blocks = sum(len(ids) for _, _, ids in requests)
    own, edges, ghosts, ghost_bytes = memory(shell)
    return {
        "policy": policy,
        "us_per_request": statistics.median(means),
        "us_by_slice": means,
        "us_least": min(means),
        "apart": shell.apart,
        "p50_us": ordered[len(ordered) // 2],
        "p99_us": ordered[len(ordered) * 99 // 100],
        "hit_ratio": hits / blocks,
        "bytes_per_page": own,
        "symbol_bytes_per_page": edges,
        "ghosts": ghosts,
        "bytes_per_ghost": ghost_bytes / ghosts if ghosts else 0.0,
        "blocks": blocks,
        "requests": len(requests),
        "p50_us_by_tenth": [
            statistics.median(taken[len(taken) * part // 10 : len(taken) * (part + 1) // 10] or [0.0])
            for part in range(10)
        ],
    }


def memory(shell: Shell) -> tuple[float, float, int, int]:
    """What the engine's own structures take at the end.

    Bytes for each resident page; bytes of symbols beside; how many ghosts there are, and their bytes, which the first
    does not hold.
    """
    core = shell.engine._core
    seen: set[int] = set()
    own = edges = ghosts = ghost_bytes = 0
    todo: list[object] = [core.runs, core.pools, core.namespaces, core.timers, core.leases, core.reservations]
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, _CODE):
            continue
        seen.add(id(found))
        own += sys.getsizeof(found)
        if isinstance(found, bytes | bytearray):
            if len(found) >= WIDTH:
                own -= len(found)
                edges += len(found)
        elif isinstance(found, GhostTable):
            ghosts += len(found)
            ghost_bytes += found.nbytes()
        elif not isinstance(found, array):
            todo.extend(gc.get_referents(found))
    pages = core.counters.pages[0][int(Residency.RESIDENT)]
    return own / max(pages, 1), edges / max(pages, 1), ghosts, ghost_bytes


PEER = """
import json, sys, time
import libcachesim as lcs
from array import array
path, capacity = sys.argv[1], int(sys.argv[2])
ids = array("q"); ids.frombytes(open(path, "rb").read())
cache = lcs.LRU(capacity)
request = lcs.Request(); request.obj_size = 1
get = cache.get
began = time.process_time()
for one in ids:
    request.obj_id = one
    get(request)
python_s = time.process_time() - began
csv = path + ".csv"
with open(csv, "w") as out:
    out.write("\\n".join(f"{n},{one},1" for n, one in enumerate(ids)) + "\\n")
how = lcs.ReaderInitParam(has_header=False, delimiter=",", obj_id_is_num=True, ignore_obj_size=True)
how.time_field, how.obj_id_field, how.obj_size_field = 1, 2, 3
reader = lcs.TraceReader(csv, lcs.TraceType.CSV_TRACE, how)
cache = lcs.LRU(capacity)
began = time.process_time()
miss, _ = cache.process_trace(reader)
c_s = time.process_time() - began
print(json.dumps({"python_s": python_s, "c_s": c_s, "miss_ratio": miss, "blocks": len(ids)}))
"""


def peer(python: str, requests: Sequence[tuple[int, bytes, array[int]]], pages: int) -> dict[str, Any]:
    """The peer on the same blocks: seconds for its Python API and its C replay."""
    scratch = harness.RESULTS / "replay-peer.bin"
    harness.RESULTS.mkdir(exist_ok=True)
    try:
        scratch.write_bytes(b"".join(ids.tobytes() for _, _, ids in requests))
        done = subprocess.run(
            [python, "-c", PEER, str(scratch), str(pages)], capture_output=True, text=True, check=False
        )
    finally:
        for path in (scratch, scratch.with_suffix(".bin.csv")):
            path.unlink(missing_ok=True)
    if done.returncode:
        raise harness.BenchError(f"the peer ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name in ("python", "c"):
        found[f"{name}_us_per_request"] = found[f"{name}_s"] * 1e6 / len(requests)
        found[f"{name}_blocks_per_s"] = found["blocks"] / found[f"{name}_s"]
    return found


def run_trace(path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a policy."""
    requests = load(path, options.limit)
    pages = int(len({one for _, _, ids in requests for one in ids}) * options.share)
    requests = repeated(requests, options.repeat)
    beside = peer(options.peer, requests, pages) if options.peer else {}
    for policy in sorted(ZOO) if options.policy == ["all"] else options.policy:
        about = {"trace": path.name.split(".")[0], "capacity_pages": pages, "repeat": options.repeat}
        lru: dict[str, Any] = {}
        if policy != "lru":
            lru = replay(requests, Shell(pages, "lru", apart=options.apart), "lru", options.slices)
        row = replay(requests, Shell(pages, policy, apart=options.apart), policy, options.slices) | about
        bar, goal = BARS_US.get(row["trace"], (0.0, 0.0))
        text = f"{row['trace']:<24} {policy:<12} {row['us_per_request']:7.1f} us a request"
        text += f" (bar {bar:.0f}, goal {goal:.0f})  p99 {row['p99_us']:.0f}  hits {row['hit_ratio']:.4f}"
        text += f"  {row['bytes_per_page']:.0f} bytes a page (bar {BAR_BYTES_PER_PAGE})"
        if row["ghosts"]:
            text += f"  {row['bytes_per_ghost']:.0f} bytes a ghost (bar {BAR_BYTES_PER_GHOST})"
        if lru:
            row["over_lru"] = row["us_per_request"] / lru["us_per_request"]
            text += f"  {row['over_lru']:.2f} x LRU (bar {BAR_OVER_LRU})"
        if beside:
            row["peer"] = beside
            row["peer_python_over_ours"] = beside["python_us_per_request"] / row["us_per_request"]
            row["peer_c_over_ours"] = beside["c_us_per_request"] / row["us_per_request"]
            text += (
                f"  peer: Python {beside['python_us_per_request']:.1f}, C {beside['c_us_per_request']:.1f}"
            )
        print(text, flush=True)
        yield row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, nargs="*", default=sorted(SHARED.glob("*.jsonl.zst")))
    parser.add_argument("--share", type=float, default=0.1, help="capacity as a share of the unique blocks")
    parser.add_argument("--policy", nargs="*", default=["lru"])
    parser.add_argument("--limit", type=int, default=0, help="only the first N requests")
    parser.add_argument("--slices", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=1, help="copies of the trace, one after the other")
    parser.add_argument("--apart", action="store_true", help="Fetch and Reserve as two calls")
    parser.add_argument("--peer", default="", help="interpreter with libcachesim")
    parser.add_argument("--name", default="replay", help="name of the result file")
    options = parser.parse_args()
    if not options.trace:
        raise harness.BenchError("no trace: give one with --trace")
    rows = [row for path in options.trace for row in run_trace(path, options)]
    harness.write(options.name, {"share": options.share, "bars_us": BARS_US, "rows": rows})


if __name__ == "__main__":
    harness.run(main)
