"""A policy with ghosts and an admission with a memory, for tests: they check what the engine tells them.

While ``known`` is entered they have the names ``remembering``, ``twice`` and ``never``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from hicache.policy import ADMISSIONS, POLICIES, RunInfo
from hicache.policy.lru import LruPolicy

GHOSTS = 12


class RememberingPolicy(LruPolicy):
    """LRU that remembers the last pages that left, and insists on the seam's word."""

    wants_ghosts = True

    def __init__(self) -> None:
        super().__init__()
        self.remembered: dict[int, None] = {}  # oldest first
        self.returned = 0
        self.units = 0

    def resize(self, units: int) -> None:
        """Only a size that means something."""
        assert units > 0
        self.units = units

    def known(self, ghosts: Sequence[int]) -> int:
        """How many of the first ones left lately."""
        return next((at for at, ghost in enumerate(ghosts) if ghost not in self.remembered), len(ghosts))

    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """All its ids, or none."""
        assert self.units, "used before it was told its size"
        assert len(ghosts) in {0, info.pages}
        for ghost in ghosts:
            del self.remembered[ghost]
        self.returned += len(ghosts)
        super().insert(run, info, now)

    def forget(self, run: int, ghosts: Sequence[int] = ()) -> None:
        """All its ids, or none."""
        assert len(ghosts) in {0, self.find(run).pages}
        self.remember(ghosts)
        super().forget(run)

    def trim(self, run: int, pages: int, ghosts: Sequence[int] = ()) -> None:
        """As many ids as pages, or none."""
        assert len(ghosts) in {0, pages}
        self.remember(ghosts)
        super().trim(run, pages)

    def remember(self, ghosts: Sequence[int]) -> None:
        """The newest GHOSTS stay."""
        assert len(set(ghosts)) == len(ghosts)
        for ghost in ghosts:
            assert 0 <= ghost < 1 << 64
            self.remembered.pop(ghost, None)
            self.remembered[ghost] = None
        while len(self.remembered) > GHOSTS:
            del self.remembered[next(iter(self.remembered))]


class Twice:
    """Lets a run in when all of it was refused before."""

    wants_ghosts = True

    def __init__(self) -> None:
        self.refused: set[int] = set()
        self.asked: list[tuple[RunInfo, int]] = []

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """Whether it was asked before."""
        assert len(ghosts) == info.pages
        self.asked.append((info, hits))
        known = self.refused.issuperset(ghosts)
        self.refused.update(ghosts)
        return known


class Never:
    """Lets nothing in."""

    wants_ghosts = False

    def admit(self, info: RunInfo, hits: int, ghosts: Sequence[int]) -> bool:
        """No."""
        assert not ghosts
        return False


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Let settings name them."""
    policies, admissions = cast(dict[str, object], POLICIES), cast(dict[str, object], ADMISSIONS)
    policies["remembering"] = RememberingPolicy
    admissions |= {"twice": Twice, "never": Never}
    try:
        yield
    finally:
        del policies["remembering"], admissions["twice"], admissions["never"]
