"""Prefetch at look-up: what a coming Fetch would have to wait for starts to move before it comes.

Nobody holds what is brought, and nobody waits for it, so it is bounded, and counted: what was brought, what of it a
Fetch then used, and what left the leases' tier unused, which is bandwidth wasted.
"""

from __future__ import annotations

from hicache.engine.core import RESIDENT, Core
from hicache.engine.holders import CopyJob
from hicache.tree import Run

#: Look-ups whose pages are on their way at one time; more are not prefetched.
MAX_WARMING = 4


def may_start(core: Core, runs: list[Run]) -> bool:
    """Whether a look-up that found these has something to promote, and bandwidth for it."""
    if all(run.state[core.lease_tier] == RESIDENT for run in runs):
        return False
    if len(core.warming) < MAX_WARMING and len(core.copies) < max(core.options.max_copies // 2, 1):
        return True
    core.counters.skipped_prefetches += 1
    return False


def arrived(core: Core, job: CopyJob, runs: list[Run], moved: int) -> None:
    """A copy that was started for a look-up has ended."""
    core.counters.prefetched_pages += moved
    if all(operation.warm for operation in job.operations):
        core.warmed.update(run for run in runs if run.state[job.dst] == RESIDENT)
    else:
        core.counters.used_prefetched_pages += moved  # a Fetch came while it was on its way


def used(core: Core, runs: list[Run]) -> None:
    """A Fetch has come for these."""
    for run in runs:
        if run in core.warmed:
            core.warmed.discard(run)
            core.counters.used_prefetched_pages += run.pages
