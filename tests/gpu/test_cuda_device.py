"""The CUDA store: every engine, the host tier's registered memory. On a GPU, and on a CUDA in ordinary memory."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")

import fake_cuda  # noqa: E402

from hicache.device import DeviceOptions, engines, open_device  # noqa: E402
from hicache.device.cuda import CudaDevice  # noqa: E402
from hicache.errors import ConfigError  # noqa: E402
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec  # noqa: E402

SLOTS = 32
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cudart"]


class Rig:
    def __init__(self, device, page_bytes, **options):
        self.page_bytes, self.told, self.next_id = page_bytes, threading.Event(), 0
        size = SLOTS * max(page_bytes, 4096) * 2
        spec = TierSpec("device", TierKind.DEVICE, size, size)
        if device == "cuda":
            try:
                self.store = open_device("cuda", spec, self.told.set, DeviceOptions(**options))
            except ConfigError as error:  # a machine without Triton
                pytest.skip(str(error))
        else:
            fake = fake_cuda.fresh()
            fake.configure(delay_us=20)
            self.store = CudaDevice(spec, self.told.set, DeviceOptions(**options), fake.driver())
        self.store.open_segment(0, "tenant", page_bytes, SLOTS)

    def move(self, op, slots, rows):
        self.next_id += 1
        buffers = [memoryview(row) for row in rows]
        self.store.submit(Batch(self.next_id, op, page_bytes=self.page_bytes, slots=slots, buffers=buffers))
        assert self.told.wait(60), "no completion"
        self.told.clear()
        [done] = self.store.poll()
        assert set(done.outcomes) == {Outcome.OK}, done.error


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ["auto", *engines.ENGINES])
@pytest.mark.parametrize("page_bytes", [248, 65536, 2 << 20])
def test_pages_come_back_by_every_engine(device, engine, page_bytes):
    if device == "cudart" and page_bytes > 65536:
        page_bytes = 200_000  # ordinary memory is slow
    rig = Rig(device, page_bytes, copy_engine=engine, cuda_staging_bytes=5 * page_bytes)
    rows = np.random.default_rng(1).integers(0, 256, (SLOTS, page_bytes), np.uint8)
    order = np.random.default_rng(2).permutation(SLOTS)
    rig.move(Op.PUT, order.tolist(), list(rows))
    back = np.zeros_like(rows)
    rig.move(Op.GET, order.tolist(), list(back))
    assert np.array_equal(rows, back)
    if engine == "auto":
        print(rig.store.stats)
    rig.store.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_registered_memfd_memory_is_copied_directly(device, engine):
    page_bytes = 1 << 20 if device == "cuda" else 1 << 16
    size = 2 * SLOTS * page_bytes
    fd = os.memfd_create("hicache-test")
    os.ftruncate(fd, size)
    arena = np.frombuffer(mmap.mmap(fd, size), np.uint8).reshape(2 * SLOTS, page_bytes)
    rig = Rig(device, page_bytes, copy_engine=engine)
    rig.store.pins.add(arena.ctypes.data, size)
    rig.store.pins.remove(0, 0, (registered := threading.Event()).set)
    assert registered.wait(60)
    assert rig.store.stats.registered_bytes == size
    arena[:SLOTS] = np.random.default_rng(3).integers(0, 256, (SLOTS, page_bytes), np.uint8)
    rig.move(Op.PUT, range(SLOTS), list(arena[:SLOTS]))
    rig.move(Op.GET, range(SLOTS), list(arena[SLOTS:]))
    assert np.array_equal(arena[:SLOTS], arena[SLOTS:])
    # without kernels a PUT is hashed on the host, hence from a copy of the host's own
    assert rig.store.stats.bounced_bytes == (0 if rig.store._driver.has_kernels else size // 2)
    rig.store.close()
    os.close(fd)


@pytest.mark.parametrize("device", DEVICES[:1])  # ordinary memory is slow
def test_more_small_pages_than_a_stages_tables_have_rows_for(device):
    """A stage of 64 MiB holds 16,384 pages of 4 KiB; the engines are measured with as many as its tables can name."""
    rig = Rig(device, 4096, cuda_staging_bytes=64 << 20)
    rows = np.random.default_rng(4).integers(0, 256, (SLOTS, 4096), np.uint8)
    rig.move(Op.PUT, range(SLOTS), list(rows))
    back = np.zeros_like(rows)
    rig.move(Op.GET, range(SLOTS), list(back))
    assert np.array_equal(rows, back)
    assert {way for way, _, _ in rig.store.stats.choices} == {"to host", "to device"}
    rig.store.close()
