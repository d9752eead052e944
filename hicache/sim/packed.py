"""A trace in the form in which it is replayed: one file of records, read through a memory map by every process.

A record is six little-endian int64 (``at_ms, input_tokens, output_tokens, turn, class, blocks``) and then each block's
16-byte symbol: its id as int64, zero-extended. What holds for the whole trace stands beside it as JSON. Written once,
as a stream; nothing but the set of ids that were seen grows with the trace.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hicache.errors import InvalidArgumentError

if TYPE_CHECKING:
    from hicache.sim.traces.model import Request

SYMBOL_BYTES = 16
HEAD = struct.Struct("<6q")
#: Of the layout above; a file of another one is written anew.
FORMAT = 1

Row = tuple[int, int, int, int, int, bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class TraceFacts:
    """What a whole trace says of itself. ``hit_blocks``: what an infinite cache would find.

    ``max_blocks``: of one request. ``problems``: lines that were left out.
    """

    name: str
    sha256: str
    block_tokens: int
    requests: int
    blocks: int
    unique_blocks: int
    hit_blocks: int
    max_blocks: int
    span_ms: int
    problems: int = 0

    @property
    def bound(self) -> float:
        """Hit ratio of an infinite cache."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0


def symbols(blocks: Sequence[int]) -> bytes:
    """The prompt for a namespace of hashes: one 16-byte symbol an id."""
    wide = bytearray(SYMBOL_BYTES * len(blocks))
    struct.pack_into(f"<{2 * len(blocks)}q", wide, 0, *(word for each in blocks for word in (each, 0)))
    return bytes(wide)


def pack(
    requests: Iterable[Request], folder: Path, *, name: str, sha256: str, block_tokens: int,
    problems: Callable[[], int] = lambda: 0,
) -> PackedTrace:  # fmt: skip
    """Write a trace's records into a folder, unless they are there already, and open them."""
    path = folder / f"trace-{sha256[:16]}-{block_tokens}.pack"
    facts_path = path.with_suffix(".json")
    if not facts_path.exists() or _stored(facts_path).get("format") != FORMAT:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        writer = _Writer()
        with part.open("wb") as out:
            for request in requests:
                out.write(writer.record(request))
        if not writer.requests:
            part.unlink()
            raise InvalidArgumentError(f"the trace {name} holds no request")
        facts = writer.facts(name, sha256, block_tokens, problems())
        part.replace(path)
        stored = {"format": FORMAT, "classes": list(writer.classes), "facts": dataclasses.asdict(facts)}
        facts_path.write_text(
            json.dumps(stored) + "\n", encoding="utf-8"
        )  # last: says that the records are whole
    return PackedTrace(path)


def _stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class _Writer:
    def __init__(self) -> None:
        self.classes: dict[str, int] = {"": 0}
        self.requests = self.blocks = self.hits = self.longest = 0
        self._seen: set[int] = set()
        self._first_ms = self._last_ms = 0

    def record(self, request: Request) -> bytes:
        blocks = request.blocks
        self._first_ms = self._first_ms if self.requests else request.at_ms
        self._last_ms = max(self._last_ms, request.at_ms)
        self.requests += 1
        self.blocks += len(blocks)
        self.longest = max(self.longest, len(blocks))
        seen = self._seen
        self.hits += next((at for at, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
        cls = self.classes.setdefault(request.cls, len(self.classes))
        head = HEAD.pack(
            request.at_ms, request.input_tokens, request.output_tokens, request.turn, cls, len(blocks)
        )
        return head + symbols(blocks)

    def facts(self, name: str, sha256: str, block_tokens: int, problems: int) -> TraceFacts:
        span_ms = max(self._last_ms - self._first_ms, 0)
        counts = (self.requests, self.blocks, len(self._seen), self.hits, self.longest)
        return TraceFacts(name, sha256, block_tokens, *counts, span_ms, problems)


class PackedTrace:
    """Records of one trace; may be read again and again. Close it, or use ``with``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = _stored(path.with_suffix(".json"))
        self.facts = TraceFacts(**stored["facts"])
        self.classes: list[str] = list(stored["classes"])
        with path.open("rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)

    def __iter__(self) -> Iterator[Row]:
        """(at_ms, input_tokens, output_tokens, turn, class, prompt) of each request, from the first on."""
        data, unpack, skip = self._map, HEAD.unpack_from, HEAD.size
        at, end = 0, len(data)
        while at < end:
            *head, blocks = unpack(data, at)
            at += skip
            prompt = data[at : at + SYMBOL_BYTES * blocks]
            at += len(prompt)
            yield (*head, prompt)

    def close(self) -> None:
        """Idempotent."""
        self._map.close()

    def __enter__(self) -> PackedTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
