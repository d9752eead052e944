"""What a burst of 10,000 page evictions out of the device tier costs the thread that owns everything.

    python bench/demotion_burst.py [--pages 10000] [--page-bytes 4096] [--repetitions 7]

The whole service in this process: engine, runtime, stores. A device tier full of pages gets as many again, in prompts
of 250 pages that all come at once; each page that comes makes one leave, by a copy to the host tier. Every callback of
the event loop is timed, and within it every event of the engine, every turn (in which completions are handed out and
copies started) and every batch given to a store (submit): by the clock, and by the thread's own CPU time, which other
processes disturb less. Two devices take turns: ``cpu``, and the CUDA store on a driver in ordinary memory whose copies
are done when they are asked for. Writes ``bench/results/demotion_burst.json``. Bar: no step of more than 1 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402
import numpy as np  # noqa: E402

from hicache.device import DeviceOptions  # noqa: E402
from hicache.runtime import Service, ServiceOptions, stores  # noqa: E402
from hicache.runtime.ports import TierPort  # noqa: E402
from hicache.types import Namespace, Notify, TierSpec, WritePolicy  # noqa: E402

PROMPT_PAGES, PAGE_TOKENS = 250, 4
DEVICE, HOST = 0, 1
BAR_MS = 1.0
STEPS = ("callback", "event", "turn", "submit")


class Instant:
    """A driver whose device is this process's memory and whose work is done when it is queued."""

    name, has_kernels, has_batch, uuid = "instant", False, True, bytes(16)

    def __init__(self) -> None:
        self._memory: dict[int, np.ndarray] = {}
        self._last = 0

    def _take(self, size_bytes: int) -> np.ndarray:
        raw = np.zeros(size_bytes + 256, np.uint8)
        memory = raw[-raw.ctypes.data % 256 :][:size_bytes]
        self._memory[memory.ctypes.data] = memory
        return memory

    def _number(self, *_: object) -> int:
        self._last += 1
        return self._last

    def allocate(self, size_bytes: int) -> int:
        return int(self._take(size_bytes).ctypes.data)

    def release(self, address: int) -> None:
        del self._memory[address]

    allocate_host = _take

    def release_host(self, memory: np.ndarray) -> None:
        del self._memory[memory.ctypes.data]

    def _nothing(self, *_: object) -> None:
        return None

    bind = register = unregister = record = close = _nothing
    stream = event = _number

    def ready(self, _event: int) -> bool:
        return True

    def elapsed_ns(self, _first: int, _second: int) -> int:
        return 1

    def copy(self, _stream: int, targets: Any, sources: Any, sizes: Any) -> None:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, size)

    copy_batch = copy

    def fill(self, _stream: int, address: int, value: int, size_bytes: int) -> None:
        ctypes.memset(address, value, size_bytes)


class Times:
    """How long the owner's thread was busy with each step, in ns: by the clock and by its own CPU."""

    def __init__(self) -> None:
        self.on = False
        self.wall: dict[str, list[int]] = {step: [] for step in STEPS}
        self.cpu: dict[str, list[int]] = {step: [] for step in STEPS}

    def wrap(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed where it is not within another of its kind."""
        depth = 0

        def timed(*arguments: Any, **named: Any) -> Any:
            nonlocal depth
            if depth or not self.on:
                return call(*arguments, **named)
            depth += 1
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            try:
                return call(*arguments, **named)
            finally:
                depth -= 1
                self.cpu[step].append(time.thread_time_ns() - cpu)
                self.wall[step].append(time.perf_counter_ns() - wall)

        return timed


def watch(service: Service, times: Times) -> None:
    """Time every step of a started service."""
    house = service._house
    assert house is not None
    engine = house.engine
    engine.handle = times.wrap("event", engine.handle)  # type: ignore[method-assign]
    house._wake.call = times.wrap("turn", house._wake.call)
    for port in house.ports:
        port.store.submit = times.wrap("submit", port.store.submit)  # type: ignore[method-assign]


def prompts(count: int, salt: int) -> Iterator[bytes]:
    for number in range(count):
        ids = np.zeros((PROMPT_PAGES, PAGE_TOKENS), np.int32)
        ids[:, 0] = np.arange(PROMPT_PAGES) + (salt << 26) + (number << 10)
        yield ids.tobytes()


async def store(service: Service, who: tuple[int, int], prompt: bytes, region: int) -> None:
    """One prompt's pages, which all lie in one region."""
    session, namespace = who
    while True:
        found = await service.reserve(session, namespace, prompt, wait_ms=60_000)
        if found.reservation or not found.missing_pages:
            break
    await service.commit(
        session, found.reservation, [(found.present_pages, found.missing_pages)], [(region, 0)], last=True
    )


async def settled(done: Callable[[], bool], tell: Callable[[], None] = lambda: None) -> None:
    for _ in range(60_000):
        tell()
        if done():
            return
        await asyncio.sleep(0.001)
    raise harness.BenchError("the burst did not drain in a minute")


async def burst(options: argparse.Namespace, times: Times) -> dict[str, Any]:
    """One burst; what was in flight at most, and what came of it."""
    size, count = options.pages * options.page_bytes, options.pages // PROMPT_PAGES
    service = Service(
        ServiceOptions(
            device=options.device,
            device_bytes=size,
            host_bytes=3 * size,
            write_policy=WritePolicy.BACK,
            prefault=False,
            free_low_fraction=0.0,
        )
    )
    await service.start()
    try:
        watch(service, times)
        gc.freeze()  # as ``hicache serve`` does
        house = service._house
        assert house is not None
        session = service.open_session("default", "bench")
        namespace, _ = service.open_namespace(Namespace("bench", PAGE_TOKENS, options.page_bytes))
        fd = os.memfd_create("bench")
        os.write(fd, np.random.default_rng(1).bytes(PROMPT_PAGES * options.page_bytes))
        region = service.regions.register(session, fd).region_id
        who = (session, namespace)
        for prompt in prompts(count, 0):
            await store(service, who, prompt, region)
        await settled(lambda: not house.copier.in_flight)
        before = house.engine.stats().counters.evicted_pages[DEVICE]
        most: collections.Counter[str] = collections.Counter()

        def look() -> None:
            device = house.ports[DEVICE]
            most["copies"] = max(most["copies"], house.copier.in_flight)
            most["queued_chunks"] = max(most["queued_chunks"], house.copier.queued)
            most["device_batches"] = max(most["device_batches"], device.in_flight)

        rss, start = resident_bytes(), time.perf_counter()
        times.on = True
        waits = [asyncio.ensure_future(store(service, who, prompt, region)) for prompt in prompts(count, 1)]
        await settled(lambda: all(wait.done() for wait in waits) and not house.copier.in_flight, look)
        times.on = False
        took = time.perf_counter() - start
        for wait in waits:
            wait.result()
        drained = house.engine.stats().counters.evicted_pages[DEVICE] - before
        pages = house.engine.stats().tiers
        return {
            "s": took,
            "demoted_pages": drained,
            "device_pages": pages[DEVICE].pages,
            "host_pages": pages[HOST].pages,
            "most_in_flight": dict(most),
            "grown_bytes": max(resident_bytes() - rss, 0),
        }
    finally:
        await service.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def percentiles(values: list[int]) -> dict[str, float]:
    """In ms."""
    order = sorted(values)
    return {
        "median_ms": statistics.median(order) / 1e6,
        "p99_ms": order[min(len(order) - 1, len(order) * 99 // 100)] / 1e6,
        "max_ms": order[-1] / 1e6,
        "over_bar": sum(value > BAR_MS * 1e6 for value in order),
        "steps": len(order),
    }


def instant_device(
    index: int, spec: TierSpec, options: ServiceOptions, notify: Notify, **clocks: Any
) -> TierPort:
    """In place of the function of ``stores`` that opens the device tier."""
    from hicache.device.cuda import CudaDevice

    settings = DeviceOptions(copy_engine="dma", cuda_staging_bytes=4 << 20)
    return TierPort(index, spec, CudaDevice(spec, notify, settings, Instant(), **clocks))  # type: ignore[arg-type]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=10_000)
    parser.add_argument("--page-bytes", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.set_defaults(device="cpu")  # bench/gpu_owner.py has it on a GPU
    options = parser.parse_args()
    opens = {"cpu": stores._open_device, "cuda, instant driver": instant_device}
    times = {name: Times() for name in opens}
    bursts: dict[str, list[dict[str, Any]]] = {name: [] for name in opens}
    run_handle = asyncio.Handle._run
    for _ in range(options.repetitions):
        for name, opened in opens.items():
            stores._open_device = opened  # type: ignore[assignment]
            asyncio.Handle._run = times[name].wrap("callback", run_handle)  # type: ignore[method-assign]
            bursts[name].append(asyncio.run(burst(options, times[name])))
    asyncio.Handle._run = run_handle  # type: ignore[method-assign]
    found = {}
    for name in opens:
        taken = times[name]
        steps = {
            step: {"cpu": percentiles(taken.cpu[step]), "wall": percentiles(taken.wall[step])}
            for step in STEPS
        }
        found[name] = {"steps": steps, "bursts": bursts[name]}
        show(name, steps, bursts[name])
    harness.write(
        "demotion_burst",
        {"bar_ms": BAR_MS, "pages": options.pages, "page_bytes": options.page_bytes, "devices": found},
        ["numpy", "torch"],
    )


def show(name: str, steps: dict[str, Any], bursts: list[dict[str, Any]]) -> None:
    last, took = bursts[-1], statistics.median(each["s"] for each in bursts)
    print(f"{name}: {last['demoted_pages']} pages demoted in {took:.2f} s (median of {len(bursts)} bursts)")
    print(f"  at most in flight: {last['most_in_flight']}; memory grew by {last['grown_bytes'] >> 20} MiB")
    for step, clocks in steps.items():
        for clock, row in clocks.items():
            print(
                f"  {step:<9} {clock:<4} median {row['median_ms']:7.3f}  p99 {row['p99_ms']:7.3f}"
                f"  max {row['max_ms']:7.3f} ms  over {BAR_MS:g} ms: {row['over_bar']} of {row['steps']}"
            )


if __name__ == "__main__":
    harness.run(main)
