"""Our policies in flat mode against libCacheSim, block by block, on two real traces.

Needs ``libcachesim`` (0.3.5), ``zstandard`` and this checkout in PYTHONPATH:

    python bench/truth.py --traces ../shared/traces --out tests/policy/truth.json --ours

Every block is an object of one byte; pools hold 1, 5, 10, 25 and 50 % of the distinct blocks, rounded down. The file
holds libCacheSim's hit ratios; ``tests/policy/test_truth.py`` holds our own against them.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import sys
import tempfile
from pathlib import Path

from hicache.policy import make_policy
from hicache.sim.flat import flat_hits
from hicache.sim.oracle import belady

TRACES = {"conversation": "mooncake_conversation", "agent": "claudecode_v6_512"}
SHARES = (1, 5, 10, 25, 50)
#: libCacheSim's name, and ours; "": the oracle. The first six are the bar, the rest differ by definition.
PAIRS = {
    "LRU": "lru",
    "FIFO": "fifo",
    "LFU": "lfu:ageing=0",
    "ARC": "arc",
    "GDSF": "gdsf",
    "Belady": "",
    "Sieve": "sieve",
    "TwoQ": "2q",
    "MQ": "mq",
    "S3FIFO": "s3fifo",
    "SLRU": "slru",
    "WTinyLFU": "wtinylfu",
}
NEVER = (1 << 63) - 1


def read(path: Path) -> list[list[int]]:
    """The block ids of every request."""
    import zstandard

    with path.open("rb") as file:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file))
        return [json.loads(line)["hash_ids"] for line in text]


def write_oracle_general(requests: list[list[int]], path: Path) -> None:
    """libCacheSim's format with next uses: time, id, size, number of the next access (-1: none)."""
    accesses = [block for blocks in requests for block in blocks]
    following: dict[int, int] = {}
    rows = []
    for at in range(len(accesses) - 1, -1, -1):
        block = accesses[at]
        rows.append(struct.pack("<IQIq", at, block + 1, 1, following.get(block, -1)))
        following[block] = at
    rows.reverse()
    path.write_bytes(b"".join(rows))


def theirs(requests: list[list[int]], capacities: dict[int, int]) -> dict[str, dict[str, float]]:
    """Hit ratios of libCacheSim."""
    import libcachesim

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.oracleGeneral.bin"
        write_oracle_general(requests, path)
        for name in PAIRS:
            found[name] = {}
            for share, capacity in capacities.items():
                reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
                missed, _ = getattr(libcachesim, name)(capacity).process_trace(reader)
                found[name][str(share)] = round(1.0 - missed, 6)
    return found


def ours(requests: list[list[int]], name: str, capacity: int) -> float:
    """Our hit ratio in flat mode."""
    if not PAIRS[name]:
        return belady([[block] for blocks in requests for block in blocks], capacity).ratio
    hits, blocks = flat_hits(make_policy(PAIRS[name]), capacity, requests)
    return hits / blocks


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--ours", action="store_true", help="also replay our own (minutes) and print the differences"
    )
    arguments = parser.parse_args()
    result = {}
    for trace, file in TRACES.items():
        requests = read(arguments.traces / f"{file}.jsonl.zst")
        distinct = len({block for blocks in requests for block in blocks})
        capacities = {share: distinct * share // 100 for share in SHARES}
        result[trace] = {"file": file, "distinct": distinct, "hits": theirs(requests, capacities)}
        arguments.out.write_text(json.dumps({"libcachesim": "0.3.5", "traces": result}, indent=1) + "\n")
        for name in PAIRS if arguments.ours else ():
            peer = result[trace]["hits"][name]
            row = [
                ours(requests, name, capacity) - peer[str(share)] for share, capacity in capacities.items()
            ]
            shown = "  ".join(f"{peer[str(s)]:.4f} {d:+.4f}" for s, d in zip(SHARES, row, strict=True))
            sys.stdout.write(f"{trace:13} {name:9} {shown}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
