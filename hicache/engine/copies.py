"""Copies between tiers: starting them, and what follows from their outcomes.

A copy is two-phase. While it is under way its runs are pinned where they come from and FILLING where they go. Copies to
a durable tier keep it ancestor-closed: whatever is missing above a run goes in the same copy, or earlier in the same
order of submission; if an ancestor must come from another tier, it goes first and the run waits.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence

from hicache.engine import warming
from hicache.engine.actions import Copy, OperationDone
from hicache.engine.core import ABSENT, DRAINING, FILLING, RESIDENT, Core, namespace_of
from hicache.engine.events import CopyDone
from hicache.engine.holders import CopyJob, Lease, Operation, Saver
from hicache.engine.pools import Pool
from hicache.tree import Run
from hicache.types import Outcome, PageRecord, WritePolicy

#: ``make_room(core, tier, run, pages)`` says whether the run's pool in a tier has room for so many pages now.
MakeRoom = Callable[[Core, int, Run, int], bool]

FINISHED_OPERATIONS = 1024


def start(
    core: Core, runs: Sequence[Run], src: int, dst: int, *, draining: frozenset[int] = frozenset()
) -> list[CopyJob]:
    """Copy runs of one namespace (a path, top first) from one tier to another. The room must be there.

    ``draining``: ids of those among them that leave ``src`` when their copy has arrived.
    """
    jobs: list[CopyJob] = []
    bound = core.options.max_copy_pages
    batch: list[Run] = []
    size = 0
    todo = list(reversed(runs))
    leaving = set(draining)
    while todo:
        run = todo.pop()
        if run.pages > bound:
            tail = core.split(run, bound - size or bound)
            if run.id in leaving:
                leaving.add(tail.id)
            todo.append(tail)
        if size + run.pages > bound:
            jobs.append(_launch(core, batch, src, dst, leaving))
            batch, size = [], 0
        batch.append(run)
        size += run.pages
    if batch:
        jobs.append(_launch(core, batch, src, dst, leaving))
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
            core.set_state(run, src, DRAINING, evicted=True)
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

    ``drain_from``: the tier that the run leaves when the copy has arrived (-1: it stays). Returns whether all of it was
    started. False also when only ancestors, or its first pages, could be: ask again when something has finished.
    """
    if len(core.copies) >= core.options.max_copies or not core.writable[dst]:
        return False
    path = [run]
    if core.tiers[dst].durable:
        missing = missing_above(core, run, dst)
        if missing is None:
            return False
        path = [*missing, run]
    src = drain_from
    if src < 0 or path[0].state[src] != RESIDENT:
        src = core.source_for(path[0], dst)
    if src < 0 or waits_for_other_source(path[0], src, dst) or much_under_way(core, core.pool(run, src), dst):
        return False
    # What stands in one tier goes in one order; the rest, down to the run itself, follows when this has arrived.
    together = list(itertools.takewhile(lambda each: each.state[src] == RESIDENT, path))
    runs, rest, tail = _make_way(core, together, dst, make_room)
    if drain_from >= 0 and rest and len(path) == 1:
        return False  # it is the last pages that are to leave, not the first
    if not runs:
        return False
    whole = together[-1] is run and not rest
    start(core, runs, src, dst, draining=tail if whole and drain_from >= 0 else frozenset())
    return whole


def much_under_way(core: Core, pool: Pool, dst: int) -> bool:
    """Whether copies to a durable tier hold half of their source: were it slow, all of the source would wait for it."""
    if pool.spec.keyed or not core.tiers[dst].durable:
        return False
    return core.counters.pages[dst][FILLING] >= max(pool.capacity // 2, core.options.max_copy_pages)


def waits_for_other_source(top: Run, src: int, dst: int) -> bool:
    """Whether the run above is still on its way to ``dst`` from another tier (order of arrival is then open)."""
    above = top.tree.parent_run(top)
    return above is not None and any(job.src != src for job in jobs_to(above, dst))


def jobs_to(run: Run, dst: int) -> list[CopyJob]:
    """The copy under way that brings a run to a tier, if there is one."""
    if run.state[dst] != FILLING:
        return []
    return [holder for holder in run.holders if isinstance(holder, CopyJob) and holder.dst == dst]


def _make_way(
    core: Core, path: list[Run], dst: int, make_room: MakeRoom
) -> tuple[list[Run], bool, frozenset[int]]:
    """Make room in ``dst`` for a path, or for its first pages, without evicting what stands just above it there.

    Returns the runs for which there is room now, whether pages of the path are left over, and the ids of the runs that
    the path's last one consists of by now (making room may have split it).
    """
    guards = [
        core.guard(run, [tier for tier in core.tier_range if run.state[tier] == RESIDENT]) for run in path
    ]
    held = list(guards)
    above = path[0].tree.parent_run(path[0])
    if above is not None and above.state[dst] == RESIDENT:
        held.append(core.guard(above, [dst]))
    bound = core.options.max_copy_pages
    everything = sum(run.pages for run in path)
    most = min(everything, max(core.options.max_copies - len(core.copies), 1) * bound)
    pages = next(
        (n for n in dict.fromkeys((most, min(most, bound), 1)) if make_room(core, dst, path[-1], n)), 0
    )
    runs = [run for guard in guards for run in guard.runs]
    tail = frozenset(run.id for run in guards[-1].runs)
    for guard in held:
        core.unguard(guard)
    return first_pages(core, runs, pages), pages < everything, tail


def first_pages(core: Core, path: list[Run], pages: int) -> list[Run]:
    """The runs that hold the first pages of a path; splits the one in which they end."""
    found = []
    for run in path:
        if pages <= 0:
            break
        if run.pages > pages:
            core.split(run, pages)
        found.append(run)
        pages -= run.pages
    return found


# --- completion


def finish(core: Core, event: CopyDone) -> None:
    """Settle every page of a copy, then tell the operations that waited for it."""
    job = core.copies.pop(event.copy)
    namespace, pages, moved = job.namespace, 0, 0
    todo = list(reversed(job.runs))
    touched: list[Run] = []
    while todo:
        run = todo.pop()
        outcome = Outcome.OK
        if not core.readable[job.dst]:
            outcome = Outcome.FAULT  # the tier went meanwhile
        elif event.outcomes is not None:
            outcome = event.outcomes[pages]
            mine = event.outcomes[pages : pages + run.pages]
            same = next((at for at, other in enumerate(mine) if other is not outcome), run.pages)
            if same < run.pages:
                todo.append(core.split(run, same))
        for part in core.cut_at_ghosts(run, job.dst) if outcome is Outcome.OK else [run]:
            charges = event.charges[pages : pages + part.pages]
            pages += part.pages
            _settle(core, job, part, outcome, charges, source_fault=event.source_fault)
            moved += part.pages if outcome is Outcome.OK else 0
            touched.append(part)
    core.counters.copied_bytes[job.src][job.dst] += namespace.page_bytes * moved
    core.counters.copied_pages[job.src][job.dst] += moved
    if core.warming and any(operation.warm for operation in job.operations):
        warming.arrived(core, job, touched, moved)
    for run in touched:
        core.let_go(job, run)
    merge_all(core, touched)
    for operation in job.operations:
        operation.moved_pages += moved
        operation.failed_pages += pages - moved
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
    if outcome is Outcome.OK:
        _arrive(core, run, dst, charges)
        if run.state[src] == DRAINING:
            core.pool(run, src).draining -= core.run_units(run, src)
            core.leave(run, src)
            core.counters.evicted_pages[src] += run.pages
        elif dst > src and _goes_further(core, run, dst):
            core.save_early(run, dst)
        return
    if run.state[src] == DRAINING:
        core.stay(run, src)
    places = run.slots[dst]
    assert places is not None, "a page was being copied to no place"
    core.set_state(run, dst, ABSENT)
    core.place(run, dst, None)
    core.release_places(job.namespace, dst, places)
    if core.tiers[dst].keyed:
        core.free_keys(dst, core.keys(run))  # an older copy that the tier may have is in nobody's books
    core.lose(run, dst)
    core.counters.failed_copy_pages[dst] += run.pages
    if core.tiers[dst].durable:
        give_up_saving(core, run)
    if source_fault and run.state[src] == RESIDENT:
        if outcome is Outcome.CORRUPT:
            core.counters.corrupt_pages[src] += run.pages
        core.void(run, src)


def give_up_saving(core: Core, run: Run) -> None:
    """Those who wait for the run to become durable wait no longer."""
    for saver in [holder for holder in run.holders if isinstance(holder, Saver)]:
        saver.unsaved_pages += run.pages
        core.let_go(saver, run)


def _goes_further(core: Core, run: Run, dst: int) -> bool:
    """Whether the write policy wants the run in the tiers below, too."""
    options = core.options
    if ABSENT not in run.state[dst + 1 :]:
        return False
    if run in core.gaps:
        return True
    if options.write_policy is WritePolicy.BACK:
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
    core.warming.discard(operation.id)
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
