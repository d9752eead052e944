"""Counters, metrics and log lines."""

from __future__ import annotations

import asyncio
import io
import logging
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from runtime_helpers import TestClient, running

from hicache.runtime import ServiceOptions
from hicache.runtime.counters import Histogram, Latencies
from hicache.runtime.log import KeyValueFormatter, quote, request_id, setup_logging
from hicache.runtime.metrics import start_http


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_what_happened(tmp_path: Path) -> None:
    async def main() -> None:
        options = ServiceOptions(host_bytes=4 << 20, disk_path=str(tmp_path / "disk"), disk_bytes=16 << 20)
        async with running(options) as service:
            client = TestClient(service)
            await client.store(20)
            await client.fetch(25)
            server = start_http(service, 0)
            try:
                found = await asyncio.to_thread(scrape, server.port)
            finally:
                await asyncio.to_thread(server.close)
            host = (("tier", "host"),)
            assert found["hicache_tier_pages", host] == 20
            assert found["hicache_tier_hit_pages_total", host] == 20
            assert found["hicache_tier_bytes_in_total", host] == 20 * 4096
            assert found["hicache_tier_capacity_bytes", host] == 4 << 20
            assert found["hicache_tier_state", (("state", "ok"), ("tier", "disk"))] == 1
            assert found["hicache_tier_degraded", (("tier", "disk"),)] == 0
            assert found["hicache_missed_pages_total", ()] == 5
            assert found["hicache_committed_pages_total", ()] == 20
            assert found["hicache_state", (("state", "serving"),)] == 1
            assert found["hicache_leases", ()] == 1
            assert found["hicache_sessions", ()] == 1
            assert found["hicache_call_seconds_count", (("call", "fetch"),)] == 1
            assert found["hicache_call_seconds_bucket", (("call", "commit"), ("le", "+Inf"))] == 1
            assert found["hicache_copies_in_flight", ()] == 0
            names = {name for name, _ in found}
            assert {"hicache_evicted_pages_total", "hicache_refused_calls_total"} & names

    asyncio.run(main())


def test_a_scrape_after_the_end_is_an_error_and_nothing_worse() -> None:
    async def main() -> None:
        async with running(ServiceOptions(host_bytes=1 << 20)) as service:
            server = start_http(service, 0)
        try:
            with pytest.raises((urllib.error.URLError, OSError)):
                await asyncio.to_thread(scrape, server.port)
        finally:
            await asyncio.to_thread(server.close)

    asyncio.run(main())


def test_quantiles_are_upper_bounds_of_their_bucket() -> None:
    histogram = Histogram()
    assert histogram.quantile_ms(0.5) == 0.0
    for _ in range(98):
        histogram.observe(1_000_000)
    for _ in range(2):
        histogram.observe(80_000_000)
    histogram.observe(0)
    histogram.observe(10**15)
    assert 1.0 <= histogram.quantile_ms(0.5) <= 1.19
    assert 80.0 <= histogram.quantile_ms(0.99) <= 96.0
    octaves = histogram.octaves()
    assert octaves[-1][1] == 102
    assert [count for _, count in octaves] == sorted(count for _, count in octaves)
    assert next(count for bound, count in octaves if bound >= 0.001024) == 99


def test_latencies_by_name() -> None:
    latencies = Latencies()
    for call in ("b", "a", "b"):
        latencies.observe(call, 2_000)
    assert [(found.call, found.count) for found in latencies.snapshot()] == [("a", 1), ("b", 2)]


def test_log_lines_are_pairs() -> None:
    stream = io.StringIO()
    handler = setup_logging("info", stream)
    logger = logging.getLogger("hicache.test")
    try:
        token = request_id.set("ab12")
        logger.info("two words, %d", 7)
        request_id.reset(token)
        logger.debug("not shown")
        try:
            raise ValueError("a\nb")
        except ValueError:
            logger.exception('said "no"\n')
        assert setup_logging("info", stream) is not handler  # instead of it, not beside it
        logger.warning("once")
    finally:
        for each in list(logging.getLogger("hicache").handlers):
            logging.getLogger("hicache").removeHandler(each)
        logging.getLogger("hicache").propagate = True
        logging.getLogger("hicache").setLevel(logging.NOTSET)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith('level=info logger=hicache.test request=ab12 msg="two words, 7"')
    assert lines[0].startswith("time=2")
    assert lines[1].endswith(r'level=error logger=hicache.test msg="said \"no\"\n"')
    assert lines[2].startswith("  Traceback")
    assert sum("once" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("value", "text"), [("plain-1.2:/x", "plain-1.2:/x"), ("", '""'), ("a b", '"a b"'), ("a=b", '"a=b"')]
)
def test_values_are_quoted_where_they_must_be(value: str, text: str) -> None:
    assert quote(value) == text
    record = logging.LogRecord("n", logging.INFO, "f", 1, value, None, None)
    assert KeyValueFormatter().format(record).endswith(f"msg={text}")
