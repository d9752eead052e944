"""What a CUDA-shaped device tells, from the store to the table, the metrics and the doctor."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")
pytest.importorskip("rich", reason="the table is drawn by it")
pytest.importorskip("grpc", reason="what is told goes over the wire")

from pool_fake import PoolDriver
from rich.console import Console

from hicache.cli import doctor, stats
from hicache.device import DeviceOptions
from hicache.device.cuda import CudaDevice
from hicache.device.engines import Choice
from hicache.rpc.client import admin_calls
from hicache.rpc.client.results import DeviceStats, Stats
from hicache.rpc.server.stats import stats_response
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.device_stats import device_stats
from hicache.runtime.metrics import ServiceCollector
from hicache.types import Ack, Namespace, TierKind, TierSpec

PAGE, PAGES = 4096, 12
SPACE = Namespace("m", 4, PAGE)


def prompt(pages: int) -> bytes:
    return random.Random(1).randbytes(pages * SPACE.symbol_bytes)


async def store_and_fetch(service: Service) -> None:
    """Pages into the device and out of it: both of its lanes have copied."""
    session = service.open_session("default", "test")
    number, _ = service.open_namespace(SPACE)
    room = await service.reserve(session, number, prompt(PAGES))
    writer = service.begin_write(session, room.reservation)
    for index in range(PAGES):
        data = bytes([index]) * PAGE
        await writer.put(index, data, xxh3_64_intdigest(data))
    stored = await writer.commit(Ack.VISIBLE, last=True)
    assert stored.stored_pages == PAGES, stored
    result = await service.fetch(session, number, prompt(PAGES), wait_ms=10_000)
    assert result.granted_pages == PAGES


def told(monkeypatch: pytest.MonkeyPatch, after: Callable[[Service], None] | None = None, **settings: object):
    """The client's Stats and the metrics of a service whose device is a fake one."""
    drivers: list[PoolDriver] = []

    def open_fake(_device, spec, notify, options, *, now_ns):
        drivers.append(PoolDriver(3, delays=False))
        small = DeviceOptions(cuda_staging_bytes=16 * PAGE, copy_engine=options.copy_engine)
        return CudaDevice(spec, notify, small, drivers[0], now_ns=now_ns)

    monkeypatch.setattr("hicache.device.open_device", open_fake)

    async def main() -> tuple[Stats, dict[str, list[object]]]:
        options = ServiceOptions(
            device="cuda:0", device_bytes=1 << 20, host_bytes=1 << 20, prefault=False, **settings
        )
        service = Service(options)
        await service.start()
        try:
            await store_and_fetch(service)
            if after is not None:
                after(service)
            found = service.stats()
            metrics = {m.name: m.samples for m in ServiceCollector(lambda: (found, {})).collect()}
            return admin_calls.parse_stats(stats_response(found)), metrics
        finally:
            await service.close()

    found = asyncio.run(asyncio.wait_for(main(), 60))
    assert not drivers[0].violations
    return found


def shown(found: Stats) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(stats.render(found, None))
    return capture.get()


def test_choices_and_bytes_reach_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    found, metrics = told(monkeypatch)
    [device] = found.devices
    assert (device.name, device.tier, device.copy_engine, device.problem) == (
        "fake (seed 3)",
        "device",
        "auto",
        "",
    )
    assert device.direct_bytes + device.bounced_bytes >= 2 * PAGES * PAGE  # once in, once out
    by_direction = {choice.direction: choice for choice in device.choices}
    assert set(by_direction) == {"to device", "to host"}
    for choice in device.choices:
        assert choice.page_bytes == PAGE and choice.rows in {"few", "many"}
        assert choice.engine in choice.gb_per_s and set(choice.gb_per_s) <= {
            "kernel",
            "staged",
            "batch",
            "dma",
        }
    text = shown(found)
    for word in ("fake (seed 3)", "copied directly", "measured", "to device", "to host", "GB/s"):
        assert word in text, word
    assert json.loads(json.dumps(stats.plain(found)))["devices"][0]["choices"][0]["gb_per_s"]
    speeds = metrics["hicache_device_copy_bytes_per_second"]
    chosen = [sample for sample in speeds if sample.labels["chosen"] == "1"]
    assert len(chosen) == len(device.choices) and all(sample.value > 0 for sample in chosen)
    assert [sample.value for sample in metrics["hicache_device_up"]] == [1.0]
    assert metrics["hicache_device_direct_bytes"][0].value == device.direct_bytes
    assert metrics["hicache_device_bounced_bytes"][0].value == device.bounced_bytes


def test_an_engine_that_was_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = told(monkeypatch, copy_engine="staged")
    [device] = found.devices
    assert (device.copy_engine, device.choices) == ("staged", ())
    assert "staged" in shown(found) and "GB/s" not in shown(found)


def test_a_device_without_choices_is_not_listed() -> None:
    async def main() -> None:
        service = Service(
            ServiceOptions(device="cpu", device_bytes=1 << 20, host_bytes=1 << 20, prefault=False)
        )
        await service.start()
        try:
            assert service.stats().devices == ()
            assert "GB/s" not in shown(admin_calls.parse_stats(stats_response(service.stats())))
        finally:
            await service.close()

    asyncio.run(main())


def test_several_devices_are_told_one_by_one() -> None:
    told = [
        SimpleNamespace(device=name, choices={("to host", PAGE, "few"): Choice("dma", {"dma": 1.5})},
            direct_bytes=size, bounced_bytes=1, registered_bytes=2, faults=0, problem="")
        for name, size in (("cuda:0", 3), ("cuda:1", 4))
    ]  # fmt: skip
    spec = TierSpec("device", TierKind.DEVICE, 1 << 20, 1 << 16)
    port: Any = SimpleNamespace(spec=spec, store=SimpleNamespace(stats=tuple(told)))
    first, second = device_stats([port], "auto")
    assert (first.name, first.direct_bytes, second.name, second.direct_bytes) == ("cuda:0", 3, "cuda:1", 4)
    assert first.choices[0].gb_per_s == {"dma": 1.5}


def device(**changed: object) -> DeviceStats:
    fields = {
        "name": "cuda:0", "tier": "device", "copy_engine": "auto", "choices": (), "direct_bytes": 9 << 30,
        "bounced_bytes": 0, "registered_bytes": 1 << 30, "faults": 0, "problem": "",
    }  # fmt: skip
    return DeviceStats(**fields | changed)


def figures(*devices: DeviceStats) -> Stats:
    return Stats("1", "serving", 1, (), {}, (), 0, 0, 0, 0, 0, 0, 0, 0, 0, devices)


def test_a_device_that_was_given_up_is_said_to_be() -> None:
    found = figures(device(), device(name="cuda:1", problem="device lost", faults=3))
    assert "device cuda:1 of tier device was given up: device lost" in shown(found)
    checks = {check.name: check for check in doctor.judge_sidecar(found)}
    assert checks["device cuda:0"].verdict is doctor.Verdict.FINE
    assert checks["device cuda:1"].verdict is doctor.Verdict.CHANGE
    assert "device lost" in checks["device cuda:1"].found


def test_the_doctor_sees_that_copies_bounce() -> None:
    [check] = doctor.judge_sidecar(figures(device(direct_bytes=1, bounced_bytes=5 << 30)))
    assert check.verdict is doctor.Verdict.ADVICE and "ulimit -l" in check.advice
