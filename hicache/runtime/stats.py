"""A snapshot of everything that is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hicache.engine import EngineStats
from hicache.runtime.counters import CallLatency
from hicache.runtime.device_stats import DeviceStats, device_stats
from hicache.runtime.loading import LoadCounts
from hicache.runtime.ports import TierPort

if TYPE_CHECKING:
    from hicache.runtime.house import House


@dataclasses.dataclass(frozen=True, slots=True)
class TierStats:
    """One tier. ``state``: ok, read-only, off. Bytes in and out are those that moved, raw.

    ``written_bytes`` over ``hit_bytes`` is what a hit costs in writes.
    """

    name: str
    kind: str
    state: str
    capacity_bytes: int
    used_bytes: int
    pages: int
    hit_pages: int
    bytes_in: int
    bytes_out: int
    evicted_pages: int
    dropped_pages: int
    corrupt_pages: int
    hit_bytes: int
    written_bytes: int
    admitted_pages: int
    refused_pages: int
    queued_batches: int
    oldest_batch_ms: int = 0
    degraded_ms: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceStats:
    """``counters``: totals and gauges that are single numbers, by the names they have in the metrics.

    ``totals``: which of them only ever grow.
    """

    state: str
    uptime_ms: int
    engine: EngineStats
    tiers: tuple[TierStats, ...]
    counters: Mapping[str, int]
    totals: frozenset[str]
    latencies: tuple[CallLatency, ...]
    devices: tuple[DeviceStats, ...] = ()


def tier_stats(engine: EngineStats, ports: Sequence[TierPort]) -> tuple[TierStats, ...]:
    """The engine's view of each tier, with what its port has seen."""
    counts = engine.counters
    return tuple(
        TierStats(
            name=view.name,
            kind=view.kind,
            state=port.health.state,
            capacity_bytes=view.capacity_bytes,
            used_bytes=view.used_bytes,
            pages=view.pages,
            hit_pages=counts.hit_pages[port.index],
            bytes_in=port.bytes_in,
            bytes_out=port.bytes_out,
            evicted_pages=counts.evicted_pages[port.index],
            dropped_pages=counts.dropped_pages[port.index],
            corrupt_pages=counts.corrupt_pages[port.index],
            hit_bytes=counts.hit_bytes[port.index],
            written_bytes=counts.written_bytes(port.index),
            admitted_pages=counts.admitted_pages[port.index],
            refused_pages=counts.refused_pages[port.index],
            queued_batches=port.in_flight,
            oldest_batch_ms=port.oldest_batch_ms,
            degraded_ms=port.degraded_ms,
            reason=port.health.reason,
        )
        for view, port in zip(engine.tiers, ports, strict=True)
    )


def service_stats(
    house: House, state: str, uptime_ms: int, latencies: Sequence[CallLatency], *, copy_engine: str
) -> ServiceStats:
    """A snapshot of a running service."""
    engine = house.engine.stats()
    report = house.recoverer.report if house.recoverer is not None else None
    disk = house.stores.disk
    totals = {
        field.name: getattr(engine.counters, field.name) for field in dataclasses.fields(engine.counters)
    }
    totals = {name: value for name, value in totals.items() if type(value) is int and name != "tiers"}
    totals["orphan_pages"] = report.orphan_pages if report is not None else 0
    totals["differing_pages"] = house.performer.differing_pages
    totals["recorded_entries"] = house.recorder.recorded if house.recorder is not None else 0
    totals["unrecorded_entries"] = house.recorder.dropped if house.recorder is not None else 0
    scrub = disk.scrub_stats if disk is not None else None
    totals["scrubbed_pages"] = scrub.pages if scrub is not None else 0
    totals["scrub_corrupt_pages"] = scrub.corrupt_pages if scrub is not None else 0
    totals["scrub_passes"] = scrub.passes if scrub is not None else 0
    totals["quarantined_pages"] = disk.stats.quarantined_pages if disk is not None else 0
    for counts in (house.loads.counts if house.loads is not None else LoadCounts(), house.packs.counts):
        totals.update(dataclasses.asdict(counts))
    if disk is not None:
        for kind, count in dict(disk.stats.corrupt).items():
            totals[f"bad_records_{kind.replace('-', '_')}"] = count
    gauges = {
        "stranded_pages": engine.stranded_pages,
        "copies_in_flight": house.copier.in_flight,
        "scrub_last_pass_ms": scrub.last_pass_ms if scrub is not None else 0,
        "copy_chunks_queued": house.copier.queued,
        "calls_waiting": house.loop.open_requests,
        "regions_retiring": house.regions.retiring,
        "kv_regions": house.kv_regions.regions,
        "timelines": house.kv_regions.timelines,
        "transfers_in_flight": house.desk.in_flight,
        "recovering": int(report is not None and not report.done),
        "recovery_read_pages": report.read_pages if report is not None else 0,
        "recovery_total_pages": report.total_pages if report is not None else 0,
        "disk_degraded_ms": max((port.degraded_ms for port in house.ports), default=0),
        "disk_oldest_batch_ms": max(
            (port.oldest_batch_ms for port in house.ports if port.spec.durable), default=0
        ),
        "disk_file_bytes": disk.used_bytes if disk is not None else 0,
    }
    return ServiceStats(
        state,
        uptime_ms,
        engine,
        tier_stats(engine, house.ports),
        {**totals, **gauges},
        frozenset(totals),
        tuple(latencies),
        device_stats(house.ports, copy_engine),
    )
