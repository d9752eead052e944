"""Settings are checked when they are made, and errors name the flag."""

from __future__ import annotations

from typing import Any

import pytest

from hicache.errors import ConfigError
from hicache.runtime.options import ServiceOptions, segment_bytes_for
from hicache.types import TierKind, segment_slots

MIB = 1 << 20


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "--host-bytes"),
        ({"host_bytes": -1}, "--host-bytes"),
        ({"host_bytes": 100}, "--host-bytes"),
        ({"device": "cpu", "host_bytes": MIB}, "--device-bytes"),
        ({"device_bytes": MIB, "host_bytes": MIB}, "--device"),
        ({"disk_path": "/x"}, "--disk-bytes"),
        ({"disk_bytes": MIB}, "--disk-path"),
        ({"host_bytes": MIB, "host_segment_bytes": 2 * MIB}, "--host-segment-bytes"),
        ({"host_bytes": MIB, "host_segment_bytes": 5000}, "--host-segment-bytes"),
        ({"host_bytes": MIB, "workers": 0}, "--workers"),
        ({"host_bytes": MIB, "bounce_bytes": MIB}, "--bounce-bytes"),
        ({"host_bytes": MIB, "default_ttl_ms": -5}, "--default-ttl"),
        ({"host_bytes": MIB, "default_ttl_ms": 10, "max_ttl_ms": 5}, "default_ttl_ms"),
        ({"host_bytes": MIB, "selective_hits": 0}, "selective_hits"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServiceOptions(**fields)


def test_the_tiers_come_fastest_first() -> None:
    options = ServiceOptions(
        device="cpu", device_bytes=MIB, host_bytes=2 * MIB, disk_path="/x", disk_bytes=64 * MIB
    )
    device, host, disk = options.specs(50 * MIB)
    assert (device.kind, host.kind, disk.kind) == (TierKind.DEVICE, TierKind.HOST, TierKind.DISK)
    assert (host.header_bytes_per_slot, host.client_readable, host.keyed) == (8, True, False)
    assert (disk.keyed, disk.durable, disk.capacity_bytes) == (True, True, 50 * MIB)
    assert not (device.client_readable or device.durable or device.header_bytes_per_slot)
    assert options.engine_options((host,)).tiers == (host,)


@pytest.mark.parametrize(
    ("capacity", "segment"),
    [
        (64 << 30, 4 << 30),
        (100 * MIB, 6 * MIB),
        (32 * MIB, 2 * MIB),
        (31 * MIB, MIB),
        (MIB, MIB),
        (700_000, 696_320),
        (4096, 4096),
    ],
)
def test_segments_fit_their_tier(capacity: int, segment: int) -> None:
    assert segment_bytes_for(capacity) == segment
    assert 0 < segment <= capacity


def test_a_small_tier_still_holds_pages() -> None:
    (spec,) = ServiceOptions(host_bytes=64 << 10).specs()
    assert segment_slots(spec, 4096) >= 10
