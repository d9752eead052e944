"""Pages into an engine's paged KV and out of it, by the sidecar's transfers and by the engine's own copier.

What is timed is a call's whole way: from ``load`` or ``pack`` to its answer, wall time, on the host.
"""

from __future__ import annotations

import mmap
import statistics
import threading
import time

import gpu_paths
import harness
import numpy as np
import torch
from gpu_machine import Machine
from xxhash import xxh3_64_intdigest

from hicache.device import DeviceOptions, kernels, open_device
from hicache.device.copying import CopyOptions, open_copies
from hicache.device.copying.cuda import CudaCopies
from hicache.device.copying.cuda_driver import CudaCopyDriver
from hicache.device.copying.jobs import LoadHandle, LoadJob, StoreHandle, StoreJob
from hicache.device.copying.kv import EngineKv
from hicache.device.copying.mapped import Span
from hicache.device.imports import OpenKv
from hicache.device.kv import MemoryKind, PagedKv, SharedMemory
from hicache.device.opening import KvTransfers
from hicache.device.transfers import HostPages, Transfer
from hicache.errors import UnsupportedError
from hicache.rpc.client import KvMemory
from hicache.rpc.client.kv_tensors import paged_kv
from hicache.types import Outcome, TierKind, TierSpec

#: An engine is measured before it is chosen, and the first run of each compiles: none of these is timed.
WARM = 7
BARS = {("llama", 8): 0.70, ("llama", 64): 0.90, ("llama", 256): 0.90, ("mla", 256): 0.75}
WAYS = {"load": "to device", "pack": "to host"}


class Pages:
    """Host memory of pages, as the host tier has it; registered by whoever moves them. ``bytes``: all of it."""

    def __init__(self, count: int, page_bytes: int) -> None:
        self.bytes = np.frombuffer(mmap.mmap(-1, count * page_bytes), np.uint8)
        self.rows = self.bytes.reshape(count, page_bytes)
        self.rows[:] = 0  # there from now on

    @property
    def span(self) -> Span:
        return Span(0, self.rows, self)


class Kv:
    """A layer-first paged cache of twice as many blocks as pages; some blocks, in no order, are the pages'."""

    def __init__(self, machine: Machine, shape: gpu_paths.Shape, count: int) -> None:
        self.machine, self.shape, self.count = machine, shape, count
        size = shape.tensor(2 * count)
        if machine.is_cuda:
            self.layers = [
                torch.zeros(size, dtype=torch.bfloat16, device=machine.device) for _ in range(shape.layers)
            ]
        else:
            self.memory = KvMemory(shape.layers * (int(np.prod(size)) * 2 + 256))
            self.layers = [self.memory.tensor(size, torch.bfloat16) for _ in range(shape.layers)]
        self.planes = [plane for layer in self.layers for plane in kernels.planes(layer, shape.layout)]
        blocks = torch.from_numpy(np.random.default_rng(3).permutation(2 * count)[:count, None].copy())
        self.places = kernels.places_of_blocks(blocks, shape.block, shape.block).cpu().numpy()
        self.page_bytes = len(self.planes) * shape.block * shape.heads * shape.dim * 2
        self.bytes = count * self.page_bytes
        self.truth = np.random.default_rng(4).integers(0, 256, (count, self.page_bytes), np.uint8)
        self.sums = [xxh3_64_intdigest(row.data) for row in self.truth]

    def fill(self, pages: np.ndarray | None) -> None:
        """The pages in their blocks, or nothing anywhere; by the kernels, that have tests of their own."""
        for layer in self.layers:
            layer.zero_()
        if pages is not None:
            rows = torch.from_numpy(pages).to(self.machine.device)
            places = torch.from_numpy(self.places).to(self.machine.device)
            kernels.unpack_units(self.planes, places, rows, self.shape.block)
        self.machine.wait()

    def holds_truth(self) -> bool:
        found = torch.zeros((self.count, self.page_bytes), dtype=torch.uint8)
        planes = [plane.cpu() for plane in self.planes]
        kernels.pack_units(planes, torch.from_numpy(self.places), found, self.shape.block)
        return np.array_equal(found.numpy(), self.truth)

    def opened(self, rig: Rig) -> OpenKv:
        """As the transfers have it: of a GPU, without IPC, which no process has with itself."""
        if not self.machine.is_cuda:
            kv = paged_kv(self.layers, self.shape.layout)
            return rig.moves.open_kv(kv)  # which takes copies of the descriptors over
        first, uuid = self.planes[0], rig.store.driver.uuid
        size = (sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True)) + 1) * 2
        memories = [SharedMemory(MemoryKind.CUDA_IPC, size, handle=bytes(64), device_uuid=uuid)] * len(
            self.planes
        )
        blocks, block, heads, dim = first.shape
        kv = PagedKv(
            tuple(memories), tuple(range(len(memories))), (0,) * len(memories),
            len(self.planes) // self.shape.layers, blocks, block, heads, dim, 2, first.stride(),
        )  # fmt: skip
        handle = OpenKv(kv, np.array([p.data_ptr() for p in self.planes], np.int64), uuid, lambda: None)
        rig.moves._keep(handle)
        return handle


class Rig:
    """A device store and its transfers, without a service."""

    def __init__(self, machine: Machine, options) -> None:
        self.machine = machine
        self.told = threading.Event()
        size = 1 << 20 if options.tiny else 64 << 20
        spec = TierSpec("device", TierKind.DEVICE, size, size)
        self.store = open_device(options.device, spec, self.told.set, DeviceOptions())
        self.moves = KvTransfers(self.store, self.told.set, time.monotonic_ns)
        self._handles: list[OpenKv] = []
        self._last = self._ended = 0

    def pages(self, kv: Kv) -> Pages:
        found = Pages(kv.count, kv.page_bytes)
        if hasattr(self.store, "pins"):
            done = threading.Event()
            self.store.pins.add(found.bytes.ctypes.data, found.bytes.nbytes)
            self.store.pins.later(done.set)
            assert done.wait(120), "host memory is not registered"
        return found

    def open(self, kv: Kv) -> OpenKv:
        self._handles.append(kv.opened(self))
        return self._handles[-1]

    def begin(self, kv: Kv, handle: OpenKv, pages: Pages, way: str, *, verify: bool, counter=None) -> None:
        self._last += 1
        sums = kv.sums if verify and way == "load" else ()
        host = HostPages([row.data for row in pages.rows], sums)
        transfer = Transfer(
            self._last, handle, host, kv.places, kv.shape.block, kv.page_bytes, counter=counter
        )
        getattr(self.moves, way)(transfer)

    def wait(self, count: int) -> None:
        """Until so many have ended, all well; those that ended besides count the next time."""
        while self._ended < count:
            assert self.told.wait(120), "a transfer has not ended in two minutes"
            self.told.clear()
            for done in self.moves.poll():
                if set(done.outcomes) != {Outcome.OK}:
                    raise harness.BenchError(f"a transfer failed: {done.error or done.outcomes}")
                self._ended += 1
        self._ended -= count

    def close(self) -> None:
        self.moves.close()
        self.store.close()


def median_ns(machine: Machine, work) -> float:
    """Wall time, warm."""
    for _ in range(WARM if machine.is_cuda else 1):
        work()
    taken = []
    for _ in range(machine.repetitions):
        machine.wait()
        start = time.perf_counter_ns()
        work()
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(taken)


def compare(kv: Kv, pages: Pages, work, way: str, who: str) -> None:
    """Move the pages once. Raises BenchError where a byte is wrong."""
    pages.rows[:] = kv.truth if way == "load" else 0
    kv.fill(None if way == "load" else kv.truth)
    work()
    if not (kv.holds_truth() if way == "load" else np.array_equal(pages.rows, kv.truth)):
        raise harness.BenchError(f"{who} {way}: wrong bytes")


def run(machine: Machine, report, options) -> None:
    """Load and pack of every shape; both at once; the copier."""
    import gpu

    counts = {"llama": (2, 4), "mla": (4,)} if options.tiny else {"llama": (64, 8, 256), "mla": (256,)}
    shapes = gpu.shapes(options.tiny)
    for name, some in counts.items():
        for count in some:
            kv = Kv(machine, shapes[name], count)
            _served(machine, report, options, kv, name)
            try:
                _copied(machine, report, options, kv, name)
            except UnsupportedError as error:
                report.skip(f"copier, {name}, {count} pages", str(error))
            del kv


def _say(machine: Machine, report, options, what: tuple[Kv, str, str, str, float]) -> None:
    kv, name, who, way, taken_ns = what
    ceiling = machine.ceiling(WAYS[way], options.ceiling_bytes)
    share = kv.bytes / taken_ns / ceiling
    report.row(
        "transfers", who=who, shape=name, pages=kv.count, way=way, gb_s=kv.bytes / taken_ns,
        ceiling_gb_s=ceiling, share=share, ms=taken_ns / 1e6,
    )  # fmt: skip
    if not options.tiny and (name, kv.count) in BARS:
        report.bar(
            f"{who} {way}, {name}, {kv.count} pages: share of the ceiling", share, BARS[name, kv.count]
        )


def _served(machine: Machine, report, options, kv: Kv, name: str) -> None:
    """The sidecar's transfers: with and without checksums (a pack always makes them)."""
    rig = Rig(machine, options)
    try:
        handle, pages = rig.open(kv), rig.pages(kv)
        for way, verify in (("load", True), ("load", False), ("pack", True)):

            def work(way=way, verify=verify) -> None:
                rig.begin(kv, handle, pages, way, verify=verify)
                rig.wait(1)

            who = "sidecar" if verify else "sidecar, no checksums,"
            compare(kv, pages, work, way, who)
            _say(machine, report, options, (kv, name, who, way, median_ns(machine, work)))
        if name == "llama" and kv.count == (4 if options.tiny else 64):
            _duplex(machine, report, options, rig, (kv, handle, pages))
        choices = {" ".join(map(str, shape)): choice.engine for shape, choice in rig.moves.choices.items()}
        report.row("engines", shape=name, pages=kv.count, choices=choices)
    finally:
        rig.close()


def _duplex(machine: Machine, report, options, rig: Rig, coming) -> None:
    """A load and a pack at once, of different caches."""
    kv, handle, pages = coming
    other = Kv(machine, kv.shape, kv.count)
    other_handle, other_pages = rig.open(other), rig.pages(other)
    other.fill(other.truth)
    pages.rows[:] = kv.truth
    kv.fill(None)

    def both() -> None:
        rig.begin(kv, handle, pages, "load", verify=True)
        rig.begin(other, other_handle, other_pages, "pack", verify=True)
        rig.wait(2)

    both()
    if not (kv.holds_truth() and np.array_equal(other_pages.rows, other.truth)):
        raise harness.BenchError("sidecar, both ways: wrong bytes")
    taken_ns = median_ns(machine, both)
    ceiling = machine.duplex_ceiling(options.ceiling_bytes)
    share = 2 * kv.bytes / taken_ns / ceiling
    report.row("transfers", who="sidecar", way="both", pages=kv.count, share=share, ceiling_gb_s=ceiling)
    report.bar("sidecar load and pack at once: share of the duplex ceiling", share, 0.85)


class Copying:
    """An engine's own copier, without a client: its pages lie in this process."""

    def __init__(self, kv: Kv) -> None:
        engine = EngineKv.of(kv.layers, layout=kv.shape.layout, page_tokens=kv.shape.block)
        options = CopyOptions()
        if kv.machine.is_cuda:  # said, not found: a rehearsal's tensors lie in ordinary memory
            driver = CudaCopyDriver(kv.machine.device.index or 0)
            self.copies = CudaCopies(engine, driver, stage_bytes=options.stage_bytes, way=options.way)
        else:
            self.copies = open_copies(engine, options)
        self.kv = kv
        self.pages = {
            way: Pages(kv.count, kv.page_bytes) for way in WAYS
        }  # a load's are registered to be read

    def load(self, *, verify: bool = True) -> LoadHandle:
        kv, layers = self.kv, range(self.kv.shape.layers)
        handle = LoadHandle(layers, kv.count, getattr(self.copies, "hold", None))
        after, sums = self.copies.mark(None), np.array(kv.sums, np.uint64)
        spans = [self.pages["load"].span]
        self.copies.load(LoadJob(spans, kv.places, layers, sums, verify, 0, lambda: None, handle, after))
        return handle

    def pack(self) -> StoreHandle:
        handle = StoreHandle(range(self.kv.shape.layers), self.kv.count, layered=False)
        spans = [self.pages["pack"].span]
        self.copies.store(StoreJob(spans, self.kv.places, True, handle, self.copies.mark(None)))
        return handle


def _copied(machine: Machine, report, options, kv: Kv, name: str) -> None:
    copying = Copying(kv)
    try:
        for way in WAYS:

            def work(way=way) -> None:
                getattr(copying, way)().wait(120)

            compare(kv, copying.pages[way], work, way, "copier")
            _say(machine, report, options, (kv, name, "copier", way, median_ns(machine, work)))
    finally:
        copying.copies.close()
