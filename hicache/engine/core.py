"""The engine's core, whole: on top of state and steps, who holds what.

A *pin* keeps a run from leaving one tier, an *anchor* its last page from being dropped from its last tier, a *hold*
lets a holder (lease, copy, reservation, ...) follow the run's splits and keeps it in the tree. Each has one undo.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hicache.engine.holders import Guard
from hicache.engine.names import namespace_of
from hicache.engine.state import TICKS_PER_MS
from hicache.engine.steps import ABSENT, DRAINING, FILLING, RESIDENT, Steps
from hicache.tree import Run
from hicache.types import NO_USE, Use

if TYPE_CHECKING:
    from hicache.tree.node import Holder

__all__ = ["ABSENT", "DRAINING", "FILLING", "RESIDENT", "TICKS_PER_MS", "Core", "namespace_of"]


#: Ends of used paths that are kept until the durable tier is told; beyond it uses are not noted.
MAX_HOT = 65_536


class Core(Steps):
    """What the rooms of the engine work on."""

    # --- pins

    def pin(self, run: Run, tier: int) -> None:
        """Keep the run from leaving a tier."""
        run.pins[tier] += 1
        if run.pins[tier] == 1 and run.state[tier] == RESIDENT and not run.below[tier]:
            run.extra.pools[tier].policy.hide(run.id)  # type: ignore[attr-defined]  # hot: no cast, no call

    def pin_all(self, holder: Holder, runs: list[Run], tier: int) -> None:
        """``pin`` and ``hold`` for many runs of one namespace at once: hot."""
        policy = runs[0].extra.pools[tier].policy  # type: ignore[attr-defined]
        for run in runs:
            run.holders.append(holder)
            pins = run.pins
            pins[tier] += 1
            if not run.below[tier] and pins[tier] == 1 and run.state[tier] == RESIDENT:
                policy.hide(run.id)
        holder.runs = runs

    def unpin_all(self, holder: Holder, tier: int) -> None:
        """Undo ``pin_all``; the holder still lists them, so that the caller can look what is left of them."""
        if not holder.runs:
            return
        self.room_changed = True
        policy = holder.runs[0].extra.pools[tier].policy  # type: ignore[attr-defined]
        for run in holder.runs:
            run.holders.remove(holder)
            pins = run.pins
            assert pins[tier] > 0, "unpinned a run that had no pin"
            pins[tier] -= 1
            if not run.below[tier] and not pins[tier] and run.state[tier] == RESIDENT:
                policy.expose(run.id)
                run.extra.pools[tier].eased += run.pages  # type: ignore[attr-defined]  # hot
        if self.condemned:
            self._void_unpinned(holder.runs, tier)

    def _void_unpinned(self, runs: list[Run], tier: int) -> None:
        """What is wrong among these leaves now, where that was the last pin."""
        for run in list(runs):
            free = not run.pins[tier] and run.state[tier] == RESIDENT
            if free and (run.id, tier) in self.condemned:
                self.void(run, tier)

    def unpin(self, run: Run, tier: int) -> None:
        """Undo one ``pin``."""
        assert run.pins[tier] > 0, "unpinned a run that had no pin"
        run.pins[tier] -= 1
        if run.pins[tier] == 0 and run.state[tier] == RESIDENT:
            self.room_changed = True
            run.extra.pools[tier].eased += run.pages  # type: ignore[attr-defined]  # hot
            self._unpinned(run, tier)

    def _unpinned(self, run: Run, tier: int) -> None:
        """The last pin of a RESIDENT run is gone."""
        if not run.below[tier]:
            run.extra.pools[tier].policy.expose(run.id)  # type: ignore[attr-defined]  # hot
        if self.condemned and (run.id, tier) in self.condemned:
            self.void(run, tier)

    def guard(self, run: Run, tiers: list[int]) -> Guard:
        """Pin a run in some tiers for one step; it may be split meanwhile. End with ``unguard``."""
        guard = Guard(tiers)
        self.hold(guard, run)
        for tier in tiers:
            self.pin(run, tier)
        return guard

    def unguard(self, guard: Guard) -> None:
        """Undo ``guard``. Nobody waits for what a guard held, since it is gone before the event is."""
        for run in guard.runs:
            run.holders.remove(guard)
            for tier in guard.tiers:
                run.pins[tier] -= 1
                if run.pins[tier] == 0 and run.state[tier] == RESIDENT:
                    self._unpinned(run, tier)
        guard.runs = []

    def void(self, run: Run, tier: int) -> None:
        """The run's bytes in a tier are wrong: they leave at once, or when the last pin does."""
        if run.pins[tier]:
            if self.news is not None and (run.id, tier) not in self.condemned:
                self.news.condemned(run, tier)
            self.condemned.add((run.id, tier))
            return
        self.leave(run, tier)
        self.condemned.discard((run.id, tier))
        self.lose(run, tier)
        if run in self.gaps and run.live:
            self.save_early(run, tier - 1)

    # --- holds

    def hold(self, holder: Holder, run: Run) -> None:
        """Let a holder follow the run's splits; it is not pruned while held."""
        holder.runs.append(run)
        run.holders.append(holder)

    def let_go(self, holder: Holder, run: Run) -> None:
        """Undo one ``hold``; a run that nothing needs any more is pruned."""
        holder.runs.remove(run)
        run.holders.remove(holder)
        self.prune(run)

    def anchor(self, run: Run, step: int) -> None:
        """Hold (1) or let go (-1) the end of a run: it is not dropped from its last tier while held."""
        run.anchors += step
        assert run.anchors >= 0, "an anchor was let go twice"
        if not run.anchors:
            self.prune(run)

    # --- use

    def touch(self, runs: list[Run], use: Use = NO_USE) -> None:
        """Count a use of these runs (a path from the root). What is said of the use holds from now on."""
        tick = self.next_tick()
        if use is not NO_USE:
            use = self.same_use(use)
            for run in runs:
                run.use = use
        for run in runs:
            run.tick = tick
            run.hits += 1
        for tier in self.tier_range:
            there = [run.id for run in runs if run.state[tier] == RESIDENT]
            if there:
                runs[0].extra.pools[tier].hit_all(there, tick)  # type: ignore[attr-defined]  # hot
        if self.copies:  # else nothing drains
            for run in runs:
                if DRAINING in run.state:
                    self.rescue(run)
        if self.durable_tier >= 0 and runs and len(self.hot) < MAX_HOT:
            self.hot.add(runs[-1].id)

    def best_tier(self, run: Run) -> int:
        """The fastest tier in which the run can be read, -1 if none."""
        found: int = self.source_for(run, -1)
        if found < 0 and DRAINING in run.state:
            found = run.state.index(DRAINING)
        return found

    def source_for(self, run: Run, dst: int) -> int:
        """The tier from which to copy a run to ``dst``: the nearest above it, else the nearest below; -1 if none."""
        above = range(dst - 1, -1, -1)
        under = range(dst + 1, len(self.tiers))
        for tier in itertools.chain(above, under):
            if run.state[tier] == RESIDENT and (run.id, tier) not in self.condemned:
                return tier
        return -1
