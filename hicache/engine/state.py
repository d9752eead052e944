"""The ground storey of the engine's core: its state, its answers, and the pools.

``Core`` is built in four storeys, each of which uses only what stands below it: state (here), names (a run's pool, keys
and ids), steps (residency and structure), holds (pins, anchors, holders). The rooms above see ``core.Core`` and nothing
of the storeys.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from hicache.engine.actions import Action, Failure, Free, OpenSegment, Reply, Result
from hicache.engine.counters import Counters
from hicache.engine.holders import (
    CopyJob,
    Ingest,
    Lease,
    NamespaceState,
    Operation,
    Reservation,
    Saver,
)
from hicache.engine.options import EngineOptions
from hicache.engine.pools import Pool, Segments
from hicache.engine.stranded import Stranded
from hicache.errors import ErrorCode
from hicache.policy import make_admission, make_policy
from hicache.policy.admission import NO_ADMISSION
from hicache.tree import Run
from hicache.types import Use, segment_slots

if TYPE_CHECKING:
    from hicache.engine.news import News

#: A tick is the shell's millisecond times this, plus a counter: it orders uses and still tells their time.
TICKS_PER_MS = 1024
#: Fewer timers than this are not worth cleaning.
SLACK_TIMERS = 1024
#: Uses that are known by value; runs keep what they have.
MAX_USES = 4096


class State:
    """Everything that one engine knows. Owned by one thread; nothing here reads a clock or does I/O."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.tiers = options.tiers
        self.tier_range = range(len(options.tiers))
        self.lease_tier = next((i for i, spec in enumerate(self.tiers) if spec.client_readable), 0)
        self.durable_tier = next((i for i, spec in enumerate(self.tiers) if spec.durable), -1)
        self.writable = [True] * len(self.tiers)  # False once a tier latched
        self.readable = [True] * len(self.tiers)  # False once a tier is gone altogether
        self.segments = [Segments(spec) for spec in self.tiers]
        # Segments given up that some session still maps.
        self.closing_segments: list[set[int]] = [set() for _ in self.tiers]
        self.pools: dict[tuple[int, str, int], Pool] = {}
        self.namespaces: dict[int, NamespaceState] = {}
        self.sessions: dict[int, str] = {}  # session -> tenant
        self.suspended: dict[int, int] = {}  # session -> when it ends
        self.runs: dict[int, Run] = {}
        self.run_ids = itertools.count(1)
        self.ids = itertools.count(1)  # leases, reservations, operations, pins, copies
        self.leases: dict[int, Lease] = {}
        self.reservations: dict[int, Reservation] = {}
        self.operations: dict[int, Operation] = {}
        self.finished: deque[int] = deque()  # done operations, remembered for late waiters
        self.copies: dict[int, CopyJob] = {}
        self.ingests: dict[int, tuple[Reservation, Ingest]] = {}
        self.savers: dict[int, Saver] = {}
        # Runs to copy down ahead of need, and the tier below which: ids, since they may be gone by then.
        self.backlog: OrderedDict[int, int] = OrderedDict()
        self.ahead: dict[int, int] = {}  # runs copied down as cold ones -> their last use then
        self.holes: set[Run] = set()  # runs in no tier, below which something remains
        self.gaps: set[Run] = set()  # runs that the durable tier has lost, below which it holds pages
        self.stranded = Stranded()  # pages of the durable tier that hang below pages which nobody has
        self.returned: set[Run] = set()  # runs that have come while there are such
        self.recovering: set[int] = set()  # namespaces of which the durable tier still holds unknown pages
        self.reading = False  # the durable tier is being read: namespaces that nobody has heard of may come
        self.cleared: set[int] = set()  # namespaces (0: all) of which what is still to come is to go
        self.chain_ends: dict[int, int] = {}  # runs in which a chain of these ends -> its number
        self.hot: set[int] = set()  # runs in which used paths end, since the durable tier was told
        # (run, tier) whose bytes are known to be wrong while pins keep them.
        self.condemned: set[tuple[int, int]] = set()
        # What admission said of a run: its last use then, for which tier, and the verdict.
        self.verdicts: dict[int, tuple[int, int, bool]] = {}
        self.uses: dict[Use, Use] = {}  # one object for equal ones, since every run points to one
        self.warming: set[int] = set()  # operations that were started for look-ups
        self.warmed: set[Run] = (
            set()
        )  # runs that these have brought to the leases' tier and no Fetch has used
        self.news: News | None = None  # while somebody watches what can be read
        self.timers: list[tuple[int, int, str, int]] = []
        self.most_timers = SLACK_TIMERS  # with more, those of what is gone are looked for
        self.counters = Counters(len(self.tiers))
        self.now_ms = 0
        self.tick = 0
        self.held_pages = 0  # at most so many pages are kept by leases and reservations
        self.out: list[Action] = []
        self.room_changed = False  # something was freed or finished: those who wait may get on
        self.backlog_grew = False

    # --- answers

    def emit(self, action: Action) -> None:
        """Ask the shell for something; order is kept."""
        self.out.append(action)

    def reply(self, request: int, result: Result) -> None:
        """Answer an event."""
        self.out.append(Reply(request, result))

    def fail(
        self, request: int, code: ErrorCode, message: str, hint: str = "", *, retry_after_ms: int = 0
    ) -> None:
        """Refuse an event."""
        self.out.append(Reply(request, Failure(code, message, hint, retry_after_ms)))

    # --- time

    def at(self, deadline_ms: int, kind: str, ident: int) -> None:
        """Have ``timers.fire`` look at this then. Stale timers are recognised there, or go when they are many."""
        heapq.heappush(self.timers, (deadline_ms, next(self.ids), kind, ident))
        if len(self.timers) > self.most_timers:
            self._forget_timers()

    def _forget_timers(self) -> None:
        """Drop the timers of what is gone: O(timers), paid for by those that go."""
        owners: dict[str, Container[int]] = {
            "lease": self.leases,
            "rest": self.leases,
            "reservation": self.reservations,
            "operation": self.operations,
            "saver": self.savers,
        }
        self.timers = [
            timer for timer in self.timers if timer[2] not in owners or timer[3] in owners[timer[2]]
        ]
        heapq.heapify(self.timers)
        self.most_timers = 2 * len(self.timers) + SLACK_TIMERS

    def next_tick(self) -> int:
        """A new tick, later than all before."""
        tick = self.now_ms * TICKS_PER_MS
        if tick <= self.tick:
            tick = self.tick + 1
        self.tick = tick
        return tick

    def same_use(self, use: Use) -> Use:
        """The one object that stands for equal uses. Callers choose them: what is kept is bounded."""
        if len(self.uses) >= MAX_USES:
            self.uses.clear()
        return self.uses.setdefault(use, use)

    # --- pools

    def pool_for(self, tier: int, domain: str, page_bytes: int) -> Pool:
        """The pool that pages of this domain and size use in a tier."""
        spec = self.tiers[tier]
        key = (tier, "", 0) if spec.keyed else (tier, domain, page_bytes)
        pool = self.pools.get(key)
        if pool is None:
            slots = 0 if spec.keyed else segment_slots(spec, page_bytes)
            pool = Pool(tier, spec, key[1], key[2], slots, make_policy(self.options.policy_of(spec.name)))
            admission = self.options.admission_of(spec.name) if tier else NO_ADMISSION
            pool.admission = make_admission(admission) if admission != NO_ADMISSION else None
            pool.tell_capacity()
            pool.lower_tiers = tuple(
                index
                for index in self.tier_range[tier + 1 :]
                if self.tiers[index].keyed or not key[2] or segment_slots(self.tiers[index], page_bytes)
            )
            self.pools[key] = pool
        return pool

    def grow(self, pool: Pool, pages: int) -> None:
        """Take spare segments until ``pages`` slots are free or none is left."""
        if pool.spec.keyed or not pool.slots_per_segment:
            return
        spare = self.segments[pool.tier].spare
        while len(pool.free) < pages and spare:
            self.give_segment(pool, spare.pop())

    def give_segment(self, pool: Pool, segment: int) -> None:
        """A segment that nobody has becomes the pool's."""
        pool.add_segment(segment)
        self.emit(OpenSegment(pool.tier, segment, pool.domain, pool.page_bytes, pool.slots_per_segment))

    def free_keys(self, tier: int, keys: Sequence[bytes]) -> None:
        """Have pages deleted from a keyed tier. A commit that is just writing one of them loses it, too."""
        self.emit(Free(tier, (), keys))
        if tier == 0:  # commits land in the first tier
            for _, ingest in self.ingests.values():
                ingest.deleted |= {key for key in keys if key in ingest.keys}

    def release_places(self, namespace: NamespaceState, tier: int, places: Sequence[int]) -> None:
        """Give back places that no page came to occupy (or that a page has left); the shell is told of slots."""
        pool = namespace.pools[tier]
        pool.give_back(places)
        if not pool.spec.keyed:
            self.emit(Free(tier, places, ()))
        self.room_changed = True
