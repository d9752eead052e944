"""How soon pages of a kind are used again: counts of reuse by kind and age, and the worth that follows.

A *lifetime* of a page begins with a use and ends with the next one (a reuse), or is lost sight of. For each kind of
page, ages in buckets of a quarter of an octave: how many lifetimes were reused at that age, and how many were seen
to reach it. Their quotient is the hazard, the chance to be reused at that age after having waited so long; little
data is filled up from all kinds together, and that from a prior that falls with age, which makes it LRU.

The worth of a page of age a is the best ratio, over all ages b > a, of the chance that it is reused before b to the
time that it takes room until its reuse or b (Gittins' index, as a rule of optimal stopping; with ages and hit
counts only it is what LHD, Beckmann et al., NSDI'18, estimates). So a young page whose kind comes back after a
pause is worth keeping through the pause if the pause is short enough, and a kind that hardly comes back goes at
once.
"""

from __future__ import annotations

from collections.abc import Iterable

BUCKETS = 4 * 30

_PRIOR_HAZARD = 0.005  # a bucket, with no data at all
_PRIOR_PAGES = 1000.0  # data of all kinds that weigh as much as the prior
_SHARED_PAGES = 100.0  # data of one kind that weigh as much as those of all kinds


def bucket(age: int) -> int:
    """The bucket of an age: exact up to 3, then four an octave."""
    if age < 4:
        return age
    bits = age.bit_length()
    return min(BUCKETS - 1, 4 * (bits - 2) + (age >> bits - 3 & 3))


def _first_age(index: int) -> int:
    return index if index < 4 else 4 + (index & 3) << index // 4 - 1


_WIDTHS = [float(_first_age(index + 1) - _first_age(index)) for index in range(BUCKETS)]
_PRIORS = [_PRIOR_HAZARD * (1.0 if index >= 8 else 0.25 * width) for index, width in enumerate(_WIDTHS)]


class HazardTable:
    """Counts for ``kinds`` kinds of pages, and the worth of each at each age since the last ``refresh``."""

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds
        self.ended = 0.0  # pages whose lifetime ended in a reuse since the last decay
        self._reused = [[0.0] * BUCKETS for _ in range(kinds)]
        self._lost = [[0.0] * BUCKETS for _ in range(kinds)]
        prior = worths(_PRIORS)
        self.worth = [list(prior) for _ in range(kinds)]

    def reuse(self, kind: int, age: int, pages: int) -> None:
        """Pages of a kind were used again at that age."""
        self._reused[kind][bucket(age)] += pages
        self.ended += pages

    def lose(self, kind: int, age: int, pages: int) -> None:
        """Pages of a kind are not followed any longer; until that age they were not used."""
        self._lost[kind][bucket(age)] += pages

    def decay(self, factor: float) -> None:
        """Let what was counted so far weigh less."""
        self.ended = 0.0
        for table in (self._reused, self._lost):
            for row in table:
                row[:] = [count * factor for count in row]

    def refresh(self, waiting: Iterable[tuple[int, int, float]]) -> None:
        """Compute all worths anew. ``waiting``: kind, age and pages of lifetimes that go on."""
        reached = [list(row) for row in self._lost]
        for kind, age, pages in waiting:
            reached[kind][bucket(age)] += pages
        reused = self._reused
        live = [kind for kind in range(self.kinds) if any(reached[kind]) or any(reused[kind])]
        everything = _hazards(
            [sum(reused[kind][index] for kind in live) for index in range(BUCKETS)],
            [sum(reached[kind][index] for kind in live) for index in range(BUCKETS)],
            _PRIORS,
            _PRIOR_PAGES,
        )
        common = worths(everything)
        for kind in range(self.kinds):
            self.worth[kind] = common
        for kind in live:
            self.worth[kind] = worths(_hazards(reused[kind], reached[kind], everything, _SHARED_PAGES))


def _hazards(reused: list[float], gone: list[float], prior: list[float], weight: float) -> list[float]:
    """The hazard of each bucket: reuses over those that reached it; who goes in a bucket was there half of it."""
    hazards = [0.0] * BUCKETS
    reached = 0.0
    for index in range(BUCKETS - 1, -1, -1):
        reached += reused[index] + gone[index]
        hazards[index] = (reused[index] + weight * prior[index]) / (reached - gone[index] / 2 + weight)
    return hazards


def worths(hazards: list[float]) -> list[float]:
    """Gittins' index of each bucket. O(buckets).

    From the last to the first: a stretch takes over what follows it while that is worth more than itself.
    """
    result = [0.0] * BUCKETS
    stretches: list[tuple[float, float, float]] = []  # chance of reuse, time spent, chance to outlast it
    for index in range(BUCKETS - 1, -1, -1):
        chance = min(hazards[index], 1.0)
        time = _WIDTHS[index] * (1.0 - chance / 2)
        outlast = 1.0 - chance
        while stretches and stretches[-1][0] * time > chance * stretches[-1][1]:
            more, longer, beyond = stretches.pop()
            chance += outlast * more
            time += outlast * longer
            outlast *= beyond
        stretches.append((chance, time, outlast))
        result[index] = chance / time
    return result
