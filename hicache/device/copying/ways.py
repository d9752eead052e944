"""Which way copies of a shape take: each way carries real jobs in turn until it was timed, then the fastest stays.

    kernel  a kernel moves units between planes and pinned host memory itself
    staged  large copies of a layer's bytes to or from a stage on the device, a kernel between that and the planes

The first job of a way compiles and warms up and is not counted. Nothing is copied for the sake of measuring.
"""

from __future__ import annotations

import dataclasses

#: From so many pages on a shape counts as many.
MANY_PAGES = 8
TIMED = 2
NAMES = ("kernel", "staged")


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A way, and the GB/s that were measured so far; ``settled``: it stays."""

    way: str
    gb_per_s: dict[str, float]
    settled: bool


class Ways:
    """The ways of one lane; its thread uses it, any may read ``choices``."""

    def __init__(self, said: str) -> None:
        self._said = said
        self._taken: dict[bool, dict[str, list[float]]] = {
            many: {name: [] for name in NAMES} for many in (False, True)
        }

    def way(self, pages: int) -> str:
        """The way for so many pages."""
        return self._said if self._said != "auto" else self._choice(pages >= MANY_PAGES).way

    def measuring(self, pages: int) -> bool:
        """Whether the time of such a job is wanted."""
        return self._said == "auto" and not self._choice(pages >= MANY_PAGES).settled

    def note(self, pages: int, way: str, gb_per_s: float) -> None:
        """A job has taken a way; 0: it could not be timed."""
        if gb_per_s:
            self._taken[pages >= MANY_PAGES][way].append(gb_per_s)

    @property
    def choices(self) -> dict[str, Choice]:
        """By "few" and "many" pages."""
        return {name: self._choice(many) for name, many in (("few", False), ("many", True))}

    def _choice(self, many: bool) -> Choice:  # noqa: FBT001
        taken = self._taken[many]
        speeds = {name: round(max(found[1:]), 2) for name, found in taken.items() if len(found) > 1}
        left = [name for name in NAMES if len(taken[name]) <= TIMED]
        if left:
            return Choice(min(left, key=lambda name: len(taken[name])), speeds, settled=False)
        return Choice(max(speeds, key=lambda name: speeds[name]), speeds, settled=True)
