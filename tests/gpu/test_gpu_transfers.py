"""Transfers through the real driver, an engine in another process. On a GPU, and on a CUDA in ordinary memory."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device room needs torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "device"))

import fake_cuda
from test_cudart_sharing import Engine
from transfer_rig import Count, Form, Planes, part, same, sums, twin

from hicache.device import DeviceOptions, open_device
from hicache.device.cuda import CudaDevice
from hicache.device.kv import MemoryKind, SharedMemory
from hicache.device.opening import open_transfers
from hicache.device.transfers import DevicePages, HostPages, Transfer
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec

FORM = Form(layers=3, blocks=8, block_tokens=4, memories=1)
PAGE_TOKENS, PAGES = 4, 6
PAGE_BYTES = part(FORM, PAGE_TOKENS)


DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cudart"]


class Rig:
    """A sidecar's transfers on a real driver, and an engine whose planes they reach."""

    def __init__(self, device, way):
        self.told = threading.Event()
        spec = TierSpec("device", TierKind.DEVICE, 1 << 20, 1 << 19)
        options = DeviceOptions(cuda_staging_bytes=4 * PAGE_BYTES, copy_engine=way)
        if device == "cuda":
            self.store = open_device("cuda", spec, self.told.set, options)
            self.engine = Engine("gpu_engine.py")
        else:
            fake = fake_cuda.fresh()
            fake.configure(delay_us=100)
            self.store = CudaDevice(spec, self.told.set, options, fake.driver())
            self.engine = Engine()
        self.moves = open_transfers(self.store, self.told.set, now_ns=time.monotonic_ns)
        self.planes = Planes(FORM, np.random.default_rng(0), lambda size: np.zeros(size, np.uint8))
        size = len(self.planes.maps[0])
        told = self.engine("cache", size)
        assert not told["offset"]
        self.memory = SharedMemory(
            MemoryKind.CUDA_IPC,
            size,
            handle=bytes.fromhex(told["handle"]),
            device_uuid=self.store.driver.uuid,
        )
        self.handle = self.moves.open_kv(self.planes.kv([self.memory]))
        driver = self.store.driver
        self.stream, self.event, self.pinned = driver.stream(0), driver.event(), driver.allocate_host(size)
        self.rows = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
        self.places = np.random.default_rng(2).permutation(8)[:PAGES].reshape(-1, 1).astype(np.int64) * 4
        self.look()

    def look(self):
        """Read the engine's memory as it is mapped here."""
        driver, start = self.store.driver, int(self.handle.planes[0]) - self.planes.plane_offset[0]
        driver.bind()
        driver.copy(self.stream, [self.pinned.ctypes.data], [start], [self.pinned.nbytes])
        driver.record(self.event, self.stream)
        while not driver.ready(self.event):
            pass
        self.planes.maps[0][:] = self.pinned
        return self.planes.maps

    def transfer(self, pages=None, **more):
        pages = pages or HostPages([row.data for row in self.rows], sums(self.rows))
        return Transfer(1, self.handle, pages, self.places, PAGE_TOKENS, PAGE_BYTES, **more)

    def wait(self, poll):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            self.told.wait(0.1)
            self.told.clear()
            found = poll()
            if found:
                return found[0]
        raise AssertionError("it never ended")

    def expect(self, *, pack):
        maps, rows = self.planes.copy(), self.rows.copy()
        twin(self.planes, self.places, rows, page_tokens=PAGE_TOKENS, pack=pack, maps=maps)
        return maps, rows

    def close(self):
        self.engine.kill()
        self.store.driver.release_host(self.pinned)
        self.moves.close()
        self.store.close()


@pytest.fixture(params=["auto", "kernel", "dma"])
def way(request):
    return request.param


@pytest.fixture(params=DEVICES)
def rig(request, way):
    made = Rig(request.param, way)
    yield made
    made.close()


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_pages_go_to_another_processs_planes_and_back(rig, layered, pinned):
    if pinned:
        done = threading.Event()
        rig.store.pins.add(rig.rows.ctypes.data, rig.rows.nbytes)
        rig.store.pins.later(done.set)
        assert done.wait(20)
    maps, _ = rig.expect(pack=False)
    counter = Count() if layered else None
    rig.moves.load(rig.transfer(counter=counter))
    done = rig.wait(rig.moves.poll)
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert same(rig.look(), maps)
    assert not layered or counter.value == FORM.layers
    seen = [rig.engine("ask", int(at))["byte"] for at in range(0, rig.memory.size_bytes, 97)]
    assert seen == maps[0][::97].tolist(), "the engine sees something else"
    rig.rows[:] = 0
    _, rows = rig.expect(pack=True)
    rig.moves.pack(rig.transfer(counter=Count(FORM.layers) if layered else None))
    done = rig.wait(rig.moves.poll)
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert np.array_equal(rig.rows, rows)
    assert list(done.checksums) == sums(rows)
    if pinned:
        gone = threading.Event()
        rig.store.pins.remove(rig.rows.ctypes.data, rig.rows.nbytes, gone.set)
        assert gone.wait(20)


def test_pages_go_from_the_devices_slots_even_when_the_engine_is_gone(rig):
    rig.store.open_segment(0, "tenant", PAGE_BYTES, 16)
    views = [memoryview(bytes(row)) for row in rig.rows]
    rig.store.submit(Batch(1, Op.PUT, page_bytes=PAGE_BYTES, slots=range(PAGES), buffers=views))
    assert set(rig.wait(rig.store.poll).outcomes) == {Outcome.OK}
    rig.engine.process.kill()
    maps, _ = rig.expect(pack=False)
    rig.moves.load(rig.transfer(DevicePages(range(PAGES)), counter=Count()))
    done = rig.wait(rig.moves.poll)
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert same(rig.look(), maps)
    closed = threading.Event()
    rig.moves.close_kv(rig.handle, closed.set)
    assert closed.wait(20), "a dead engine's memory stays mapped"
