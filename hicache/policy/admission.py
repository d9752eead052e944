"""The seam of admission: whether a run that leaves a tier is worth writing to the next.

One admission object serves one pool of a lower tier. It is asked once for a run between two uses of it, and what it
refuses it remembers itself, in bounded memory: the run is not copied, and if nobody else holds it it is gone. Ghost
ids are those of the policies: one for each page, in page order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hicache.errors import ConfigError
from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.sketch import CountMin

_REMEMBERED = 1 << 18  # pages
_HALVED_EVERY = 10  # times the counters of a row


class Admission(Protocol):
    """Says yes or no to one run at a time."""

    #: Whether it remembers pages. Only such an admission is told ghost ids.
    wants_ghosts: bool

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Whether the run, used ``hits`` times since it came, is worth the write. A refusal is remembered."""


class Always:
    """Everything is written."""

    wants_ghosts = False

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Yes. O(1)."""
        return True


class SecondTouch:
    """What was used again, or was refused before and has come back.

    The rule of flash caches (for instance Eisenman et al., "Flashield", NSDI'19, compares with it): half of what is
    written is never read, and a second touch tells. The first page stands for its run.
    """

    wants_ghosts = True

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._refused = GhostTable(remembered)

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Yes from the second touch on. O(1)."""
        if hits > 0 or (ghosts and self._refused.pop(ghosts[0]) >= 0):
            return True
        if ghosts:
            self._refused.add(ghosts[0], 0)
        return False


class TinyLfu:
    """What has been seen at least as often as the average of what asked lately.

    After Einziger, Friedman and Manes, "TinyLFU", ACM ToS 13(4), 2017: a sketch counts, and is halved now and then. The
    paper compares with the victim; a tier below has none at hand, so the bar is the mean estimate of recent askers.
    """

    wants_ghosts = True

    def __init__(self, counters: int = 1 << 16) -> None:
        self._sketch = CountMin(counters)
        self._every = _HALVED_EVERY * counters
        self._asked = 0
        self._mean = 1.0

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Yes if its count is not below the mean and above one. O(1)."""
        if not ghosts:
            return hits > 0
        self._asked += 1
        if self._asked >= self._every:
            self._asked = 0
            self._sketch.halve()
        count = self._sketch.add(ghosts[0]) + hits
        self._mean += (count - self._mean) / 256
        return count > 1 and count >= self._mean


class CostAware:
    """What saves more compute than its write costs.

    A page of depth d takes ``1 + d / attention`` units to compute again (``RunInfo.cost`` times that), and comes back
    with a chance that grows with its uses: (uses + 1) / (uses + 4). A write costs ``write`` units.
    """

    wants_ghosts = True

    def __init__(self, write: float = 0.5, attention: float = 64.0, remembered: int = _REMEMBERED) -> None:
        self._write, self._attention = write, attention
        self._seen = GhostTable(remembered)

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Yes if the expected saving is above the cost. O(1)."""
        uses = hits
        if ghosts:
            uses += max(0, self._seen.get(ghosts[0]))
        saved = (info.cost or 1.0) * (1.0 + (info.depth + info.pages / 2) / self._attention)
        admitted = (uses + 1) / (uses + 4) * saved >= self._write
        if ghosts and not admitted:
            self._seen.add(ghosts[0], uses + 1)
        return admitted


#: The one that lets everything in.
NO_ADMISSION = "always"
#: Every admission by the name it has in settings.
ADMISSIONS: Mapping[str, Callable[[], Admission]] = {
    NO_ADMISSION: Always,
    "cost": CostAware,
    "second-touch": SecondTouch,
    "tinylfu": TinyLfu,
}


def make_admission(name: str) -> Admission:
    """A new admission with an empty memory. Raises ConfigError for a name that is not in ``ADMISSIONS``."""
    if name not in ADMISSIONS:
        raise ConfigError(f"unknown admission {name!r}", hint=f"one of {', '.join(sorted(ADMISSIONS))}")
    return ADMISSIONS[name]()
