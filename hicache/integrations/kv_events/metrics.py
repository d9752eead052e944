"""The publisher's counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hicache.integrations.kv_events.publisher import Publisher

PREFIX = "hicache_events_"


class PublisherCollector(Collector):
    """Reads the counts at each scrape; whole numbers, so that no lock is needed."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        counts = self._publisher.counts
        for name in ("stored_blocks", "removed_blocks", "resets", "lost"):
            yield CounterMetricFamily(PREFIX + name, name.replace("_", " "), value=getattr(counts, name))
        yield GaugeMetricFamily(
            PREFIX + "caught_up", "1 while what was published is how things stand", value=counts.caught_up
        )
        yield GaugeMetricFamily(PREFIX + "revision", "of the sidecar's journal", value=counts.revision)
        for name in ("messages", "replayed", "retold", "refused"):
            family = CounterMetricFamily(PREFIX + name, f"{name} at an endpoint", labels=["endpoint"])
            for outlet in self._publisher.outlets:
                family.add_metric([outlet.spec.bind], getattr(outlet, name))
            yield family


def start_http(publisher: Publisher, port: int) -> tuple[Callable[[], None], int]:
    """Serve them at http://127.0.0.1:port/metrics (0: any) until what is answered is called; and the port.

    Raises OSError.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PublisherCollector(publisher))
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop, int(server.server_address[1])
