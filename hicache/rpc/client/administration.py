"""The operators' calls, as steps."""

from __future__ import annotations

from hicache.rpc.client import admin_calls, calls
from hicache.rpc.client.core import Budget, Core, NamespaceState, named, simple, tier_index
from hicache.rpc.client.results import Advice, CheckResult, EvictResult, PinResult, Stats, Tree
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import Steps
from hicache.rpc.pb import admin_pb2


def pin(
    core: Core, namespace: NamespaceState, prompt: bytes, tier: int | str, ttl_ms: int
) -> Steps[PinResult]:
    """Keep a prefix in a tier."""

    def build(who: calls.Who, link: Link) -> admin_pb2.PinRequest:
        return admin_calls.pin(who, prompt, tier_index(link, tier), ttl_ms)

    reply = yield from named(core, "Pin", namespace, build, core.budget(None))
    return admin_calls.parse_pin(reply.message)


def unpin(core: Core, pin_id: int) -> Steps[None]:
    """Let it go."""
    yield from simple(
        core,
        "Unpin",
        lambda link: admin_pb2.UnpinRequest(session_id=link.session_id, pin_id=pin_id),
        core.budget(None),
    )


def evict(core: Core, namespace: NamespaceState, prompt: bytes, tier: int | str | None) -> Steps[EvictResult]:
    """Move pages out of a tier; None: out of all."""

    def build(who: calls.Who, link: Link) -> admin_pb2.EvictRequest:
        index = 0 if tier is None else tier_index(link, tier)
        return admin_calls.evict(who, prompt, index, everywhere=tier is None)

    reply = yield from named(core, "Evict", namespace, build, core.budget(None))
    return admin_calls.parse_evict(reply.message)


def clear(core: Core, namespace: NamespaceState | None) -> Steps[EvictResult]:
    """Drop what is cached in a namespace; None: in all."""
    budget = core.budget(None)
    if namespace is not None:
        reply = yield from named(
            core, "Clear", namespace, lambda who, _: admin_calls.clear(who, all_namespaces=False), budget
        )
    else:
        request_id = core.new_id()
        reply = yield from simple(
            core,
            "Clear",
            lambda link: admin_calls.clear(calls.Who(link.session_id, 0, request_id), all_namespaces=True),
            budget,
        )
    return admin_calls.parse_evict(reply.message)


def stats(core: Core) -> Steps[Stats]:
    """The sidecar's figures."""
    reply = yield from simple(
        core,
        "GetStats",
        lambda link: admin_pb2.GetStatsRequest(session_id=link.session_id),
        core.budget(None),
    )
    return admin_calls.parse_stats(reply.message)


def tree(core: Core, namespace: NamespaceState | None, max_nodes: int) -> Steps[Tree]:
    """The cache's tree, of one namespace or of all."""
    budget = core.budget(None)

    def request(link: Link, number: int) -> admin_pb2.GetTreeRequest:
        return admin_pb2.GetTreeRequest(session_id=link.session_id, max_nodes=max_nodes, namespace_id=number)

    if namespace is None:
        reply = yield from simple(core, "GetTree", lambda link: request(link, 0), budget)
    else:
        reply = yield from named(
            core, "GetTree", namespace, lambda who, link: request(link, who.namespace_id), budget
        )
    return admin_calls.parse_tree(reply.message)


def check(core: Core) -> Steps[CheckResult]:
    """The engine's own invariant check."""
    reply = yield from simple(
        core, "Check", lambda link: admin_pb2.CheckRequest(session_id=link.session_id), core.budget(None)
    )
    return admin_calls.parse_check(reply.message)


def advice(core: Core) -> Steps[Advice]:
    """What other sizes and policies would have done."""
    reply = yield from simple(
        core,
        "GetAdvice",
        lambda link: admin_pb2.GetAdviceRequest(session_id=link.session_id),
        core.budget(None),
    )
    return admin_calls.parse_advice(reply.message)


def drain(core: Core, grace_ms: int) -> Steps[None]:
    """Stop the sidecar gracefully."""
    default = core.budget(None)
    budget = Budget(default.timeout_s, wait_ms=grace_ms, retry=False)
    yield from simple(
        core,
        "Drain",
        lambda link: admin_pb2.DrainRequest(session_id=link.session_id, grace_ms=grace_ms),
        budget,
    )
