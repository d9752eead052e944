"""What a trace's own structure says, in one pass."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Set

from hicache.sim.traces.model import Request


@dataclasses.dataclass(frozen=True, slots=True)
class TraceFacts:
    """Counts of a trace.

    ``hit_blocks``: what an infinite cache finds when each request is stored before the next one asks, the
    leading ids of a request that were seen before.
    """

    requests: int
    blocks: int
    unique_blocks: int
    hit_blocks: int

    @property
    def bound(self) -> float:
        """Hit ratio of an infinite cache."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0


def facts(requests: Iterable[Request]) -> TraceFacts:
    """Count a trace and its infinite-cache bound. Memory grows with the different blocks only."""
    seen: set[int] = set()
    count = blocks = hits = 0
    for request in requests:
        count += 1
        blocks += len(request.blocks)
        hits += known_depth(request.blocks, seen)
        seen.update(request.blocks)
    return TraceFacts(count, blocks, len(seen), hits)


def known_depth(blocks: array[int], seen: Set[int]) -> int:
    """How many leading blocks were seen before."""
    return next((depth for depth, block in enumerate(blocks) if block not in seen), len(blocks))
