"""Pins: leases of the operator's."""

from __future__ import annotations

from hicache.engine import leases
from hicache.engine.actions import PinResult
from hicache.engine.core import RESIDENT, Core
from hicache.engine.events import Pin, Unpin
from hicache.engine.holders import Lease


def pin(core: Core, event: Pin) -> None:
    """A lease of the operator's, in any tier, without an end unless one is given."""
    namespace = core.namespaces[event.namespace]
    match = namespace.tree.match(event.prompt)
    runs = core.cut(namespace, match)
    if not runs:
        core.reply(event.request, PinResult(0, 0))
        return
    core.touch(runs)
    lease = Lease(next(core.ids), leases.OPERATOR, namespace, event.tier, match.pages, [], 0)
    leases.begin(core, lease, runs, event.ttl_ms)
    if any(run.state[event.tier] != RESIDENT for run in runs):
        lease.operation = leases.promote(core, lease, leases.OPERATOR)
    pages = sum(run.pages for run in lease.runs)
    if not pages:
        leases.end(core, lease)
    core.reply(event.request, PinResult(lease.id if pages else 0, pages))


def unpin(core: Core, event: Unpin) -> None:
    """Unknown pins are fine."""
    lease = core.leases.get(event.pin)
    if lease is not None and lease.session == leases.OPERATOR:
        leases.end(core, lease)
