"""Reserve: room for the missing pages of a prompt, now or after a wait in line.

A reservation takes places and anchors the page before its first, so that the pages have something to hang from.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from hicache.engine import room, shares
from hicache.engine.actions import ReserveResult
from hicache.engine.commits import FIRST, let_go_anchor
from hicache.engine.copies import merge_all
from hicache.engine.core import Core
from hicache.engine.events import Fetch, Reserve
from hicache.engine.holders import NamespaceState, Reservation, ReserveWaiter
from hicache.engine.pools import Pool
from hicache.errors import ErrorCode
from hicache.tree import Run
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


def along(core: Core, event: Fetch, end: tuple[int, Run | None] | None) -> ReserveResult | None:
    """Room for what a Fetch did not find, if it can be had at once without passing those who wait for theirs.

    ``end``: how many pages match and the run in which they end, where that is still so. None: no room, ask again with
    Reserve, which waits.
    """
    namespace = core.namespaces[event.namespace]
    pool = namespace.pools[FIRST]
    if pool.waiters or not core.writable[FIRST] or not pool.fits(1, namespace.page_bytes):
        return None
    core.counters.reserves += 1
    use = core.same_use(event.use) if event.use is not NO_USE else NO_USE
    ask = ReserveWaiter(
        event.request,
        event.session,
        namespace,
        event.prompt,
        event.reserve_ttl_ms,
        core.now_ms,
        Pressure.WAIT,
        use,
    )
    return _try(core, ask, end, last_try=False)


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
    result = _try(core, waiter, None, last_try=last_try)
    if result is not None:
        core.reply(waiter.request, result)
    return result is not None


def _try(
    core: Core, ask: ReserveWaiter, end: tuple[int, Run | None] | None, *, last_try: bool
) -> ReserveResult | None:
    """The answer to who asks; None if there is no room. ``end``: as in ``along``."""
    namespace = ask.namespace
    total = len(ask.prompt) // namespace.tree.symbol_bytes
    if end is None:
        match = namespace.tree.match(ask.prompt)
        end = match.pages, core.cut_end(namespace, match) if match.pages < total else None
    present, last = end
    if present == total:
        return ReserveResult(0, total, 0, 0)
    ttl = min(ask.ttl_ms or core.options.default_ttl_ms, core.options.max_ttl_ms)
    reservation = Reservation(
        next(core.ids),
        ask.session,
        namespace,
        ask.prompt,
        present,
        present,
        present,
        present,
        array("q"),
        core.now_ms + ttl,
        use=ask.use,
    )
    if last is not None:
        # What makes room may split the run: the reservation follows, as the anchor does.
        core.hold(reservation, last)
        core.anchor(last, 1)
    granted = _have_room(core, ask, total - present, last_try=last_try)
    if not granted:
        let_go_anchor(core, reservation)
        return None
    _grant(core, reservation, granted)
    return ReserveResult(reservation.id, present, granted, reservation.expires_ms)


def _have_room(core: Core, ask: ReserveWaiter, missing: int, *, last_try: bool) -> int:
    """For how many of the missing pages there is room now.

    A prompt that would take more than half of the tier gets at least that much: the head of a prompt is worth keeping,
    and waiting for the tier to be idle helps nobody. The last try takes what there is.
    """
    namespace = ask.namespace
    most = _most_pages(core, namespace)
    asked = min(missing, most)
    drop = ask.pressure is Pressure.DROP or last_try
    if _room(core, namespace, asked, drop=drop):
        return asked
    smaller = _halves(asked, 1 if last_try else max(most // 2, 1))
    return next((pages for pages in smaller if _room(core, namespace, pages, drop=drop)), 0)


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


def _grant(core: Core, reservation: Reservation, pages: int) -> None:
    """Take the places."""
    namespace = reservation.namespace
    pool = namespace.pools[FIRST]
    pool.tick = core.tick
    reservation.places = pool.take(pages, namespace.page_bytes)
    reservation.end += pages
    core.reservations[reservation.id] = reservation
    core.held_pages += reservation.end
    if len(reservation.runs) > 1:
        _keep_last(core, reservation)
    core.at(reservation.expires_ms, "reservation", reservation.id)


def _keep_last(core: Core, reservation: Reservation) -> None:
    """The run was split: only its last part is held on to."""
    *others, last = reservation.runs
    reservation.runs = [last]
    for run in others:
        run.holders.remove(reservation)
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
