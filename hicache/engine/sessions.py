"""Sessions and namespaces: who may hold what, and what goes when they go."""

from __future__ import annotations

from hicache.engine import commits, leases
from hicache.engine.core import Core
from hicache.engine.events import (
    NamespaceOpened,
    SessionEnded,
    SessionOpened,
    SessionResumed,
    SessionSuspended,
)
from hicache.engine.holders import LeaseStage, NamespaceState
from hicache.errors import ErrorCode
from hicache.tree import Tree


def open_session(core: Core, event: SessionOpened) -> None:
    """A client attached."""
    core.sessions[event.session] = event.tenant


def suspend(core: Core, event: SessionSuspended) -> None:
    """Its life line broke: it has the window to come back."""
    if event.session in core.sessions:
        core.suspended[event.session] = core.now_ms + event.window_ms
        core.at(core.suspended[event.session], "session", event.session)


def resume(core: Core, event: SessionResumed) -> None:
    """It came back in time."""
    core.suspended.pop(event.session, None)


def ended(core: Core, event: SessionEnded) -> None:
    """Goodbye, or a death that was seen."""
    end_session(core, event.session, dead=event.dead)


def end_session(core: Core, session: int, *, dead: bool) -> None:
    """Release everything a session holds. Leases of a process that may still be reading rest for the grace."""
    if core.sessions.pop(session, None) is None:
        return
    core.suspended.pop(session, None)
    core.counters.lost_sessions += int(dead)
    for lease in [each for each in core.leases.values() if each.session == session]:
        if dead:
            leases.end(core, lease)
        elif lease.stage is LeaseStage.LIVE:
            leases.expire(core, lease)
    for reservation in [each for each in core.reservations.values() if each.session == session]:
        if not reservation.closing:
            commits.end(core, reservation)
    for operation in [each for each in core.operations.values() if each.session == session and not each.done]:
        leases.drop_operation(core, operation)
    for pool in core.pools.values():
        for waiter in [each for each in pool.waiters if each.session == session]:
            pool.waiters.remove(waiter)
            core.fail(waiter.request, ErrorCode.UNAVAILABLE, "the session ended while it waited for room")


def open_namespace(core: Core, event: NamespaceOpened) -> None:
    """Make a namespace's tree and find its pools. Idempotent."""
    if event.namespace in core.namespaces:
        return
    spec = event.spec
    pools = [core.pool_for(tier, spec.tenant, spec.page_bytes) for tier in core.tier_range]
    tree = Tree(spec.symbol_bytes, len(core.tiers), core.run_ids)
    namespace = NamespaceState(event.namespace, spec, event.fingerprint, tree, pools)
    if all(getattr(pool.policy, "only_last_use", False) and pool.admission is None for pool in pools):
        namespace.many_hits = max(core.options.selective_hits, 1) if len(pools) > 1 else 1
    core.namespaces[event.namespace] = namespace
