"""Pages that tell which they are: three page sizes, chains of four, bytes made from a version."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import numpy as np

from hicache.keys import chain_keys, fingerprint
from hicache.types import Namespace, PageRecord

#: By name: the capacity, and the size of a shard (0: one for all).
LAYOUTS = {
    "one-shard": {"capacity_bytes": 32 << 20, "shard_bytes": 0},
    "shards": {"capacity_bytes": 64 << 20, "shard_bytes": 4 << 20},
}
CHAIN = 4
#: (bytes of a page, how many pages there may be)
SPACES = ((4_000, 600), (20_000, 400), (2 << 20, 18))
NAMESPACES = [Namespace(f"crash-{size}", 4, size) for size, _ in SPACES]
PRINTS = [fingerprint(namespace) for namespace in NAMESPACES]
_MARK = struct.Struct("<4sIII")

Name = tuple[int, int]  # (space, number)


@functools.cache
def record(name: Name) -> PageRecord:
    space, number = name
    parent = key((space, number - 1)) if number % CHAIN else PRINTS[space]
    return PageRecord(PRINTS[space], parent, number.to_bytes(16, "little"))


@functools.cache
def key(name: Name) -> bytes:
    made = record(name)
    return chain_keys(made.parent_key, made.symbol, 16)[0]


def content(name: Name, version: int) -> bytes:
    """Half of the versions compress as bf16 does, half not at all."""
    space, number = name
    size = SPACES[space][0]
    rng = np.random.default_rng([space, number, version])
    if (number + version) % 2:
        body = rng.bytes(size)
    else:
        floats = rng.standard_normal(min(size // 2, 50_000), dtype=np.float32).view(np.uint32) >> 16
        body = np.resize(floats.astype("<u2"), size // 2).tobytes()
    return _MARK.pack(b"page", space, number, version) + body[_MARK.size :]


def version_of(name: Name, page: bytes | memoryview) -> int:
    """The version whose bytes these are; -1 when they are nobody's."""
    mark, space, number, version = _MARK.unpack_from(page)
    if mark != b"page" or (space, number) != name:
        return -1
    return version if content(name, version) == page else -1


def everything() -> list[Name]:
    return [(space, number) for space, (_, count) in enumerate(SPACES) for number in range(count)]


def reachable(present: set[Name]) -> set[Name]:
    """Of these pages, those whose ancestors are all there."""
    return {
        (space, number)
        for space, number in present
        if all((space, above) in present for above in range(number - number % CHAIN, number))
    }


def disk_use(folder: Path) -> int:
    """What ``du`` shows."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
