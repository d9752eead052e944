"""Reserve and commit: room first, then the copy, then the tree.

A reservation takes places and anchors the page before its first; the tree hears of the new pages only when their bytes
are there, in page order, so that an abandoned store leaves no hole. Whoever stored a page first wins.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from hicache.engine import reclaim, room, savers
from hicache.engine.actions import CommitResult, CopyIn, Free, ReserveResult
from hicache.engine.copies import merge_all
from hicache.engine.core import ABSENT, RESIDENT, Core
from hicache.engine.events import Abort, Commit, CopyDone, Reserve
from hicache.engine.holders import Ingest, NamespaceState, Reservation, ReserveWaiter
from hicache.errors import ErrorCode
from hicache.keys import chain_keys
from hicache.tree import Run
from hicache.types import Ack, Outcome, PageRecord, Pressure, WritePolicy

FIRST = 0  # commits land in the first tier
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
    )
    pool = namespace.pools[FIRST]
    if not pool.waiters and try_grant(core, waiter, last_try=False):
        return
    if not event.wait_ms:
        if not try_grant(core, waiter, last_try=True):
            refuse(core, waiter)
        return
    core.counters.waited_calls += 1
    pool.waiters.append(waiter)
    core.at(waiter.deadline_ms, "waiter", 0)
    core.room_changed = True


def try_grant(core: Core, waiter: ReserveWaiter, *, last_try: bool) -> bool:
    """Grant a reservation if the room can be had now. On the last try unsaved pages are dropped for it."""
    namespace = waiter.namespace
    pool = namespace.pools[FIRST]
    match = namespace.tree.match(waiter.prompt)
    total = len(waiter.prompt) // namespace.tree.symbol_bytes
    if match.pages == total:
        core.reply(waiter.request, ReserveResult(0, total, 0, 0))
        return True
    runs = core.cut(namespace, match)
    if runs:
        core.hold(
            waiter, runs[-1]
        )  # what makes room may split the run: the waiter follows, as the anchor does
        core.anchor(runs[-1], 1)
    most = _most_pages(core, namespace)
    asked = min(total - match.pages, most)
    drop = waiter.pressure is Pressure.DROP or last_try
    # A prompt that would take more than half of the tier gets at least that much: the head of a prompt is worth
    # keeping, and waiting for the tier to be idle helps nobody. The last try takes what there is.
    granted = 0
    for pages in _sizes(asked, 1 if last_try else max(most // 2, 1)):
        granted = pages if _room(core, namespace, pages, drop=drop) else 0
        if granted:
            break
    if granted:
        _grant(core, waiter, match.pages, granted)
    else:
        reclaim.wanted(core, pool)
    _let_go_anchor(core, waiter)
    return granted > 0


def _sizes(asked: int, least: int) -> Iterator[int]:
    """What is asked for, then halves of it, not below ``least``."""
    pages = asked
    while pages >= min(least, asked) and pages > 0:
        yield pages
        pages = pages // 2


def _room(core: Core, namespace: NamespaceState, pages: int, *, drop: bool) -> bool:
    """Room without losing anything if that can be had, else by dropping unsaved pages if that is allowed."""
    pool = namespace.pools[FIRST]
    if room.make_room(core, pool, pages, namespace.page_bytes):
        return True
    # Asked only now: the try above may have started the very copies that are worth waiting for.
    may_drop = drop or not _hope(core)
    return may_drop and room.make_room(core, pool, pages, namespace.page_bytes, drop=True)


def _let_go_anchor(core: Core, holder: ReserveWaiter | Reservation) -> None:
    """Undo a hold on runs of which the last is anchored."""
    held = list(holder.runs)
    for run in held:
        run.holders.remove(holder)
    holder.runs = []
    if held:
        core.anchor(held[-1], -1)
        merge_all(core, held)


def _hope(core: Core) -> bool:
    """Whether anything under way may still free room: copies down, or room that leases will give back."""
    return bool(core.copies) or any(core.closing_segments) or any(p.leaving >= 0 for p in core.pools.values())


def _most_pages(core: Core, namespace: NamespaceState) -> int:
    """The most pages the first tier could ever hold of this namespace."""
    pool = namespace.pools[FIRST]
    if pool.spec.keyed:
        return pool.spec.capacity_bytes // pool.units(1, namespace.page_bytes)
    return core.segments[FIRST].total * pool.slots_per_segment


def _grant(core: Core, waiter: ReserveWaiter, present: int, pages: int) -> None:
    namespace = waiter.namespace
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
    )
    core.reservations[reservation.id] = reservation
    if waiter.runs:
        core.hold(reservation, waiter.runs[-1])
        core.anchor(waiter.runs[-1], 1)
    core.at(reservation.expires_ms, "reservation", reservation.id)
    core.reply(waiter.request, ReserveResult(reservation.id, present, pages, reservation.expires_ms))


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
        retry,
    )


# --- commit


def commit(core: Core, event: Commit) -> None:
    """Start copying a session's pages in."""
    core.counters.commits += 1
    reservation = core.reservations.get(event.reservation)
    if reservation is None or reservation.session != event.session or reservation.closing:
        core.fail(
            event.request,
            ErrorCode.NOT_FOUND,
            f"reservation {event.reservation} expired or never was",
            "reserve again",
        )
        return
    problem = _check_pieces(reservation, event.pieces)
    if problem:
        core.fail(event.request, ErrorCode.INVALID, problem)
        return
    first = reservation.submitted
    count = sum(pages for _, pages in event.pieces)
    ingest = Ingest(next(core.ids), event.request, first, count, event.ack, event.last)
    if not count:
        ingest.outcomes = []
        reservation.ingests.append(ingest)
        settle(core, reservation)
        return
    reservation.submitted += count
    reservation.ingests.append(ingest)
    core.ingests[ingest.copy] = (reservation, ingest)
    skip = first - reservation.next
    places = reservation.places[skip : skip + count]
    keyed = core.tiers[FIRST].keyed
    keys, records = _identify(core, reservation, first, count) if keyed else ([], [])
    namespace = reservation.namespace
    core.emit(
        CopyIn(
            ingest.copy,
            namespace.id,
            FIRST,
            namespace.page_bytes,
            range(first, first + count),
            () if keyed else places,
            keys,
            records,
            event.source,
        )
    )


def _check_pieces(reservation: Reservation, pieces: Sequence[tuple[int, int]]) -> str:
    """What is wrong with a commit's pieces, empty if nothing: they go on in order from what was committed."""
    expected = reservation.submitted
    for first, pages in pieces:
        if pages < 1:
            return "a piece of a commit must have at least one page"
        if first != expected:
            return f"commit starts at page {first}, the reservation goes on at page {expected}: commit in page order"
        expected += pages
    if expected > reservation.end:
        return f"commit reaches page {expected}, the reservation ends at page {reservation.end}"
    return ""


def _identify(
    core: Core, reservation: Reservation, first: int, count: int
) -> tuple[list[bytes], list[PageRecord]]:
    """Keys and records of pages that go straight to a keyed tier."""
    namespace = reservation.namespace
    width = namespace.tree.symbol_bytes
    symbols = reservation.prompt[: (first + count) * width]
    chain = [namespace.fingerprint, *chain_keys(namespace.fingerprint, symbols, width)]
    records = [
        PageRecord(namespace.fingerprint, chain[page], symbols[page * width : (page + 1) * width])
        for page in range(first, first + count)
    ]
    return chain[first + 1 :], records


def finish(core: Core, event: CopyDone) -> None:
    """A commit's bytes are there (or not)."""
    reservation, ingest = core.ingests.pop(event.copy)
    ingest.outcomes = list(event.outcomes or [Outcome.OK] * ingest.pages)
    ingest.charges = list(event.charges)
    settle(core, reservation)


def settle(core: Core, reservation: Reservation) -> None:
    """Put finished commits into the tree, in page order, and answer them."""
    while reservation.ingests and reservation.ingests[0].outcomes is not None:
        ingest = reservation.ingests.popleft()
        if ingest.first != reservation.next:  # an earlier one failed: so do those that came after it
            _discard(core, reservation, ingest, ingest.first)
            _answer(core, reservation, ingest, [], 0, ingest.pages)
            continue
        outcomes = ingest.outcomes or []
        good = next(
            (index for index, outcome in enumerate(outcomes) if outcome is not Outcome.OK), len(outcomes)
        )
        runs, present = _graft(core, reservation, good, ingest.charges)
        _discard(core, reservation, ingest, ingest.first + good if present >= 0 else ingest.first)
        if good < ingest.pages:
            reservation.submitted = reservation.next  # may be committed again from here
        _answer(core, reservation, ingest, runs, present, ingest.pages - good)
        if ingest.last and good == ingest.pages:
            reservation.closing = True
    if reservation.closing and not reservation.ingests:
        close(core, reservation)


def _discard(core: Core, reservation: Reservation, ingest: Ingest, first: int) -> None:
    """Take pages of a commit, from ``first`` on, that a keyed tier holds but the tree will not, out of that tier."""
    end = ingest.first + ingest.pages
    if not core.tiers[FIRST].keyed or first >= end:
        return
    outcomes = (ingest.outcomes or [])[first - ingest.first :]
    keys, _ = _identify(core, reservation, first, end - first)
    tree = reservation.namespace.tree
    runs, _ = tree.runs(tree.trace(reservation.prompt[: end * tree.symbol_bytes]))
    held: list[bool] = []  # by page: whether the tree knows it in the tier (stored by somebody else)
    for run in runs:
        held += [run.state[FIRST] != ABSENT] * run.pages
    held += [False] * (end - len(held))
    rows = zip(held[first:], keys, outcomes, strict=False)
    gone = [key for known, key, outcome in rows if outcome is Outcome.OK and not known]
    if gone:
        core.emit(Free(FIRST, (), gone))


def _answer(
    core: Core, reservation: Reservation, ingest: Ingest, runs: list[Run], present: int, failed: int
) -> None:
    stored = sum(run.pages for run in runs)
    core.counters.committed_pages += stored
    core.counters.committed_bytes += stored * reservation.namespace.page_bytes
    core.counters.already_present_pages += max(present, 0)
    if present < 0:
        core.fail(
            ingest.request,
            ErrorCode.CONFLICT,
            f"the page before page {ingest.first} is gone (its tier lost it)",
            "abort, match again and store from there",
        )
        return
    first, last = ingest.first, ingest.first + ingest.pages - failed
    if ingest.ack is Ack.DURABLE and core.durable_tier >= 0 and last > first:
        path = savers.path_of(core, reservation.namespace, reservation.prompt, first, last)
        savers.save(core, ingest.request, path, (stored, present, failed))
        return
    core.reply(ingest.request, CommitResult(stored, present, 0, failed))
    if core.options.write_policy is WritePolicy.THROUGH:
        core.backlog.extend(run.id for run in runs)


def _graft(core: Core, reservation: Reservation, count: int, charges: list[int]) -> tuple[list[Run], int]:
    """Hang ``count`` pages whose bytes have arrived into the tree: new runs, and how many were there already.

    -1 present: the page before them is gone.
    """
    places = reservation.places[:count]
    del reservation.places[:count]
    if charges and core.tiers[FIRST].keyed:
        reservation.namespace.pools[FIRST].recharge(places, charges[:count])
        places = array("q", charges[:count])
    first = reservation.next
    reservation.next += count
    namespace = reservation.namespace
    if not count:
        return [], 0
    width = namespace.tree.symbol_bytes
    prompt = reservation.prompt[: (first + count) * width]
    if namespace.tree.match(prompt).pages < first:
        core.release_places(namespace, FIRST, places)
        return [], -1
    core.next_tick()
    return lay(core, namespace, prompt, first, FIRST, places)


def lay(
    core: Core, namespace: NamespaceState, prompt: bytes, first: int, tier: int, places: array[int]
) -> tuple[list[Run], int]:
    """Give pages [first, end of prompt) their places in a tier: in new runs, or in holes that stood there.

    Pages that are matchable already keep what they have: their new places are given back.

    Returns the runs that are resident now through this call, and how many pages were there already.
    """
    tree = namespace.tree
    width = tree.symbol_bytes
    page, present = first, 0
    stored: list[Run] = []
    path = core.cut(namespace, tree.trace(prompt))
    known = from_page(core, path, first)
    for run in known:
        mine = places[page - first : page - first + run.pages]
        page += run.pages
        if run.live or run.state[tier] != ABSENT:
            present += run.pages
            core.release_places(namespace, tier, mine)
            continue
        _occupy(core, run, tier, mine)
        core.holes.discard(run)
        stored.append(run)
    total = len(prompt) // width
    if page < total:
        above = path[-1] if path else None
        run = tree.insert(prompt, above, page, total - page)
        core.adopt(run, namespace)
        _occupy(core, run, tier, places[page - first :])
        stored.append(run)
    return stored, present


def from_page(core: Core, path: list[Run], first: int) -> list[Run]:
    """The runs of a path from a page on; splits the run in which the page lies."""
    page = 0
    for index, run in enumerate(path):
        if page == first:
            return path[index:]
        if page + run.pages > first:
            tail = core.split(run, first - page)
            path.insert(index + 1, tail)
            return path[index + 1 :]
        page += run.pages
    return []


def _occupy(core: Core, run: Run, tier: int, places: array[int]) -> None:
    core.place(run, tier, places)
    core.set_state(run, tier, RESIDENT)


# --- ends


def abort(core: Core, event: Abort) -> None:
    """Unknown reservations are fine."""
    reservation = core.reservations.get(event.reservation)
    if reservation is not None and reservation.session == event.session:
        end(core, reservation)


def end(core: Core, reservation: Reservation) -> None:
    """No more commits; room that nothing is being copied into goes back when the copies under way are done."""
    reservation.closing = True
    settle(core, reservation)


def close(core: Core, reservation: Reservation) -> None:
    """Give everything back."""
    if core.reservations.pop(reservation.id, None) is None:
        return
    if reservation.places:
        core.release_places(reservation.namespace, FIRST, reservation.places)
        reservation.places = array("q")
    _let_go_anchor(core, reservation)
    core.room_changed = True
