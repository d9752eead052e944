"""Commit: pages are copied in first, then the tree hears of them, in page order; and how reservations end.

Nothing of a store is seen before its bytes are there, so that an abandoned one leaves no hole. Whoever stored a page
first wins.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hicache.engine import savers, shares, tips
from hicache.engine.actions import CommitResult, Compare, CopyIn
from hicache.engine.copies import merge_all
from hicache.engine.core import ABSENT, RESIDENT, Core, namespace_of
from hicache.engine.events import Abort, Commit, CopyDone
from hicache.engine.holders import Ingest, Reservation
from hicache.errors import ErrorCode
from hicache.keys import chain_keys
from hicache.tree import Run
from hicache.tree.tips import is_new
from hicache.types import Ack, Outcome, PageRecord, SymbolKind, WritePolicy

FIRST = 0  # commits land in the first tier
RETRY_MS = 50


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
    if reservation.ingests and reservation.ingests[0].first != reservation.next:
        # Those write into the very places that this one would be given.
        core.fail(
            event.request,
            ErrorCode.UNAVAILABLE,
            "an earlier commit of this reservation failed while later ones are still being copied",
            "wait for their answers, then commit again from where it failed",
            retry_after_ms=RETRY_MS,
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
    ingest.keys, records = _identify(core, reservation, first, count) if keyed else ([], [])
    namespace = reservation.namespace
    core.emit(
        CopyIn(
            ingest.copy,
            namespace.id,
            FIRST,
            namespace.page_bytes,
            range(first, first + count),
            () if keyed else places,
            ingest.keys,
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
    ingest.outcomes = event.outcomes or ()
    if not core.readable[FIRST]:
        ingest.outcomes = [Outcome.FAULT] * ingest.pages
    if ingest.deleted:
        outcomes = ingest.outcomes or [Outcome.OK] * ingest.pages
        rows = zip(ingest.keys, outcomes, strict=True)
        ingest.outcomes = [Outcome.MISS if key in ingest.deleted else found for key, found in rows]
    ingest.charges = event.charges
    settle(core, reservation)


def settle(core: Core, reservation: Reservation) -> None:
    """Put finished commits into the tree, in page order, and answer them."""
    while reservation.ingests and reservation.ingests[0].outcomes is not None:
        ingest = reservation.ingests.popleft()
        if ingest.first != reservation.next:  # an earlier one failed: so do those that came after it
            _discard(core, reservation, ingest, ingest.first)
            _answer(core, reservation, ingest, ([], 0), ingest.pages)
            continue
        good = ingest.pages
        if ingest.outcomes:
            bad = (index for index, outcome in enumerate(ingest.outcomes) if outcome is not Outcome.OK)
            good = next(bad, good)
        runs, present = _graft(core, reservation, good, ingest.charges)
        _discard(core, reservation, ingest, ingest.first + good if present >= 0 else ingest.first)
        if good < ingest.pages:
            reservation.submitted = reservation.next  # may be committed again from here
        _answer(core, reservation, ingest, (runs, present), ingest.pages - good)
        if ingest.last and good == ingest.pages:
            reservation.closing = True
    if reservation.closing and not reservation.ingests:
        close(core, reservation)


def _discard(core: Core, reservation: Reservation, ingest: Ingest, first: int) -> None:
    """Take pages of a commit, from ``first`` on, that a keyed tier holds but the tree will not, out of that tier."""
    end = ingest.first + ingest.pages
    if not core.tiers[FIRST].keyed or first >= end:
        return
    outcomes = (ingest.outcomes or [Outcome.OK] * ingest.pages)[first - ingest.first :]
    keys = ingest.keys[first - ingest.first :]
    tree = reservation.namespace.tree
    found = tree.trace(reservation.prompt[: end * tree.symbol_bytes])
    held: list[bool] = []  # by page: whether the tree knows it in the tier (stored by somebody else)
    for run in tree.runs(found)[0]:
        held += [run.state[FIRST] != ABSENT] * run.pages
    held[found.pages :] = [False] * (end - found.pages)  # the last run may go on with other pages
    rows = zip(held[first:], keys, outcomes, strict=False)
    gone = [key for known, key, outcome in rows if outcome is Outcome.OK and not known]
    if gone:
        core.free_keys(FIRST, gone)


def _answer(
    core: Core, reservation: Reservation, ingest: Ingest, grafted: tuple[list[Run], int], failed: int
) -> None:
    runs, present = grafted
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
        for run in runs:
            core.save_early(run, FIRST)


def _graft(core: Core, reservation: Reservation, count: int, charges: Sequence[int]) -> tuple[list[Run], int]:
    """Hang ``count`` pages whose bytes have arrived into the tree: new runs, and how many were there already.

    -1 present: the page before them is gone.
    """
    places = reservation.places
    if count < len(places):
        reservation.places = places[count:]
        places = places[:count]
    else:
        reservation.places = array("q")
    if charges and core.tiers[FIRST].keyed:
        reservation.namespace.pools[FIRST].recharge(places, charges[:count])
        places = array("q", charges[:count])
    first = reservation.next
    reservation.next += count
    namespace = reservation.namespace
    if not count:
        return [], 0
    width = namespace.tree.symbol_bytes
    prompt = reservation.prompt
    if len(prompt) > (first + count) * width:
        prompt = prompt[: (first + count) * width]
    after = reservation.runs[-1] if reservation.runs else None
    if not core.holes and reservation.present_pages == first and is_new(namespace.tree, prompt, after, first):
        core.next_tick()
        pool = namespace.pools[FIRST]
        special = core.gaps or core.stranded.pages or pool.draining or pool.leaving_runs is not None
        tokens = namespace.spec.symbol_kind is SymbolKind.TOKENS
        if special or (tokens and pool.policy.wants_ghosts):
            return _add(core, reservation, prompt, after, places), 0
        return tips.add(core, reservation, prompt[first * width :], places), 0
    if namespace.tree.match(prompt).pages < first:
        core.release_places(namespace, FIRST, places)
        return [], -1
    core.next_tick()
    return _lay(core, reservation, prompt, first, places)


def _lay(
    core: Core, reservation: Reservation, prompt: bytes, first: int, places: array[int]
) -> tuple[list[Run], int]:
    """Give pages [first, end of prompt) their places in the first tier: in new runs, or in holes that stood there.

    Pages that are matchable already keep what they have: their new places are given back.

    Returns the runs that are resident now through this call, and how many pages were there already.
    """
    namespace = reservation.namespace
    tree = namespace.tree
    page, present = first, 0
    stored: list[Run] = []
    path = core.cut(namespace, tree.trace(prompt))
    for run in from_page(core, path, first):
        mine = places[page - first : page - first + run.pages]
        page += run.pages
        if run.live:
            present += run.pages
            _keep(core, run, mine)
        else:
            stored += _appear(core, run, mine)
    total = len(prompt) // tree.symbol_bytes
    if page < total:
        after = path[-1] if path else None
        stored += _add(core, reservation, prompt, after, places[page - first :])
    return stored, present


def _add(
    core: Core, reservation: Reservation, prompt: bytes, after: Run | None, places: array[int]
) -> list[Run]:
    """Give the last pages of a prompt, which have no place in the tree yet, one after ``after``."""
    tree = reservation.namespace.tree
    total, count = len(prompt) // tree.symbol_bytes, len(places)
    run = tree.insert(prompt, after, total - count, count)
    core.adopt(run, reservation.namespace, reservation.use)
    return _appear(core, run, places)


def _appear(core: Core, run: Run, places: array[int]) -> list[Run]:
    """The run is in the first tier now, in the pieces in which its policy wants it."""
    pool = core.pool(run, FIRST)
    parts = core.cut_at_ghosts(run, FIRST) if pool.policy.wants_ghosts else [run]
    start = 0
    for part in parts:
        mine = places if len(parts) == 1 else places[start : start + part.pages]
        core.appear(part, FIRST, mine)
        if pool.leaving_runs is not None:
            shares.note_leaving(core, part, pool)
        start += part.pages
    return parts


def _keep(core: Core, run: Run, places: array[int]) -> None:
    """The run was there first. In a keyed tier the later copy has replaced its bytes, so that its charge counts."""
    old = run.slots[FIRST]
    if core.tiers[FIRST].keyed and old is not None:
        core.place(run, FIRST, places)
        places = old
    elif old is not None and run.state[FIRST] == RESIDENT:
        core.emit(Compare(FIRST, places, array("q", old)))
    core.release_places(namespace_of(run), FIRST, places)


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
    core.held_pages -= reservation.end
    if reservation.places:
        core.release_places(reservation.namespace, FIRST, reservation.places)
        reservation.places = array("q")
    let_go_anchor(core, reservation)
    core.room_changed = True


def let_go_anchor(core: Core, holder: Reservation) -> None:
    """Undo a hold on runs of which the last is anchored."""
    held = holder.runs
    if not held:
        return
    for run in held:
        run.holders.remove(holder)
    holder.runs = []
    core.anchor(held[-1], -1)
    merge_all(core, held)
