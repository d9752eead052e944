"""Clear and Evict while a durable tier is being read, and what they do to pages that nobody can reach."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_recovery import PAGE, attach, stranded, torn
from worlds import DISK, HOST, NS, TENANT, Shell, act, ev, line, matched, pages, put, tier, used, world

from hicache.types import Ack


def read_all(shell: Shell) -> None:
    while shell.recovery:
        shell.recover_some()
    shell.finish_all()
    shell.engine.check()


def half_read(parts: int, *, namespaces: tuple[int, ...] = (NS,)) -> Shell:
    """Two prompts in each namespace are on disk, and so many events of the recovery have been handled."""
    shell = world(tier(HOST, 32, 2), tier(DISK, 100))
    for namespace in namespaces:
        put(shell, line(0, 5), namespace=namespace, ack=Ack.DURABLE)
        put(shell, line(0, 3) + pages(50, 51), namespace=namespace, ack=Ack.DURABLE)
    fresh = attach(shell.restart(shell.engine.options, part_pages=2))
    fresh.handle(ev.Recovering(1, going=True))
    for _ in range(parts):
        fresh.recover_some()
    return fresh


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_clear_holds_for_what_has_not_been_read_yet(parts: int, *, whole: bool) -> None:
    fresh = half_read(parts, namespaces=(NS, TENANT))
    fresh.ask(ev.Clear, namespace=0 if whole else NS)
    read_all(fresh)
    fresh.handle(ev.Recovering(1, going=False))
    assert matched(fresh, line(0, 5)) == 0
    left = 0 if whole else 7
    assert used(fresh, 1) == left * PAGE
    assert len(fresh.content[-1]) == left


def test_evicting_everything_of_a_namespace_is_clearing_it() -> None:
    fresh = half_read(1)
    fresh.ask(ev.Evict, namespace=NS, prompt=b"", tier=1)
    read_all(fresh)
    assert (used(fresh, 1), len(fresh.content[-1])) == (0, 0)


def test_what_is_stored_after_the_clear_stays() -> None:
    fresh = half_read(1)
    fresh.ask(ev.Clear, namespace=NS)
    put(fresh, line(0, 5))
    fresh.handle(ev.Drain(999, 60_000))  # the copies down are under way while the rest is read
    read_all(fresh)
    assert matched(fresh, line(0, 5)) == 5
    assert (used(fresh, 1), len(fresh.content[-1])) == (5 * PAGE, 5)


def test_a_clear_ends_with_the_recovery() -> None:
    fresh = half_read(1)
    fresh.ask(ev.Clear, namespace=NS)
    read_all(fresh)
    fresh.handle(ev.Recovering(1, going=False))
    put(fresh, line(0, 5), ack=Ack.DURABLE)
    assert len(fresh.content[-1]) == 5
    again = fresh.restart(fresh.engine.options)
    again.finish_all()
    assert matched(again, line(0, 5)) == 5


def evict(shell: Shell, prompt: bytes, tier_index: int) -> int:
    answer = shell.ask(ev.Evict, namespace=NS, prompt=prompt, tier=tier_index)
    assert isinstance(answer, act.EvictResult)
    shell.engine.check()
    return answer.pages


@pytest.mark.parametrize(
    ("prompt", "gone"),
    [
        (line(0, 2), 9),  # the lost page itself: all that hangs below it
        (line(0, 3), 9),  # a stranded page, and all below it
        (line(0, 3) + pages(3), 6),
        (line(0, 3) + pages(3, 4), 5),
        (line(0, 3) + pages(80, 81), 1),
        (line(0, 3) + pages(99), 0),
        (line(700, 3), 0),
    ],
)
def test_of_a_stranded_tree_the_branch_goes(prompt: bytes, gone: int) -> None:
    shell = world(tier(HOST, 32), tier(DISK, 100))
    for end in (pages(3, 4, 5, 6), pages(3, 4, 70, 71), pages(80, 81)):
        put(shell, line(0, 3) + end, ack=Ack.DURABLE)
    fresh = torn(shell, line(0, 2))
    fresh.finish_all()
    before = stranded(fresh)
    assert before == 9
    evict(fresh, prompt, 0)
    assert stranded(fresh) == before
    evict(fresh, prompt, 1)
    fresh.finish_all()
    assert before - stranded(fresh) == gone
    assert used(fresh, 1) == len(fresh.content[-1]) * PAGE
