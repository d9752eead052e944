"""Copies between tiers: starting them, and what follows from their outcomes.

A copy is two-phase. While it is under way its runs are pinned where they come from and FILLING where they go. Copies to
a durable tier keep it ancestor-closed: whatever is missing above a run goes in the same copy, or earlier in the same
order of submission; if an ancestor must come from another tier, it goes first and the run waits.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence

from hicache.engine.actions import Copy, OperationDone
from hicache.engine.core import ABSENT, DRAINING, FILLING, RESIDENT, Core, namespace_of
from hicache.engine.events import CopyDone
from hicache.engine.holders import CopyJob, Lease, Operation
from hicache.tree import Run
from hicache.types import Outcome, PageRecord, WritePolicy

#: Makes room in a pool: ``make_room(run's pool, pages, page_bytes)`` says whether it is there now.
MakeRoom = Callable[[int, Run, int], bool]

FINISHED_OPERATIONS = 1024


def start(core: Core, runs: Sequence[Run], src: int, dst: int, *, drain: Run | None = None) -> list[CopyJob]:
    """Copy runs of one namespace (a path, top first) from one tier to another. The room must be there.

    ``drain``: the run among them that leaves ``src`` when its copy has arrived.
    """
    jobs: list[CopyJob] = []
    bound = core.options.max_copy_pages
    batch: list[Run] = []
    size = 0
    todo = list(reversed(runs))
    draining = {drain.id} if drain is not None else set()
    while todo:
        run = todo.pop()
        if run.pages > bound:
            tail = core.split(run, bound - size or bound)
            if run.id in draining:
                draining.add(tail.id)
            todo.append(tail)
        if size + run.pages > bound:
            jobs.append(_launch(core, batch, src, dst, draining))
            batch, size = [], 0
        batch.append(run)
        size += run.pages
    if batch:
        jobs.append(_launch(core, batch, src, dst, draining))
    return jobs


def _launch(core: Core, runs: list[Run], src: int, dst: int, draining: set[int]) -> CopyJob:
    namespace = namespace_of(runs[0])
    job = CopyJob(next(core.ids), namespace, src, dst, [])
    core.copies[job.id] = job
    pool = namespace.pools[dst]
    src_keyed, dst_keyed = core.tiers[src].keyed, core.tiers[dst].keyed
    sources, targets = array("q"), array("q")
    keys: list[bytes] = []
    records: list[PageRecord] = []
    for run in runs:
        core.hold(job, run)
        core.pin(run, src)
        places = pool.take(run.pages, namespace.page_bytes)
        core.place(run, dst, places)
        core.set_state(run, dst, FILLING)
        if run.id in draining:
            core.set_state(run, src, DRAINING)
            namespace.pools[src].draining += core.run_units(run, src)
        if not src_keyed:
            sources.extend(run.slots[src] or ())
        if not dst_keyed:
            targets.extend(places)
        if src_keyed or dst_keyed:
            keys += core.keys(run)
        if dst_keyed:
            records += page_records(core, run)
    core.emit(Copy(job.id, namespace.id, src, dst, namespace.page_bytes, sources, targets, keys, records))
    return job


def page_records(core: Core, run: Run) -> list[PageRecord]:
    """What a keyed tier writes beside each page of the run."""
    namespace = namespace_of(run)
    keys = core.keys(run)
    above = run.tree.parent_run(run)
    parent = core.keys(above)[-1] if above is not None else namespace.fingerprint
    width = run.tree.symbol_bytes
    symbols = run.tree.symbols(run)
    return [
        PageRecord(namespace.fingerprint, before, symbols[index * width : (index + 1) * width])
        for index, before in enumerate([parent, *keys[:-1]])
    ]


def missing_above(core: Core, run: Run, dst: int) -> list[Run] | None:
    """Ancestors that the durable tier lacks, top first; None if one of them is in no tier (the run is stranded)."""
    missing: list[Run] = []
    above = run.tree.parent_run(run)
    while above is not None and above.state[dst] == ABSENT:
        if not above.live:
            return None
        missing.append(above)
        above = above.tree.parent_run(above)
    missing.reverse()
    return missing


def copy_down(core: Core, run: Run, dst: int, make_room: MakeRoom, *, drain_from: int = -1) -> bool:
    """Start copying a run, with the ancestors that a durable tier needs, to a lower tier.

    ``drain_from``: the tier that the run leaves when the copy has arrived (-1: it stays). Returns whether copying was
    started; False also when only ancestors could be started: ask again when something has finished.
    """
    if len(core.copies) >= core.options.max_copies or not core.writable[dst]:
        return False
    src = drain_from if drain_from >= 0 else core.source_for(run, dst)
    path = [run]
    if core.tiers[dst].durable:
        missing = missing_above(core, run, dst)
        if missing is None:
            return False
        path = [*missing, run]
    if path[0].state[src] != RESIDENT:
        src = core.source_for(path[0], dst)
    if src < 0 or path[0].state[src] != RESIDENT or _waits_for_other_source(core, path[0], src, dst):
        return False
    # What stands in one tier goes in one order; the rest, down to the run itself, follows when this has arrived.
    together = list(itertools.takewhile(lambda each: each.state[src] == RESIDENT, path))
    if not _room_for(core, together, dst, make_room):
        return False
    whole = together[-1] is run
    start(core, together, src, dst, drain=run if whole and drain_from >= 0 else None)
    return whole


def _waits_for_other_source(core: Core, top: Run, src: int, dst: int) -> bool:
    """Whether the run above is still on its way to ``dst`` from another tier (order of arrival is then open)."""
    above = top.tree.parent_run(top)
    if above is None or above.state[dst] != FILLING:
        return False
    jobs = [holder for holder in above.holders if isinstance(holder, CopyJob) and holder.dst == dst]
    return any(job.src != src for job in jobs) or not jobs


def _room_for(core: Core, path: list[Run], dst: int, make_room: MakeRoom) -> bool:
    """Make room for a path in ``dst`` without evicting what stands just above it there."""
    guards = [
        core.guard(run, [tier for tier in core.tier_range if run.state[tier] == RESIDENT]) for run in path
    ]
    above = path[0].tree.parent_run(path[0])
    if above is not None and above.state[dst] == RESIDENT:
        guards.append(core.guard(above, [dst]))
    try:
        return make_room(dst, path[-1], sum(run.pages for run in path))
    finally:
        for guard in guards:
            core.unguard(guard)


# --- completion


def finish(core: Core, event: CopyDone) -> None:
    """Settle every page of a copy, then tell the operations that waited for it."""
    job = core.copies.pop(event.copy)
    namespace, pages = job.namespace, 0
    todo = list(reversed(job.runs))
    touched: list[Run] = []
    while todo:
        run = todo.pop()
        outcome = Outcome.OK
        if event.outcomes is not None:
            outcome = event.outcomes[pages]
            same = 1
            while same < run.pages and event.outcomes[pages + same] is outcome:
                same += 1
            if same < run.pages:
                todo.append(core.split(run, same))
        charges = event.charges[pages : pages + run.pages]
        pages += run.pages
        _settle(core, job, run, outcome, charges, source_fault=event.source_fault)
        for operation in job.operations:
            if outcome is Outcome.OK:
                operation.moved_pages += run.pages
            else:
                operation.failed_pages += run.pages
        touched.append(run)
    core.counters.copied_bytes[job.src][job.dst] += namespace.page_bytes * pages
    core.counters.copied_pages[job.src][job.dst] += pages
    for run in touched:
        core.let_go(job, run)
    merge_all(core, touched)
    for operation in job.operations:
        operation.copies.discard(job.id)
        finish_operation(core, operation)
    core.room_changed = True


def merge_all(core: Core, runs: list[Run]) -> None:
    """Join runs that have become alike again with their neighbours, so that churn does not shred a node."""
    for run in reversed(runs):
        if run.id not in core.runs:
            continue
        while core.merge(run):
            pass
        above = run.tree.parent_run(run) if run.start else None
        if above is not None:
            core.merge(above)


def _settle(
    core: Core, job: CopyJob, run: Run, outcome: Outcome, charges: Sequence[int], *, source_fault: bool
) -> None:
    src, dst = job.src, job.dst
    core.unpin(run, src)
    if run.state[src] == DRAINING:
        namespace_of(run).pools[src].draining -= core.run_units(run, src)
        if outcome is not Outcome.OK:
            core.set_state(run, src, RESIDENT)
    if outcome is Outcome.OK:
        _arrive(core, run, dst, charges)
        if run.state[src] == DRAINING:
            core.leave(run, src)
            core.counters.evicted_pages[src] += run.pages
        elif dst > src and _goes_further(core, run):
            core.backlog.append(run.id)
        return
    places = run.slots[dst]
    assert places is not None
    core.set_state(run, dst, ABSENT)
    core.place_nothing(run, dst)
    core.release_places(job.namespace, dst, places)
    core.counters.failed_copy_pages[dst] += run.pages
    if source_fault and run.state[src] == RESIDENT:
        if outcome is Outcome.CORRUPT:
            core.counters.corrupt_pages[src] += run.pages
        core.void(run, src)


def _goes_further(core: Core, run: Run) -> bool:
    """Whether the write policy wants the run in the tiers below, too."""
    options = core.options
    if ABSENT not in run.state or options.write_policy is WritePolicy.BACK:
        return False
    return options.write_policy is WritePolicy.THROUGH or run.hits >= options.selective_hits


def _arrive(core: Core, run: Run, dst: int, charges: Sequence[int]) -> None:
    if charges:
        places = run.slots[dst]
        assert places is not None
        namespace_of(run).pools[dst].recharge(places, charges)
        core.place(run, dst, array("q", charges))
    core.set_state(run, dst, RESIDENT)


def finish_operation(core: Core, operation: Operation) -> None:
    """Announce an operation that has nothing more to wait for."""
    if operation.done or operation.runs or operation.copies:
        return
    operation.done = True
    core.emit(OperationDone(operation.id, operation.moved_pages, operation.failed_pages))
    core.finished.append(operation.id)
    while len(core.finished) > FINISHED_OPERATIONS:
        core.operations.pop(core.finished.popleft(), None)
    lease = core.leases.get(operation.lease)
    if lease is not None:
        trim_lease(core, lease)


def trim_lease(core: Core, lease: Lease) -> None:
    """A lease ends where its promotions failed: keep the prefix that is there."""
    keep = 0
    for run in lease.runs:
        if run.state[lease.tier] not in {RESIDENT, FILLING}:
            break
        keep += 1
    for run in reversed(lease.runs[keep:]):
        core.unpin(run, lease.tier)
        core.let_go(lease, run)
