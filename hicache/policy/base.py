"""The seam: what a policy is told, what it is asked, and what it may rely on.

One policy object serves one pool. It knows a run from ``insert`` to ``forget``; an id may come back after
that, as a new run. Calls about a run that it does not know, and uses of a plan that has ended, raise
ViolationError. Ticks never go back.

A ghost id is a 64-bit int that stands for one page at its place in its prompt, the same whenever the page comes
back; the ids of a run come in page order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(slots=True)
class RunInfo:
    """What a policy may know of a run when it arrives. Nobody changes it (not ``frozen``: that is slower to make)."""

    pages: int
    depth: int  # pages before it
    key: bytes | None = None  # key of its last page, where known
    cls: str = ""  # request class
    turn: int = 0
    cost: float = 0.0  # of computing a page again, in units of the caller's choice


class Plan(Protocol):
    """One search for victims. The policy stays as it is until ``commit``."""

    def next(self) -> int | None:
        """The next victim, each run at most once; None when no candidate is left."""

    def expose(self, run: int) -> None:
        """Make a hidden run a candidate for the rest of this plan only, since the plan takes what hid it."""

    def commit(self, evicted: Sequence[int] = ()) -> None:
        """End the plan: of the runs it gave, these leave; the others keep their place.

        Those that leave are hidden until the caller forgets them.
        """

    def abort(self) -> None:
        """End the plan; the policy is as if it had never begun."""


class Policy(Protocol):
    """Order of one pool's runs. Only exposed ones are candidates; ``hide`` and ``expose`` decide which.

    A policy may have methods more, which save time: ``hit_all(runs, now)``, as ``hit`` of each in turn; ``first()``,
    the run that a plan begun now would give first (None: no candidate), which must change nothing;
    ``next_known(ghosts, start)``, where the first page from ``start`` on stands that it remembers, the end if there is
    none. One that has ``only_last_use`` set says that of a run it knows pages, depth and last use: the engine may then
    merge runs that were last used together however often each was used before.
    """

    #: Whether it remembers pages that have left. Only such a policy is told ghost ids, which cost a hash a page.
    wants_ghosts: bool

    def known(self, ghosts: Sequence[int]) -> int:
        """How many of these pages, from the first on, it remembers as ghosts: what arrives is cut there."""

    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """A run has arrived; it is hidden. ``ghosts``: the ids of its pages, all remembered or none."""

    def hit(self, run: int, now: int) -> None:
        """A run was used."""

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        """The last pages of a run have become a run of their own: hidden, with the same history."""

    def merge(self, run: int, absorbed: int, pages: int) -> None:
        """A run has taken over the run after it, and has ``pages`` now. It is as exposed as it was before."""

    def hide(self, run: int) -> None:
        """The run is no candidate; idempotent."""

    def expose(self, run: int) -> None:
        """The run is a candidate; idempotent."""

    def trim(self, run: int, pages: int, ghosts: Sequence[int] = ()) -> None:
        """A run has lost its last ``pages``, not all of them; it keeps its place. ``ghosts``: the lost pages' ids."""

    def forget(self, run: int, ghosts: Sequence[int] = ()) -> None:
        """The run has left the pool. ``ghosts``: its pages' ids if it was evicted, nothing if it is simply gone."""

    def begin(self) -> Plan:
        """Start to choose victims. One plan at a time, and no other call while it is open.

        A plan that was left open counts as aborted.
        """
