"""What calls answer: small frozen results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]


# --- what callers see


@dataclasses.dataclass(frozen=True, slots=True)
class MatchResult:
    """How much of a prompt is cached. Runs of pages have one best tier each, in page order."""

    matched_pages: int
    matched_tokens: int
    run_pages: tuple[int, ...]
    run_tiers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CommitResult:
    """What became of committed pages. ``durable_pages`` counts, of all of them, those that survive a crash now."""

    stored_pages: int = 0
    already_present_pages: int = 0
    durable_pages: int = 0

    def __add__(self, other: CommitResult) -> CommitResult:
        return CommitResult(
            self.stored_pages + other.stored_pages,
            self.already_present_pages + other.already_present_pages,
            self.durable_pages + other.durable_pages,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class StoreResult:
    """What became of a stored prompt: pages that were there before, and what was committed."""

    present_pages: int
    committed: CommitResult


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchResult:
    """``operation`` 0: nothing to move."""

    operation: int
    matched_pages: int
    moving_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class OperationResult:
    """How far an operation is."""

    done: bool
    moved_pages: int
    failed_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class PinResult:
    """``pin`` 0: nothing of the prompt is cached."""

    pin: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class EvictResult:
    """``kept_pages`` are leased or pinned."""

    pages: int
    kept_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class TierStats:
    """One tier's figures. ``written_per_hit``: bytes written to it for each byte served from it; 0 before a hit.

    ``reason``: why its state is not ok, and for ``degraded_ms`` now; empty if it is.
    """

    name: str
    kind: str
    state: str
    capacity_bytes: int
    used_bytes: int
    pages: int
    hit_pages: int
    bytes_in: int
    bytes_out: int
    evicted_pages: int
    dropped_pages: int
    corrupt_pages: int
    hit_bytes: int = 0
    written_bytes: int = 0
    admitted_pages: int = 0
    refused_pages: int = 0
    written_per_hit: float = 0.0
    reason: str = ""
    degraded_ms: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class LatencyStats:
    """How long calls of one name took at the server."""

    call: str
    count: int
    p50_ms: float
    p99_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class CopyChoice:
    """The engine that copies pages of one size one way, few or many at once; ``gb_per_s``: as measured, by engine."""

    direction: str
    page_bytes: int
    rows: str
    engine: str
    gb_per_s: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStats:
    """One device of the device tier. ``copy_engine``: what was asked for; auto: see ``choices``.

    ``direct_bytes`` went without, ``bounced_bytes`` through a bounce buffer. ``problem``: why it was given up.
    """

    name: str
    tier: str
    copy_engine: str
    choices: tuple[CopyChoice, ...]
    direct_bytes: int
    bounced_bytes: int
    registered_bytes: int
    faults: int
    problem: str


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """The sidecar's figures."""

    server_version: str
    state: str
    uptime_ms: int
    tiers: tuple[TierStats, ...]
    counters: Mapping[str, int]
    latencies: tuple[LatencyStats, ...]
    sessions: int
    leases: int
    reservations: int
    waiting: int
    copies_in_flight: int
    namespaces: int
    tree_nodes: int
    tree_runs: int
    tree_pages: int
    devices: tuple[DeviceStats, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TreeNode:
    """One node of the cache's tree; ``parent`` 0 for the first nodes of a namespace."""

    id: int
    parent: int
    namespace: str
    depth_pages: int
    pages: int
    first_symbol_digest: bytes
    tier_pages: tuple[int, ...]
    pinned_pages: int
    hits: int
    idle_ms: int
    children: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """Nodes, parents before children; ``omitted_nodes`` were too many to send."""

    nodes: tuple[TreeNode, ...]
    omitted_nodes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CheckResult:
    """The answer of the engine's own invariant check; ``problem`` is empty where ``ok``."""

    ok: bool
    problem: str
    action_digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class SizeAdvice:
    """A tier at ``factor`` of its size: the share of pages that it and the faster tiers would have served."""

    tier: str
    factor: float
    capacity_bytes: int
    hit_ratio: float


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyAdvice:
    """A policy's hit ratio on the same sample; comparable with the others' only."""

    name: str
    hit_ratio: float
    current: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """What the last look-ups say of other sizes and policies, from a sample of ``uses`` over ``span_ms``.

    ``rate``: the share of pages that is watched. ``sizes`` and ``policies`` are empty while there are too few uses.
    """

    uses: int
    rate: float
    span_ms: int
    unbounded: float
    sizes: tuple[SizeAdvice, ...]
    policies: tuple[PolicyAdvice, ...]


# --- what the client itself works with


@dataclasses.dataclass(frozen=True, slots=True)
class TierInfo:
    """One tier, as the server describes it."""

    name: str
    kind: str
    capacity_bytes: int
    durable: bool
    client_readable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Capabilities:
    """What the server offers and its limits."""

    server_version: str
    epoch: bytes
    tiers: tuple[TierInfo, ...]
    fd_socket: str
    max_message_bytes: int
    max_lease_ttl_ms: int
    chunk_bytes: int
    max_prompt_bytes: int = 1 << 62
    max_prompt_pages: int = 1 << 62
    max_queries_per_call: int = 1
    kv_memory: tuple[
        str, ...
    ] = ()  # of engines' KV, that the server can map; none: it copies to and from no KV
    device_uuids: tuple[bytes, ...] = ()
    pool_shared: bool = False

    def tier_name(self, index: int) -> str:
        """A tier's name, or its number where the server did not name it."""
        return self.tiers[index].name if index < len(self.tiers) else str(index)


@dataclasses.dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to Hello."""

    session_id: bytes
    epoch: bytes
    tenant: str
    resumed: bool
    keep_alive_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class RegionInfo:
    """An arena region's size and layout. ``counted``: it has a generation counter a slot; pools have none."""

    region_id: int
    size_bytes: int
    page_bytes: int
    first_slot_offset: int
    slot_stride: int
    slots: int
    counted: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class PoolInfo:
    """A segment of a device tier's pool on a GPU. ``handle``: of CUDA IPC; empty where it is mapped by descriptor."""

    region: RegionInfo
    size_bytes: int
    handle: bytes
    device_uuid: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive leased pages in consecutive slots of one region."""

    region_id: int
    pages: int
    offset: int
    first_slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """A Fetch's answer. ``extents`` is empty where the pages cannot be mapped; the arrays have one entry a page."""

    lease: int
    matched_pages: int
    granted_pages: int
    expires_in_ms: int
    operation: int
    tier_pages: tuple[int, ...]
    pending_pages: int
    pending_ms: int
    extents: tuple[Extent, ...]
    checksums: U64
    generations: U64


@dataclasses.dataclass(frozen=True, slots=True)
class Reserved:
    """A Reserve's answer. ``reservation`` 0: nothing is missing."""

    reservation: int
    present_pages: int
    missing_pages: int
    expires_in_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Renewed:
    """Leases that are gone, and the new time to live of the others."""

    lost: frozenset[int]
    expires_in_ms: int
