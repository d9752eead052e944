"""Bringing pages down to the durable tier: durable commits, drains, and copies ahead of need.

A page is durable when it and every page above it are in the durable tier: only then is it matched after a crash.
"""

from __future__ import annotations

from hicache.engine import copies, gate, room
from hicache.engine.actions import CommitResult, DrainResult
from hicache.engine.core import ABSENT, DRAINING, FILLING, Core
from hicache.engine.events import Drain
from hicache.engine.holders import NamespaceState, Saver
from hicache.tree import Run

#: How many of a saver's runs are looked at each time: those in front are the oldest. Also for the backlog.
WINDOW = 64
#: Runs waiting for an early copy; beyond this they wait for their eviction instead.
MAX_BACKLOG = 4096
#: How often pages that the tier has lost are copied there again for one saver's sake.
MAX_MENDED = 8


def path_of(core: Core, namespace: NamespaceState, prompt: bytes, first: int, last: int) -> list[Run]:
    """The runs that hold pages [first, last) of a prompt."""
    width = namespace.tree.symbol_bytes
    runs = core.cut(namespace, namespace.tree.match(prompt[: last * width]))
    page = 0
    found = []
    for run in runs:
        end = page + run.pages
        if end > first:
            found.append(run if page >= first else core.split(run, first - page))
        page = end
    return found


def save(core: Core, request: int, runs: list[Run], counts: tuple[int, int, int]) -> None:
    """Answer a commit when its pages are durable, or when it is clear that they will not be."""
    saver = Saver(next(core.ids), request, core.now_ms + core.options.default_ttl_ms)
    saver.stored_pages, saver.already_present_pages, saver.failed_pages = counts
    for run in runs:
        core.hold(saver, run)
    _begin(core, saver)


def drain(core: Core, event: Drain) -> None:
    """Save every page that is in no durable tier, paths from the root down. O(runs)."""
    saver = Saver(next(core.ids), event.request, core.now_ms + event.grace_ms, is_drain=True)
    if core.durable_tier >= 0:
        for namespace in core.namespaces.values():
            for node in namespace.tree.walk():
                for run in node.runs:
                    if run.live and run.state[core.durable_tier] in {ABSENT, FILLING}:
                        core.hold(saver, run)
    else:
        saver.unsaved_pages = sum(run.pages for run in core.runs.values() if run.live)
    _begin(core, saver)


def _begin(core: Core, saver: Saver) -> None:
    core.savers[saver.id] = saver
    core.at(saver.deadline_ms, "saver", saver.id)
    core.room_changed = True


def advance(core: Core, saver: Saver) -> None:
    """Let go of what is durable, start what can be started, answer when nothing more can come."""
    late = core.now_ms >= saver.deadline_ms
    while saver.runs:
        front = saver.runs[:WINDOW]
        pending = [run for run in front if _is_pending(core, saver, run)]
        left = [run for run in front if saver in run.holders]
        if left and late:
            break
        if left and (pending or core.copies):
            return
        for run in left:  # nothing is under way that could help these; the next ones may have more luck
            _give_up(core, saver, run)
    _finish(core, saver)


def _is_pending(core: Core, saver: Saver, run: Run) -> bool:
    """Let a run go if it is durable or cannot become so, else see to its copy. True while that is under way."""
    tier = core.durable_tier
    state = run.state[tier]
    if state == FILLING:
        return True
    if not run.live or (run.id, tier) in core.condemned or (state == ABSENT and not core.writable[tier]):
        _give_up(core, saver, run)
        return False
    if state == ABSENT:
        return _start(core, run, tier)
    above = _not_durable_above(run, tier)
    if above is None:
        saver.durable_pages += run.pages
        core.let_go(saver, run)
        if not saver.is_drain:
            saver.deadline_ms = core.now_ms + core.options.default_ttl_ms
        return False
    if above.state[tier] == FILLING:
        return True
    if saver.mended >= MAX_MENDED or not above.live:
        _give_up(core, saver, run)
        return False
    saver.mended += 1
    return _start(core, above, tier)


def _not_durable_above(run: Run, tier: int) -> Run | None:
    """The topmost run above that the tier does not have (yet)."""
    found = None
    above = run.tree.parent_run(run)
    while above is not None:
        if above.state[tier] in {ABSENT, FILLING}:
            found = above
        above = above.tree.parent_run(above)
    return found


def _start(core: Core, run: Run, tier: int) -> bool:
    if DRAINING in run.state:
        core.rescue(run)
    return copies.copy_down(core, run, tier, room.make_room_below)


def _give_up(core: Core, saver: Saver, run: Run) -> None:
    saver.unsaved_pages += run.pages
    core.let_go(saver, run)


def _finish(core: Core, saver: Saver) -> None:
    del core.savers[saver.id]
    for run in list(saver.runs):
        _give_up(core, saver, run)
    if saver.is_drain:
        core.reply(saver.request, DrainResult(saver.unsaved_pages))
        return
    core.reply(
        saver.request,
        CommitResult(
            saver.stored_pages, saver.already_present_pages, saver.durable_pages, saver.failed_pages
        ),
    )


def work_backlog(core: Core) -> None:
    """Start early copies of runs that were written through, have become hot, or mend a gap."""
    while len(core.backlog) > MAX_BACKLOG:
        core.backlog.popitem(last=False)
    for _ in range(min(len(core.backlog), WINDOW)):
        if len(core.copies) >= max(core.options.max_copies // 2, 1):
            return
        ident, tier = core.backlog.popitem(last=False)
        run = core.runs.get(ident)
        lower = _next_tier_for(core, run, tier) if run is not None and run.live else -1
        if run is None or lower < 0 or not gate.admits(core, run, lower):
            continue
        if not copies.copy_down(core, run, lower, room.make_room_below) and _follows(core, run, lower):
            core.backlog[ident] = tier


def _next_tier_for(core: Core, run: Run, tier: int) -> int:
    """The first tier below this one that takes the run's pages and lacks them; -1 if there is none."""
    lower = core.pool(run, tier).lower_tiers if tier >= 0 else core.tier_range
    return next((index for index in lower if core.writable[index] and run.state[index] == ABSENT), -1)


def _follows(core: Core, run: Run, tier: int) -> bool:
    """Whether pages above are on their way to the tier, so that the run can follow them."""
    above = run.tree.parent_run(run)
    while above is not None and above.state[tier] == ABSENT:
        above = above.tree.parent_run(above)
    return run.state[tier] == ABSENT and above is not None and above.state[tier] == FILLING
