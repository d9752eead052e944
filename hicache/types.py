"""Words shared by every floor: tiers, residency, namespaces, and the page-store port.

Standard library only. Nothing here decides anything.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Protocol

#: A slot number is ``segment * SLOTS_PER_SEGMENT + index``: one int names a place in a slotted tier.
SLOTS_PER_SEGMENT = 1 << 24

#: Slots of large pages start on a memory page, those of small pages on a cache line.
LARGE_PAGE_BYTES = 64 * 1024
LARGE_ALIGN_BYTES = 4096
SMALL_ALIGN_BYTES = 64


class TierKind(enum.Enum):
    """What a tier is made of. Decides which store serves it; decisions read the flags of its spec instead."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Residency(enum.IntEnum):
    """State of one page in one tier. The allowed steps are the table in ``engine/residency.py``."""

    ABSENT = 0  # no bytes here
    FILLING = 1  # a copy towards this tier is under way; never read
    RESIDENT = 2  # readable
    DRAINING = 3  # leaving: a copy away from this tier is under way; reused only after it


class Outcome(enum.Enum):
    """What became of one page of a batch."""

    OK = "ok"
    MISS = "miss"  # GET/DELETE of a page the store does not hold
    CORRUPT = "corrupt"  # a checksum, size or identity check said no; the page is gone from the store
    FULL = "full"  # no space; nothing was written
    FAULT = "fault"  # the medium failed; nothing was written or read


class Ack(enum.Enum):
    """When a commit is acknowledged."""

    VISIBLE = "visible"  # matchable
    DURABLE = "durable"  # survives kill -9


class Pressure(enum.Enum):
    """What a store does when its victims still drain."""

    WAIT = "wait"  # wait for the drain until the deadline, then drop unsaved victims
    DROP = "drop"  # drop unsaved victims at once


class WritePolicy(enum.Enum):
    """When the copy in the next tier is made."""

    THROUGH = "write-through"  # at insert
    SELECTIVE = "write-through-selective"  # at the n-th hit, else at eviction
    BACK = "write-back"  # at eviction


class SymbolKind(enum.Enum):
    """What a page's symbol is made of."""

    TOKENS = "tokens"  # little-endian int32 token ids, plus extra_key_bytes of digest
    HASHES = "hashes"  # the client's own cryptographic block hash, 16..32 bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that must be equal for KV to be reusable. Pages of two namespaces never meet.

    ``tenant`` is set by the server from the caller's credentials, never by the caller.
    ``page_bytes`` is the size of one page (all layers, all ranks) as stored.
    """

    model: str
    page_tokens: int
    page_bytes: int
    tenant: str = "default"
    salt: str = ""
    revision: str = ""
    adapter: str = ""
    kv_dtype: str = "bfloat16"
    layout: str = "opaque"
    codec: str = "lossless"
    layers: int = 0
    kv_heads: int = 0
    head_size: int = 0
    world_size: int = 1
    engine_version: str = ""
    symbol_kind: SymbolKind = SymbolKind.TOKENS
    symbol_hash_bytes: int = 0  # HASHES only: 16..32
    extra_key_bytes: int = 0  # TOKENS only: width of the digest of a page's extra keys

    @property
    def symbol_bytes(self) -> int:
        """Width of one page's symbol in bytes."""
        if self.symbol_kind is SymbolKind.HASHES:
            return self.symbol_hash_bytes
        return 4 * self.page_tokens + self.extra_key_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier as the engine sees it. Tiers are an ordered list, fastest first.

    A *slotted* tier holds pages in numbered slots of fixed size, grouped in segments; a *keyed* tier
    (``keyed=True``) holds them by page key and charges the bytes they really take.
    """

    name: str
    kind: TierKind
    capacity_bytes: int
    segment_bytes: int = 0  # slotted tiers: the grain in which room moves between pools
    header_bytes_per_slot: int = 0  # slotted tiers: generation counters kept beside the slots
    keyed: bool = False
    durable: bool = False  # survives the process; kept ancestor-closed
    client_readable: bool = False  # clients on this host can map it


def slot_stride(page_bytes: int) -> int:
    """Distance in bytes between two slots that hold pages of ``page_bytes``."""
    align = LARGE_ALIGN_BYTES if page_bytes >= LARGE_PAGE_BYTES else SMALL_ALIGN_BYTES
    return -(-page_bytes // align) * align


def segment_slots(spec: TierSpec, page_bytes: int) -> int:
    """How many slots of ``page_bytes`` one segment of this tier holds, after its header; 0 if none fits."""
    stride = slot_stride(page_bytes)
    count = spec.segment_bytes // (stride + spec.header_bytes_per_slot)
    while count and segment_header_bytes(spec, count) + count * stride > spec.segment_bytes:
        count -= 1
    return count


def segment_header_bytes(spec: TierSpec, slots: int) -> int:
    """Bytes before the first slot of a segment: the generation counters, rounded up to a memory page."""
    raw = spec.header_bytes_per_slot * slots
    return -(-raw // LARGE_ALIGN_BYTES) * LARGE_ALIGN_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """What a caller says of the request behind a look-up or a store; policies may weigh it, nothing else does."""

    cls: str = ""  # request class: "chat", "batch", ...
    turn: int = 0  # of its conversation, from 1; 0 unknown
    cost: float = 0.0  # of computing one page again, in units of the caller's choice; 0 unknown


NO_USE = Use()


@dataclasses.dataclass(frozen=True, slots=True)
class PageRecord:
    """What a durable tier writes beside a page, in the same transaction, so that the tree can be rebuilt."""

    namespace: bytes  # fingerprint, 32 bytes
    parent_key: bytes  # key of the page before it; the namespace seed for a first page
    symbol: bytes


class Op(enum.Enum):
    """What a batch asks of a store."""

    PUT = "put"
    GET = "get"
    DELETE = "delete"
    FLUSH = "flush"  # completes when everything submitted before it is durable (keyed) or done
    PROBE = (
        "probe"  # keyed: writes a little and commits; one outcome, OK when the medium takes writes (again)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Pages to move through one store; columns, one entry a page.

    Slotted stores read ``slots``, keyed stores ``keys``. ``buffers`` are contiguous, ``page_bytes`` each:
    sources of a PUT, destinations of a GET; they belong to the store until the completion.
    ``checksums`` of a PUT are xxh3-64 of the sources: the store verifies them before it accepts a page
    (CORRUPT on a difference); empty means "compute them".
    """

    id: int
    op: Op
    page_bytes: int = 0
    slots: Sequence[int] = ()
    keys: Sequence[bytes] = ()
    buffers: Sequence[memoryview] = ()
    checksums: Sequence[int] = ()
    records: Sequence[PageRecord] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """What became of a batch, in its page order.

    ``checksums``: xxh3-64 of each page moved (PUT and GET; 0 where the outcome is not OK).
    ``charges``: keyed PUT: bytes of capacity each page takes. ``error`` says why, when an outcome is FAULT or FULL.
    """

    id: int
    outcomes: Sequence[Outcome]
    checksums: Sequence[int] = ()
    charges: Sequence[int] = ()
    error: str = ""


class PageStore(Protocol):
    """The store seam. ``submit`` never blocks on the medium; results come back through ``poll``.

    ``notify`` (given at construction) is called from any thread when ``poll`` has something to give.
    PUT and DELETE of one key take effect in submission order. Stores never raise for a failing medium:
    the outcome says it.
    """

    def submit(self, batch: Batch) -> None:
        """Queue a batch. Raises InvalidArgumentError for a batch that does not fit the store."""

    def poll(self) -> list[Completion]:
        """Completions since the last call; never blocks."""

    def close(self) -> None:
        """Finish what was submitted, release everything. Idempotent."""


class AddressableStore(PageStore, Protocol):
    """A slotted store whose slots are plain host memory, so that other stores copy into and out of it directly."""

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """Give a segment its domain and slot size. Its slots start empty."""

    def close_segment(self, segment: int) -> None:
        """Give the segment's memory back."""

    def views(self, slots: Sequence[int]) -> list[memoryview]:
        """Writable views of the slots, ``page_bytes`` each."""

    def seal(self, slots: Sequence[int], checksums: Sequence[int]) -> None:
        """Record the checksums of pages that were copied into their slots."""

    def checksums(self, slots: Sequence[int]) -> list[int]:
        """The recorded checksums."""

    def free(self, slots: Sequence[int]) -> None:
        """The slots hold nothing from now on; their generations move on."""


Notify = Callable[[], None]
