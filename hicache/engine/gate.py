"""Admission: whether a run is worth a copy in a lower tier.

Asked when a run would be copied ahead of need and when it is a victim that stands nowhere else, once between two uses
of it: admissions count what they are asked, and a plan that was abandoned must not count as another use. Never asked
for durable commits, drains, pages that mend a gap, and what an operator moves.
"""

from __future__ import annotations

from hicache.engine.core import Core
from hicache.engine.holders import Saver
from hicache.tree import Run


def admits(core: Core, run: Run, lower: int) -> bool:
    """Whether the run may be written to a lower tier now."""
    admission = core.pool(run, lower).admission
    if admission is None or run in core.gaps or any(isinstance(each, Saver) for each in run.holders):
        return True
    tick, tier, verdict = core.verdicts.get(run.id, (-1, -1, False))
    if tick == run.tick and tier == lower:
        return verdict
    ghosts = core.page_ids(run) if admission.wants_ghosts else ()
    verdict = admission.admit(core.info(run), run.hits, ghosts)
    core.verdicts[run.id] = (run.tick, lower, verdict)
    counts = core.counters.admitted_pages if verdict else core.counters.refused_pages
    counts[lower] += run.pages
    return verdict


def refuses(core: Core, run: Run, lower: int, *, leaving: int = 0) -> bool:
    """Whether a run that stands in one tier only may leave it without a copy: nothing hangs below it, nobody waits.

    ``leaving``: how many of its next runs are about to go.
    """
    if lower < 0 or core.pool(run, lower).admission is None or run.anchors:
        return False
    return len(run.tree.child_runs(run)) <= leaving and not admits(core, run, lower)
