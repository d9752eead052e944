"""Fetch, prefetch and pin: leases on a prefix, and the promotions they wait for."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence

from hicache.engine import copies, reservations, room, warming
from hicache.engine.actions import FetchResult, OperationResult, Piece, RenewResult
from hicache.engine.core import ABSENT, DRAINING, FILLING, RESIDENT, Core
from hicache.engine.events import (
    CancelOperation,
    Fetch,
    Prefetch,
    ReleaseLeases,
    RenewLeases,
    Touch,
)
from hicache.engine.holders import CopyJob, Lease, LeaseStage, NamespaceState, Operation
from hicache.engine.pools import Pool
from hicache.engine.sound import leasable
from hicache.tree import Run
from hicache.types import WritePolicy

OPERATOR = 0  # the session that owns pins
#: How many of the operations that wait for room in a pool are tried each time.
TRIES = 8
#: A promotion is not cut into smaller copies than this.
LEAST_COPY_BYTES = 1 << 20


def touch(core: Core, event: Touch) -> None:
    """Count a look-up as a use."""
    namespace = core.namespaces[event.namespace]
    runs = core.cut(namespace, namespace.tree.match(event.prompt))
    core.touch(runs, event.use)
    if event.prefetch and runs and warming.may_start(core, runs):
        operation = new_operation(core, namespace, core.lease_tier, runs, OPERATOR)
        operation.warm = True
        core.warming.add(operation.id)
        advance(core, operation)


def fetch(core: Core, event: Fetch) -> None:
    """Match, lease, and start promoting what the client cannot read where it is."""
    namespace = core.namespaces[event.namespace]
    tree, prompt = namespace.tree, event.prompt
    tier = event.tier
    if tier < 0:
        tier = core.lease_tier
    if event.max_pages:
        prompt = prompt[: event.max_pages * tree.symbol_bytes]
    match = tree.match(prompt)
    runs, pages = core.cut(namespace, match), match.pages
    if core.condemned:
        runs, pages = leasable(core, runs, tier)
    result, as_matched = _answer(core, event, namespace, tier, (runs, pages))
    core.counters.fetches += 1
    core.counters.missed_pages += len(prompt) // tree.symbol_bytes - pages
    if event.reserve_missing:
        known = as_matched and pages == match.pages and (not event.max_pages or match.pages < event.max_pages)
        end = (match.pages, runs[-1] if runs else None) if known else None
        result.reserved = reservations.along(core, event, end)
    core.reply(event.request, result)


def _answer(
    core: Core, event: Fetch, namespace: NamespaceState, tier: int, match: tuple[list[Run], int]
) -> tuple[FetchResult, bool]:
    """Lease a match (its runs and pages) in a tier; also whether the tree is still as it was matched."""
    tier_pages = [0] * len(core.tiers)
    runs, pages = match
    if not runs:
        return FetchResult(0, 0, 0, 0, (), 0, tier_pages), True
    core.touch(runs, event.use)
    namespace.pools[tier].tick = core.tick
    if core.warmed:
        warming.used(core, runs)
    tier_pages[tier] = pages
    missing = _count_hits(core, runs, tier, tier_pages, namespace.page_bytes)
    if core.options.write_policy is WritePolicy.SELECTIVE and len(core.tiers) > 1:
        _save_hot(core, runs)
    if missing and not event.promote:
        runs = _resident_prefix(runs, tier)
    lease = Lease(next(core.ids), event.session, namespace, tier, pages, tier_pages, 0)
    if runs:
        begin(core, lease, runs, _ttl(core, event.ttl_ms))
        if missing:
            lease.operation = promote(core, lease, event.session)
        if not lease.runs:
            end(core, lease)
    return view(core, lease) if lease.runs else _empty(lease), not missing


def _count_hits(core: Core, runs: list[Run], tier: int, tier_pages: list[int], page_bytes: int) -> bool:
    """Count from where each page is served; whether some are not in the lease's tier. No run is DRAINING any more.

    ``tier_pages`` comes with all of them in the lease's tier.
    """
    hits, hit_bytes = core.counters.hit_pages, core.counters.hit_bytes
    elsewhere = [run for run in runs if run.state[tier] != RESIDENT]
    if not elsewhere:
        hits[tier] += tier_pages[tier]
        hit_bytes[tier] += tier_pages[tier] * page_bytes
        return False
    for run in elsewhere:
        tier_pages[tier] -= run.pages
        tier_pages[run.state.index(RESIDENT)] += run.pages
    for index, pages in enumerate(tier_pages):
        hits[index] += pages
        hit_bytes[index] += pages * page_bytes
    return True


def _empty(lease: Lease) -> FetchResult:
    return FetchResult(0, lease.matched_pages, 0, 0, (), 0, lease.tier_pages)


def _resident_prefix(runs: list[Run], tier: int) -> list[Run]:
    for index, run in enumerate(runs):
        if run.state[tier] != RESIDENT:
            return runs[:index]
    return runs


def _save_hot(core: Core, runs: list[Run]) -> None:
    """Queue runs that have just had their n-th use for an early copy down."""
    bound = core.options.selective_hits
    for run in runs:
        if run.hits == bound and ABSENT in run.state[run.state.index(RESIDENT) :]:
            core.save_early(run, core.best_tier(run))


def _ttl(core: Core, asked_ms: int) -> int:
    return min(asked_ms or core.options.default_ttl_ms, core.options.max_ttl_ms)


def begin(core: Core, lease: Lease, runs: list[Run], ttl_ms: int) -> None:
    """Let the lease pin these runs; ``ttl_ms`` 0: without an end."""
    core.leases[lease.id] = lease
    core.held_pages += lease.matched_pages
    if ttl_ms:
        lease.expires_ms = core.now_ms + ttl_ms
        core.at(lease.expires_ms, "lease", lease.id)
    core.pin_all(lease, runs, lease.tier)


def promote(core: Core, lease: Lease, session: int) -> int:
    """Start bringing a lease's runs to its tier. Returns the operation, 0 if there is none to wait for."""
    operation = new_operation(core, lease.namespace, lease.tier, lease.runs, session)
    operation.lease = lease.id
    advance(core, operation)
    if operation.done:
        core.operations.pop(operation.id, None)
        return 0
    return operation.id


def new_operation(
    core: Core, namespace: NamespaceState, tier: int, runs: Sequence[Run], session: int
) -> Operation:
    """An operation that is to bring these runs to a tier. The last is anchored until it has started.

    Its pages go in page order: a prefix is of use only as far as it has no gap. They go in as many copies as it may
    have under way, so that every reader of the tier they come from has work, but not in crumbs.
    """
    operation = Operation(next(core.ids), session, namespace, tier)
    core.operations[operation.id] = operation
    core.at(core.now_ms + core.options.default_ttl_ms, "operation", operation.id)
    for run in runs:
        if run.state[tier] != RESIDENT:
            core.hold(operation, run)
    if operation.runs:
        core.anchor(operation.runs[-1], 1)
    parts = core.options.promotion_copies
    pages = -(-sum(run.pages for run in operation.runs) // parts)
    least = -(-LEAST_COPY_BYTES // namespace.page_bytes)
    operation.step = min(max(pages, least), core.options.max_copy_pages)
    return operation


def advance(core: Core, operation: Operation) -> None:
    """Start as many of an operation's promotions as there is room for now."""
    while operation.runs:
        run = operation.runs[0]
        if not _start_one(core, operation, run):
            break
    if operation.runs and not operation.copies and not _may_get_room(core, operation):
        _give_up(core, operation)
    wanting = operation.namespace.pools[operation.tier].wanting
    wanting.pop(operation.id, None)
    if operation.runs:
        wanting[operation.id] = operation  # behind the others that wait
    copies.finish_operation(core, operation)


def advance_some(core: Core, pool: Pool) -> None:
    """Let operations that wait for room in a pool try again: those whose turn it is."""
    if len(core.copies) >= core.options.max_copies:
        return
    for operation in list(itertools.islice(pool.wanting.values(), TRIES)):
        if operation.runs:
            advance(core, operation)


def _start_one(core: Core, operation: Operation, run: Run) -> bool:
    """Deal with an operation's first run. False if it must wait."""
    tier = operation.tier
    if run.state[tier] == DRAINING:
        core.rescue(run)
    state = run.state[tier]
    if state == FILLING:
        _join(operation, copies.jobs_to(run, tier))
    elif state == ABSENT:
        source = core.best_tier(run)
        if source < 0 or not core.writable[tier]:
            _give_up(core, operation)
            return False
        under_way = len(operation.copies) >= core.options.promotion_copies
        if under_way or len(core.copies) >= core.options.max_copies:
            return False
        if run.state[source] == DRAINING:
            core.rescue(run)
        if run.pages > operation.step:
            core.split(run, operation.step)
        if not _start_copy(core, operation, run, source):
            return False
    _started(core, operation, run)
    return True


def _start_copy(core: Core, operation: Operation, run: Run, source: int) -> bool:
    tier = operation.tier
    if core.tiers[tier].durable:
        if not copies.copy_down(core, run, tier, room.make_room_below):
            return False
        _join(operation, copies.jobs_to(run, tier))
        return True
    guard = core.guard(run, [source])
    there = room.make_room_below(core, tier, run, run.pages)
    core.unguard(guard)
    if there and run.state[source] == RESIDENT:
        _join(operation, copies.start(core, [run], source, tier))
        return True
    return False


def _join(operation: Operation, jobs: Iterable[CopyJob]) -> None:
    """The operation waits for these, too."""
    for job in jobs:
        operation.copies.add(job.id)
        if operation not in job.operations:
            job.operations.append(operation)


def _started(core: Core, operation: Operation, run: Run) -> None:
    """The run needs the operation's hold no longer."""
    last = operation.runs[-1] is run
    core.let_go(operation, run)
    if last:
        core.anchor(run, -1)


def _may_get_room(core: Core, operation: Operation) -> bool:
    """Whether something under way can still let a waiting operation get on."""
    return bool(core.copies) or core.segments[operation.tier].claimant is not None


def _give_up(core: Core, operation: Operation) -> None:
    """What has not started yet fails."""
    last = operation.runs[-1]
    operation.namespace.pools[operation.tier].wanting.pop(operation.id, None)
    for run in list(operation.runs):
        operation.failed_pages += run.pages
        core.let_go(operation, run)
    core.anchor(last, -1)


def drop_operation(core: Core, operation: Operation) -> None:
    """Nobody waits any more: what has not started never will."""
    if operation.runs:
        _give_up(core, operation)
    copies.finish_operation(core, operation)


def cancel(core: Core, event: CancelOperation) -> None:
    """Copies under way go on: others may share them."""
    operation = core.operations.get(event.operation)
    if operation is not None and operation.session == event.session and not operation.done:
        drop_operation(core, operation)


def prefetch(core: Core, event: Prefetch) -> None:
    """Bring a prefix to a tier without leasing it."""
    namespace = core.namespaces[event.namespace]
    match = namespace.tree.match(event.prompt)
    runs = core.cut(namespace, match)
    core.touch(runs)
    moving = sum(run.pages for run in runs if run.state[event.tier] != RESIDENT)
    if not moving:
        core.reply(event.request, OperationResult(0, match.pages, 0))
        return
    operation = new_operation(core, namespace, event.tier, runs, event.session)
    core.reply(event.request, OperationResult(operation.id, match.pages, moving))
    advance(core, operation)


# --- the life of a lease


def view(core: Core, lease: Lease) -> FetchResult:
    """The lease as it stands: the prefix that can be read now."""
    tier = lease.tier
    places = array("q")
    for run in lease.runs:
        slots = run.slots[tier]
        if (
            slots is None
            or run.state[tier] != RESIDENT
            or (core.condemned and (run.id, tier) in core.condemned)
        ):
            break
        places += slots
    operation = core.operations.get(lease.operation)
    waiting = lease.operation if operation is not None and not operation.done else 0
    return FetchResult(
        lease.id,
        lease.matched_pages,
        len(places),
        lease.expires_ms,
        (Piece(tier, places),) if places else (),
        waiting,
        lease.tier_pages,
        lease.namespace.page_bytes,
        None,
        tier,
    )


def renew(core: Core, event: RenewLeases) -> None:
    """Extend leases that are still live."""
    expires = core.now_ms + _ttl(core, event.ttl_ms)
    lost = []
    for ident in event.leases:
        lease = core.leases.get(ident)
        if lease is None or lease.session != event.session or lease.stage is not LeaseStage.LIVE:
            lost.append(ident)
            continue
        if expires < lease.expires_ms:
            core.at(expires, "lease", ident)  # else the timer that it has looks again
        lease.expires_ms = expires
    core.reply(event.request, RenewResult(lost, expires))


def release(core: Core, event: ReleaseLeases) -> None:
    """The owner is done with these."""
    for ident in event.leases:
        lease = core.leases.get(ident)
        if lease is not None and lease.session == event.session and lease.stage is LeaseStage.LIVE:
            end(core, lease)


def end(core: Core, lease: Lease) -> None:
    """Let go of everything the lease holds."""
    del core.leases[lease.id]
    core.held_pages -= lease.matched_pages
    operation = core.operations.get(lease.operation)
    if operation is not None and not operation.done:
        drop_operation(core, operation)
    core.unpin_all(lease, lease.tier)
    many = lease.namespace.many_hits
    later: Run | None = None
    for run in reversed(lease.runs):
        if not run.live:
            core.prune(run)
        elif later is None or (
            run.node is later.node and (run.hits == later.hits or 0 < many <= later.hits <= run.hits)
        ):
            core.merge(
                run
            )  # cut apart for a shorter match, or come one after the other and now used together
        later = run
    lease.runs = []
    core.room_changed = True


def expire(core: Core, lease: Lease) -> None:
    """Its owner has lost it; its slots rest for the grace in case the owner is still reading."""
    lease.stage = LeaseStage.RESTING
    operation = core.operations.get(lease.operation)
    if operation is not None and not operation.done:
        drop_operation(core, operation)
    core.counters.expired_leases += 1
    core.at(core.now_ms + core.options.expiry_grace_ms, "rest", lease.id)
