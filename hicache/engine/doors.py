"""What is looked at before an event is let in: it must name things that there are.

An event about a namespace, a session or a tier that is not known changes nothing. Where it wants an answer it is
refused; else it is dropped: what it names may have gone while it was on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hicache.engine import events as ev
from hicache.engine.actions import Free
from hicache.engine.core import Core
from hicache.errors import ErrorCode


def _namespace(core: Core, event: ev.Fetch | ev.Reserve | ev.Prefetch | ev.Pin | ev.Evict | ev.Clear) -> bool:
    if event.namespace in core.namespaces:
        return True
    core.fail(
        event.request,
        ErrorCode.NOT_FOUND,
        f"namespace {event.namespace} is not open",
        "open it first: its number holds for one run of the server",
    )
    return False


def _call(core: Core, event: ev.Fetch | ev.Reserve | ev.Prefetch) -> bool:
    if event.session not in core.sessions:
        core.fail(
            event.request,
            ErrorCode.NOT_FOUND,
            f"session {event.session} has ended or never was",
            "attach again",
        )
        return False
    return event.namespace in core.namespaces or _namespace(core, event)


def _fetch(core: Core, event: ev.Fetch) -> bool:
    if event.tier < 0 and event.session in core.sessions and event.namespace in core.namespaces:
        return True  # hot
    return _call(core, event) and (event.tier < 0 or _slotted(core, event))


def _slotted(core: Core, event: ev.Fetch) -> bool:
    """Whether a Fetch names a tier in whose slots a lease can hold pages."""
    if event.tier < len(core.tiers) and not core.tiers[event.tier].keyed:
        return True
    names = [f"{index} ({spec.name})" for index, spec in enumerate(core.tiers) if not spec.keyed]
    problem = f"there is no tier {event.tier}"
    if event.tier < len(core.tiers):
        problem = f"no lease can be in tier {event.tier} ({core.tiers[event.tier].name}), which has no slots"
    hint = f"name none, or one of {', '.join(names)}" if names else "name none"
    core.fail(event.request, ErrorCode.INVALID, problem, hint)
    return False


def _tier(core: Core, event: ev.Prefetch | ev.Pin | ev.Evict, lowest: int = 0) -> bool:
    if lowest <= event.tier < len(core.tiers):
        return True
    names = ", ".join(f"{index} ({spec.name})" for index, spec in enumerate(core.tiers))
    core.fail(event.request, ErrorCode.INVALID, f"there is no tier {event.tier}", f"one of {names}")
    return False


def _recovered(core: Core, event: ev.Recovered) -> bool:
    if not 0 <= event.tier < len(core.tiers):
        return False
    if event.namespace in core.namespaces:
        return True
    for keys in event.keys:  # nobody will ever ask for these
        core.emit(Free(event.tier, (), list(keys)))
    return False


#: Whether an event of a type may change the engine; if not, this has answered it. Types that are not here always may.
DOORS: dict[type, Callable[[Core, Any], bool]] = {
    ev.Touch: lambda core, event: event.namespace in core.namespaces,
    ev.Fetch: _fetch,
    ev.Reserve: _call,
    ev.Prefetch: lambda core, event: _call(core, event) and _tier(core, event),
    ev.Pin: lambda core, event: _namespace(core, event) and _tier(core, event),
    ev.Evict: lambda core, event: _namespace(core, event) and _tier(core, event, -1),
    ev.Clear: lambda core, event: not event.namespace or _namespace(core, event),
    ev.PageCorrupt: lambda core, event: (
        event.namespace in core.namespaces and bool(event.prompt) and 0 <= event.tier < len(core.tiers)
    ),
    ev.PagesLost: lambda core, event: 0 <= event.tier < len(core.tiers),
    ev.TierLatched: lambda core, event: 0 <= event.tier < len(core.tiers),
    ev.TierRestored: lambda core, event: 0 <= event.tier < len(core.tiers),
    ev.SegmentClosed: lambda core, event: 0 <= event.tier < len(core.tiers),
    ev.Recovering: lambda core, event: 0 <= event.tier < len(core.tiers),
    ev.Recovered: _recovered,
}
