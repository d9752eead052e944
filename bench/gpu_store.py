"""The device store itself: what its owner's thread feels of 10,000 evictions, and which engines it took."""

from __future__ import annotations

import threading
import time

import numpy as np
from gpu_machine import Machine

from hicache.device import DeviceOptions, open_device
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec


def run(machine: Machine, report, options) -> None:
    """A burst of evictions: GETs in batches of 64, ten thousand pages, into host pages."""
    page_bytes, slots, burst = (64 << 10, 1024, 10_000) if not options.tiny else (4096, 64, 640)
    segment_bytes = slots * page_bytes
    told = threading.Event()
    spec = TierSpec("device", TierKind.DEVICE, segment_bytes, segment_bytes)
    store = open_device(options.device, spec, told.set, DeviceOptions())
    try:
        store.open_segment(0, "bench", page_bytes, slots)
        arena = np.random.default_rng(0).integers(0, 256, (slots, page_bytes), dtype=np.uint8)
        pages = list(map(memoryview, arena))
        _wait(store, told, _submit(store, Op.PUT, range(slots), pages, page_bytes))
        back = np.zeros_like(arena)
        if hasattr(store, "pins"):
            store.pins.add(back.ctypes.data, back.nbytes)
        buffers = list(map(memoryview, back))
        taken, waiting, started = [], set(), time.perf_counter()
        for number in range(burst // 64):
            some = [(number * 64 + i) % slots for i in range(64)]
            begin = time.perf_counter()
            waiting |= _submit(store, Op.GET, some, [buffers[s] for s in some], page_bytes)
            taken.append(time.perf_counter() - begin)
        _wait(store, told, waiting, taken)
        seconds = time.perf_counter() - started
        assert np.array_equal(arena, back), "wrong bytes"
        stats = getattr(store, "stats", None)
        report.row(
            "store",
            pages=burst,
            owner_ms_max=max(taken) * 1e3,
            owner_ms_p50=sorted(taken)[len(taken) // 2] * 1e3,
            gb_s=burst * page_bytes / seconds / 1e9,
            choices={" ".join(map(str, shape)): vars_of(choice) for shape, choice in stats.choices.items()}
            if stats
            else {},
        )
        report.bar("the longest call on the owner's thread, ms", max(taken) * 1e3, 1.0, at_most=True)
    finally:
        store.close()


def vars_of(choice) -> dict:
    return {"engine": choice.engine, "gb_s": choice.gb_per_s}


def _submit(store, op: Op, slots, buffers, page_bytes: int) -> set[int]:
    _submit.last = getattr(_submit, "last", 0) + 1
    store.submit(Batch(_submit.last, op, page_bytes=page_bytes, slots=list(slots), buffers=buffers))
    return {_submit.last}


def _wait(store, told: threading.Event, waiting: set[int], taken: list[float] | None = None) -> None:
    while waiting:
        assert told.wait(60), "no completion in a minute"
        told.clear()
        begin = time.perf_counter()
        done = store.poll()
        if taken is not None:
            taken.append(time.perf_counter() - begin)
        for completion in done:
            assert set(completion.outcomes) == {Outcome.OK}, completion.error
            waiting.discard(completion.id)
