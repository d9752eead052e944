"""The seam of admission: whether a run that leaves a tier is worth writing to the next.

One admission object serves one pool of a lower tier. It is asked once for a run between two uses of it, and what it
refuses it remembers itself: the run is not copied, and if nobody else holds it it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hicache.errors import ConfigError
from hicache.policy.base import RunInfo


class Admission(Protocol):
    """Says which runs are written to a lower tier."""

    #: Whether it remembers pages; only then is it told their ghost ids, which cost a hash a page.
    wants_ghosts: bool

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Whether the run is worth writing. ``hits``: its uses since it was stored; ``ghosts``: its pages' ids."""


class Always:
    """Everything is worth it."""

    wants_ghosts = False

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Yes."""
        return True


#: The one that lets everything in.
NO_ADMISSION = "always"
#: Every admission by the name it has in settings.
ADMISSIONS: Mapping[str, Callable[[], Admission]] = {NO_ADMISSION: Always}


def make_admission(name: str) -> Admission:
    """A new, empty admission. Raises ConfigError for a name that is not in ``ADMISSIONS``."""
    if name not in ADMISSIONS:
        raise ConfigError(f"unknown admission {name!r}", hint=f"one of {', '.join(sorted(ADMISSIONS))}")
    return ADMISSIONS[name]()
