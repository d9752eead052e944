"""Everything the engine believes, recomputed from scratch. Tests run this after every event."""

from __future__ import annotations

from collections import Counter

from hicache.engine.core import ABSENT, DRAINING, FILLING, RESIDENT, Core, namespace_of
from hicache.engine.holders import CopyJob
from hicache.engine.pools import Pool
from hicache.errors import ViolationError
from hicache.keys import chain_keys
from hicache.tree import Run
from hicache.types import SLOTS_PER_SEGMENT


def check(core: Core) -> None:
    """Compare state with its invariants. O(everything); raises ViolationError naming the first that does not hold."""
    runs = _check_trees(core)
    for run in runs:
        _check_run(core, run)
    _check_pins(core, runs)
    _check_leases(core)
    _check_ledger(core, runs)
    _check_counts(core, runs)
    _check_stranded(core, runs)
    _check_recovery(core)


def _require(ok: bool, message: str) -> None:  # noqa: FBT001  # an assertion, read as one
    if not ok:
        raise ViolationError(message)


def _check_trees(core: Core) -> list[Run]:
    found: list[Run] = []
    for namespace in core.namespaces.values():
        namespace.tree.check()
        for node in namespace.tree.walk():
            found.extend(node.runs)
    _require({run.id for run in found} == set(core.runs), "the run table and the trees differ")
    return found


def _check_run(core: Core, run: Run) -> None:
    above = run.tree.parent_run(run)
    for tier, state in enumerate(run.state):
        places = run.slots[tier]
        _require((places is None) == (state == ABSENT), f"{run}: state and places differ in tier {tier}")
        _require(places is None or len(places) == run.pages, f"{run}: one place a page in tier {tier}")
        if state != ABSENT and core.tiers[tier].durable and above is not None:
            closed = above.state[tier] != ABSENT or above in core.gaps
            _require(closed, f"{run}: the durable tier {tier} lacks the page above it")
        if state == DRAINING:
            _require(not _stays_below(run, tier), f"{run}: drains from tier {tier} above pages that stay")
        if state == FILLING:
            jobs = [holder for holder in run.holders if isinstance(holder, CopyJob) and holder.dst == tier]
            _require(len(jobs) == 1, f"{run}: FILLING in tier {tier} under {len(jobs)} copies")
    if not run.live:
        needed = run.tree.child_runs(run) or run.anchors or run.holders or any(run.pins)
        _require(bool(needed), f"{run}: in no tier, held by nobody, and still in the tree")
        if run.tree.child_runs(run) and any(child.live for child in run.tree.child_runs(run)):
            _require(run in core.holes, f"{run}: a hole that is not known as one")


def _stays_below(run: Run, tier: int) -> bool:
    """Whether a page below stands in the tier and does not leave it."""
    todo = run.tree.child_runs(run)
    while todo:
        each = todo.pop()
        if each.state[tier] not in {ABSENT, DRAINING}:
            return True
        if each.below[tier]:
            todo.extend(each.tree.child_runs(each))
    return False


def _check_pins(core: Core, runs: list[Run]) -> None:
    pins: Counter[tuple[int, int]] = Counter()
    anchors: Counter[int] = Counter()
    for lease in core.leases.values():
        pins.update((run.id, lease.tier) for run in lease.runs)
    for job in core.copies.values():
        pins.update((run.id, job.src) for run in job.runs)
    for reservation in core.reservations.values():
        anchors.update(run.id for run in reservation.runs[-1:])
    for operation in core.operations.values():
        anchors.update(run.id for run in operation.runs[-1:])
    for run in runs:
        for tier in core.tier_range:
            _require(
                run.pins[tier] == pins[run.id, tier],
                f"{run}: pins of tier {tier} are not its leases and copies",
            )
        _require(run.anchors == anchors[run.id], f"{run}: {run.anchors} anchors, {anchors[run.id]} holders")
    for job in core.copies.values():
        for run in job.runs:
            _require(run.state[job.src] in {RESIDENT, DRAINING}, f"{run}: copied from a tier where it is not")


def _check_leases(core: Core) -> None:
    for lease in core.leases.values():
        name = f"lease {lease.id} in tier {lease.tier}"
        keyed = core.tiers[lease.tier].keyed
        mine = not keyed or lease.tier == core.lease_tier or not lease.session
        _require(mine, f"{name}: it is a session's, and has no slots")
        path: Run | None = None
        for run in lease.runs:
            _require(namespace_of(run) is lease.namespace, f"{name}: {run} is of another namespace")
            _require(run.tree.parent_run(run) is path, f"{name}: {run} does not follow the run before it")
            path = run
        operation = core.operations.get(lease.operation)
        if operation is not None:
            _require(
                operation.tier == lease.tier, f"{name}: it waits for promotions to tier {operation.tier}"
            )
            _require(operation.lease == lease.id, f"{name}: its operation is lease {operation.lease}'s")
    for ident, tier in core.condemned:
        pinned = ident in core.runs and core.runs[ident].pins[tier]
        _require(bool(pinned), f"run {ident} is condemned in tier {tier}, and no pin keeps it there")
    for run in core.warmed:
        _require(run.state[core.lease_tier] == RESIDENT, f"{run}: prefetched, and not in the usual tier")


def _check_ledger(core: Core, runs: list[Run]) -> None:
    held: dict[int, list[int]] = {id(pool): [] for pool in core.pools.values()}
    draining: Counter[int] = Counter()
    for run in runs:
        for tier, places in enumerate(run.slots):
            pool = namespace_of(run).pools[tier]
            held[id(pool)].extend(places or ())
            if run.state[tier] == DRAINING:
                draining[id(pool)] += core.run_units(run, tier)
    for reservation in core.reservations.values():
        held[id(reservation.namespace.pools[0])].extend(reservation.places)
    for _, chain in core.stranded:
        held[id(chain.namespace.pools[core.durable_tier])].extend(chain.charges)
    for pool in core.pools.values():
        mine = held[id(pool)]
        _require(
            pool.draining == draining[id(pool)], f"pool {pool.tier}/{pool.domain}: draining units differ"
        )
        if pool.spec.keyed:
            _require(pool.used == sum(mine), f"tier '{pool.spec.name}': charges and ledger differ")
        else:
            _check_slots(pool, mine)
    for tier, segments in enumerate(core.segments):
        given = sum(len(pool.segments) for pool in core.pools.values() if pool.tier == tier)
        closing = len(core.closing_segments[tier])
        _require(
            given + len(segments.spare) + closing == segments.total, f"segments of tier {tier} do not add up"
        )


def _check_slots(pool: Pool, held: list[int]) -> None:
    name = f"pool {pool.tier}/{pool.domain}"
    _require(len(set(held)) == len(held), f"{name}: a slot has two owners")
    _require(not set(held) & set(pool.free), f"{name}: a slot is both free and held")
    _require(pool.used == len(held), f"{name}: used slots differ from those held")
    total = len(pool.segments) * pool.slots_per_segment
    _require(len(held) + len(pool.free) + pool.leaving_slots == total, f"{name}: slots were lost")
    segments = {slot // SLOTS_PER_SEGMENT for slot in (*held, *pool.free)}
    _require(segments <= pool.segments, f"{name}: a slot of another pool's segment")


def _check_counts(core: Core, runs: list[Run]) -> None:
    held = sum(lease.matched_pages for lease in core.leases.values())
    held += sum(reservation.end for reservation in core.reservations.values())
    _require(core.held_pages == held, "the count of held pages differs")
    for tier in core.tier_range:
        for state in (FILLING, RESIDENT, DRAINING):
            pages = sum(run.pages for run in runs if run.state[tier] == state)
            _require(
                core.counters.pages[tier][state] == pages, f"tier {tier}: the count of state {state} differs"
            )


def _check_stranded(core: Core, runs: list[Run]) -> None:
    chains = list(core.stranded)
    _require(
        core.stranded.pages == sum(chain.pages for _, chain in chains), "the count of stranded pages differs"
    )
    units = sum(sum(chain.charges) for _, chain in chains)
    _require(core.stranded.units == units, "the units of stranded pages differ")
    numbers = {chain.namespace.id for _, chain in chains}
    _require(
        all(core.stranded.has(number) for number in numbers), "a namespace with stranded pages is not known"
    )
    for waits_for, chain in chains:
        width = chain.namespace.tree.symbol_bytes
        _require(len(chain.symbols) == chain.pages * width, "a stranded chain: one symbol a page")
        keys = chain_keys(waits_for, chain.symbols, width)
        _require(keys == chain.key_list(), "a stranded chain: its keys do not follow from its parent's")
    waited_for = {key for key, chain in chains if chain.namespace.id not in core.recovering}
    for run in runs if waited_for else ():
        if run.live:
            namespace = namespace_of(run)
            keys = chain_keys(
                namespace.fingerprint, namespace.tree.prompt_to(run), namespace.tree.symbol_bytes
            )
            _require(
                waited_for.isdisjoint(keys[-run.pages :]),
                f"{run}: pages are stranded below it, and it is here",
            )
    _require(not core.returned, "runs have returned, and nobody has looked what is stranded below them")


def _check_recovery(core: Core) -> None:
    ends = {
        run.id: number
        for namespace in core.namespaces.values()
        for number, run in enumerate(namespace.recovered)
        if run is not None
    }
    _require(core.chain_ends == ends, "the ends of recovered chains are not where they are looked for")
    _require(core.runs.keys() >= ends.keys(), "a recovered chain ends in a run that is gone")
