"""What a durable tier is told of the use of its pages, so that a restart knows which are worth keeping.

A use notes the end of its path, no more. What stands above is looked up when the heat is told: a page's heat counts for
all pages before it, so that of a path only those runs are told that were used more often than what was told below them.
"""

from __future__ import annotations

from hicache.engine.core import RESIDENT, TICKS_PER_MS, Core, namespace_of
from hicache.tree import Run

#: (namespace, key of the run's last page, its last use in ms of the shell's clock, its hits)
Heat = tuple[int, bytes, int, int]


def take(core: Core, limit: int) -> list[Heat]:
    """Tell of ``limit`` ends of paths, or of fewer if that makes more than ``limit`` runs; they are forgotten."""
    found: list[Heat] = []
    seen: set[int] = set()
    while core.hot and len(found) < limit:
        run = core.runs.get(core.hot.pop())
        if run is not None:
            _tell(core, run, seen, found)
    return found


def _tell(core: Core, end: Run, seen: set[int], found: list[Heat]) -> None:
    told = -1
    run: Run | None = end
    while run is not None and run.id not in seen:
        seen.add(run.id)
        if run.state[core.durable_tier] == RESIDENT and run.hits > told:
            told = run.hits
            key = core.keys(run)[-1] if run.last_key is None else run.last_key
            found.append((namespace_of(run).id, key, run.tick // TICKS_PER_MS, run.hits))
        run = run.tree.parent_run(run)
