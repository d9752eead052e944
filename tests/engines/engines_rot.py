"""Bytes that rot: in a sidecar's memory, and in the records of its disk folder."""

from __future__ import annotations

import random
import re
from pathlib import Path

import lmdb
import pytest

#: Small enough that every page has some; what is not zero is somebody's data.
GRAIN = 4096


def flip_in_memory(pid: int, rng: random.Random, count: int = 1) -> None:
    """Flip a bit in ``count`` places of the sidecar's pages. Skips where the kernel forbids it."""
    try:
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            places = [place for begin, end in _arenas(pid) for place in _held(memory, begin, end)]
            assert places, "the sidecar holds something"
            for place in rng.sample(places, count):
                memory.seek(place)
                (byte,) = memory.read(1)
                memory.seek(place)
                memory.write(bytes([byte ^ 0x40]))
    except PermissionError:
        pytest.skip("this kernel does not let us write another process's memory")


def _arenas(pid: int) -> list[tuple[int, int]]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    found = re.findall(r"^(\w+)-(\w+) rw-s \S+ \S+ \S+ +(/memfd:\S*)", maps, re.MULTILINE)
    return [(int(begin, 16), int(end, 16)) for begin, end, _ in found]


def _held(memory: object, begin: int, end: int) -> list[int]:
    """Places inside data: in the middle of grains that are not empty."""
    memory.seek(begin)  # type: ignore[attr-defined]
    held = memory.read(end - begin)  # type: ignore[attr-defined]
    empty = bytes(GRAIN)
    return [
        begin + at + GRAIN // 2 for at in range(0, len(held), GRAIN) if held[at : at + GRAIN] != empty[:GRAIN]
    ]


def flip_on_disk(folder: Path, rng: random.Random, count: int = 1) -> None:
    """Flip a bit in the bodies of ``count`` records. The sidecar must not be running."""
    chosen = []
    for data in sorted(folder.glob("shards/*/data.mdb")):
        with _opened(data.parent) as env, env.begin(db=env.open_db(b"pages", create=False)) as txn:
            chosen += [(data.parent, key) for key, value in txn.cursor() if len(value) > GRAIN]
    assert len(chosen) >= count, "there are records"
    for shard, key in rng.sample(chosen, count):
        with _opened(shard) as env:
            pages = env.open_db(b"pages", create=False)
            with env.begin(db=pages, write=True) as txn:
                value = bytearray(txn.get(key))
                value[rng.randrange(len(value) // 2, len(value))] ^= 1 << rng.randrange(8)
                txn.put(key, bytes(value))


def _opened(shard: Path) -> lmdb.Environment:
    size = (shard / "data.mdb").stat().st_size
    return lmdb.open(str(shard), max_dbs=8, map_size=max(size * 2, 1 << 26))
