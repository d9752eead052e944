"""Bringing pages down to the durable tier: durable commits, drains, and copies ahead of need."""

from __future__ import annotations

from hicache.engine import copies, room
from hicache.engine.actions import CommitResult, DrainResult
from hicache.engine.core import ABSENT, DRAINING, FILLING, RESIDENT, Core
from hicache.engine.events import Drain
from hicache.engine.holders import NamespaceState, Saver
from hicache.tree import Run

#: How many of a saver's runs are looked at each time: those in front are the oldest.
WINDOW = 64
#: Runs waiting for an early copy; beyond this they wait for their eviction instead.
MAX_BACKLOG = 4096


def path_of(core: Core, namespace: NamespaceState, prompt: bytes, first: int, last: int) -> list[Run]:
    """The runs that hold pages [first, last) of a prompt."""
    width = namespace.tree.symbol_bytes
    runs = core.cut(namespace, namespace.tree.match(prompt[: last * width]))
    page = 0
    found = []
    for run in runs:
        if page + run.pages > first:
            found.append(run if page >= first else core.split(run, first - page))
        page += run.pages
    return found


def save(core: Core, request: int, runs: list[Run], counts: tuple[int, int, int]) -> None:
    """Answer a commit when its pages are durable, or when it is clear that they will not be."""
    stored, present, failed = counts
    saver = Saver(request, [], 0, stored, present, failed)
    for run in runs:
        core.hold(saver, run)
    core.savers.append(saver)
    core.room_changed = True


def drain(core: Core, event: Drain) -> None:
    """Save every page that is in no durable tier, coldest work last: paths from the root down."""
    saver = Saver(event.request, [], core.now_ms + event.grace_ms, is_drain=True)
    core.savers.append(saver)
    core.at(saver.deadline_ms, "drain", 0)
    core.room_changed = True
    if core.durable_tier < 0:
        return
    for namespace in core.namespaces.values():
        for node in namespace.tree.walk():
            for run in node.runs:
                if run.live and run.state[core.durable_tier] != RESIDENT:
                    core.hold(saver, run)


def advance(core: Core, saver: Saver) -> None:
    """Let go of what is durable, start what can be started, answer when nothing more can come."""
    tier = core.durable_tier
    pending = False
    maker = room.room_maker(core)
    for run in list(saver.runs[:WINDOW]):
        if run.id not in core.runs:
            continue
        state = run.state[tier] if tier >= 0 else ABSENT
        if state in {RESIDENT, DRAINING}:
            saver_done(core, saver, run)
        elif state == FILLING:
            pending = True
        elif run.live and core.writable[tier]:
            pending = _start(core, run, tier, maker) or pending
    late = bool(saver.deadline_ms) and core.now_ms >= saver.deadline_ms
    if saver.runs and not late and (pending or core.copies):
        return
    _finish(core, saver)


def _start(core: Core, run: Run, tier: int, maker: copies.MakeRoom) -> bool:
    if DRAINING in run.state:
        core.rescue(run)
    return copies.copy_down(core, run, tier, maker)


def saver_done(core: Core, saver: Saver, run: Run) -> None:
    """One run is durable."""
    saver.durable_pages += run.pages
    core.let_go(saver, run)


def _finish(core: Core, saver: Saver) -> None:
    core.savers.remove(saver)
    unsaved = sum(run.pages for run in saver.runs)
    for run in list(saver.runs):
        core.let_go(saver, run)
    if saver.is_drain:
        core.reply(saver.request, DrainResult(unsaved if core.durable_tier >= 0 else _unsaved(core)))
        return
    core.reply(
        saver.request,
        CommitResult(
            saver.stored_pages, saver.already_present_pages, saver.durable_pages, saver.failed_pages
        ),
    )


def _unsaved(core: Core) -> int:
    return sum(run.pages for run in core.runs.values() if run.live)


def work_backlog(core: Core) -> None:
    """Start early copies of runs that were written through or have become hot."""
    while len(core.backlog) > MAX_BACKLOG:
        core.backlog.popleft()
    maker = room.room_maker(core)
    for _ in range(len(core.backlog)):
        if len(core.copies) >= core.options.max_copies // 2 or not core.backlog:
            return
        run = core.runs.get(core.backlog.popleft())
        if run is None or not run.live:
            continue
        lower = room.lower_tier(core, core.best_tier(run))
        while lower >= 0 and run.state[lower] != ABSENT:
            lower = room.lower_tier(core, lower)
        if lower >= 0:
            copies.copy_down(core, run, lower, maker)
