"""Transfers over a CUDA device, on the fake: against the twin, by every way, and what goes wrong."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from cuda_fake import FakeDriver
from transfer_rig import Count, Form, Planes, forms, part, same, sums, twin

from hicache.device import DeviceOptions
from hicache.device.courses import runs
from hicache.device.cuda import CudaDevice
from hicache.device.driver import DriverError
from hicache.device.kv import FAILED, MemoryKind, SharedMemory
from hicache.device.opening import KvTransfers
from hicache.device.transfers import DevicePages, HostPages, Transfer
from hicache.errors import UnsupportedError
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec

SPEC = TierSpec("device", TierKind.DEVICE, 4 << 21, 1 << 21)


class Rig:
    """A store on a fake device, an engine on another fake that has its memory, and pages of random bytes."""

    def __init__(
        self,
        form=None,
        *,
        pages=6,
        page_tokens=4,
        unit_tokens=4,
        seed=0,
        pinned=True,
        engine="auto",
        bay_pages=3,
        skip=0.0,
        spread=False,
        threaded=False,
        driver=None,
    ):
        self.rng = np.random.default_rng(seed)
        self.form = form or Form()
        self.engine = FakeDriver(seed)
        self.driver = driver or FakeDriver(seed)
        self.page_tokens = page_tokens
        self.page_bytes = self.form.page_offset + part(self.form, page_tokens)
        self.told = threading.Event()
        options = DeviceOptions(cuda_staging_bytes=bay_pages * self.page_bytes, copy_engine=engine)
        self.store = CudaDevice(SPEC, self.told.set, options, self.driver, threaded=threaded)
        self.moves = KvTransfers(self.store, self.told.set, lambda: 0, threaded=threaded)
        self.threaded = threaded
        self.planes = Planes(self.form, self.rng, self._take)
        handles = [
            SharedMemory(
                MemoryKind.CUDA_IPC,
                len(memory),
                handle=self.engine.share(memory.ctypes.data),
                device_uuid=self.driver.uuid,
            )
            for memory in self.planes.maps
        ]
        self.memories = handles
        self.handle = self.moves.open_kv(self.planes.kv(handles))
        stride = -(-self.page_bytes // 64) * 64
        self.arena = np.zeros(((2 if spread else 1) * pages, stride), np.uint8)
        order = random.Random(seed).sample(range(len(self.arena)), pages) if spread else range(pages)
        self.rows = [self.arena[at, : self.page_bytes] for at in order]
        for row in self.rows:
            row[:] = self.rng.integers(0, 256, self.page_bytes, np.uint8)
        if pinned:
            self.store.pins.add(self.arena.ctypes.data, self.arena.nbytes)
            self.store.pins.work()
        self.places = self.form.places(random.Random(seed), pages, page_tokens, unit_tokens, skip=skip)
        self.next_id = 0

    def _take(self, size):
        return self.engine.memory[self.engine.allocate(size)]

    def transfer(self, pages=None, **more):
        self.next_id += 1
        pages = pages or HostPages([row.data for row in self.rows], sums(self.rows))
        return Transfer(
            self.next_id, self.handle, pages, self.places, self.page_tokens, self.page_bytes, **more
        )

    def wait(self, count=1):
        found = []
        for _ in range(100_000):
            if self.threaded:
                assert self.told.wait(20), "a transfer never ended"
                self.told.clear()
            else:
                self.moves.step()
                self.store.step()
            found += self.moves.poll()
            if len(found) >= count:
                return found
        raise AssertionError("a transfer never ended")

    def run(self, transfer, *, pack=False):
        (self.moves.pack if pack else self.moves.load)(transfer)
        return self.wait()[0]

    def expect(self, pack, **more):
        maps, rows = self.planes.copy(), np.array(self.rows)
        twin(self.planes, self.places, rows, page_tokens=self.page_tokens, pack=pack, maps=maps, **more)
        return maps, rows

    def store_pages(self):
        """Put the pages into the device's slots."""
        self.store.open_segment(0, "tenant", self.page_bytes, 12)
        slots = list(range(3, 3 + len(self.rows)))
        views = [memoryview(bytes(row)) for row in self.rows]
        self.store.submit(Batch(1, Op.PUT, page_bytes=self.page_bytes, slots=slots, buffers=views))
        for _ in range(100_000):
            self.store.step()
            if self.store.poll():
                return slots
        raise AssertionError("the pages were not put")

    def close(self):
        self.moves.close()
        self.store.close()
        for memory in self.planes.maps:
            self.engine.release(memory.ctypes.data)
        assert not self.driver.violations, self.driver.violations[:3]


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


def counted(wanted):
    """A counter that lets all layers be taken, or none at all."""
    return Count(1 << 40) if wanted else None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(forms(), st.data())
def test_transfers_do_what_the_twin_does(shape, data):
    form, page_tokens, unit_tokens, layers = shape
    ways = st.sampled_from(["auto", "kernel", "staged", "dma"])
    made = Rig(
        form,
        pages=data.draw(st.integers(1, 9)),
        page_tokens=page_tokens,
        unit_tokens=unit_tokens,
        seed=data.draw(st.integers(0, 1 << 16)),
        pinned=data.draw(st.booleans()),
        engine=data.draw(ways),
        bay_pages=data.draw(st.integers(1, 4)),
        skip=data.draw(st.sampled_from([0.0, 0.3])),
        spread=data.draw(st.booleans()),
    )
    first, count = layers
    pack, layered = data.draw(st.booleans()), data.draw(st.booleans())
    maps, rows = made.expect(pack, layers=layers)
    more = {"first_layer": first, "layers": count, "counter": None}
    if layered:
        more["counter"] = Count(1 << 40 if pack else 0)
    done = made.run(made.transfer(**more), pack=pack)
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert np.array_equal(np.array(made.rows), rows)
    assert same(made.planes.maps, maps)
    assert list(done.checksums) == sums(rows)
    if layered and not pack:
        assert more["counter"].value == count
    made.close()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(forms(), st.integers(0, 1 << 16), st.booleans(), st.booleans())
def test_loads_from_the_devices_slots_do_what_the_twin_does(shape, seed, layered, verify):
    form, page_tokens, unit_tokens, layers = shape
    made = Rig(form, page_tokens=page_tokens, unit_tokens=unit_tokens, seed=seed)
    maps, _ = made.expect(pack=False, layers=layers)
    slots = made.store_pages()
    more = {"first_layer": layers[0], "layers": layers[1], "counter": Count() if layered else None}
    done = made.run(made.transfer(DevicePages(slots, verify), **more))
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert same(made.planes.maps, maps)
    assert list(done.checksums) == sums(made.rows)
    made.close()
