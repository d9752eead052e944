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

from collections.abc import Iterator, Mapping
from operator import add

from hicache.policy.guard import CELL_BITS

BUCKETS = 4 * 22  # ages up to four millions; what is older counts as of the last

_PRIOR_HAZARD = 0.005  # a bucket, with no data at all
_PRIOR_PAGES = 1000.0  # data of all kinds that weigh as much as the prior
_SHARED_PAGES = 100.0  # data of one kind that weigh as much as those of all kinds


def bucket(age: int) -> int:
    """The bucket of an age: exact up to 3, then four an octave."""
    if age < 4:
        return max(age, 0)
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
        self.fresh: dict[int, float] = {}  # reused since the last refresh, by cell
        self._reused = [[0.0] * BUCKETS for _ in range(kinds)]
        self._lost = [[0.0] * BUCKETS for _ in range(kinds)]
        prior = worths(_PRIORS)
        self.worth = [list(prior) for _ in range(kinds)]

    def reuse(self, kind: int, age: int, pages: int) -> None:
        """Pages of a kind were used again at that age."""
        cell = kind << CELL_BITS | bucket(age)
        self.fresh[cell] = self.fresh.get(cell, 0.0) + pages
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

    def refresh(self, standing: Mapping[int, float]) -> Iterator[None]:
        """Compute all worths anew, a kind a step. ``standing``: pages of lifetimes that go on, by cell."""
        mask = (1 << CELL_BITS) - 1
        for cell, pages in self.fresh.items():
            self._reused[cell >> CELL_BITS][cell & mask] += pages
        self.fresh = {}
        gone = [list(row) for row in self._lost]
        for cell, pages in standing.items():
            gone[cell >> CELL_BITS][cell & mask] += pages
        live: dict[int, list[float]] = {}
        ended, reached = [0.0] * BUCKETS, [0.0] * BUCKETS
        for kind in range(self.kinds):
            if any(gone[kind]) or any(self._reused[kind]):
                yield
                live[kind] = _reaching(self._reused[kind], gone[kind])
                ended = list(map(add, ended, self._reused[kind]))
                reached = list(map(add, reached, live[kind]))
        yield
        everything = _hazards(ended, reached, _PRIORS, _PRIOR_PAGES)
        found = [worths(everything)] * self.kinds
        for kind, here in live.items():
            yield
            found[kind] = worths(_hazards(self._reused[kind], here, everything, _SHARED_PAGES))
        self.worth = found


def _reaching(reused: list[float], gone: list[float]) -> list[float]:
    """How many lifetimes reached each bucket; who goes in a bucket was there half of it."""
    reached = [0.0] * BUCKETS
    total = 0.0
    for index in range(BUCKETS - 1, -1, -1):
        total += reused[index] + gone[index]
        reached[index] = total - gone[index] / 2
    return reached


def _hazards(reused: list[float], reached: list[float], prior: list[float], weight: float) -> list[float]:
    """The hazard of each bucket: reuses over those that reached it."""
    return [
        (ended + weight * before) / (here + weight)
        for ended, here, before in zip(reused, reached, prior, strict=True)
    ]


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
