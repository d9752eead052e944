"""What the writer is asked to do, and how a group of it is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from hicache.tier.encoder import PagePut
from hicache.tier.outbox import Pending
from hicache.tier.shelf import Shard


@dataclasses.dataclass(frozen=True, slots=True)
class DeleteKeys:
    """A DELETE batch."""

    pending: Pending


@dataclasses.dataclass(frozen=True, slots=True)
class Flush:
    """Settles when everything before it has."""

    pending: Pending


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """Writes a little and commits it."""

    pending: Pending


@dataclasses.dataclass(frozen=True, slots=True)
class SaveNamespace:
    """A namespace to store before the pages that follow."""

    fingerprint: bytes
    json: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Purge:
    """Pages found corrupt: removed unless they were replaced meanwhile; then the GET that found them is settled.

    ``gone``, if given, is told which pages are no longer in the store.
    """

    pending: Pending
    positions: tuple[int, ...]
    gone: Callable[[list[bytes]], None] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SaveHeat:
    """When each page was used last and how often; keys that are not stored are passed over."""

    keys: Sequence[bytes]
    last_use_ms: Sequence[int]
    hits: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Upkeep:
    """Something for the writer's thread to start between two groups."""

    start: Callable[[], None]


WriteOp = PagePut | DeleteKeys | Flush | Probe | SaveNamespace | Purge | SaveHeat | Upkeep


@dataclasses.dataclass(slots=True)
class WriterStats:
    """Counters since the start. Written by the writer thread only."""

    commits: int = 0
    pages: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    map_full: int = 0
    pieces_pages: int = 0  # stored in pieces
    refused_pages: int = 0
    faults: int = 0
    purged_pages: int = 0
    corrupt: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # purged pages by the word of their codec.Kind
    quarantined_pages: int = 0
    heat_rows: int = 0
    evacuations: int = 0
    evacuated_pages: int = 0
    evacuated_bytes: int = 0


def keys_of(op: WriteOp) -> list[bytes]:
    """The pages whose presence an operation changes."""
    if isinstance(op, PagePut):
        return [op.key]
    if isinstance(op, DeleteKeys):
        return [bytes(key) for key in op.pending.batch.keys]
    if isinstance(op, Purge):
        return [bytes(op.pending.batch.keys[at]) for at in op.positions]
    return []


def parts(group: Sequence[WriteOp]) -> Iterator[list[WriteOp]]:
    """The group in parts, in order, in each of which no two operations name the same page.

    Within a part the order of operations makes no difference to anybody.
    """
    part: list[WriteOp] = []
    seen: set[bytes] = set()
    for op in group:
        keys = keys_of(op)
        if not seen.isdisjoint(keys):
            yield part
            part, seen = [], set()
        part.append(op)
        seen.update(keys)
    if part:
        yield part


def delete_order(
    homes: Mapping[bytes, Sequence[Shard]], parents: Mapping[bytes, bytes]
) -> list[tuple[Shard, list[bytes]]]:
    """Transactions that remove every copy, a page never before its descendants in another shard.

    Args:
        homes: the shards that hold each doomed page.
        parents: the parent's key of each.
    """
    waiting: dict[int, dict[bytes, None]] = {}
    shards: dict[int, Shard] = {}
    children: dict[bytes, int] = {}  # doomed copies of pages below a doomed page
    for key, places in homes.items():
        for shard in places:
            shards[shard.info.number] = shard
            waiting.setdefault(shard.info.number, {})[key] = None
            if parents.get(key) in homes and parents[key] != key:
                children[parents[key]] = children.get(parents[key], 0) + 1
    steps = []
    while any(waiting.values()):
        number, taken = next(
            ((n, taken) for n, doomed in waiting.items() if (taken := take_free(doomed, parents, children))),
            (-1, []),
        )
        if not taken:  # only rows that lie about their parents get here
            number = next(n for n in waiting if waiting[n])
            taken = list(waiting[number])
            waiting[number].clear()
        steps.append((shards[number], taken))
    return steps


def take_free(
    waiting: dict[bytes, None], parents: Mapping[bytes, bytes], children: dict[bytes, int]
) -> list[bytes]:
    """Take what has nothing doomed below it, or only what is taken along."""
    free = [key for key in waiting if not children.get(key)]
    taken = []
    while free:
        key = free.pop()
        del waiting[key]
        taken.append(key)
        parent = parents.get(key, b"")
        if parent in children and parent != key:
            children[parent] -= 1
            if not children[parent] and parent in waiting:
                free.append(parent)
    return taken
