"""Recorded traces: Mooncake's JSON lines, plain or zstd-compressed, read as a stream.

One object a line: ``timestamp`` (ms), ``input_length``, ``output_length`` (tokens), ``hash_ids`` (one a
block of 512 tokens, prefix-chained: an id stands for its block and everything before it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path

import zstandard

from hicache.errors import InvalidArgumentError

#: Width in bytes of the symbol that stands for one ``hash_ids`` entry.
SYMBOL_BYTES = 16
BLOCK_TOKENS = 512
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One line of a trace."""

    timestamp_ms: float
    hash_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class TraceFacts:
    """What a trace's own structure says.

    ``hit_blocks``: what an infinite cache finds when each request is stored before the next one asks, the
    leading ids of a request that were seen before.
    """

    requests: int
    blocks: int
    unique_blocks: int
    hit_blocks: int

    @property
    def bound(self) -> float:
        """Hit ratio of an infinite cache."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0


def read(path: Path, limit: int = 0) -> Iterator[Request]:
    """The requests of a trace, at most ``limit`` (0: all). Raises InvalidArgumentError naming the line."""
    with contextlib.closing(_lines(path)) as lines:
        for number, line in enumerate(lines, 1):
            if limit and number > limit:
                return
            if line.strip():
                yield _parse(path, number, line)


def _lines(path: Path) -> Generator[str]:
    try:
        with path.open("rb") as raw:
            packed = raw.read(len(_ZSTD_MAGIC)) == _ZSTD_MAGIC
            raw.seek(0)
            stream = zstandard.ZstdDecompressor().stream_reader(raw) if packed else raw
            with io.TextIOWrapper(stream, encoding="utf-8") as text:
                yield from text
    except OSError as error:
        raise InvalidArgumentError(f"--trace: cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, zstandard.ZstdError) as error:
        raise InvalidArgumentError(f"--trace: {path} is neither JSON lines nor zstd: {error}") from error


def _parse(path: Path, number: int, line: str) -> Request:
    try:
        entry = json.loads(line)
        ids = tuple(entry["hash_ids"])
        if not all(isinstance(found, int) and not isinstance(found, bool) for found in ids):
            raise TypeError("hash_ids must be whole numbers")
        return Request(float(entry.get("timestamp", 0)), ids)
    except KeyError as error:
        problem = f"no {error} in it"
    except (ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    raise InvalidArgumentError(
        f"--trace: {path}:{number}: not a Mooncake trace line: {problem}",
        hint='expected {"timestamp": ms, "hash_ids": [int, ...]}',
    )


def facts(requests: Iterator[Request]) -> TraceFacts:
    """Count a trace and its infinite-cache bound."""
    seen: set[int] = set()
    count = blocks = hits = 0
    for request in requests:
        count += 1
        blocks += len(request.hash_ids)
        hits += next(
            (i for i, found in enumerate(request.hash_ids) if found not in seen), len(request.hash_ids)
        )
        seen.update(request.hash_ids)
    return TraceFacts(count, blocks, len(seen), hits)


class Symbols:
    """The 16-byte symbols of ids: a keyed hash, equal in every process; remembered, as ids repeat."""

    def __init__(self, salt: str) -> None:
        self._key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
        self._known: dict[int, bytes] = {}

    def of(self, ids: tuple[int, ...]) -> bytes:
        """The prompt for a hash namespace: one symbol an id, concatenated."""
        known = self._known
        for found in ids:
            if found not in known:
                raw = found.to_bytes(16, "little", signed=True)
                known[found] = hashlib.blake2b(raw, key=self._key, digest_size=SYMBOL_BYTES).digest()
        return b"".join([known[found] for found in ids])
