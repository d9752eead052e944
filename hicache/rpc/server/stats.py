"""GetStats: the service's counts as a message."""

from __future__ import annotations

import dataclasses

from hicache.rpc.pb import admin_pb2
from hicache.runtime.device_stats import DeviceStats
from hicache.runtime.stats import ServiceStats, TierStats
from hicache.version import __version__


def stats_response(stats: ServiceStats) -> admin_pb2.GetStatsResponse:
    """What the service counts."""
    engine = stats.engine
    return admin_pb2.GetStatsResponse(
        server_version=__version__,
        uptime_ms=stats.uptime_ms,
        state=stats.state,
        tiers=[_tier(tier) for tier in stats.tiers],
        counters=stats.counters,
        sessions=engine.sessions,
        leases=engine.leases,
        reservations=engine.reservations,
        waiting=engine.waiting,
        copies_in_flight=engine.copies,
        namespaces=engine.namespaces,
        tree_nodes=engine.nodes,
        tree_runs=engine.runs,
        tree_pages=engine.pages,
        latencies=[admin_pb2.LatencyStats(**dataclasses.asdict(each)) for each in stats.latencies],
        devices=[_device(device) for device in stats.devices],
    )


def _tier(tier: TierStats) -> admin_pb2.TierStats:
    return admin_pb2.TierStats(
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
        reason=tier.reason,
        degraded_ms=tier.degraded_ms,
    )


def _device(device: DeviceStats) -> admin_pb2.DeviceStats:
    return admin_pb2.DeviceStats(
        name=device.name,
        tier=device.tier,
        copy_engine=device.copy_engine,
        choices=[
            admin_pb2.CopyChoice(
                direction=choice.direction,
                page_bytes=choice.page_bytes,
                rows=choice.rows,
                engine=choice.engine,
                gb_per_s=choice.gb_per_s,
            )
            for choice in device.choices
        ],
        direct_bytes=device.direct_bytes,
        bounced_bytes=device.bounced_bytes,
        registered_bytes=device.registered_bytes,
        faults=device.faults,
        problem=device.problem,
    )
