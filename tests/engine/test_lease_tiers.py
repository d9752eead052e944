"""Leases in other tiers than the usual one, and leases of the same pages in several tiers at once."""

from __future__ import annotations

import pytest

from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.errors import ErrorCode, NotFoundError
from hicache.types import Outcome
from tests.engine.shell import Shell
from tests.engine.worlds import DEVICE, DISK, HOST, ME, NS, OTHER, fetch, line, put, tier, where, world

ON_DEVICE, IN_HOST, ON_DISK = 0, 1, 2


def three(device: int = 8, host: int = 16, **settings: object) -> Shell:
    return world(tier(DEVICE, device, 1), tier(HOST, host, 1), tier(DISK, 100), **settings)


def only_in(shell: Shell, index: int, prompt: bytes) -> None:
    """Bring a prompt to a tier, and out of all others."""
    answer = shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=prompt, tier=index)
    assert isinstance(answer, act.OperationResult)
    shell.finish_all()
    for other in range(len(shell.specs) - 1, -1, -1):
        if other != index:
            shell.ask(ev.Evict, namespace=NS, prompt=prompt, tier=other)
            shell.finish_all()
    assert where(shell, prompt) == ["R" if each == index else "-" for each in range(len(shell.specs))]


def view(shell: Shell, lease: int, session: int = ME) -> act.FetchResult:
    return shell.engine.lease_view(session, lease)


def slots(result: act.FetchResult) -> list[int]:
    return [slot for piece in result.pieces for slot in piece.slots]


@pytest.mark.parametrize("source", [ON_DEVICE, IN_HOST, ON_DISK])
@pytest.mark.parametrize("into", [ON_DEVICE, IN_HOST])
def test_pages_come_to_the_tier_of_the_lease_from_wherever_they_are(source: int, into: int) -> None:
    """Granted where they are there, promoted or copied down where they are not; hits count where they were found."""
    shell = three()
    put(shell, line(0, 4))
    only_in(shell, source, line(0, 4))
    answer = fetch(shell, line(0, 5), tier=into)
    found = [0, 0, 0]
    found[source] = 4
    assert (answer.tier, answer.matched_pages, list(answer.tier_pages)) == (into, 4, found)
    assert shell.engine.stats().counters.hit_pages == found
    assert (answer.granted_pages, answer.operation == 0) == ((4, True) if source == into else (0, False))
    shell.finish_all()
    after = view(shell, answer.lease)
    assert (after.granted_pages, after.operation, after.tier) == (4, 0, into)
    assert [piece.tier for piece in after.pieces] == [into]
    shell.verify(NS, line(0, 5), after)
    assert where(shell, line(0, 4))[into] == "R"


def test_without_a_tier_a_lease_is_where_clients_can_map_it() -> None:
    shell = three()
    put(shell, line(0, 2))
    assert fetch(shell, line(0, 2)).tier == IN_HOST
    shell = world(tier(DEVICE, 8), tier(DISK, 100))
    put(shell, line(0, 2))
    assert fetch(shell, line(0, 2)).tier == ON_DEVICE == fetch(shell, line(0, 2), tier=0).tier


def test_without_promotion_only_what_is_in_the_tier_is_leased() -> None:
    shell = three()
    put(shell, line(0, 2))
    only_in(shell, IN_HOST, line(0, 2))
    put(shell, line(0, 4))
    assert fetch(shell, line(0, 4), tier=ON_DEVICE, promote=False).lease == 0
    answer = fetch(shell, line(0, 4), tier=IN_HOST, promote=False)
    assert (answer.matched_pages, answer.granted_pages, answer.operation, answer.tier) == (4, 2, 0, IN_HOST)


def test_both_tiers_at_once() -> None:
    """Two leases of the same pages, one in each tier: neither moves, and each keeps its own tier's copy only."""
    shell = three()
    put(shell, line(0, 4))
    device = fetch(shell, line(0, 4), tier=ON_DEVICE)
    host = fetch(shell, line(0, 4), session=OTHER)
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["R", "R", "-"]
    here, there = view(shell, device.lease), view(shell, host.lease, OTHER)
    assert slots(here) == slots(device) and here.granted_pages == there.granted_pages == 4
    for index in (ON_DEVICE, IN_HOST):
        assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=index) == act.EvictResult(0, 4)
    shell.handle(ev.ReleaseLeases(ME, [device.lease]))
    assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=ON_DEVICE) == act.EvictResult(4, 0)
    assert where(shell, line(0, 4)) == ["-", "R", "-"]
    assert slots(view(shell, host.lease, OTHER)) == slots(there)


def test_what_promotions_have_cut_apart_is_joined_when_the_last_lease_in_any_tier_ends() -> None:
    """Not before: the pins of a lease in another tier keep the parts as they are."""
    shell = three(max_copy_pages=2, policy="lru")
    put(shell, line(0, 6))
    only_in(shell, IN_HOST, line(0, 6))
    for order in ((ME, OTHER), (OTHER, ME)):
        leases = {
            ME: fetch(shell, line(0, 6), tier=ON_DEVICE),
            OTHER: fetch(shell, line(0, 6), session=OTHER),
        }
        shell.finish_all()
        assert view(shell, leases[ME].lease).granted_pages == leases[OTHER].granted_pages == 6
        assert shell.engine.stats().runs == 3
        for session in order:
            assert shell.engine.stats().runs == 3
            shell.handle(ev.ReleaseLeases(session, [leases[session].lease]))
        assert shell.engine.stats().runs == 1
        assert where(shell, line(0, 6)) == ["R", "R", "-"]
        assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 6), tier=ON_DEVICE) == act.EvictResult(6, 0)


def test_a_wrong_copy_in_one_tier_stops_leases_there_and_nowhere_else() -> None:
    """Until its last pin goes; then a Fetch brings a sound copy back from the other tier."""
    shell = three()
    put(shell, line(0, 4))
    device = fetch(shell, line(0, 4), tier=ON_DEVICE)
    host = fetch(shell, line(0, 4), session=OTHER)
    shell.finish_all()
    shell.rot(NS, line(0, 3), ON_DEVICE)
    shell.handle(ev.PageCorrupt(NS, ON_DEVICE, line(0, 3)))
    assert view(shell, device.lease).granted_pages == 2
    assert view(shell, host.lease, OTHER).granted_pages == 4
    again = fetch(shell, line(0, 4), tier=ON_DEVICE)
    assert (again.matched_pages, again.granted_pages, again.operation) == (2, 2, 0)
    assert fetch(shell, line(0, 4)).granted_pages == 4
    shell.handle(ev.ReleaseLeases(ME, [device.lease, again.lease]))
    assert where(shell, line(0, 3)) == ["-", "R", "-"]
    mended = fetch(shell, line(0, 4), tier=ON_DEVICE)
    shell.finish_all()
    assert view(shell, mended.lease).granted_pages == 4
    assert shell.place_of(NS, line(0, 3), ON_DEVICE) is not None


def test_a_wrong_copy_is_not_promoted_from() -> None:
    """The host's copy is wrong and leased: a lease on the device takes the disk's, or ends before the page."""
    for saved in (True, False):
        shell = three()
        put(shell, line(0, 4))
        if saved:
            shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 4), tier=ON_DISK)
            shell.finish_all()
        host = fetch(shell, line(0, 4), session=OTHER)
        shell.finish_all()
        shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=ON_DEVICE)
        shell.rot(NS, line(0, 4), IN_HOST)
        shell.handle(ev.PageCorrupt(NS, IN_HOST, line(0, 4)))
        answer = fetch(shell, line(0, 4), tier=ON_DEVICE)
        shell.finish_all()
        assert view(shell, answer.lease).granted_pages == (4 if saved else 3)
        assert view(shell, host.lease, OTHER).granted_pages == 3
        shell.verify(NS, line(0, 4), view(shell, answer.lease))


def test_a_page_that_is_leaving_the_device_stays_for_a_lease_there() -> None:
    """Its copy to the host goes on; nothing is copied back."""
    shell = three(device=4)
    put(shell, line(0, 4))
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, OTHER, NS, line(100, 2), 1000, 500))
    assert where(shell, line(0, 4))[:2] == ["D", "F"]
    answer = fetch(shell, line(0, 4), tier=ON_DEVICE)
    assert (answer.granted_pages, answer.operation) == (4, 0)
    shell.finish_all()
    assert where(shell, line(0, 4))[0] == "R"
    assert shell.engine.stats().counters.rescued_pages > 0
    assert [copy.dst_tier for copy in shell.moved if isinstance(copy, act.Copy)].count(ON_DEVICE) == 0


def test_a_page_on_its_way_down_is_waited_for_by_a_lease_below() -> None:
    """A lease in the host joins the copy that the device's eviction has started."""
    shell = three(device=4)
    put(shell, line(0, 4))
    shell.handle(ev.Reserve(next(shell.requests), OTHER, NS, line(100, 2), 1000, 500))
    copies = len(shell.moved)
    answer = fetch(shell, line(0, 4))
    assert answer.operation and answer.granted_pages < 4
    shell.finish_all()
    assert view(shell, answer.lease).granted_pages == 4
    towards_host = [copy for copy in shell.moved if isinstance(copy, act.Copy) and copy.dst_tier == IN_HOST]
    pages_copied = sum(len(copy.dst_slots) for copy in towards_host)
    assert pages_copied == 4 and len(shell.moved) >= copies


def test_one_operation_a_lease_and_each_ends_its_own() -> None:
    """Two leases of what is on disk, one in each tier: each waits for its own copies; a failed one trims its own."""
    shell = three()
    put(shell, line(0, 4))
    only_in(shell, ON_DISK, line(0, 4))
    device = fetch(shell, line(0, 4), tier=ON_DEVICE)
    host = fetch(shell, line(0, 4), session=OTHER)
    assert device.operation and host.operation and device.operation != host.operation
    to_device = next(n for n, copy in enumerate(shell.pending) if getattr(copy, "dst_tier", -1) == ON_DEVICE)
    shell.finish(to_device, [Outcome.FAULT] * 4)
    assert shell.done_operations[device.operation].failed_pages == 4
    assert view(shell, device.lease).granted_pages == 0
    assert not shell.engine.operation_view(OTHER, host.operation).done
    shell.finish_all()
    assert shell.engine.operation_view(OTHER, host.operation).done
    assert view(shell, host.lease, OTHER).granted_pages == 4


def test_reserving_along_with_a_lease_in_the_device() -> None:
    """What is missing follows what matched, whether that was there or is only now on its way."""
    for source in (ON_DEVICE, IN_HOST):
        shell = three()
        put(shell, line(0, 3))
        only_in(shell, source, line(0, 3))
        answer = fetch(shell, line(0, 5), tier=ON_DEVICE, reserve_missing=True)
        assert answer.reserved is not None
        assert (answer.reserved.present_pages, answer.reserved.missing_pages) == (3, 2)
        request = next(shell.requests)
        shell.handle(
            ev.Commit(request, ME, answer.reserved.reservation, [(3, 2)], (NS, line(0, 5)), last=True)
        )
        assert isinstance(shell.settle(request), act.CommitResult)
        shell.finish_all()
        whole = fetch(shell, line(0, 5), tier=ON_DEVICE)
        assert whole.granted_pages == 5


def test_a_prompt_larger_than_the_device_is_granted_as_far_as_its_copies_find_room() -> None:
    """The lease ends there; the rest is still served from the host."""
    shell = three(device=5, max_copy_pages=2)
    put(shell, line(0, 5))
    only_in(shell, IN_HOST, line(0, 5))
    put(shell, line(0, 9))
    only_in(shell, IN_HOST, line(0, 9))
    answer = fetch(shell, line(0, 9), tier=ON_DEVICE)
    shell.finish_all()
    after = view(shell, answer.lease)
    assert (after.matched_pages, after.granted_pages, after.operation) == (9, 5, 0)
    shell.verify(NS, line(0, 9), after)
    assert fetch(shell, line(0, 9), session=OTHER).granted_pages == 9


def test_pages_prefetched_to_the_host_count_as_used_by_a_lease_on_the_device() -> None:
    """They come from there, not from disk."""
    shell = three()
    put(shell, line(0, 4))
    only_in(shell, ON_DISK, line(0, 4))
    shell.handle(ev.Touch(NS, line(0, 4), prefetch=True))
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["-", "R", "R"]
    answer = fetch(shell, line(0, 4), tier=ON_DEVICE)
    assert list(answer.tier_pages) == [0, 4, 0]
    counts = shell.engine.stats().counters
    assert (counts.prefetched_pages, counts.used_prefetched_pages, counts.unused_prefetched_pages) == (
        4,
        4,
        0,
    )


def test_operator_pins_and_leases_of_one_run_in_all_tiers() -> None:
    """Three holders, three tiers: each tier's pins are its own."""
    shell = three()
    put(shell, line(0, 2))
    pin = shell.ask(ev.Pin, namespace=NS, prompt=line(0, 2), tier=ON_DISK)
    assert isinstance(pin, act.PinResult)
    device, host = fetch(shell, line(0, 2), tier=ON_DEVICE), fetch(shell, line(0, 2))
    shell.finish_all()
    assert where(shell, line(0, 2)) == ["R", "R", "R"]
    for gone, event in (
        (ON_DEVICE, ev.ReleaseLeases(ME, [device.lease])),
        (IN_HOST, ev.ReleaseLeases(ME, [host.lease])),
        (ON_DISK, ev.Unpin(pin.pin)),
    ):
        assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 2), tier=gone) == act.EvictResult(0, 2)
        shell.handle(event)
        assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 2), tier=gone) == act.EvictResult(2, 0)


def test_a_device_that_takes_no_more_still_grants_what_it_has() -> None:
    shell = three()
    put(shell, line(0, 2))
    put(shell, line(50, 2))
    only_in(shell, IN_HOST, line(50, 2))
    shell.latch(ON_DEVICE, readable=True)
    assert fetch(shell, line(0, 2), tier=ON_DEVICE).granted_pages == 2
    answer = fetch(shell, line(50, 2), tier=ON_DEVICE)
    assert (answer.lease, answer.granted_pages, answer.matched_pages) == (0, 0, 2)
    assert fetch(shell, line(50, 2)).granted_pages == 2


def test_expired_leases_rest_in_their_own_tier() -> None:
    """The device's slots are not used again before the grace is over; the host's lease goes on."""
    shell = three(expiry_grace_ms=200)
    put(shell, line(0, 2))
    device = fetch(shell, line(0, 2), tier=ON_DEVICE, ttl_ms=100)
    host = fetch(shell, line(0, 2), ttl_ms=1000)
    shell.finish_all()
    shell.advance(150)
    with pytest.raises(NotFoundError):
        view(shell, device.lease)
    assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 2), tier=ON_DEVICE) == act.EvictResult(0, 2)
    shell.advance(200)
    assert shell.ask(ev.Evict, namespace=NS, prompt=line(0, 2), tier=ON_DEVICE) == act.EvictResult(2, 0)
    assert view(shell, host.lease).granted_pages == 2


@pytest.mark.parametrize(
    ("index", "says", "hint"),
    [
        (3, "there is no tier 3", "name none, or one of 0 (device), 1 (host)"),
        (
            2,
            "no lease can be in tier 2 (disk), which has no slots",
            "name none, or one of 0 (device), 1 (host)",
        ),
    ],
)
def test_tiers_in_which_no_lease_can_be(index: int, says: str, hint: str) -> None:
    shell = three()
    put(shell, line(0, 2))
    answer = shell.ask(
        ev.Fetch, session=ME, namespace=NS, prompt=line(0, 2), tier=index, reserve_missing=True
    )
    assert answer == act.Failure(ErrorCode.INVALID, says, hint)
    assert shell.engine.stats().leases == shell.engine.stats().reservations == 0
    answer = shell.ask(ev.Fetch, session=99, namespace=NS, prompt=line(0, 2), tier=index)
    assert isinstance(answer, act.Failure) and answer.code is ErrorCode.NOT_FOUND


def test_a_disk_alone_leases_in_its_usual_tier_only() -> None:
    shell = world(tier(DISK, 20))
    put(shell, line(0, 2))
    assert fetch(shell, line(0, 2)).granted_pages == 2
    answer = shell.ask(ev.Fetch, session=ME, namespace=NS, prompt=line(0, 2), tier=0)
    assert isinstance(answer, act.Failure) and answer.hint == "name none"
