"""Reserve: room for the missing pages of a prompt, now or after a wait in line.

A reservation takes places and anchors the page before its first, so that the pages have something to hang from.
"""

from __future__ import annotations

from collections.abc import Iterator

from hicache.engine import room, shares
from hicache.engine.actions import ReserveResult
from hicache.engine.commits import FIRST, let_go_anchor
from hicache.engine.copies import merge_all
from hicache.engine.core import Core
from hicache.engine.events import Reserve
from hicache.engine.holders import NamespaceState, Reservation, ReserveWaiter
from hicache.engine.pools import Pool
from hicache.errors import ErrorCode
from hicache.types import NO_USE, Pressure

RETRY_MS = 200


def reserve(core: Core, event: Reserve) -> None:
    """Grant the room now, or wait for it in line."""
    core.counters.reserves += 1
    namespace = core.namespaces[event.namespace]
    waiter = ReserveWaiter(
        event.request,
        event.session,
        namespace,
        event.prompt,
        event.ttl_ms,
        core.now_ms + event.wait_ms,
        event.pressure,
        core.same_use(event.use) if event.use is not NO_USE else NO_USE,
    )
    pool = namespace.pools[FIRST]
    if _refuse_for_good(core, waiter, pool):
        return
    if not pool.waiters and try_grant(core, waiter, last_try=False):
        return
    if event.wait_ms <= 0:
        if not try_grant(core, waiter, last_try=True):
            refuse(core, waiter)
        return
    core.counters.waited_calls += 1
    pool.waiters.append(waiter)
    core.at(waiter.deadline_ms, "waiter", 0)
    core.room_changed = True


def _refuse_for_good(core: Core, waiter: ReserveWaiter, pool: Pool) -> bool:
    """Answer a call that no waiting helps."""
    name, size = core.tiers[FIRST].name, waiter.namespace.page_bytes
    if not core.writable[FIRST]:
        core.fail(
            waiter.request,
            ErrorCode.UNAVAILABLE,
            f"tier '{name}', where pages are stored first, has failed and takes no more",
            "see the server's log; it must be restarted",
        )
    elif not pool.fits(1, size):
        core.fail(
            waiter.request,
            ErrorCode.INVALID,
            f"a page of {size} bytes does not fit tier '{name}'",
            "give the tier more room, or larger segments",
        )
    else:
        return False
    core.counters.refused_calls += 1
    return True


def try_grant(core: Core, waiter: ReserveWaiter, *, last_try: bool) -> bool:
    """Grant a reservation if the room can be had now. On the last try unsaved pages are dropped for it."""
    namespace = waiter.namespace
    match = namespace.tree.match(waiter.prompt)
    total = len(waiter.prompt) // namespace.tree.symbol_bytes
    if match.pages == total:
        core.reply(waiter.request, ReserveResult(0, total, 0, 0))
        return True
    last = core.cut_end(namespace, match)
    if last is not None:
        # What makes room may split the run: the waiter follows, as the anchor does.
        core.hold(waiter, last)
        core.anchor(last, 1)
    most = _most_pages(core, namespace)
    asked = min(total - match.pages, most)
    drop = waiter.pressure is Pressure.DROP or last_try
    # A prompt that would take more than half of the tier gets at least that much: the head of a prompt is worth
    # keeping, and waiting for the tier to be idle helps nobody. The last try takes what there is.
    granted = asked
    if not _room(core, namespace, asked, drop=drop):
        smaller = _halves(asked, 1 if last_try else max(most // 2, 1))
        granted = next((pages for pages in smaller if _room(core, namespace, pages, drop=drop)), 0)
    if granted:
        _grant(core, waiter, match.pages, granted)
    let_go_anchor(core, waiter)
    return granted > 0


def _halves(asked: int, least: int) -> Iterator[int]:
    """The half of what is asked for, the half of that, and so on, not below ``least``."""
    pages = asked // 2
    while pages >= min(least, asked) and pages > 0:
        yield pages
        pages //= 2


def _room(core: Core, namespace: NamespaceState, pages: int, *, drop: bool) -> bool:
    """Room without losing anything if that can be had, else by dropping unsaved pages if that is allowed."""
    pool = namespace.pools[FIRST]
    if not drop and room.make_room(core, pool, pages, namespace.page_bytes):
        return True
    # Asked only now: the try above may have started the very copies that are worth waiting for.
    may_drop = drop or not _hope(core)
    return may_drop and room.make_room(core, pool, pages, namespace.page_bytes, drop=True)


def _hope(core: Core) -> bool:
    """Whether anything under way may still free room: copies down, or a segment that another pool gives up."""
    return bool(core.copies) or core.segments[FIRST].claimant is not None


def _most_pages(core: Core, namespace: NamespaceState) -> int:
    """The most pages that one prompt of the namespace can have in the first tier, whoever else uses it."""
    pool = namespace.pools[FIRST]
    if pool.spec.keyed:
        return pool.spec.capacity_bytes // pool.units(1, namespace.page_bytes)
    segments = core.segments[FIRST]
    mine = len(pool.segments) + len(segments.spare)
    if mine < segments.total:
        mine = max(mine, shares.fair_segments(core, pool))
    return mine * pool.slots_per_segment


def _grant(core: Core, waiter: ReserveWaiter, present: int, pages: int) -> None:
    namespace = waiter.namespace
    namespace.pools[FIRST].tick = core.tick
    ttl = min(waiter.ttl_ms or core.options.default_ttl_ms, core.options.max_ttl_ms)
    places = namespace.pools[FIRST].take(pages, namespace.page_bytes)
    reservation = Reservation(
        next(core.ids),
        waiter.session,
        namespace,
        waiter.prompt,
        present,
        present,
        present,
        present + pages,
        places,
        core.now_ms + ttl,
        use=waiter.use,
    )
    core.reservations[reservation.id] = reservation
    if waiter.runs:
        _pass_on(core, waiter, reservation)
    core.at(reservation.expires_ms, "reservation", reservation.id)
    core.reply(waiter.request, ReserveResult(reservation.id, present, pages, reservation.expires_ms))


def _pass_on(core: Core, waiter: ReserveWaiter, reservation: Reservation) -> None:
    """The hold on the last run, and its anchor, become the reservation's; the others are let go."""
    *others, last = waiter.runs
    waiter.runs = []
    last.holders[last.holders.index(waiter)] = reservation
    reservation.runs.append(last)
    for run in others:
        run.holders.remove(waiter)
    merge_all(core, others)


def refuse(core: Core, waiter: ReserveWaiter) -> None:
    """No room within the deadline."""
    core.counters.refused_calls += 1
    soonest = min((lease.expires_ms for lease in core.leases.values() if lease.expires_ms), default=0)
    retry = min(max(soonest - core.now_ms, RETRY_MS), 5_000) if soonest else RETRY_MS
    core.fail(
        waiter.request,
        ErrorCode.EXHAUSTED,
        f"no room for the missing pages in tier '{core.tiers[FIRST].name}' within the deadline: "
        "what is there is leased, pinned or being written",
        "release leases, allow a longer wait_ms, or give the tier more room",
        retry_after_ms=retry,
    )
