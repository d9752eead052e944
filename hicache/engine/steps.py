"""The middle storey of the engine's core: residency and structure change here and nowhere else.

Everything above (leases, stores, copies, eviction) works through these steps only, so that tree, policies and ledger
cannot disagree:

- a policy knows a run exactly while it is RESIDENT in the policy's tier, and may choose it exactly while it is
  *exposed*: RESIDENT, unpinned, nothing present below it in that tier;
- ``Pool.used`` is what runs, reservations and copies hold;
- what is known of a run by its id or in a set (holes, gaps, backlog, condemned) follows its splits and merges.
"""

from __future__ import annotations

from array import array

from hicache.engine.actions import Free
from hicache.engine.holders import NamespaceState
from hicache.engine.pools import Pool
from hicache.engine.residency import check_step
from hicache.engine.state import State
from hicache.policy import RunInfo
from hicache.tree import Match, Run
from hicache.types import Residency

ABSENT = int(Residency.ABSENT)
FILLING = int(Residency.FILLING)
RESIDENT = int(Residency.RESIDENT)
DRAINING = int(Residency.DRAINING)


class Steps(State):
    """Steps of residency and structure."""

    def pool(self, run: Run, tier: int) -> Pool:
        """The run's pool in a tier."""
        return namespace_of(run).pools[tier]

    def run_units(self, run: Run, tier: int) -> int:
        """Units of the pool that the run holds in a tier."""
        places = run.slots[tier]
        if places is None:
            return 0
        return sum(places) if self.tiers[tier].keyed else run.pages

    def keys(self, run: Run) -> list[bytes]:
        """The page keys of a run, computed if they were not yet."""
        namespace = namespace_of(run)
        return namespace.tree.page_keys(run, namespace.fingerprint)

    # --- structure

    def adopt(self, run: Run, namespace: NamespaceState) -> None:
        """Take charge of a run that the tree has just made."""
        run.extra = namespace
        run.tick = self.tick
        self.runs[run.id] = run

    def cut(self, namespace: NamespaceState, match: Match) -> list[Run]:
        """The runs that cover exactly a match; splits the last one if need be."""
        runs, pages = namespace.tree.runs(match)
        if runs and pages < runs[-1].pages:
            self.split(runs[-1], pages)
        return runs

    def split(self, run: Run, pages: int) -> Run:
        """Split a run, policies included; returns the tail. Pages that are leaving stay: somebody has an interest."""
        if DRAINING in run.state:
            self.rescue(run)
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
        self._know_alike(run, tail)
        if self.chain_ends and run.id in self.chain_ends:
            _end_chain_in(self, tail, self.chain_ends.pop(run.id))
        return tail

    def _know_alike(self, run: Run, other: Run) -> None:
        """What is known of one run holds for the other, too."""
        for known in (self.holes, self.gaps, self.returned):
            if run in known:
                known.add(other)
        if run.id in self.backlog:
            self.backlog[other.id] = self.backlog[run.id]
        if run.id in self.ahead:
            self.ahead[other.id] = self.ahead[run.id]
        if run.id in self.hot:
            self.hot.add(other.id)
        if self.condemned:
            self.condemned |= {(other.id, tier) for ident, tier in self.condemned if ident == run.id}

    def _forget(self, run: Run) -> None:
        """The run is no more."""
        del self.runs[run.id]
        self.ahead.pop(run.id, None)
        self.hot.discard(run.id)
        self.holes.discard(run)
        self.gaps.discard(run)
        self.returned.discard(run)
        if self.chain_ends and run.id in self.chain_ends:
            namespace_of(run).recovered[self.chain_ends.pop(run.id)] = None
        if self.condemned:
            self.condemned -= {(run.id, tier) for tier in self.tier_range}

    def merge(self, run: Run) -> bool:
        """Join the run with the next one of its node if the two have become alike."""
        if self.chain_ends and run.id in self.chain_ends:
            return False  # chains are still to come that hang below its end
        absorbed = run.tree.try_merge(run)
        if absorbed is None:
            return False
        self._know_alike(absorbed, run)
        if self.chain_ends and absorbed.id in self.chain_ends:
            _end_chain_in(self, run, self.chain_ends.pop(absorbed.id))
        self._forget(absorbed)
        for tier, state in enumerate(run.state):
            if state == RESIDENT:
                policy = namespace_of(run).pools[tier].policy
                policy.merge(run.id, absorbed.id, run.pages)
                if run.below[tier]:
                    policy.hide(run.id)
                else:
                    policy.expose(run.id)
        return True

    def prune(self, run: Run) -> None:
        """Take the run, and what its removal makes useless above, out of the tree if nothing needs it."""
        if run.live or run.id not in self.runs:
            return
        for gone in run.tree.prune(run):
            self._forget(gone)

    # --- residency

    def set_state(self, run: Run, tier: int, state: int) -> None:
        """One step of the residency table, with all that follows for policies and counts."""
        old = run.state[tier]
        check_step(old, state)
        if old == RESIDENT:
            self.pool(run, tier).policy.forget(run.id)
        above = run.tree.set_state(run, tier, state)
        if state == RESIDENT:
            self._enter(run, tier)
        if old == ABSENT and self.pool(run, tier).draining:
            self._keep_above(run, tier)
        if above is not None and above.state[tier] == RESIDENT and not above.pins[tier]:
            policy = self.pool(above, tier).policy
            if above.below[tier]:
                policy.hide(above.id)
            else:
                policy.expose(above.id)
        if state != ABSENT and tier == self.durable_tier and self.gaps:
            self.gaps.discard(run)
        if self.stranded.pages and state == RESIDENT and old != DRAINING:
            self.returned.add(run)
        counts = self.counters.pages[tier]
        counts[old] -= run.pages
        counts[state] += run.pages

    def _keep_above(self, run: Run, tier: int) -> None:
        """Something has come to stand below: what drains just above it stays."""
        above = run.tree.parent_run(run)
        while above is not None and above.state[tier] == ABSENT:
            above = above.tree.parent_run(above)
        if above is not None and above.state[tier] == DRAINING:
            self.rescue(above)

    def _enter(self, run: Run, tier: int) -> None:
        """The run has become RESIDENT: its pool's policy hears of it."""
        policy = self.pool(run, tier).policy
        key = run.last_key
        policy.insert(run.id, RunInfo(run.pages, run.tree.depth_pages(run), key, "", 0, 1.0), run.tick)
        if not run.pins[tier] and not run.below[tier]:
            policy.expose(run.id)
        self.holes.discard(run)

    def place(self, run: Run, tier: int, places: array[int] | None) -> None:
        """Write down where the run's pages lie in a tier; None: nowhere any more."""
        run.tree.set_slots(run, tier, places)

    def appear(self, run: Run, tier: int, places: array[int]) -> None:
        """The run's pages are in a tier without having been copied there by us: committed, or recovered."""
        run.tick = self.tick
        self.place(run, tier, places)
        self.set_state(run, tier, RESIDENT)
        if run in self.gaps:
            self.save_early(run, tier)

    def leave(self, run: Run, tier: int) -> None:
        """The run's pages are no longer in the tier: state, places, ledger, and the shell is told."""
        places = run.slots[tier]
        assert places is not None, "a page without a place left a tier"
        pool = namespace_of(run).pools[tier]
        self.set_state(run, tier, ABSENT)
        self.place(run, tier, None)
        pool.give_back(places)
        if pool.spec.keyed:
            self.free_keys(tier, self.keys(run))
        else:
            self.emit(Free(tier, places, ()))
        self.room_changed = True

    def lose(self, run: Run, tier: int) -> None:
        """The run has left a tier against our will. Below it the durable tier may hold pages: then that is a gap."""
        if tier == self.durable_tier and run.below[tier]:
            self.gaps.add(run)
        if not run.live:
            self.holes.add(run)
            self.prune(run)

    def rescue(self, run: Run) -> None:
        """A DRAINING page was hit: it stays. The copy away from it goes on as a write-through."""
        for tier in self.tier_range:
            if run.state[tier] == DRAINING:
                self.counters.rescued_pages += run.pages
                self.stay(run, tier)

    def stay(self, run: Run, tier: int) -> None:
        """A DRAINING page does not leave after all; nor do those that drain above it."""
        each: Run | None = run
        while each is not None and each.state[tier] in {ABSENT, DRAINING}:
            if each.state[tier] == DRAINING:
                self.pool(each, tier).draining -= self.run_units(each, tier)
                self.set_state(each, tier, RESIDENT)
            each = each.tree.parent_run(each)

    def save_early(self, run: Run, tier: int) -> None:
        """Have the run copied to the next tier below ``tier``, ahead of need.

        Never to a tier that it has had its early copy in: two runs could push each other out of it without end.
        """
        self.backlog[run.id] = tier
        self.backlog_grew = True


def namespace_of(run: Run) -> NamespaceState:
    """The namespace of a run that the engine has adopted."""
    namespace = run.extra
    assert isinstance(namespace, NamespaceState)
    return namespace


def _end_chain_in(state: State, run: Run, number: int) -> None:
    """The recovered chain of this number ends in the run from now on."""
    state.chain_ends[run.id] = number
    namespace_of(run).recovered[number] = run
