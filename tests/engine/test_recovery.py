"""What comes back at start: heat and order, stranded chains, a tier that is well again."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parent))

from worlds import (
    DISK,
    HOST,
    ME,
    NS,
    TENANT,
    Shell,
    act,
    ev,
    fetch,
    line,
    matched,
    pages,
    put,
    tier,
    used,
    where,
    world,
)  # fmt: skip

from hicache.types import Ack, Outcome

PAGE = 4096  # what a page turns out to cost on disk


def torn(shell: Shell, *prompts: bytes, namespace: int = NS) -> Shell:
    """A restart after the last page of each prompt has been lost on disk; recovery is still to come."""
    for prompt in prompts:
        del shell.content[-1][shell.place_of(namespace, prompt, len(shell.specs) - 1)]
    return shell.restart(shell.engine.options)


def attach(shell: Shell) -> Shell:
    shell.handle(ev.SessionOpened(ME, "default"))
    return shell


def stranded(shell: Shell) -> int:
    return shell.engine.stats().stranded_pages


# --- stranded


def test_pages_below_a_lost_one_are_stranded_counted_and_charged() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 5), ack=Ack.DURABLE)
    fresh = torn(shell, line(0, 2))
    fresh.finish_all()
    assert matched(fresh, line(0, 5)) == 1
    assert stranded(fresh) == 3
    assert used(fresh, 1) == 4 * PAGE


def test_they_are_alive_again_when_the_lost_page_is_stored_again() -> None:
    """And not written again: only the lost page is."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 5), ack=Ack.DURABLE)
    fresh = attach(torn(shell, line(0, 2)))
    fresh.finish_all()
    put(fresh, line(0, 2))
    assert matched(fresh, line(0, 5)) == 5
    fresh.finish_all()
    assert stranded(fresh) == 0
    assert where(fresh, line(0, 2)) == ["R", "R"]  # the gap has been mended
    assert used(fresh, 1) == 5 * PAGE
    written = [len(copy.keys) for copy in fresh.moved if isinstance(copy, act.Copy) and copy.dst_tier == 1]
    assert written == [1]
    assert fetch(fresh, line(0, 5)).matched_pages == 5
    assert fresh.engine.stats().counters.revived_pages == 3


def test_pages_stored_again_with_the_lost_one_keep_their_old_copies() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 8), ack=Ack.DURABLE)
    fresh = attach(torn(shell, line(0, 2), line(0, 6)))
    fresh.finish_all()
    assert stranded(fresh) == 5
    put(fresh, line(0, 4))
    assert matched(fresh, line(0, 8)) == 5
    assert where(fresh, line(0, 4)) == ["R", "R"]
    assert stranded(fresh) == 2
    put(fresh, line(0, 8), ack=Ack.DURABLE)
    fresh.finish_all()
    assert (matched(fresh, line(0, 8)), stranded(fresh), used(fresh, 1)) == (8, 0, 8 * PAGE)


def test_a_store_while_the_disk_is_read_finds_its_tail_at_the_end() -> None:
    """The page comes back before anybody knows that chains hang below it; another chain comes after them."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 3) + pages(50, 51), ack=Ack.DURABLE)
    put(shell, line(0, 3) + pages(60, 61), ack=Ack.DURABLE)
    for parts in (1, 2, 100):
        shell.engine.check()
        content = dict(shell.content[-1])
        fresh = shell.restart(shell.engine.options, part_pages=parts)
        key = shell.place_of(NS, line(0, 2), 1)
        fresh.content[-1].pop(key)
        fresh.recovery = (
            torn(shell, line(0, 2)).recovery if parts == 100 else _without(shell, line(0, 2), parts)
        )
        shell.content[-1] = content
        attach(fresh)
        put(fresh, line(0, 2))
        while fresh.recovery:
            fresh.recover_some()
        fresh.finish_all()
        assert (stranded(fresh), used(fresh, 1)) == (0, 7 * PAGE)
        assert matched(fresh, line(0, 3) + pages(50, 51)) == 5
        assert matched(fresh, line(0, 3) + pages(60, 61)) == 5


def _without(shell: Shell, prompt: bytes, parts: int) -> list[ev.Recovered]:
    place = shell.place_of(NS, prompt, 1)
    content = shell.content[-1].pop(place)
    recovery = shell.restart(shell.engine.options, part_pages=parts).recovery
    shell.content[-1][place] = content
    return recovery


def test_a_page_that_is_stored_anew_is_not_deleted_with_its_stranded_copy() -> None:
    """Room is made at the end of a recovery, while new copies of stranded pages are on their way to the disk."""
    shell = world(tier(HOST, 32), tier(DISK, 8))
    put(shell, line(0, 8), ack=Ack.DURABLE)
    fresh = attach(torn(shell, line(0, 2), line(0, 5)))
    room = fresh.reserve(ME, NS, line(0, 8))
    assert isinstance(room, act.ReserveResult) and room.missing_pages == 8
    request = next(fresh.requests)
    fresh.handle(ev.Commit(request, ME, room.reservation, [(0, 8)], (NS, line(0, 8)), Ack.DURABLE, last=True))
    copy_in = next(index for index, copy in enumerate(fresh.pending) if isinstance(copy, act.CopyIn))
    fresh.finish(copy_in)
    assert [type(copy) for copy in fresh.pending] == [act.Copy]
    while fresh.recovery:
        fresh.recover_some()
    fresh.finish_all()
    answer = fresh.replies[request]
    assert isinstance(answer, act.CommitResult) and answer.durable_pages == 8
    assert {prompt for _, prompt in fresh.disk_pages()} == {line(0, count) for count in range(1, 9)}


def test_stranded_pages_are_the_first_to_go() -> None:
    shell = world(tier(HOST, 32), tier(DISK, 8))  # sixteen pages of what they really take
    put(shell, line(0, 5), ack=Ack.DURABLE)
    put(shell, line(100, 4), ack=Ack.DURABLE)
    fresh = attach(torn(shell, line(0, 2)))
    fresh.finish_all()
    assert (stranded(fresh), used(fresh, 1)) == (3, 8 * PAGE)
    put(fresh, line(200, 5), ack=Ack.DURABLE)  # five pages of 8192 are asked for, 32768 are free
    fresh.finish_all()
    assert stranded(fresh) == 1  # from the end
    assert matched(fresh, line(100, 4)) == 4
    put(fresh, line(0, 2))
    assert matched(fresh, line(0, 5)) == 3


def test_clear_and_evict_drop_them() -> None:
    shell = world(tier(HOST, 32, 2), tier(DISK, 100))
    for namespace in (NS, TENANT):
        put(shell, line(0, 5), namespace=namespace, ack=Ack.DURABLE)
    for namespace in (NS, TENANT):
        del shell.content[-1][shell.place_of(namespace, line(0, 2), 1)]
    fresh = shell.restart(shell.engine.options)
    fresh.finish_all()
    assert stranded(fresh) == 6
    answer = fresh.ask(ev.Clear, namespace=NS)
    assert isinstance(answer, act.EvictResult)
    assert (answer.pages, stranded(fresh)) == (4, 3)
    assert isinstance(fresh.ask(ev.Evict, namespace=TENANT, prompt=b"", tier=0), act.EvictResult)
    assert stranded(fresh) == 3
    answer = fresh.ask(ev.Evict, namespace=TENANT, prompt=b"", tier=1)
    assert isinstance(answer, act.EvictResult)
    assert (answer.pages, stranded(fresh), used(fresh, 1)) == (4, 0, 0)
    assert not fresh.content[-1]


def test_in_the_process_pages_below_a_corrupt_one_wait_in_the_tree() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 5), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=b"", tier=0)
    shell.rot(NS, line(0, 2), 1)
    shell.handle(ev.PageCorrupt(NS, 1, line(0, 2)))
    assert (matched(shell, line(0, 5)), stranded(shell), used(shell, 1)) == (1, 3, 4 * PAGE)
    moved = len(shell.moved)
    put(shell, line(0, 2))
    shell.finish_all()
    assert (matched(shell, line(0, 5)), stranded(shell), used(shell, 1)) == (5, 0, 5 * PAGE)
    assert [len(copy.keys) for copy in shell.moved[moved:] if isinstance(copy, act.Copy)] == [1]


LINES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(found=LINES, lost=st.sets(st.integers(0, 40)), again=st.permutations(range(5)), part=st.integers(1, 5))
def test_whatever_is_lost_all_is_back_when_all_is_stored_again(
    found: list[tuple[int, int, int]], lost: set[int], again: list[int], part: int
) -> None:
    """Against the plain rule: a page is matched if it and all before it are stored; else it is stranded."""
    shell = world(tier(HOST, 200), tier(DISK, 200))
    prompts = [line(100 * base, count) + line(1000 + tail, 2) for base, count, tail in found]
    for prompt in prompts:
        shell.store(ME, NS, prompt, ack=Ack.DURABLE)
    everything = sorted(shell.disk_pages())
    for index in lost:
        if index < len(everything):
            del shell.content[-1][shell.place_of(*everything[index], 1)]
    kept = shell.disk_pages()
    fresh = attach(shell.restart(shell.engine.options, part_pages=part))
    fresh.finish_all()
    reached = {p for p in kept if all((p[0], p[1][:end]) in kept for end in range(4, len(p[1]), 4))}
    assert stranded(fresh) == len(kept - reached)
    assert used(fresh, 1) == PAGE * len(kept)
    for _, prompt in everything:
        assert (matched(fresh, prompt) * 4 == len(prompt)) == ((NS, prompt) in reached)
    for index in again:
        if index < len(prompts):
            fresh.store(ME, NS, prompts[index])
            assert matched(fresh, prompts[index]) * 4 == len(prompts[index])
    request = next(fresh.requests)
    fresh.handle(ev.Drain(request, 60_000))
    assert fresh.settle(request) == act.DrainResult(0)
    fresh.finish_all()
    assert stranded(fresh) == 0
    assert fresh.disk_pages() == set(everything)
    assert used(fresh, 1) == PAGE * len(everything)


# --- heat


def victims(shell: Shell, prompts: list[bytes]) -> list[int]:
    """In which order these lines of pages leave the disk tier when room is wanted page by page."""
    order: list[int] = []
    core = shell.engine._core
    pool = core.namespaces[NS].pools[-1]
    plan = pool.policy.begin()
    while (ident := plan.next()) is not None:
        run = core.runs[ident]
        prompt = run.tree.prompt_to(run)
        order += [number for number, each in enumerate(prompts) if each.startswith(prompt)]
    plan.abort()
    return order


@settings(max_examples=60, deadline=None)
@given(
    uses=st.lists(st.integers(0, 5), max_size=20), gap=st.sampled_from([1, 7, 100_000]), late=st.booleans()
)
def test_after_a_restart_runs_leave_in_the_order_in_which_they_would_have_left(
    uses: list[int], gap: int, late: bool
) -> None:
    shell = world(tier(HOST, 100), tier(DISK, 100))
    prompts = [line(100 * number, 3) for number in range(6)]
    shell.now = 10_000_000
    heat: dict[bytes, tuple[int, int]] = {}
    for prompt in prompts:
        shell.now += gap
        put(shell, prompt, ack=Ack.DURABLE)
        heat[shell.place_of(NS, prompt, 1)] = (shell.now, 0)
    for number in uses:
        shell.now += gap
        shell.handle(ev.Touch(NS, prompts[number]))
    shell.finish_all()
    for _, key, last_use_ms, hits in shell.engine.heat(100):
        heat[key] = (last_use_ms, hits)
    before = victims(shell, prompts)
    rows = {}
    offset = shell.now + 5 if late else shell.now - 50_000  # the new process' clock starts anywhere
    for prompt in prompts:
        last_use_ms, hits = heat[shell.place_of(NS, prompt, 1)]
        for end in (4, 8, 12):
            rows[NS, prompt[:end]] = (last_use_ms - offset, hits)
    fresh = shell.restart(shell.engine.options, heat=rows)
    fresh.now = 60_000
    fresh.finish_all()
    assert victims(fresh, prompts) == before
    fresh.handle(ev.Touch(NS, prompts[before[0]]))
    assert victims(fresh, prompts) == [*before[1:], before[0]]


def test_heat_is_told_once_and_only_of_the_durable_tier() -> None:
    shell = world(tier(HOST, 100), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    put(shell, line(50, 2))
    assert shell.engine.heat(10) == []
    shell.advance(500)
    for prompt in (line(0, 2), line(0, 4), line(0, 2), line(50, 2)):
        shell.handle(ev.Touch(NS, prompt))
    keys = {shell.place_of(NS, line(0, 4), 1): 1, shell.place_of(NS, line(0, 2), 1): 3}
    assert {key: hits for _, key, _, hits in shell.engine.heat(10)} == keys
    assert shell.engine.heat(10) == []
    shell.handle(ev.Touch(NS, line(0, 4)))
    [(namespace, key, last_use_ms, hits), *rest] = shell.engine.heat(10)
    assert (namespace, key, last_use_ms, hits) == (NS, shell.place_of(NS, line(0, 4), 1), shell.now, 2)
    assert [each[3] for each in rest] == [4]


def test_heat_is_bounded() -> None:
    shell = world(tier(HOST, 100), tier(DISK, 100), check=False)
    for number in range(20):
        put(shell, line(100 * number, 1), ack=Ack.DURABLE)
        shell.handle(ev.Touch(NS, line(100 * number, 1)))
    assert len(shell.engine.heat(5)) == 5
    assert len(shell.engine.heat(100)) == 15


# --- a tier that is well again


def test_a_latched_tier_takes_pages_again_when_it_is_well() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 2), ack=Ack.DURABLE)
    shell.latch(1, readable=True)
    answer = put(shell, line(0, 4), ack=Ack.DURABLE)
    assert answer.durable_pages == 0
    assert not shell.engine.stats().tiers[1].writable
    shell.restore(1)
    assert put(shell, line(0, 6), ack=Ack.DURABLE).durable_pages == 2
    assert where(shell, line(0, 4)) == ["R", "R"]
    assert shell.engine.stats().tiers[1].writable


def test_a_tier_that_was_gone_starts_empty() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    put(shell, line(50, 4), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(50, 4), tier=0)
    shell.latch(1, readable=False)
    assert (matched(shell, line(0, 4)), matched(shell, line(50, 4)), used(shell, 1)) == (4, 0, 0)
    shell.restore(1)
    assert put(shell, line(0, 5), ack=Ack.DURABLE).durable_pages == 1
    assert used(shell, 1) == 5 * PAGE


def test_a_tier_that_goes_while_it_is_read_takes_its_stranded_pages_along() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 5), ack=Ack.DURABLE)
    fresh = torn(shell, line(0, 2))
    fresh.recover_some()
    fresh.latch(1, readable=False)
    fresh.finish_all()
    assert (stranded(fresh), used(fresh, 1), matched(fresh, line(0, 5))) == (0, 0, 0)
    fresh.restore(1)
    attach(fresh)
    assert put(fresh, line(0, 5), ack=Ack.DURABLE).durable_pages == 5


def test_what_a_tier_lost_is_mended_when_it_is_well_again() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 5), ack=Ack.DURABLE)
    shell.latch(1, readable=True)
    shell.rot(NS, line(0, 2), 1)
    shell.handle(ev.PageCorrupt(NS, 1, line(0, 2)))
    assert where(shell, line(0, 2)) == ["R", "-"]
    shell.restore(1)
    shell.finish_all()
    assert where(shell, line(0, 2)) == ["R", "R"]


def test_a_copy_that_was_under_way_when_its_tier_latched_may_end_after_it_is_well() -> None:
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 4))
    request = next(shell.requests)
    shell.handle(ev.Drain(request, 1000))
    assert shell.pending
    shell.handle(ev.TierLatched(1, readable=True))
    shell.handle(ev.TierRestored(1))
    shell.finish(0, [Outcome.OK, Outcome.OK, Outcome.FAULT, Outcome.FAULT])
    shell.finish_all()
    assert where(shell, line(0, 2)) == ["R", "R"]
