"""What more or less room would do, from a sample of the pages that were used.

Of all pages a share ``rate`` is watched, chosen by their identity, so that a watched page is watched whenever it comes
back. The distance between two of its uses, counted in watched pages, is ``rate`` times the true one.

Sources: Mattson et al., "Evaluation techniques for storage hierarchies", 1970 (stack distances); Waldspurger et al.,
"Efficient MRC construction with SHARDS", FAST 2015 (spatial sampling).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from hicache.policy.base import Policy, RunInfo

#: No distance: a page that was not used before.
NEVER = -1


def reuse_distances(idents: Sequence[int]) -> list[int]:
    """For each use, how many other pages were used since the last use of its page; NEVER for the first.

    A Fenwick tree over the places of last uses: O(n log n).
    """
    size = len(idents)
    tree = [0] * (size + 1)
    last: dict[int, int] = {}
    found = []
    for place, ident in enumerate(idents, 1):
        before = last.get(ident)
        if before is None:
            found.append(NEVER)
        else:
            found.append(len(last) - _sum_to(tree, before))
            _add(tree, before, -1)
        last[ident] = place
        _add(tree, place, 1)
    return found


def _sum_to(tree: list[int], place: int) -> int:
    total = 0
    while place:
        total += tree[place]
        place &= place - 1
    return total


def _add(tree: list[int], place: int, step: int) -> None:
    while place < len(tree):
        tree[place] += step
        place += place & -place


class SampledCurve:
    """The hit ratio of LRU with any room. ``skip``: uses at the start that only say what was there before.

    ``asked``: all pages that were asked for since then, watched or not. How many uses of watched pages that should have
    made is known; what is missing or too much is taken for uses of the few hottest pages, which the sample has or has
    not by chance, and which every cache holds (SHARDS-adj).
    """

    def __init__(self, idents: Sequence[int], rate: float, *, skip: int = 0, asked: int = 0) -> None:
        self._rate = rate
        counted = reuse_distances(idents)[skip:]
        self._hottest = asked * rate - len(counted) if asked else 0.0
        self.uses = len(counted)
        self._distances = sorted(distance for distance in counted if distance != NEVER)

    def ratio(self, pages: int) -> float:
        """Hits over uses with room for so many pages."""
        return self._share(bisect_left(self._distances, pages * self._rate))

    @property
    def bound(self) -> float:
        """Of a cache without end, as far as the sample reaches back."""
        return self._share(len(self._distances))

    def _share(self, hits: int) -> float:
        uses = self.uses + self._hottest
        return min(max((hits + self._hottest) / uses, 0.0), 1.0) if uses > 0 else 0.0


def shadow_ratio(policy: Policy, uses: Sequence[tuple[int, int]], room: int, *, skip: int = 0) -> float:
    """What a policy would have hit with a small cache of ``room`` watched pages, each a run of its own.

    ``uses``: (page, pages before it in its prompt). The pages are leaves to the policy: it is compared with others
    that are asked in the same way, not with the cache that serves.
    """
    runs: dict[int, int] = {}  # page -> its run, as long as it is held
    pages: dict[int, int] = {}
    hits = newest = 0
    for now, (page, depth) in enumerate(uses):
        run = runs.get(page)
        if run is not None:
            hits += now >= skip
            policy.hit(run, now)
            continue
        ghosts = (page,) if policy.wants_ghosts else ()
        known = policy.known(ghosts) > 0 if ghosts else False
        if len(runs) >= room:
            del runs[_evict(policy, pages)]
        newest += 1
        runs[page], pages[newest] = newest, page
        policy.insert(newest, RunInfo(1, depth), now, ghosts if known else ())
        policy.expose(newest)
    return hits / max(len(uses) - skip, 1)


def _evict(policy: Policy, pages: dict[int, int]) -> int:
    """The page that leaves."""
    plan = policy.begin()
    victim = plan.next()
    assert victim is not None, "every page of a shadow cache may leave"
    plan.commit((victim,))
    page = pages.pop(victim)
    policy.forget(victim, (page,) if policy.wants_ghosts else ())
    return page
