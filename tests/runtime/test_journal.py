"""The journal and its watchers, with an engine that says what a test wants."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from runtime_helpers import FakeClock

from hicache.engine import events as ev
from hicache.engine.actions import Announce, SurveyDone
from hicache.errors import ExhaustedError, StaleError
from hicache.keys import KEY_BYTES, chain_keys
from hicache.runtime import watchers as room
from hicache.runtime.journal import ENTRY_PAGES, Journal, cut
from hicache.runtime.watchers import LINGER_MS, Kind, Watchers

WIDTH = 16


def announce(pages: int, *, stored: bool = True, namespace: int = 1, **fields: Any) -> Announce:
    symbols = b"".join(page.to_bytes(WIDTH, "little") for page in range(pages))
    keys = b"".join(chain_keys(b"seed", symbols, WIDTH))
    return Announce(
        stored, namespace, 0, b"p" * 32 if stored else b"", keys, symbols if stored else b"", **fields
    )


class Stage:
    """Watchers, and the events that they hand in."""

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        self.clock = FakeClock()
        self.pieces: list[Announce | SurveyDone] = []
        self.watchers = Watchers(self.handle, lambda number: {1: "red", 2: "blue"}[number], self.clock)

    def handle(self, event: ev.Event) -> None:
        self.events.append(event)
        if isinstance(event, ev.SurveyNext) and self.pieces:
            piece = self.pieces.pop(0)
            if isinstance(piece, SurveyDone):
                self.watchers.survey_done(piece)
            else:
                self.watchers.take(piece)

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_long_announcements_are_cut_at_pages() -> None:
    entries = list(cut(announce(2 * ENTRY_PAGES + 3)))
    assert [len(entry.keys) // KEY_BYTES for entry in entries] == [ENTRY_PAGES, ENTRY_PAGES, 3]
    assert entries[0].parent == b"p" * 32 and entries[1].parent == entries[0].keys[-KEY_BYTES:]
    assert b"".join(entry.symbols for entry in entries) == announce(2 * ENTRY_PAGES + 3).symbols
    gone = list(cut(announce(ENTRY_PAGES + 1, stored=False)))
    assert len(gone) == 2 and not gone[1].parent and not gone[1].symbols


def test_a_ring_keeps_what_fits_and_says_from_where() -> None:
    journal = Journal(10, 5_000)
    assert (journal.first, journal.last, journal.since(10, 1)) == (10, 9, [])
    for _ in range(50):
        journal.append(announce(10))
    assert journal.last == 59 and 50 < journal.first <= 59
    assert [each.revision for each in journal.since(journal.first, 1 << 20)] == list(range(journal.first, 60))
    assert len(journal.since(journal.first, 1)) == 1
    assert journal.since(60, 1) == []
    for revision in (journal.first - 1, 0, 61):
        with pytest.raises(StaleError):
            journal.since(revision, 1)


def test_news_progress_and_tenants() -> None:
    async def scenario() -> None:
        stage = Stage()
        red, blue = stage.watchers.come("red", 1), stage.watchers.come("blue", 1)
        everybody = stage.watchers.come("", 1)
        assert stage.kinds() == ["Watching"]
        stage.watchers.take(announce(2, namespace=1))
        stage.watchers.take(announce(3, namespace=2))
        stage.watchers.take(
            announce(1, namespace=2, surveys=(99,), news=False)
        )  # a survey's, of somebody gone
        part = await red.next(0.01)
        assert (part.kind, part.revision, len(part.entries)) == (Kind.NEWS, 1, 1)
        assert (await red.next(0.01)) == room.Part(Kind.PROGRESS, 1)
        assert [len(each.keys) // 32 for each in (await blue.next(0.01)).entries] == [3]
        assert [len(each.keys) // 32 for each in (await everybody.next(0.01)).entries] == [2, 3]
        waiting = asyncio.create_task(red.next(10))
        await asyncio.sleep(0.01)
        stage.watchers.take(announce(4, namespace=1))
        assert (await waiting).revision == 2
        waiting = asyncio.create_task(red.next(10))
        await asyncio.sleep(0.01)
        stage.watchers.close()
        assert await waiting is None and await blue.next(1) is None

    run(scenario())


def test_a_survey_asks_for_pieces_as_they_are_taken() -> None:
    async def scenario() -> None:
        stage = Stage()
        watcher = stage.watchers.come("red")
        assert stage.kinds() == ["Watching", "SurveyOpened"]
        stage.pieces = [announce(5, surveys=(1,), news=False) for _ in range(3)]
        stage.pieces.append(SurveyDone(1))
        stage.watchers.take(announce(7, surveys=(1,)))  # news of what it was told
        part = await watcher.next(1)
        assert part.kind is Kind.SURVEY and [len(e.keys) // 32 for e in part.entries] == [7, 5, 5, 5]
        stage.watchers.take(announce(1))
        assert await watcher.next(1) == room.Part(Kind.CAUGHT_UP, 1), "news since the end come after it"
        part = await watcher.next(1)
        assert (part.kind, part.revision, part.entries[0].revision) == (Kind.NEWS, 2, 2)

    run(scenario())


def test_who_does_not_read_falls_behind_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "JOURNAL_BYTES", 4_000)
    monkeypatch.setattr(room, "SURVEY_BYTES", 4_000)

    async def scenario() -> None:
        stage = Stage()
        slow, quick, late = (
            stage.watchers.come("red", 1),
            stage.watchers.come("red", 1),
            stage.watchers.come("red"),
        )
        for revision in range(1, 21):
            stage.watchers.take(announce(10, surveys=(1,)))
            assert (await quick.next(1)).revision == revision
        part = await slow.next(1)
        assert part.kind is Kind.COMPACTED and 1 < part.revision <= 20
        assert (await late.next(1)).kind is Kind.COMPACTED and not late.queue and late.queued_bytes == 0
        assert "SurveyClosed" in stage.kinds() and stage.watchers.compacted == 2
        assert (await stage.watchers.come("red", 25).next(1)).kind is Kind.COMPACTED, "not there yet"

    run(scenario())


def test_a_journal_outlives_its_watchers_for_a_while() -> None:
    async def scenario() -> None:
        stage = Stage()
        watcher = stage.watchers.come("red", 1)
        stage.watchers.take(announce(1))
        stage.watchers.leave(watcher)
        stage.watchers.leave(watcher)
        stage.clock.advance(LINGER_MS - 1)
        stage.watchers.take(announce(1))
        again = stage.watchers.come("red", 2)
        assert (await again.next(1)).revision == 2
        stage.watchers.leave(again)
        stage.clock.advance(LINGER_MS)
        assert stage.kinds() == ["Watching", "Watching"] and stage.events[-1] == ev.Watching(on=False)
        assert (await stage.watchers.come("red", 3).next(1)) == room.Part(Kind.COMPACTED, 4), (
            "changes were missed"
        )

    run(scenario())


def test_watchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_WATCHERS", 2)

    async def scenario() -> None:
        stage = Stage()
        first = stage.watchers.come("red")
        stage.watchers.come("red", 1)
        with pytest.raises(ExhaustedError):
            stage.watchers.come("blue")
        stage.watchers.leave(first)
        assert stage.kinds()[-1] == "SurveyClosed" and len(stage.watchers) == 1
        stage.watchers.come("blue")

    run(scenario())
