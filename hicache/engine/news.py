"""What watchers are told: which pages became readable in a tier, and which ceased to be.

Exists only while somebody watches (``core.news``); without it nothing here is computed. A page is *told of* in a tier
exactly while a look-up would find it there and a fetch could have it: RESIDENT or DRAINING (a hit rescues it), its
bytes not known to be wrong (``condemned``), and every page before it such a page in some tier. Pages below a hole are
told as gone with it, and as back when it is mended; chains among the stranded are not told of at all until they hang in
the tree again.

Pages are told parents first and named by their keys. ``Survey`` is how a watcher that comes later learns what is
there: a walk in pieces, between which everything may change. What happens to a run that the walk has not reached yet
is held back, since the walk will tell how it stands then; told runs are known by id, and so are the parts they split
into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hicache.engine.actions import Announce
from hicache.engine.sound import reachable, sound_below, sound_in
from hicache.engine.survey import Survey
from hicache.keys import KEY_BYTES
from hicache.tree import Run
from hicache.tree.node import LIVE

if TYPE_CHECKING:
    from hicache.engine.core import Core
    from hicache.engine.holders import NamespaceState


class News:
    """Emits ``Announce`` actions as pages come and go; the core calls it at each step that makes them do so."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.surveys: dict[int, Survey] = {}

    # --- steps of the core

    def stepped(self, run: Run, tier: int, old: int) -> None:
        """The run's residency in a tier has changed."""
        if run.state[tier] in LIVE:
            if old not in LIVE:
                self.gained(run, tier)
        elif old in LIVE:
            self.lost(run, tier)

    def gained(self, run: Run, tier: int) -> None:
        """The run has become readable in a tier."""
        core = self._core
        if not reachable(core, run):
            return
        self._tell(run, tier, stored=True)
        others = any(sound_in(core, run, other) for other in core.tier_range if other != tier)
        if not others and any(run.below):  # it was a hole
            self._tell_below(run, stored=True)

    def lost(self, run: Run, tier: int) -> None:
        """The run is no longer readable in a tier; it still has its place in the tree."""
        if (run.id, tier) not in self._core.condemned:  # else that was told when it was
            self._lost(run, tier)

    def trimmed(self, run: Run, tier: int, pages: int) -> None:
        """The last pages of a tip are about to leave the tree."""
        if reachable(self._core, run):
            self._emit(run, tier, (run.pages - pages, pages), stored=False)

    def condemned(self, run: Run, tier: int) -> None:
        """The run's bytes in a tier have just been found wrong; pins still keep them."""
        if run.state[tier] in LIVE:
            self._lost(run, tier)

    def _lost(self, run: Run, tier: int) -> None:
        core = self._core
        if not reachable(core, run):
            return
        others = any(sound_in(core, run, other) for other in core.tier_range if other != tier)
        if not others and any(run.below):
            self._tell_below(run, stored=False)
        self._tell(run, tier, stored=False)

    def alike(self, run: Run, other: Run) -> None:
        """Two parts of what was one run: whoever was told of one knows the other."""
        for survey in self.surveys.values():
            if run.id in survey.told:
                survey.told.add(other.id)

    def merged(self, run: Run, absorbed: Run) -> None:
        """A run has taken over the next one. Whoever knew the first only is told of the rest now."""
        for survey in self.surveys.values():
            if run.id in survey.told and absorbed.id not in survey.told and reachable(self._core, run):
                self._tell_state(survey, run, (run.pages - absorbed.pages, absorbed.pages))
            survey.told.discard(absorbed.id)

    # --- telling

    def _tell(self, run: Run, tier: int, *, stored: bool) -> None:
        self._tell_in(run, [tier], stored=stored)

    def _tell_in(self, run: Run, tiers: list[int], *, stored: bool) -> None:
        """Announce a whole run in some tiers."""
        fresh = self._introduce(run) if stored else frozenset()
        for tier in tiers:
            self._emit(run, tier, (0, run.pages), stored=stored, fresh=fresh)

    def _tell_below(self, run: Run, *, stored: bool) -> None:
        """The run's end became, or ceased to be, a way to what is below it."""
        core = self._core
        runs = list(sound_below(core, run))
        for each in runs if stored else reversed(runs):
            tiers = [tier for tier in core.tier_range if sound_in(core, each, tier)]
            self._tell_in(each, tiers, stored=stored)

    def _introduce(self, run: Run) -> frozenset[int]:
        """Tell the surveys that do not know the run, and may, where it can be read now; which these were."""
        fresh = []
        for survey in self.surveys.values():
            if run.id not in survey.told and survey.covers(_namespace(run)) and survey.may_tell(run):
                survey.told.add(run.id)
                self._tell_state(survey, run, (0, run.pages))
                fresh.append(survey.id)
        return frozenset(fresh)

    def _emit(
        self,
        run: Run,
        tier: int,
        part: tuple[int, int],
        *,
        stored: bool,
        fresh: frozenset[int] = frozenset(),
    ) -> None:
        heard = tuple(
            survey.id
            for survey in self.surveys.values()
            if run.id in survey.told and survey.id not in fresh and survey.covers(_namespace(run))
        )
        self._core.emit(self._announce(run, tier, part, stored=stored, surveys=heard))

    def _tell_state(self, survey: Survey, run: Run, part: tuple[int, int]) -> None:
        """Tell one survey where a run, or a part of it, can be read."""
        for tier in self._core.tier_range:
            if sound_in(self._core, run, tier):
                announce = self._announce(run, tier, part, stored=True, surveys=(survey.id,))
                announce.news = False
                self._core.emit(announce)

    def _announce(
        self, run: Run, tier: int, part: tuple[int, int], *, stored: bool, surveys: tuple[int, ...]
    ) -> Announce:
        first, pages = part
        self._core.keys(run)
        packed = run.packed_keys or b""
        width = run.tree.symbol_bytes
        at = (run.start + first) * width
        return Announce(
            stored,
            _namespace(run).id,
            tier,
            self._key_before(run, first) if stored else b"",
            packed[first * KEY_BYTES : (first + pages) * KEY_BYTES],
            bytes(run.node.edge[at : at + pages * width]) if stored else b"",
            surveys,
        )

    def _key_before(self, run: Run, first: int) -> bytes:
        """The key of the page before one of the run's, empty at the root."""
        if first:
            packed = run.packed_keys or b""
            return packed[(first - 1) * KEY_BYTES : first * KEY_BYTES]
        above = run.tree.parent_run(run)
        return (above.last_key or b"") if above is not None else b""

    # --- surveys

    def advance(self, survey: Survey) -> bool:
        """Tell the next piece; whether that was the last one."""
        for run in survey.piece(self._core):
            self._tell_state(survey, run, (0, run.pages))
        return survey.over


def _namespace(run: Run) -> NamespaceState:
    found: NamespaceState = run.extra  # type: ignore[assignment]  # hot: the engine's own
    return found
