"""A walk for victims that was in vain is not made again before something has changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from worlds import DISK, HOST, ME, NS, Shell, ev, fetch, line, matched, put, tier, world

from hicache.engine import room
from hicache.engine.pools import Pool

PROMPTS = 8
PAGES = 16


class Full:
    """A host tier full of unsaved pages, above a disk whose writes do not end by themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shell: Shell = world(
            tier(HOST, PROMPTS * PAGES), tier(DISK, 10_000), max_copies=2, max_copy_pages=4
        )
        for number in range(PROMPTS):
            put(self.shell, line(100 * number, PAGES))
        self.shell.finish_all()
        self.core = self.shell.engine._core
        self.pool: Pool = self.core.namespaces[NS].pools[0]
        self.walks = 0
        begin = self.pool.policy.begin

        def counted() -> object:
            self.walks += 1
            return begin()

        monkeypatch.setattr(self.pool.policy, "begin", counted)

    def room(self, pages: int) -> bool:
        return room.make_room(self.core, self.pool, pages, self.core.namespaces[NS].page_bytes)


def dirty(shell: Shell) -> list[bytes]:
    """The prompts that stand in the host tier only, all of them."""
    found = []
    for number in range(PROMPTS):
        runs, _ = shell.engine._core.namespaces[NS].tree.runs(
            shell.engine._core.namespaces[NS].tree.trace(line(100 * number, PAGES))
        )
        if all(run.live == 1 for run in runs):
            found.append(line(100 * number, PAGES))
    return found


def test_nothing_new_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full(monkeypatch)
    need = 60
    assert not full.room(need)
    first = full.walks
    for _ in range(room.STALL_TRIES):
        assert not full.room(need)
    assert full.walks == first
    assert not full.room(need)  # uses may have changed the order: one looks again
    assert full.walks > first


def test_a_use_that_ends_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that a lease held become clean victims when it ends: there is room at once."""
    full = Full(monkeypatch)
    shell = full.shell
    prompt = dirty(shell)[-1]
    shell.handle(ev.Drain(999, 60_000))
    shell.finish_all()
    lease = fetch(shell, prompt).lease
    others = [fetch(shell, line(100 * number, PAGES)).lease for number in range(PROMPTS)]
    assert not full.room(PAGES)
    shell.handle(ev.ReleaseLeases(ME, (*others[: PROMPTS - 1],)))
    before = full.walks
    assert full.room(PAGES)
    assert full.walks <= before + 1  # the front victim may do without one
    shell.handle(ev.ReleaseLeases(ME, (lease, others[-1])))
    shell.engine.check()


def test_a_waiter_costs_no_walk_for_every_page_that_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its room, in few walks, though copies end by fours and each end lets it try again."""
    full = Full(monkeypatch)
    shell = full.shell
    before = full.walks
    put(shell, line(9000, 64))
    shell.finish_all()
    assert matched(shell, line(9000, 64)) == 64
    finished = 64 // 4
    assert full.walks - before <= 2 * finished
    shell.engine.check()
