"""Prometheus metrics. Nothing is counted through prometheus: a scrape takes one snapshot of the service's own counts.

Names begin with ``hicache_``. By tier: ``tier`` is its name.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from hicache.runtime.counters import Histogram
from hicache.runtime.device_stats import DeviceStats
from hicache.runtime.stats import ServiceStats, TierStats

if TYPE_CHECKING:
    from hicache.runtime.service import Service

_log = logging.getLogger(__name__)

PREFIX = "hicache_"
SNAPSHOT_TIMEOUT_S = 5.0

_TIER_GAUGES = (
    ("capacity_bytes", "bytes the tier may take"),
    ("used_bytes", "bytes it takes"),
    ("pages", "pages it holds"),
    ("queued_batches", "batches given to its store and not done"),
)
_TIER_TOTALS = (
    ("hit_pages", "pages served from the tier"),
    ("hit_bytes", "bytes of these pages"),
    ("written_bytes", "raw bytes stored in it; over hit_bytes: what a hit costs in writes"),
    ("admitted_pages", "pages that admission let in, where it was asked"),
    ("refused_pages", "pages that admission found not worth writing"),
    ("bytes_in", "bytes copied into it"),
    ("bytes_out", "bytes copied out of it"),
    ("evicted_pages", "pages that left it and stayed in another"),
    ("dropped_pages", "pages that left it as their last tier"),
    ("corrupt_pages", "pages whose bytes were not what was stored"),
)
_DEVICE_TOTALS = (
    ("direct_bytes", "bytes copied from or to the host tier's memory directly"),
    ("bounced_bytes", "bytes copied through a bounce buffer"),
    ("faults", "copies that failed"),
)
_GAUGES = (
    "sessions",
    "leases",
    "reservations",
    "waiting",
    "namespaces",
    "nodes",
    "runs",
    "pages",
)


class ServiceCollector:
    """Turns a snapshot into metric families. ``take`` is called on the scraper's thread."""

    def __init__(self, take: Callable[[], tuple[ServiceStats, dict[str, Histogram]]]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        stats, calls = self._take()
        state = GaugeMetricFamily(PREFIX + "state", "1 for the state the service is in", labels=["state"])
        for name in ("serving", "draining", "failed"):
            state.add_metric([name], float(stats.state == name))
        yield state
        yield GaugeMetricFamily(PREFIX + "uptime_seconds", "since the start", value=stats.uptime_ms / 1000)
        yield from _tiers(stats.tiers)
        yield from _devices(stats.devices)
        yield from _totals(stats)
        yield _latencies(calls)


def _tiers(tiers: tuple[TierStats, ...]) -> Iterator[Metric]:
    for name, text in _TIER_GAUGES:
        gauge = GaugeMetricFamily(f"{PREFIX}tier_{name}", text, labels=["tier"])
        for tier in tiers:
            gauge.add_metric([tier.name], getattr(tier, name))
        yield gauge
    for name, text in _TIER_TOTALS:
        total = CounterMetricFamily(f"{PREFIX}tier_{name}", text, labels=["tier"])
        for tier in tiers:
            total.add_metric([tier.name], getattr(tier, name))
        yield total
    writable = GaugeMetricFamily(
        f"{PREFIX}tier_state", "1 for the state the tier is in", labels=["tier", "state"]
    )
    for tier in tiers:
        for word in ("ok", "read-only", "off"):
            writable.add_metric([tier.name, word], float(tier.state == word))
    yield writable
    degraded = GaugeMetricFamily(
        f"{PREFIX}tier_degraded", "1 while the tier is not ok; the log says why", labels=["tier"]
    )
    for tier in tiers:
        degraded.add_metric([tier.name], float(tier.state != "ok"))
    yield degraded


def _devices(devices: tuple[DeviceStats, ...]) -> Iterator[Metric]:
    if not devices:
        return
    up = GaugeMetricFamily(f"{PREFIX}device_up", "0 for a device that was given up", labels=["device"])
    registered = GaugeMetricFamily(
        f"{PREFIX}device_registered_bytes", "of host memory that it copies from directly", labels=["device"]
    )
    for device in devices:
        up.add_metric([device.name], float(not device.problem))
        registered.add_metric([device.name], device.registered_bytes)
    yield from (up, registered, _copy_speeds(devices))
    for name, text in _DEVICE_TOTALS:
        total = CounterMetricFamily(f"{PREFIX}device_{name}", text, labels=["device"])
        for device in devices:
            total.add_metric([device.name], getattr(device, name))
        yield total


def _copy_speeds(devices: tuple[DeviceStats, ...]) -> Metric:
    speed = GaugeMetricFamily(
        f"{PREFIX}device_copy_bytes_per_second",
        "what was measured for a shape, by copy engine; chosen: 1 for the one that copies it",
        labels=["device", "direction", "page_bytes", "rows", "engine", "chosen"],
    )
    for device in devices:
        for choice in device.choices:
            shape = [device.name, choice.direction, str(choice.page_bytes), choice.rows]
            for engine, gb_per_s in choice.gb_per_s.items():
                speed.add_metric([*shape, engine, str(int(engine == choice.engine))], gb_per_s * 1e9)
    return speed


def _totals(stats: ServiceStats) -> Iterator[Metric]:
    for name in _GAUGES:
        yield GaugeMetricFamily(PREFIX + name, name.replace("_", " "), value=getattr(stats.engine, name))
    for name, count in stats.counters.items():
        family = CounterMetricFamily if name in stats.totals else GaugeMetricFamily
        yield family(PREFIX + name, name.replace("_", " "), value=count)


def _latencies(calls: dict[str, Histogram]) -> Metric:
    found = HistogramMetricFamily(PREFIX + "call_seconds", "how long calls took", labels=["call"])
    for call, histogram in sorted(calls.items()):
        octaves = histogram.octaves()
        buckets = [(f"{bound:g}", float(count)) for bound, count in octaves]
        found.add_metric([call], [*buckets, ("+Inf", float(octaves[-1][1]))], histogram.total_ns / 1e9)
    return found


class MetricsServer:
    """Serves ``/metrics`` from a thread of its own until ``close``."""

    def __init__(self, service: Service, port: int, host: str = "127.0.0.1") -> None:
        """Raises OSError where the address cannot be had. Make it on the service's loop."""
        self._loop = asyncio.get_running_loop()
        self._service = service
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(ServiceCollector(self._take))
        self._server, self._thread = start_http_server(port, addr=host, registry=self.registry)
        self.port = int(self._server.server_address[1])

    def _take(self) -> tuple[ServiceStats, dict[str, Histogram]]:
        """A snapshot, made on the loop's thread."""

        async def snapshot() -> tuple[ServiceStats, dict[str, Histogram]]:
            return self._service.stats(), dict(self._service.latencies.calls)

        future = asyncio.run_coroutine_threadsafe(snapshot(), self._loop)
        try:
            return future.result(SNAPSHOT_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop serving. Idempotent. Not while the loop's thread is needed by a scrape: it answers with an error."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=SNAPSHOT_TIMEOUT_S)


def start_http(service: Service, port: int, host: str = "127.0.0.1") -> MetricsServer:
    """Serve the service's metrics at ``http://host:port/metrics``; port 0: any."""
    return MetricsServer(service, port, host)
