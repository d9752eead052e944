"""What holds runs: leases, reservations, copies, operations. Each has ``runs``, which grow when a run is split."""

from __future__ import annotations

import dataclasses
import enum
from array import array
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hicache.types import NO_USE, Ack, Namespace, Outcome, Pressure, Use

if TYPE_CHECKING:
    from hicache.engine.pools import Pool
    from hicache.tree import Run, Tree


@dataclasses.dataclass(slots=True, eq=False)
class NamespaceState:
    """A namespace in this process: its tree and its pool in each tier."""

    id: int
    spec: Namespace
    fingerprint: bytes
    tree: Tree
    pools: list[Pool]
    # While a recovery goes on, by number of the chain: the run in which it ends, None if it has none;
    recovered: list[Run | None] = dataclasses.field(default_factory=list)
    recovered_depths: array[int] = dataclasses.field(
        default_factory=lambda: array("q")
    )  # its pages and those above
    recovered_keys: dict[int, bytes] = dataclasses.field(
        default_factory=dict
    )  # and the last key of a stranded one.
    page_bytes: int = dataclasses.field(init=False)  # of one page; the spec's, asked for often
    many_hits: int = (
        0  # from so many on nobody asks how often a run was hit, so that runs are joined (0: never)
    )

    def __post_init__(self) -> None:
        """Copy what is asked for often."""
        self.page_bytes = self.spec.page_bytes


class LeaseStage(enum.Enum):
    """A lease is live until it expires; then its pins rest for the grace, unseen by its owner."""

    LIVE = 1
    RESTING = 2


@dataclasses.dataclass(slots=True, eq=False)
class Lease:
    """Pins in one tier, owned by a session (0: an operator's pin)."""

    id: int
    session: int
    namespace: NamespaceState
    tier: int
    matched_pages: int
    tier_pages: list[int]
    expires_ms: int  # 0: never
    runs: list[Run] = dataclasses.field(default_factory=list)
    operation: int = 0
    stage: LeaseStage = LeaseStage.LIVE


@dataclasses.dataclass(slots=True, eq=False)
class Operation:
    """Promotions that somebody may wait for.

    ``runs`` are still to be started, in page order, the last one anchored; ``copies`` are those under way.
    """

    id: int
    session: int
    namespace: NamespaceState
    tier: int
    lease: int = 0
    runs: list[Run] = dataclasses.field(default_factory=list)
    copies: set[int] = dataclasses.field(default_factory=set)
    moved_pages: int = 0
    failed_pages: int = 0
    done: bool = False
    step: int = 0  # pages of one copy
    warm: bool = False  # started for a look-up; nobody waits


@dataclasses.dataclass(slots=True, eq=False)
class Leaving:
    """The runs that have pages in a segment being given up."""

    runs: list[Run] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class Guard:
    """Pins for the length of one step: what makes room must not take the pages that it is made for."""

    tiers: list[int]
    runs: list[Run] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class CopyJob:
    """One Copy under way. Its runs are pinned in ``src`` and FILLING in ``dst``."""

    id: int
    namespace: NamespaceState
    src: int
    dst: int
    runs: list[Run]
    operations: list[Operation] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class Ingest:
    """One Commit being copied in: pages [first, first + pages) of its reservation's prompt."""

    copy: int
    request: int
    first: int
    pages: int
    ack: Ack
    last: bool
    outcomes: Sequence[Outcome] | None = None  # None: not back yet; empty: all OK
    charges: Sequence[int] = ()
    keys: Sequence[bytes] = ()  # keyed destinations only, one a page
    deleted: frozenset[bytes] = frozenset()  # of those: deleted since the copy was started


@dataclasses.dataclass(slots=True, eq=False)
class Reservation:
    """Room for pages [next, end) of a prompt; the page before the first is anchored against being dropped."""

    id: int
    session: int
    namespace: NamespaceState
    prompt: bytes
    present_pages: int
    next: int  # first page not in the tree yet
    submitted: int  # first page not handed over by a commit yet
    end: int  # never changes once it is granted
    places: array[int]  # of pages [next, end)
    expires_ms: int
    runs: list[Run] = dataclasses.field(default_factory=list)  # the anchor, if there is one
    ingests: deque[Ingest] = dataclasses.field(default_factory=deque)
    closing: bool = False
    use: Use = NO_USE


@dataclasses.dataclass(slots=True, eq=False)
class ReserveWaiter:
    """A Reserve that waits for room."""

    request: int
    session: int
    namespace: NamespaceState
    prompt: bytes
    ttl_ms: int
    deadline_ms: int
    pressure: Pressure
    use: Use = NO_USE


@dataclasses.dataclass(slots=True, eq=False)
class Saver:
    """Pages on their way to the durable tier: a durable commit, or a drain (``request`` of the one who waits)."""

    id: int
    request: int
    deadline_ms: int
    is_drain: bool = False
    runs: list[Run] = dataclasses.field(default_factory=list)  # not durable yet
    mended: int = 0  # pages above that were copied again for its sake
    stored_pages: int = 0
    already_present_pages: int = 0
    failed_pages: int = 0
    durable_pages: int = 0
    unsaved_pages: int = 0  # given up
