"""The engine's state, and the few primitive steps that change it.

Everything above (leases, stores, copies, eviction) changes residency, pins and structure through these steps only, so
that tree, policies and ledger cannot disagree:

- a policy knows a run exactly while it is RESIDENT in the policy's tier, and may choose it exactly while it is
  *exposed*: RESIDENT, unpinned, nothing present below it in that tier;
- ``Pool.used`` is what runs, reservations and copies hold.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hicache.engine.actions import Action, Failure, Free, OpenSegment, Reply, Result
from hicache.engine.counters import Counters
from hicache.engine.holders import (
    CopyJob,
    Guard,
    Ingest,
    Lease,
    NamespaceState,
    Operation,
    Reservation,
    Saver,
)
from hicache.engine.options import EngineOptions
from hicache.engine.pools import Pool, Segments
from hicache.engine.residency import check_step
from hicache.errors import ErrorCode
from hicache.policy import RunInfo, make_policy
from hicache.tree import Match, Run
from hicache.types import Residency, segment_slots

if TYPE_CHECKING:
    from hicache.tree.node import Holder

ABSENT = int(Residency.ABSENT)
FILLING = int(Residency.FILLING)
RESIDENT = int(Residency.RESIDENT)
DRAINING = int(Residency.DRAINING)

#: A tick is the shell's millisecond times this, plus a counter: it orders uses and still tells their time.
TICKS_PER_MS = 1024


class Core:
    """State of one engine. Owned by one thread; nothing here reads a clock or does I/O."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.tiers = options.tiers
        self.tier_range = range(len(options.tiers))
        self.lease_tier = next((i for i, spec in enumerate(self.tiers) if spec.client_readable), 0)
        self.durable_tier = next((i for i, spec in enumerate(self.tiers) if spec.durable), -1)
        self.writable = [True] * len(self.tiers)  # False once a tier latched
        self.segments = [Segments(spec) for spec in self.tiers]
        self.closing_segments = [0] * len(self.tiers)  # given up, still mapped by some session
        self.pools: dict[tuple[int, str, int], Pool] = {}
        self.namespaces: dict[int, NamespaceState] = {}
        self.namespace_of: dict[bytes, NamespaceState] = {}
        self.sessions: dict[int, str] = {}  # session -> tenant
        self.runs: dict[int, Run] = {}
        self.run_ids = itertools.count(1)
        self.ids = itertools.count(1)  # leases, reservations, operations, pins, copies
        self.leases: dict[int, Lease] = {}
        self.reservations: dict[int, Reservation] = {}
        self.operations: dict[int, Operation] = {}
        self.finished: deque[int] = deque()  # done operations, remembered for late waiters
        self.copies: dict[int, CopyJob] = {}
        self.ingests: dict[int, tuple[Reservation, Ingest]] = {}
        self.savers: list[Saver] = []
        self.backlog: deque[int] = (
            deque()
        )  # runs to copy down ahead of need; ids, since they may be gone by then
        self.holes: set[Run] = set()  # runs in no tier, below which something remains
        self.condemned: dict[
            int, int
        ] = {}  # run -> tier whose bytes are known to be wrong, while pins keep them
        self.suspended: dict[int, int] = {}  # session -> when it ends
        self.timers: list[tuple[int, int, str, int]] = []
        self.counters = Counters(len(self.tiers))
        self.now_ms = 0
        self.tick = 0
        self.out: list[Action] = []
        self.room_changed = False  # something was freed or finished: those who wait may get on

    # --- answers

    def emit(self, action: Action) -> None:
        """Ask the shell for something; order is kept."""
        self.out.append(action)

    def reply(self, request: int, result: Result) -> None:
        """Answer an event."""
        self.out.append(Reply(request, result))

    def fail(
        self, request: int, code: ErrorCode, message: str, hint: str = "", retry_after_ms: int = 0
    ) -> None:
        """Refuse an event."""
        self.out.append(Reply(request, Failure(code, message, hint, retry_after_ms)))

    def at(self, deadline_ms: int, kind: str, ident: int) -> None:
        """Have ``timers.fire`` look at this then. Stale timers are recognised there, never removed."""
        heapq.heappush(self.timers, (deadline_ms, next(self.ids), kind, ident))

    def next_tick(self) -> int:
        """A new tick, later than all before."""
        self.tick = max(self.tick + 1, self.now_ms * TICKS_PER_MS)
        return self.tick

    # --- pools

    def pool_for(self, tier: int, domain: str, page_bytes: int) -> Pool:
        """The pool that pages of this domain and size use in a tier."""
        spec = self.tiers[tier]
        key = (tier, "", 0) if spec.keyed else (tier, domain, page_bytes)
        pool = self.pools.get(key)
        if pool is None:
            slots = 0 if spec.keyed else segment_slots(spec, page_bytes)
            pool = Pool(tier, spec, key[1], key[2], slots, make_policy(self.options.policy))
            self.pools[key] = pool
        return pool

    def grow(self, pool: Pool, pages: int) -> None:
        """Take spare segments until ``pages`` slots are free or none is left."""
        if pool.spec.keyed or not pool.slots_per_segment:
            return
        spare = self.segments[pool.tier].spare
        while len(pool.free) < pages and spare:
            segment = spare.pop()
            pool.add_segment(segment)
            self.emit(OpenSegment(pool.tier, segment, pool.domain, pool.page_bytes, pool.slots_per_segment))

    def pool(self, run: Run, tier: int) -> Pool:
        """The run's pool in a tier."""
        return namespace_of(run).pools[tier]

    def release_places(self, namespace: NamespaceState, tier: int, places: Sequence[int]) -> None:
        """Give back places that no page came to occupy (or that a page has left); the shell is told of slots."""
        pool = namespace.pools[tier]
        pool.give_back(places)
        if not pool.spec.keyed:
            self.emit(Free(tier, places, ()))
        self.room_changed = True

    # --- runs

    def adopt(self, run: Run, namespace: NamespaceState) -> None:
        """Take charge of a run that the tree has just made."""
        run.extra = namespace
        run.tick = self.tick
        self.runs[run.id] = run

    def split(self, run: Run, pages: int) -> Run:
        """Split a run, policies included; returns the tail."""
        tail = run.tree.split_run(run, pages)
        self.runs[tail.id] = tail
        pools = namespace_of(run).pools
        for tier, state in enumerate(run.state):
            if state == RESIDENT:
                policy = pools[tier].policy
                policy.split(run.id, tail.id, tail.pages)
                policy.hide(run.id)  # the tail is present below it
                if not tail.pins[tier] and not tail.below[tier]:
                    policy.expose(tail.id)
        return tail

    def cut(self, namespace: NamespaceState, match: Match) -> list[Run]:
        """The runs that cover exactly a match; splits the last one if need be."""
        runs, pages = namespace.tree.runs(match)
        if runs and pages < runs[-1].pages:
            self.split(runs[-1], pages)
        return runs

    def set_state(self, run: Run, tier: int, state: int) -> None:
        """One step of the residency table, with all that follows for policies and counts."""
        old = run.state[tier]
        check_step(old, state)
        pool = namespace_of(run).pools[tier]
        if old == RESIDENT:
            pool.policy.forget(run.id)
        above = run.tree.set_state(run, tier, state)
        if state == RESIDENT:
            info = RunInfo(
                run.pages, run.tree.depth_pages(run), run.keys[-1] if run.keys else None, "", 0, 1.0
            )
            pool.policy.insert(run.id, info, run.tick)
            if not run.pins[tier] and not run.below[tier]:
                pool.policy.expose(run.id)
        if above is not None and above.state[tier] == DRAINING and above.below[tier]:
            self.rescue(above)  # something has come to stand below it
        if above is not None and above.state[tier] == RESIDENT and not above.pins[tier]:
            if above.below[tier]:
                namespace_of(above).pools[tier].policy.hide(above.id)
            else:
                namespace_of(above).pools[tier].policy.expose(above.id)
        self.counters.pages[tier][old] -= run.pages
        self.counters.pages[tier][state] += run.pages

    def place(self, run: Run, tier: int, places: array[int]) -> None:
        """Write down where the run's pages lie in a tier."""
        run.tree.set_slots(run, tier, places)

    def place_nothing(self, run: Run, tier: int) -> None:
        """The run has no places in a tier any more."""
        run.tree.set_slots(run, tier, None)

    def leave(self, run: Run, tier: int) -> None:
        """The run's pages are no longer in the tier: state, places, ledger, and the shell is told."""
        places = run.slots[tier]
        assert places is not None, "a page without a place left a tier"
        pool = namespace_of(run).pools[tier]
        self.set_state(run, tier, ABSENT)
        run.tree.set_slots(run, tier, None)
        pool.give_back(places)
        if pool.spec.keyed:
            self.emit(Free(tier, (), self.keys(run)))
        else:
            self.emit(Free(tier, places, ()))
        self.room_changed = True

    def keys(self, run: Run) -> list[bytes]:
        """The page keys of a run, computed if they were not yet."""
        namespace = namespace_of(run)
        return namespace.tree.page_keys(run, namespace.fingerprint)

    def pin(self, run: Run, tier: int) -> None:
        """Keep the run from leaving a tier."""
        run.pins[tier] += 1
        if run.pins[tier] == 1 and run.state[tier] == RESIDENT:
            namespace_of(run).pools[tier].policy.hide(run.id)

    def unpin(self, run: Run, tier: int) -> None:
        """Undo one ``pin``."""
        assert run.pins[tier] > 0, "unpinned a run that had no pin"
        run.pins[tier] -= 1
        if run.pins[tier] == 0 and run.state[tier] == RESIDENT:
            if not run.below[tier]:
                namespace_of(run).pools[tier].policy.expose(run.id)
            self.room_changed = True
            if self.condemned and self.condemned.get(run.id) == tier:
                self.void(run, tier)

    def guard(self, run: Run, tiers: list[int]) -> Guard:
        """Pin a run in some tiers for one step; it may be split meanwhile. End with ``unguard``."""
        guard = Guard(tiers)
        self.hold(guard, run)
        for tier in tiers:
            self.pin(run, tier)
        return guard

    def unguard(self, guard: Guard) -> None:
        """Undo ``guard``."""
        for run in guard.runs:
            run.holders.remove(guard)
            for tier in guard.tiers:
                self.unpin(run, tier)
        guard.runs = []

    def void(self, run: Run, tier: int) -> None:
        """The run's bytes in a tier are wrong: they leave at once, or when the last pin does."""
        if run.pins[tier]:
            self.condemned[run.id] = tier
            return
        self.condemned.pop(run.id, None)
        self.leave(run, tier)
        if not run.live:
            self.holes.add(run)
            self.prune(run)

    def hold(self, holder: Holder, run: Run) -> None:
        """Let a holder follow the run's splits; it is not pruned while held."""
        holder.runs.append(run)
        run.holders.append(holder)

    def let_go(self, holder: Holder, run: Run) -> None:
        """Undo one ``hold``; a run that nothing needs any more is pruned."""
        holder.runs.remove(run)
        run.holders.remove(holder)
        self.prune(run)

    def prune(self, run: Run) -> None:
        """Take the run, and what its removal makes useless above, out of the tree if nothing needs it."""
        if run.live or run.id not in self.runs:
            return
        for gone in run.tree.prune(run):
            del self.runs[gone.id]
            self.holes.discard(gone)
            self.condemned.pop(gone.id, None)

    def merge(self, run: Run) -> bool:
        """Join the run with the next one of its node if the two have become alike."""
        absorbed = run.tree.try_merge(run)
        if absorbed is None:
            return False
        del self.runs[absorbed.id]
        self.holes.discard(absorbed)
        for tier, state in enumerate(run.state):
            if state == RESIDENT:
                policy = namespace_of(run).pools[tier].policy
                policy.merge(run.id, absorbed.id, run.pages)
                if run.below[tier]:
                    policy.hide(run.id)
                else:
                    policy.expose(run.id)
        return True

    def anchor(self, run: Run, step: int) -> None:
        """Hold (1) or let go (-1) the end of a run: it is not dropped from its last tier while held."""
        run.anchors += step
        assert run.anchors >= 0, "an anchor was let go twice"
        if not run.anchors:
            self.prune(run)

    def rescue(self, run: Run) -> None:
        """A DRAINING page was hit: it stays. The copy away from it goes on as a write-through."""
        for tier in self.tier_range:
            if run.state[tier] == DRAINING:
                self.set_state(run, tier, RESIDENT)
                self.pool(run, tier).draining -= self.run_units(run, tier)
                self.counters.rescued_pages += run.pages

    def run_units(self, run: Run, tier: int) -> int:
        """Units of the pool that the run holds in a tier."""
        places = run.slots[tier]
        if places is None:
            return 0
        return sum(places) if self.tiers[tier].keyed else run.pages

    def touch(self, runs: list[Run]) -> None:
        """Count a use of these runs (a path from the root)."""
        tick = self.next_tick()
        for run in runs:
            run.tick = tick
            run.hits += 1
            pools = run.extra.pools  # type: ignore[attr-defined]  # hot: no cast, no call
            for tier, state in enumerate(run.state):
                if state == RESIDENT:
                    pools[tier].policy.hit(run.id, tick)
                elif state == DRAINING:
                    self.rescue(run)

    def best_tier(self, run: Run) -> int:
        """The fastest tier in which the run can be read, -1 if none."""
        try:
            return run.state.index(RESIDENT)
        except ValueError:
            return run.state.index(DRAINING) if DRAINING in run.state else -1

    def source_for(self, run: Run, dst: int) -> int:
        """The tier from which to copy a run to ``dst``: the nearest above it, else the nearest below; -1 if none."""
        above = range(dst - 1, -1, -1)
        under = range(dst + 1, len(self.tiers))
        return next((tier for tier in (*above, *under) if run.state[tier] == RESIDENT), -1)


def namespace_of(run: Run) -> NamespaceState:
    """The namespace of a run that the engine has adopted."""
    namespace = run.extra
    assert isinstance(namespace, NamespaceState)
    return namespace
