"""Promotion layer by layer ahead of compute, by the paths an engine uses: a Load with a counter, the copier's fences.

A layer's compute is some products that take about 1.5 times as long as its copy, as in a prefill; it begins when its
layer is there. Hidden is what of the load's time alone the whole does not take longer than compute alone.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import threading
import time

import harness
import numpy as np
import torch
from gpu_machine import Machine
from gpu_transfers import WARM, Copying, Kv, Rig, compare, median_ns

from hicache.errors import UnsupportedError


class Count:
    """One counter of a timeline, in memory of its own; ``show`` waits for it on a stream, or here."""

    def __init__(self, machine: Machine) -> None:
        self._words = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint64)
        self._word = ctypes.c_uint64.from_address(self._words.ctypes.data)
        self._fences = None
        if machine.is_cuda:
            from hicache.device.fences import open_fences

            self._fences = open_fences()
            self._fences.admit(self._words.ctypes.data, self._words.nbytes, self._words)

    def get(self) -> int:
        return self._word.value

    def set(self, value: int) -> None:
        self._word.value = value

    def hold(self, stream, value: int) -> None:
        """What the stream is given from now on comes when the counter shows ``value``."""
        if self._fences is not None:
            self._shown = self._fences.wait(stream, self._words.ctypes.data, value)
            return
        end = time.monotonic() + 60
        while self.get() < value:
            assert time.monotonic() < end, "a layer has not come in a minute"
            time.sleep(0.0001)


class Compute:
    """Matrix products, so many a layer."""

    def __init__(self, machine: Machine, layers: int, size: int) -> None:
        self.machine, self.layers, self.products = machine, layers, 1
        self.a = torch.randn((size, size), device=machine.device).to(torch.bfloat16)
        self.b = torch.randn((size, size), device=machine.device).to(torch.bfloat16)
        self.out = torch.empty_like(self.a)

    def fit(self, layer_ns: float) -> float:
        """So many products that a layer takes that long; how long all layers take alone."""
        self.products = 1
        one_ns = median_ns(self.machine, lambda: self.run(lambda _layer: None)) / self.layers
        self.products = max(1, round(layer_ns / one_ns))
        return median_ns(self.machine, lambda: self.run(lambda _layer: None))

    def run(self, wait) -> None:
        """All layers, each after ``wait(layer)``; until they are done."""
        with self.machine.on(0):
            for layer in range(self.layers):
                wait(layer)
                self.layer()
        if self.machine.is_cuda:
            self.machine.streams[0].synchronize()

    def layer_ns(self) -> float:
        """Median of a layer by the device's clock; waits for no other stream than its own."""
        taken = []
        for _ in range(self.machine.repetitions + 2):
            if not self.machine.is_cuda:
                begin = time.perf_counter_ns()
                self.layer()
                taken.append(time.perf_counter_ns() - begin)
                continue
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            with self.machine.on(0):
                ends[0].record()
                self.layer()
                ends[1].record()
            ends[1].synchronize()
            taken.append(ends[0].elapsed_time(ends[1]) * 1e6)
        return statistics.median(taken[2:])

    def layer(self) -> None:
        for _ in range(self.products):
            torch.mm(self.a, self.b, out=self.out)


def run(machine: Machine, report, options) -> None:
    """Both ways of a layered load; then what compute feels of the sidecar's copies."""
    import gpu

    shape = gpu.shapes(options.tiny)["llama"]
    compute = Compute(machine, shape.layers, 64 if options.tiny else 2048)
    for count in (4,) if options.tiny else (256, 64):
        kv = Kv(machine, shape, count)
        _load(machine, report, options, kv, compute)
        try:
            _copier(machine, report, kv, compute)
        except UnsupportedError as error:
            report.skip("layered copier", str(error))
        del kv
    _slowdowns(machine, report, options, Kv(machine, shape, 4 if options.tiny else 64))


def _slowdowns(machine: Machine, report, options, kv: Kv) -> None:
    """Products by the device's clock, while another thread keeps two transfers each way in flight."""
    compute = Compute(machine, 1, 64 if options.tiny else 8192)
    compute.products = 4 if options.tiny else 60
    rig = Rig(machine, options)
    try:
        handle, pages = rig.open(kv), rig.pages(kv)
        pages.rows[:] = kv.truth
        for ways in (("load",), ("pack",), ("load", "pack")):
            copies = _Copies(rig, kv, [(kv, handle, pages, way) for way in ways for _ in range(2)])
            alone_ns = compute.layer_ns()
            copies.start()
            beside_ns = compute.layer_ns()
            gb_s = copies.end()
            slowdown = beside_ns / alone_ns - 1
            name = " and ".join(ways)
            report.row(
                "slowdown", beside=name, slowdown=slowdown, copies_gb_s=gb_s, compute_ms=alone_ns / 1e6
            )
            report.bar(f"compute beside the sidecar's {name}: slowdown", slowdown, 0.05, at_most=True)
    finally:
        rig.close()


class _Copies:
    """Transfers one after another on a thread, which owns the rig meanwhile. What they carry is the same each time."""

    def __init__(self, rig: Rig, kv: Kv, each: list) -> None:
        self._rig, self._kv, self._each = rig, kv, each
        self._stop, self._warm = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._rounds, self._ns, self._failed = 0, 0, ""

    def start(self) -> None:
        self._thread.start()
        assert self._warm.wait(300), "copies do not begin"

    def end(self) -> float:
        """GB/s."""
        self._stop.set()
        self._thread.join()
        if self._failed:
            raise harness.BenchError(self._failed)
        return self._rounds * self._kv.bytes / max(self._ns, 1)

    def _run(self) -> None:
        try:
            begin = done = 0
            for what in self._each:
                self._rig.begin(*what, verify=True)
            while not self._stop.is_set():
                if done == WARM * len(self._each):
                    begin = time.perf_counter_ns()
                    self._warm.set()
                what = self._each[done % len(self._each)]
                self._rig.wait(1)
                self._rig.begin(*what, verify=True)
                done += 1
            self._ns, self._rounds = time.perf_counter_ns() - begin, done - WARM * len(self._each)
            self._rig.wait(len(self._each))
        except Exception as error:  # noqa: BLE001 - told by end()
            self._failed = f"copies: {error}"
            self._warm.set()


def _tell(report, kv: Kv, who: str, taken_ns: tuple[float, float, float]) -> None:
    load_ns, alone_ns, together_ns = taken_ns
    hidden = 1 - max(0.0, together_ns - alone_ns) / load_ns
    report.row(
        "layered", who=who, pages=kv.count, hidden=hidden, load_ms=load_ns / 1e6, compute_ms=alone_ns / 1e6,
        together_ms=together_ns / 1e6,
    )  # fmt: skip
    report.bar(f"promotion hidden, layer by layer, {who}, {kv.count} pages", hidden, 0.90)


def _load(machine: Machine, report, options, kv: Kv, compute: Compute) -> None:
    """The sidecar's Load; the stream waits for the timeline's counter by itself."""
    rig = Rig(machine, options)
    try:
        handle, pages = rig.open(kv), rig.pages(kv)
        counter, stream = Count(machine), machine.streams[0]

        def load() -> None:
            counter.set(0)
            rig.begin(kv, handle, pages, "load", verify=True, counter=counter)

        def alone() -> None:
            load()
            rig.wait(1)

        def both() -> None:
            load()
            compute.run(lambda layer: counter.hold(stream, layer + 1))
            rig.wait(1)

        compare(kv, pages, alone, "load", "layered")
        load_ns = median_ns(machine, alone)
        alone_ns = compute.fit(1.5 * load_ns / compute.layers)
        _tell(report, kv, "load with a counter", (load_ns, alone_ns, median_ns(machine, both)))
        if not kv.holds_truth():
            raise AssertionError("layered: wrong bytes")
    finally:
        rig.close()


def _copier(machine: Machine, report, kv: Kv, compute: Compute) -> None:
    """The copier; the stream waits for an event a layer."""
    copying = Copying(kv)
    stream = machine.streams[0]
    try:

        def alone() -> None:
            copying.load().wait(120)

        def both() -> None:
            handle = copying.load()
            compute.run(lambda layer: handle.wait_layer(layer, stream, 120))
            handle.wait(120)

        compare(kv, copying.pages["load"], alone, "load", "copier, layered")
        load_ns = median_ns(machine, alone)
        alone_ns = compute.fit(1.5 * load_ns / compute.layers)
        _tell(report, kv, "copier with events", (load_ns, alone_ns, median_ns(machine, both)))
    finally:
        copying.copies.close()
