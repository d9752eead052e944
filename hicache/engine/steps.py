"""The third storey of the engine's core: residency and structure change here and nowhere else.

Everything above (leases, stores, copies, eviction) works through these steps only, so that tree, policies and ledger
cannot disagree:

- a policy knows a run exactly while it is RESIDENT in the policy's tier, and may choose it exactly while it is
  *exposed*: RESIDENT, unpinned, nothing present below it in that tier;
- ``Pool.used`` is what runs, reservations and copies hold;
- what is known of a run by its id or in a set (holes, gaps, backlog, condemned) follows its splits and merges.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from hicache.engine.actions import Free
from hicache.engine.holders import NamespaceState
from hicache.engine.names import Names, namespace_of
from hicache.engine.pools import Pool
from hicache.engine.residency import check_step
from hicache.policy import Policy
from hicache.tree import Match, Run
from hicache.tree.tips import last_run
from hicache.types import NO_USE, Residency, Use

ABSENT = int(Residency.ABSENT)
FILLING = int(Residency.FILLING)
RESIDENT = int(Residency.RESIDENT)
DRAINING = int(Residency.DRAINING)


class Steps(Names):
    """Steps of residency and structure."""

    # --- structure

    def adopt(self, run: Run, namespace: NamespaceState, use: Use = NO_USE) -> None:
        """Take charge of a run that the tree has just made."""
        run.extra = namespace
        run.use = use
        run.tick = self.tick
        self.runs[run.id] = run

    def cut_end(self, namespace: NamespaceState, match: Match) -> Run | None:
        """The run that ends where a match does, split if need be; None for an empty match."""
        if not match.nodes:
            return None
        run, pages = last_run(namespace.tree, match)
        if pages < run.pages:
            self.split(run, pages)
        return run

    def cut(self, namespace: NamespaceState, match: Match) -> list[Run]:
        """The runs that cover exactly a match; splits the last one if need be."""
        runs, pages = namespace.tree.runs(match)
        if runs and pages < runs[-1].pages:
            self.split(runs[-1], pages)
        return runs

    def cut_at_ghosts(self, run: Run, tier: int) -> list[Run]:
        """Cut a run that is about to be RESIDENT in a tier where the tier's policy ceases to know its pages.

        What it knows has been used before: that counts as a use, so that the pieces stay apart.
        """
        policy = self.pool(run, tier).policy
        if not policy.wants_ghosts:
            return [run]
        parts, left = [run], run.pages
        for pages, known in stretches(policy, self.page_ids(run)):
            part = parts[-1]
            left -= pages
            if left:
                parts.append(self.split(part, pages, rescue=False))
            part.hits += known
        return parts

    def split(self, run: Run, pages: int, *, rescue: bool = True) -> Run:
        """Split a run, policies included; returns the tail. Pages that are leaving stay: somebody has an interest.

        Unless ``rescue`` is false: then both parts go on leaving.
        """
        if rescue and DRAINING in run.state:
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
        for known in (self.holes, self.gaps, self.warmed, self.returned):
            if run in known:
                known.add(other)
        if run.id in self.backlog:
            self.backlog[other.id] = self.backlog[run.id]
        if run.id in self.ahead:
            self.ahead[other.id] = self.ahead[run.id]
        if run.id in self.hot:
            self.hot.add(other.id)
        if run.id in self.verdicts:
            self.verdicts[other.id] = self.verdicts[run.id]
        if self.news is not None:
            self.news.alike(run, other)
        if self.condemned:
            self.condemned |= {(other.id, tier) for ident, tier in self.condemned if ident == run.id}

    def forget_run(self, run: Run) -> None:
        """The run is no more."""
        del self.runs[run.id]
        if self.ahead or self.verdicts or self.hot:
            self.ahead.pop(run.id, None)
            self.verdicts.pop(run.id, None)
            self.hot.discard(run.id)
        for known in (self.holes, self.gaps, self.warmed, self.returned):
            if known:
                known.discard(run)
        if self.chain_ends and run.id in self.chain_ends:
            namespace_of(run).recovered[self.chain_ends.pop(run.id)] = None
        if self.condemned:
            self.condemned -= {(run.id, tier) for tier in self.tier_range}

    def merge(self, run: Run) -> bool:
        """Join the run with the next one of its node if the two have become alike."""
        if self.chain_ends and run.id in self.chain_ends:
            return False  # chains are still to come that hang below its end
        if self.warmed and self._differ_in_use(run):
            return False
        absorbed = run.tree.try_merge(run, run.extra.many_hits)  # type: ignore[attr-defined]  # hot
        if absorbed is None:
            return False
        if self.news is not None:
            self.news.merged(run, absorbed)
        self._know_alike(absorbed, run)
        if self.chain_ends and absorbed.id in self.chain_ends:
            _end_chain_in(self, run, self.chain_ends.pop(absorbed.id))
        self.forget_run(absorbed)
        for tier, state in enumerate(run.state):
            if state == RESIDENT:
                policy = namespace_of(run).pools[tier].policy
                policy.merge(run.id, absorbed.id, run.pages)
                if run.below[tier]:
                    policy.hide(run.id)
                else:
                    policy.expose(run.id)
        return True

    def _differ_in_use(self, run: Run) -> bool:
        """Whether the run was prefetched and not used, and the next one not, or the other way round."""
        return any((run in self.warmed) != (after in self.warmed) for after in run.tree.child_runs(run))

    def prune(self, run: Run) -> None:
        """Take the run, and what its removal makes useless above, out of the tree if nothing needs it."""
        if run.live or run.id not in self.runs:
            return
        for gone in run.tree.prune(run):
            self.forget_run(gone)

    # --- residency

    def set_state(self, run: Run, tier: int, state: int, *, evicted: bool = False) -> None:
        """One step of the residency table, with all that follows for policies and counts.

        ``evicted``: the pages leave to make room, so that a policy may remember them.
        """
        old = run.state[tier]
        check_step(old, state)
        pool: Pool = run.extra.pools[tier]  # type: ignore[attr-defined]  # hot: no cast, no call
        policy = pool.policy
        if old == RESIDENT:
            policy.forget(run.id, self.page_ids(run) if evicted and policy.wants_ghosts else ())
            if tier == self.lease_tier and run in self.warmed:
                self.warmed.discard(run)
                self.counters.unused_prefetched_pages += run.pages
        above = run.tree.set_state(run, tier, state)
        if state == RESIDENT:
            self._enter(run, tier, policy)
        if old == ABSENT and pool.draining:
            self._keep_above(run, tier)
        if above is not None and above.state[tier] == RESIDENT and not above.pins[tier]:
            if above.below[tier]:
                policy.hide(above.id)
            else:
                policy.expose(above.id)
                pool.eased += above.pages
        if state != ABSENT and tier == self.durable_tier and self.gaps:
            self.gaps.discard(run)
        if self.stranded.pages and state == RESIDENT and old != DRAINING:
            self.returned.add(run)
        counts = self.counters.pages[tier]
        counts[old] -= run.pages
        counts[state] += run.pages
        if self.news is not None:
            self.news.stepped(run, tier, old)

    def _keep_above(self, run: Run, tier: int) -> None:
        """Something has come to stand below: what drains just above it stays."""
        above = run.tree.parent_run(run)
        while above is not None and above.state[tier] == ABSENT:
            above = above.tree.parent_run(above)
        if above is not None and above.state[tier] == DRAINING:
            self.rescue(above)

    def _enter(self, run: Run, tier: int, policy: Policy) -> None:
        """The run has become RESIDENT: its pool's policy hears of it."""
        ghosts: list[int] = []
        if policy.wants_ghosts:
            ghosts = self.page_ids(run)
            if policy.known(ghosts) < len(ghosts):
                ghosts = []
        policy.insert(run.id, self.info(run), run.tick, ghosts)
        if run.live > 1:
            for other in namespace_of(run).pools:  # it is clean wherever it stands
                other.eased += run.pages
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

    def leave(self, run: Run, tier: int, *, evicted: bool = False) -> None:
        """The run's pages are no longer in the tier: state, places, ledger, and the shell is told.

        ``evicted``: as in ``set_state``.
        """
        places = run.slots[tier]
        assert places is not None, "a page without a place left a tier"
        pool: Pool = run.extra.pools[tier]  # type: ignore[attr-defined]  # hot
        self.set_state(run, tier, ABSENT, evicted=evicted)
        run.slots[tier] = None
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


def stretches(policy: Policy, ids: list[int]) -> Iterator[tuple[int, bool]]:
    """The pages cut where the policy begins or ceases to know them: how many, and whether it does."""
    start = 0
    next_known = getattr(policy, "next_known", None)
    while start < len(ids):
        known = policy.known(ids[start:] if start else ids)
        end = start + known
        if not known and next_known is not None:
            end = next_known(ids, start + 1)
        while not known and next_known is None and end < len(ids) and not policy.known((ids[end],)):
            end += 1
        yield end - start, known > 0
        start = end


def _end_chain_in(state: Names, run: Run, number: int) -> None:
    """The recovered chain of this number ends in the run from now on."""
    state.chain_ends[run.id] = number
    namespace_of(run).recovered[number] = run
