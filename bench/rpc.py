"""Match over gRPC: beside an empty call on the same server, beside LMCache's look-up, and while stores run.

    python bench/rpc.py [--repetitions 9] [--no-peer] [--load-s 20]

Cases are sampled in turn within each round, so that all of them meet the same machine. Needs the project's
environment; the peer needs ``bench/peers/setup.sh lmcache``. Writes ``bench/results/rpc.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "peers")]

import harness  # noqa: E402
import lmcache_server  # noqa: E402

from hicache.cli.sidecar import Sidecar  # noqa: E402

OURS = (
    "empty",
    "match_2k_bytes",
    "match_8k_bytes",
    "match_32k_bytes",
    "match_131k_bytes",
    "match_131k_hashes",
)
PEERS = ("lookup_hit_2k", "lookup_hit_8k", "lookup_hit_32k", "lookup_hit_131k")
BARS = {"match_8k_bytes": 1.35, "match_131k_bytes": 3.0, "match_131k_hashes": 1.6}


def in_turn(cases: Sequence[tuple[harness.Process, str]], repetitions: int) -> list[dict[str, Any]]:
    """Every case once a round; the first round warms up."""
    samples: dict[str, list[dict[str, Any]]] = {case: [] for _, case in cases}
    for repetition in range(repetitions + 1):
        for contender, case in cases:
            got = contender.sample(case)
            if "error" in got:
                raise harness.BenchError(f"{case}: {got['error']}")
            if repetition:
                samples[case].append(got)
    rows = [{"case": case, "contender": who.label, **harness.summary(samples[case])} for who, case in cases]
    harness.print_rows(rows)
    return rows


def under_load(client: harness.Process, sidecar: Sidecar, seconds: float, rounds: int) -> dict[str, Any]:
    """Percentiles of Match of 8k tokens: idle, then with a storing process at full rate, in one run."""
    idle = [client.sample("match_8k_bytes") for _ in range(rounds)]
    command = [sys.executable, str(HERE / "contenders" / "hicache_storer.py"), sidecar.target, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as storer:
        assert storer.stdout is not None
        storer.stdout.readline()  # it stores now
        busy = []
        end = time.monotonic() + seconds * 0.8
        while time.monotonic() < end:
            busy.append(client.sample("match_8k_bytes"))
        stored = storer.stdout.readline().strip()
    quiet, loaded = harness.summary(idle), harness.summary(busy)
    found = {
        "idle_p50_us": quiet["p50_us"],
        "idle_p99_us": quiet["p99_us"],
        "loaded_p50_us": loaded["p50_us"],
        "loaded_p99_us": loaded["p99_us"],
        "p99_ratio": loaded["p99_us"] / quiet["p99_us"],
        "loaded_calls": loaded["calls"],
        "storer": stored,
    }
    print("\nMatch of 8k tokens while stores and demotion run at full rate:")
    for name, value in found.items():
        print(f"  {name:<16} {value:.1f}" if isinstance(value, float) else f"  {name:<16} {value}")
    return found


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15, help="rounds, at least 7 (default 15)")
    parser.add_argument("--no-peer", action="store_true", help="without LMCache")
    parser.add_argument(
        "--load-s", type=float, default=20.0, help="seconds of stores at full rate (default 20)"
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hicache-bench-")))
        flags = ["--host-bytes", "256MiB", "--disk-path", str(folder / "disk"), "--disk-bytes", "4GiB"]
        sidecar = stack.enter_context(Sidecar(folder, flags))
        spec = {"target": sidecar.target, "server_pid": sidecar.pid}
        command = [sys.executable, str(HERE / "contenders" / "hicache_rpc.py")]
        ours = stack.enter_context(harness.Process(command, spec))
        cases = [(ours, case) for case in OURS]
        contenders = [ours.info]
        if not options.no_peer:
            server = stack.enter_context(lmcache_server.running(0.0625))
            peer_spec = {"url": server.url, "server_pid": server.pid, "seed": 2026}
            peer_command = [str(harness.venv_python("lmcache")), str(HERE / "peers" / "lmcache_client.py")]
            peer = stack.enter_context(harness.Process(peer_command, peer_spec))
            cases += [(peer, case) for case in PEERS]
            contenders.append(peer.info)
        rows = in_turn(cases, options.repetitions)
        p50 = {row["case"]: row["p50_us"] for row in rows}
        over_empty = {case: p50[case] / p50["empty"] for case in OURS if case != "empty"}
        over_peer = {
            size: p50[f"match_{size}_bytes"] / p50[f"lookup_hit_{size}"]
            for size in ("2k", "8k", "32k", "131k")
            if f"lookup_hit_{size}" in p50
        }
        print("\nmedian against the empty call:")
        for case, ratio in over_empty.items():
            bar = f"  (bar {BARS[case]})" if case in BARS else ""
            print(f"  {case:<20} {ratio:5.2f}x{bar}")
        for size, ratio in over_peer.items():
            bar = "  (bar 0.25)" if size == "131k" else ""
            print(f"  against LMCache's look-up, {size:<6} {ratio:5.2f}x{bar}")
        loaded = under_load(ours, sidecar, options.load_s, options.repetitions)
    harness.write(
        "rpc",
        {
            "contenders": contenders,
            "rows": rows,
            "over_empty": over_empty,
            "over_peer": over_peer,
            "bars": {**BARS, "131k against LMCache": 0.25, "p99 loaded against idle": 4.0},
            "under_load": loaded,
        },
        ["grpcio", "protobuf"],
    )


if __name__ == "__main__":
    harness.run(main)
