"""Who watches which pages can be read, and what each is told next.

A watcher *surveys* (the engine walks its trees in pieces, each asked for only when the watcher has taken the one
before) and then *follows* its tenant's journal. The engine announces while there is a journal; a journal stays for a
while after its last watcher, so that one who was cut off can go on where it was. All of it is on the loop's thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import itertools
from collections import deque
from collections.abc import Callable

from hicache.engine import events
from hicache.engine.actions import Announce, SurveyDone
from hicache.engine.events import Event
from hicache.errors import ExhaustedError, StaleError, UnavailableError
from hicache.runtime.clock import Alarm, Clock
from hicache.runtime.journal import Entry, Journal, cut

#: A journal keeps about so much; what a watcher may have waiting while it surveys; how much it takes at once.
JOURNAL_BYTES = 64 << 20
SURVEY_BYTES = 32 << 20
PART_BYTES = 1 << 20
#: A journal outlives its last watcher by this.
LINGER_MS = 60_000
#: News gather for so long before they go out, and a survey rests so long between pieces.
GATHER_S = 0.005
REST_S = 0.002
MAX_WATCHERS = 256
ALL_TENANTS = ""


class Kind(enum.Enum):
    """What a part of a watcher's stream is."""

    SURVEY = "survey"  # what there is; or, of pages that were told already, what happened to them
    CAUGHT_UP = "caught up"  # the survey is over: what was told is how things stand at this revision
    NEWS = "news"  # what happened up to this revision
    PROGRESS = "progress"  # nothing happened up to this revision
    COMPACTED = "compacted"  # it fell behind: there is nothing before this revision. The stream ends


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What a watcher is told next."""

    kind: Kind
    revision: int
    entries: list[Entry] = dataclasses.field(default_factory=list)


class Watcher:
    """One stream of parts. ``next`` until it answers None or a COMPACTED part; then, or before, ``Watchers.leave``."""

    def __init__(self, watchers: Watchers, tenant: str, journal: Journal, revision: int) -> None:
        self._watchers = watchers
        self.tenant = tenant
        self.journal = journal
        self.revision = revision  # the next one it wants
        self.survey = 0  # its survey, while that goes on
        self.queue: deque[Entry] = deque()
        self.queued_bytes = 0
        self.surveying = False  # until the last part of the survey is taken
        self.fell_behind = False
        self.closed = False

    def put(self, announce: Announce) -> None:
        """Something of its survey. One who takes nothing falls behind."""
        if self.queued_bytes > SURVEY_BYTES:
            self.fell_behind = True
            self._forget()
            return
        for entry in cut(announce):
            self.queue.append(entry)
            self.queued_bytes += entry.held_bytes

    def _forget(self) -> None:
        self.queue.clear()
        self.queued_bytes = 0
        self._watchers.end_survey(self)

    async def next(self, quiet_s: float) -> Part | None:
        """The next part: within ``quiet_s``, a PROGRESS if there is no other. None when watching has ended."""
        if self.surveying:
            return await self._survey()
        if not self.closed and self.revision > self.journal.last:
            await self.journal.changed(quiet_s)
            if self.revision <= self.journal.last:
                await asyncio.sleep(GATHER_S)
        if self.closed:
            return None
        try:
            found = self.journal.since(self.revision, PART_BYTES)
        except StaleError:
            return self._compacted()
        if not found:
            return Part(Kind.PROGRESS, self.revision - 1)
        self.revision = found[-1].revision + 1
        return Part(Kind.NEWS, found[-1].revision, found)

    async def _survey(self) -> Part | None:
        while self.survey and self.queued_bytes < PART_BYTES and not self.closed:
            self._watchers.advance(self)
            await asyncio.sleep(REST_S if self.survey else 0)
        if self.closed:
            return None
        if self.fell_behind:
            return self._compacted()
        if not self.queue:
            self.surveying = False
            return Part(Kind.CAUGHT_UP, self.revision - 1)
        found, most_bytes = [], PART_BYTES
        while self.queue and most_bytes > 0:
            found.append(self.queue.popleft())
            most_bytes -= found[-1].held_bytes
            self.queued_bytes -= found[-1].held_bytes
        return Part(Kind.SURVEY, 0, found)

    def _compacted(self) -> Part:
        self._watchers.compacted += 1
        return Part(Kind.COMPACTED, self.journal.first)


class Watchers:
    """All watchers of a service. ``handle`` is the loop's; ``namespace_tenant`` tells whose a namespace is."""

    def __init__(
        self, handle: Callable[[Event], None], namespace_tenant: Callable[[int], str], clock: Clock
    ) -> None:
        self._handle = handle
        self._tenant_of = namespace_tenant
        self._clock = clock
        self._journals: dict[str, Journal] = {}
        self._lasts: dict[str, int] = {}  # last revisions of journals that are no more
        self._lingering: dict[str, Alarm] = {}
        self._watchers: set[Watcher] = set()
        self._surveys: dict[int, Watcher] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self.announced = 0
        self.compacted = 0

    def __len__(self) -> int:
        return len(self._watchers)

    # --- watchers

    def come(self, tenant: str, revision: int = 0) -> Watcher:
        """A new watcher of a tenant's pages (ALL_TENANTS: of all): from a revision on, or (0) with a survey first.

        One that asks for a revision that is not there is told so by its first part. Raises ExhaustedError or
        UnavailableError.
        """
        if self._closed:
            raise UnavailableError("the service has stopped")
        if len(self._watchers) >= MAX_WATCHERS:
            raise ExhaustedError(f"{len(self._watchers)} watchers are there", retry_after_ms=1_000)
        journal = self._open(tenant)
        watcher = Watcher(self, tenant, journal, revision)
        self._watchers.add(watcher)
        if not revision:
            watcher.survey, watcher.surveying = next(self._numbers), True
            self._surveys[watcher.survey] = watcher
            self._handle(events.SurveyOpened(watcher.survey, tenant))
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """Idempotent. The tenant's journal stays for a while."""
        self.end_survey(watcher)
        if watcher not in self._watchers:
            return
        self._watchers.discard(watcher)
        tenant = watcher.tenant
        alone = all(each.tenant != tenant for each in self._watchers)
        if alone and tenant in self._journals and not self._closed:
            self._lingering[tenant] = self._clock.alarm(LINGER_MS, lambda: self._drop(tenant))

    def advance(self, watcher: Watcher) -> None:
        """Have the engine tell the next piece of a survey."""
        self._handle(events.SurveyNext(watcher.survey))

    def end_survey(self, watcher: Watcher) -> None:
        """Nobody needs it any more, or never did. Idempotent."""
        if self._surveys.pop(watcher.survey, None) is not None:
            self._handle(events.SurveyClosed(watcher.survey))
            watcher.survey = 0

    def close(self) -> None:
        """Every stream ends, and nobody comes any more."""
        self._closed = True
        for alarm in self._lingering.values():
            alarm.cancel()
        self._lingering.clear()
        for watcher in self._watchers:
            watcher.closed = True
            watcher.journal.wake()

    # --- journals

    def _open(self, tenant: str) -> Journal:
        alarm = self._lingering.pop(tenant, None)
        if alarm is not None:
            alarm.cancel()
        journal = self._journals.get(tenant)
        if journal is None:
            # Revisions go on, with a gap: what happened while nobody watched is not known.
            journal = Journal(self._lasts.pop(tenant, -1) + 2, JOURNAL_BYTES)
            if not self._journals:
                self._handle(events.Watching(on=True))
            self._journals[tenant] = journal
        return journal

    def _drop(self, tenant: str) -> None:
        del self._lingering[tenant]
        self._lasts[tenant] = self._journals.pop(tenant).last
        if not self._journals:
            self._handle(events.Watching(on=False))

    # --- what the engine says

    def take(self, announce: Announce) -> None:
        """Write it into the journals that it belongs to, and tell the surveys that know its pages."""
        self.announced += 1
        if announce.news:
            for tenant in (ALL_TENANTS, self._tenant_of(announce.namespace)):
                journal = self._journals.get(tenant)
                if journal is not None:
                    journal.append(announce)
        for survey in announce.surveys:
            watcher = self._surveys.get(survey)
            if watcher is not None:
                watcher.put(announce)

    def survey_done(self, done: SurveyDone) -> None:
        """From here on its watcher follows the journal."""
        watcher = self._surveys.pop(done.survey, None)
        if watcher is not None:
            watcher.survey = 0
            watcher.revision = watcher.journal.last + 1
