"""What happens by itself when time passes."""

from __future__ import annotations

import heapq

from hicache.engine import commits, leases, reservations
from hicache.engine.core import Core
from hicache.engine.holders import LeaseStage
from hicache.engine.sessions import end_session


def next_deadline_ms(core: Core) -> int | None:
    """When the shell should hand in a Tick at the latest."""
    return core.timers[0][0] if core.timers else None


def fire(core: Core) -> None:
    """Look at everything whose time has come. Timers that no longer mean anything are dropped here."""
    while core.timers and core.timers[0][0] <= core.now_ms:
        _, _, kind, ident = heapq.heappop(core.timers)
        _HANDLERS[kind](core, ident)


def _lease(core: Core, ident: int) -> None:
    lease = core.leases.get(ident)
    if lease is None or lease.stage is not LeaseStage.LIVE or not lease.expires_ms:
        return
    if lease.expires_ms <= core.now_ms:
        leases.expire(core, lease)
    else:
        core.at(lease.expires_ms, "lease", ident)  # it was renewed


def _rest(core: Core, ident: int) -> None:
    lease = core.leases.get(ident)
    if lease is not None and lease.stage is LeaseStage.RESTING:
        leases.end(core, lease)


def _reservation(core: Core, ident: int) -> None:
    reservation = core.reservations.get(ident)
    if reservation is not None and not reservation.closing and reservation.expires_ms <= core.now_ms:
        core.counters.expired_reservations += 1
        commits.end(core, reservation)


def _session(core: Core, ident: int) -> None:
    if core.suspended.get(ident, core.now_ms + 1) <= core.now_ms:
        end_session(core, ident, dead=False)


def _waiter(core: Core, _ident: int) -> None:
    """Everybody whose wait for room is over gets a last try, in line."""
    for pool in list(core.pools.values()):
        for waiter in list(pool.waiters):
            if waiter.deadline_ms <= core.now_ms:
                pool.waiters.remove(waiter)
                if not reservations.try_grant(core, waiter, last_try=True):
                    reservations.refuse(core, waiter)


def _saver(core: Core, ident: int) -> None:
    saver = core.savers.get(ident)
    if saver is not None and saver.deadline_ms > core.now_ms:
        core.at(saver.deadline_ms, "saver", ident)  # it has made progress
    else:
        core.room_changed = True  # the pump looks at savers, and at their deadlines


def _operation(core: Core, ident: int) -> None:
    """It has waited for room for long enough: it ends with what it has started."""
    operation = core.operations.get(ident)
    if operation is not None and operation.runs:
        leases.drop_operation(core, operation)


_HANDLERS = {
    "lease": _lease,
    "rest": _rest,
    "reservation": _reservation,
    "session": _session,
    "waiter": _waiter,
    "saver": _saver,
    "operation": _operation,
}
