"""What a look-up could lead to: runs that can be read somewhere, and are not behind one that cannot.

A copy that is known to be wrong but still pinned (``condemned``) is none: whoever fetched up to it would stop there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hicache.tree import Run
from hicache.tree.node import LIVE, parent_run

if TYPE_CHECKING:
    from hicache.engine.core import Core


def sound_in(core: Core, run: Run, tier: int) -> bool:
    """Whether the run can be read in a tier."""
    return run.state[tier] in LIVE and (not core.condemned or (run.id, tier) not in core.condemned)


def sound(core: Core, run: Run) -> bool:
    """Whether the run can be read anywhere. O(1) where nothing is condemned."""
    if not core.condemned:
        return run.live > 0
    return any(sound_in(core, run, tier) for tier in core.tier_range)


def reachable(core: Core, run: Run) -> bool:
    """Whether everything before the run can be read. O(nodes above, runs of its node where that has holes).

    While something is condemned, O(runs above).
    """
    if core.condemned:
        each = parent_run(run)
        while each is not None and sound(core, each):
            each = parent_run(each)
        return each is None
    node = run.node
    if node.holes and any(not each.live for each in node.runs if each.start < run.start):
        return False
    above = node.parent
    while above is not None:
        if above.holes:
            return False
        above = above.parent
    return True


def sound_below(core: Core, run: Run) -> Iterator[Run]:
    """What can be reached through a run's end, parents first. O(it)."""
    todo = run.tree.child_runs(run)
    while todo:
        each = todo.pop()
        if sound(core, each):
            yield each
            todo.extend(each.tree.child_runs(each))


def leasable(core: Core, runs: list[Run], tier: int) -> tuple[list[Run], int]:
    """The runs before the first whose bytes in the lease's tier are known to be wrong.

    No new lease may keep those from leaving it. A copy that is wrong in another tier is no reason to stop: it is not
    promoted from, and if there is no other, the lease ends before it.
    """
    pages = 0
    for index, run in enumerate(runs):
        if (run.id, tier) in core.condemned:
            return runs[:index], pages
        pages += run.pages
    return runs, pages
