"""Requests built and responses parsed for AdminService."""

from __future__ import annotations

from collections.abc import Mapping

from hicache.rpc.client.calls import Who
from hicache.rpc.client.results import (
    Advice,
    CheckResult,
    CopyChoice,
    DeviceStats,
    EvictResult,
    LatencyStats,
    PinResult,
    PolicyAdvice,
    SizeAdvice,
    Stats,
    TierStats,
    Tree,
    TreeNode,
)
from hicache.rpc.pb import admin_pb2


def pin(who: Who, prompt: bytes, tier: int, ttl_ms: int) -> admin_pb2.PinRequest:
    """Keep a prefix in a tier."""
    return admin_pb2.PinRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        namespace_id=who.namespace_id,
        prompt=prompt,
        tier=tier,
        ttl_ms=ttl_ms,
    )


def evict(who: Who, prompt: bytes, tier: int, *, everywhere: bool) -> admin_pb2.EvictRequest:
    """Move a prefix and what continues it out of a tier, or of all."""
    return admin_pb2.EvictRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        namespace_id=who.namespace_id,
        prompt=prompt,
        tier=tier,
        everywhere=everywhere,
    )


def clear(who: Who, *, all_namespaces: bool) -> admin_pb2.ClearRequest:
    """Drop what is neither leased nor pinned."""
    return admin_pb2.ClearRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        namespace_id=who.namespace_id,
        all_namespaces=all_namespaces,
    )


def parse_pin(message: admin_pb2.PinResponse) -> PinResult:
    """The answer to Pin."""
    return PinResult(message.pin_id, message.pages)


def parse_evict(message: admin_pb2.EvictResponse | admin_pb2.ClearResponse) -> EvictResult:
    """The answer to Evict and Clear."""
    return EvictResult(message.pages, message.kept_pages)


def parse_check(message: admin_pb2.CheckResponse) -> CheckResult:
    """The answer to Check."""
    return CheckResult(message.ok, message.problem, message.action_digest)


def parse_advice(message: admin_pb2.GetAdviceResponse) -> Advice:
    """The answer to GetAdvice."""
    return Advice(
        message.uses,
        message.rate,
        message.span_ms,
        message.unbounded,
        tuple(
            SizeAdvice(each.tier, each.factor, each.capacity_bytes, each.hit_ratio) for each in message.sizes
        ),
        tuple(PolicyAdvice(each.name, each.hit_ratio, each.current) for each in message.policies),
    )


def parse_stats(message: admin_pb2.GetStatsResponse) -> Stats:
    """The answer to GetStats."""
    counters: Mapping[str, int] = dict(sorted(message.counters.items()))
    return Stats(
        server_version=message.server_version,
        state=message.state,
        uptime_ms=message.uptime_ms,
        tiers=tuple(_tier(tier) for tier in message.tiers),
        counters=counters,
        latencies=tuple(
            LatencyStats(row.call, row.count, row.p50_ms, row.p99_ms) for row in message.latencies
        ),
        sessions=message.sessions,
        leases=message.leases,
        reservations=message.reservations,
        waiting=message.waiting,
        copies_in_flight=message.copies_in_flight,
        namespaces=message.namespaces,
        tree_nodes=message.tree_nodes,
        tree_runs=message.tree_runs,
        tree_pages=message.tree_pages,
        devices=tuple(_device(device) for device in message.devices),
    )


def _device(device: admin_pb2.DeviceStats) -> DeviceStats:
    return DeviceStats(
        name=device.name,
        tier=device.tier,
        copy_engine=device.copy_engine,
        choices=tuple(
            CopyChoice(row.direction, row.page_bytes, row.rows, row.engine, dict(row.gb_per_s))
            for row in device.choices
        ),
        direct_bytes=device.direct_bytes,
        bounced_bytes=device.bounced_bytes,
        registered_bytes=device.registered_bytes,
        faults=device.faults,
        problem=device.problem,
    )


def _tier(tier: admin_pb2.TierStats) -> TierStats:
    return TierStats(
        name=tier.name,
        kind=tier.kind,
        state=tier.state,
        capacity_bytes=tier.capacity_bytes,
        used_bytes=tier.used_bytes,
        pages=tier.pages,
        hit_pages=tier.hit_pages,
        bytes_in=tier.bytes_in,
        bytes_out=tier.bytes_out,
        evicted_pages=tier.evicted_pages,
        dropped_pages=tier.dropped_pages,
        corrupt_pages=tier.corrupt_pages,
        hit_bytes=tier.hit_bytes,
        written_bytes=tier.written_bytes,
        admitted_pages=tier.admitted_pages,
        refused_pages=tier.refused_pages,
        written_per_hit=tier.written_bytes / tier.hit_bytes if tier.hit_bytes else 0.0,
        reason=tier.reason,
        degraded_ms=tier.degraded_ms,
    )


def parse_tree(message: admin_pb2.GetTreeResponse) -> Tree:
    """The answer to GetTree."""
    return Tree(tuple(_node(node) for node in message.nodes), message.omitted_nodes)


def _node(node: admin_pb2.TreeNode) -> TreeNode:
    return TreeNode(
        id=node.id,
        parent=node.parent,
        namespace=node.namespace,
        depth_pages=node.depth_pages,
        pages=node.pages,
        first_symbol_digest=node.first_symbol_digest,
        tier_pages=tuple(node.tier_pages),
        pinned_pages=node.pinned_pages,
        hits=node.hits,
        idle_ms=node.idle_ms,
        children=node.children,
    )
