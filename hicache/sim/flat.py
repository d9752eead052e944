"""Flat mode: every block an object of one page of its own, no tree, driven straight on a policy.

It is what block-cache simulators measure, and serves to hold our policies against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hicache.policy import Policy, RunInfo


def flat_hits(
    policy: Policy, capacity: int, requests: Iterable[Sequence[int]], *, store_first: bool = False
) -> tuple[int, int]:
    """Hits, and blocks asked for, of a pool of ``capacity`` pages; each block is one access, first to last.

    ``store_first``: room is made after a block has come, so that it may be the one to leave.
    """
    resident: set[int] = set()
    info = RunInfo(1, 0)
    hits = now = 0
    hit, known, insert, expose = policy.hit, policy.known, policy.insert, policy.expose
    wants_ghosts = policy.wants_ghosts
    for blocks in requests:
        for block in blocks:
            now += 1
            if block in resident:
                hits += 1
                hit(block, now)
                continue
            ghosts: tuple[int, ...] = (block,) if wants_ghosts else ()
            back = wants_ghosts and known(ghosts) > 0
            if not store_first and len(resident) >= capacity:
                _evict_one(policy, resident)
            insert(block, info, now, ghosts if back else ())
            expose(block)
            resident.add(block)
            if len(resident) > capacity:
                _evict_one(policy, resident)
    return hits, now


def _evict_one(policy: Policy, resident: set[int]) -> None:
    plan = policy.begin()
    victim = plan.next()
    assert victim is not None, "every resident block is exposed"
    plan.commit((victim,))
    policy.forget(victim, (victim,) if policy.wants_ghosts else ())
    resident.discard(victim)
