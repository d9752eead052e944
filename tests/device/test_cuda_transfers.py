"""Transfers over a CUDA device, on the fake: against the twin, by every way, and what goes wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from cuda_fake import FakeDriver
from pool_fake import PoolDriver
from transfer_rig import Count, Form, Planes, forms, part, same, sums, twin

from hicache.device import DeviceOptions
from hicache.device.courses import runs
from hicache.device.cuda import CudaDevice, open_cuda
from hicache.device.driver import DriverError
from hicache.device.kv import FAILED, MemoryKind, SharedMemory
from hicache.device.opening import KvTransfers
from hicache.device.transfers import DevicePages, HostPages, Transfer
from hicache.errors import InvalidArgumentError, UnsupportedError
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
        timeout_ms=0,
        clock=lambda: 0,
    ):
        self.rng = np.random.default_rng(seed)
        self.form = form or Form()
        self.engine = FakeDriver(seed)
        self.driver = driver or FakeDriver(seed)
        self.page_tokens = page_tokens
        self.page_bytes = self.form.page_offset + part(self.form, page_tokens)
        self.told = threading.Event()
        options = DeviceOptions(
            cuda_staging_bytes=bay_pages * self.page_bytes, copy_engine=engine, timeout_ms=timeout_ms
        )
        self.store = CudaDevice(SPEC, self.told.set, options, self.driver, threaded=threaded, now_ns=clock)
        self.now_ns = 0
        self.moves = KvTransfers(self.store, self.told.set, lambda: self.now_ns, threaded=threaded)
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


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_threads_move_pages_and_close_ends_what_was_submitted(pinned, pack):
    made = Rig(threaded=True, pinned=pinned)
    maps, rows = made.expect(pack)
    done = made.run(made.transfer(counter=Count(1 << 40 if pack else 0)), pack=pack)
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert same(made.planes.maps, maps)
    assert np.array_equal(np.array(made.rows), rows)
    for number in range(10):
        (made.moves.pack if number % 2 else made.moves.load)(made.transfer(counter=Count()))
    made.moves.close()
    assert sorted(late.id for late in made.moves.poll()) == list(range(2, 12))
    made.close()


def test_layers_are_told_as_they_land_and_packs_wait_for_theirs(rig):
    counter = Count()
    rig.run(rig.transfer(counter=counter))
    assert counter.seen == [1, 2]
    counter = Count()
    rig.moves.pack(rig.transfer(counter=counter, deadline_ns=5))
    for counter.value in (0, 1):
        for _ in range(200):
            rig.moves.step()
        assert not rig.moves.poll()
    rig.now_ns = 5
    [done] = rig.wait()
    assert "deadline" in done.error
    assert set(done.outcomes) == {Outcome.FAULT}


def test_the_engine_is_measured_on_the_first_chunks_of_a_shape():
    made = Rig(pages=8, bay_pages=8)
    for _ in range(8):
        made.run(made.transfer(counter=Count()))
    shape = ("to engine", made.form.per_layer * made.page_bytes // 4, "many")
    choice = made.moves.choices[shape]
    assert set(choice.gb_per_s) == {"staged", "kernel"}
    assert choice.gb_per_s[choice.engine] == max(choice.gb_per_s.values())
    before = made.driver.calls["strips"]
    made.run(made.transfer(counter=Count()))
    assert (made.driver.calls["strips"] > before) == (choice.engine == "staged")
    made.close()


def test_whole_pages_are_hashed_on_the_device_and_strips_on_the_host(rig):
    before = rig.driver.calls["hash_rows"]
    wrong = sums(rig.rows)
    wrong[4] ^= 1
    for counter, hashes in ((None, 2), (Count(), 0)):
        done = rig.run(rig.transfer(HostPages([row.data for row in rig.rows], wrong), counter=counter))
        assert [outcome is Outcome.CORRUPT for outcome in done.outcomes] == [n == 4 for n in range(6)]
        assert rig.driver.calls["hash_rows"] == before + hashes
        before = rig.driver.calls["hash_rows"]
    assert counter.value == FAILED


@pytest.mark.parametrize(("engine", "strips", "whole"), [("kernel", 0, 0), ("dma", 1, 1), ("batch", 1, 1)])
def test_the_way_can_be_said(engine, strips, whole):
    made = Rig(engine=engine)
    made.run(made.transfer(counter=Count()))
    assert (made.driver.calls["strips"] > 0) == bool(strips)
    made.run(made.transfer())
    assert (made.driver.calls["hash_rows"] > 0) == bool(whole)
    made.close()


def test_memory_that_is_taken_away_under_a_transfer_stays_registered_until_it_has_ended(rig):
    gone = []
    rig.moves.load(rig.transfer())
    rig.store.pins.remove(rig.arena.ctypes.data, rig.arena.nbytes, lambda: gone.append(True))
    rig.store.pins.work()
    assert not gone
    assert rig.driver.registered
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.OK}
    rig.store.pins.work()
    assert gone == [True]
    assert not rig.driver.registered


def test_runs_of_neighbours_end_where_registered_memory_does():
    rows = np.array([0, 10, 20, 30, 100, 120, 200], np.int64)
    assert runs(rows, 10, [0]) == [(0, 4, 10), (4, 2, 20), (6, 1, 10)]
    assert runs(rows, 10, [0, 20]) == [(0, 2, 10), (2, 2, 10), (4, 2, 20), (6, 1, 10)]
    assert runs(rows, 15, [0]) == [(0, 1, 15), (1, 1, 15), (2, 1, 15), (3, 2, 70), (5, 2, 80)]
    assert runs(np.array([5, 5], np.int64), 10, [0]) == [(0, 1, 10), (1, 1, 10)]
    assert runs(np.array([0, 1 << 40], np.int64), 10, [0]) == [(0, 1, 10), (1, 1, 10)]


# --- mapping


def test_an_allocation_of_two_regions_is_mapped_once_until_both_are_closed(rig):
    other = rig.moves.open_kv(rig.planes.kv(rig.memories))
    assert len(rig.driver.mapped) == 1
    rig.moves.close_kv(rig.handle, lambda: None)
    assert len(rig.driver.mapped) == 1
    gone = []
    rig.moves.close_kv(other, lambda: gone.append(True))
    assert gone
    assert not rig.driver.mapped


def test_memory_that_cannot_be_mapped_is_refused_with_advice(rig):
    far = SharedMemory(MemoryKind.CUDA_IPC, 1 << 20, handle=bytes(64), device_uuid=bytes(range(16)))
    with pytest.raises(UnsupportedError, match=rf"{bytes(range(16)).hex()}.*{rig.driver.uuid.hex()}"):
        rig.moves.open_kv(rig.planes.kv([far]))
    own = SharedMemory(
        MemoryKind.CUDA_IPC,
        1 << 20,
        handle=rig.driver.share(rig.driver.allocate(1 << 20)),
        device_uuid=rig.driver.uuid,
    )
    with pytest.raises(UnsupportedError, match=r"expandable_segments:False.*PID and IPC namespaces"):
        rig.moves.open_kv(rig.planes.kv([own]))
    short = [dataclasses.replace(memory, size_bytes=len(rig.planes.maps[0]) + 1) for memory in rig.memories]
    for still in (1, 0):
        with pytest.raises(InvalidArgumentError, match="it is said to have"):
            rig.moves.open_kv(rig.planes.kv(short))
        assert len(rig.driver.mapped) == still
        if still:
            rig.moves.close_kv(rig.handle, lambda: None)
    rig.driver.release(next(at for at, m in rig.driver.memory.items() if m.nbytes == 1 << 20))


def test_pages_of_the_device_go_to_its_own_regions_only(rig):
    host = Planes(rig.form, rig.rng)
    handle = rig.moves.open_kv(host.kv())
    rig.moves.check(rig.handle, device_pages=True)
    with pytest.raises(UnsupportedError, match="fetch without device=True"):
        rig.moves.check(handle, device_pages=True)
    assert rig.moves.memory_kinds == ("memfd", "cuda-ipc", "cuda-fd")
    assert rig.moves.device_uuids == (rig.driver.uuid,)
    rig.moves.close_kv(handle, lambda: None)
    host.close()


def test_memory_by_descriptor(rig):
    fds = [rig.engine.fds[memory.ctypes.data] for memory in rig.planes.maps]
    memories = [
        SharedMemory(MemoryKind.CUDA_FD, len(memory), fd=os.dup(fd), device_uuid=rig.driver.uuid)
        for memory, fd in zip(rig.planes.maps, fds, strict=True)
    ]
    rig.moves.close_kv(rig.handle, lambda: None)
    rig.handle = rig.moves.open_kv(rig.planes.kv(memories))
    maps, _ = rig.expect(pack=False)
    assert set(rig.run(rig.transfer()).outcomes) == {Outcome.OK}
    assert same(rig.planes.maps, maps)


def test_without_kernels_no_region_is_taken():
    driver = FakeDriver(kernels=False)
    store = CudaDevice(SPEC, lambda: None, DeviceOptions(), driver, threaded=False)
    moves = KvTransfers(store, lambda: None, lambda: 0, threaded=False)
    assert moves.memory_kinds == ("memfd",)
    assert moves.device_uuids == ()
    moves.close()
    store.close()


ENGINE = """
    import sys
    sys.path[:0] = [{tests!r}]
    from cuda_fake import FakeDriver
    driver = FakeDriver(7)
    address = driver.allocate(int(sys.argv[1]))
    driver.memory[address][:] = 5
    print(driver.share(address).hex(), flush=True)
    for line in sys.stdin:
        print(driver.memory[address].tobytes().hex(), flush=True)
"""


def test_an_engine_in_another_process_sees_what_was_loaded(rig):
    size = len(rig.planes.maps[0])
    code = textwrap.dedent(ENGINE.format(tests=str(Path(__file__).parent)))
    engine = subprocess.Popen(
        [sys.executable, "-c", code, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        handle = bytes.fromhex(engine.stdout.readline())
        memory = SharedMemory(MemoryKind.CUDA_IPC, size, handle=handle, device_uuid=rig.driver.uuid)
        rig.handle = rig.moves.open_kv(rig.planes.kv([memory]))
        rig.planes.maps[0][:] = 5
        maps, _ = rig.expect(pack=False)
        assert set(rig.run(rig.transfer()).outcomes) == {Outcome.OK}
        engine.stdin.write("\n")
        engine.stdin.flush()
        assert bytes.fromhex(engine.stdout.readline()) == maps[0].tobytes()
    finally:
        engine.kill()
        engine.communicate()
    assert set(rig.run(rig.transfer()).outcomes) == {Outcome.OK}, "its memory stays mapped"
    with pytest.raises(UnsupportedError, match="could not be mapped"):
        rig.moves.open_kv(
            rig.planes.kv(
                [dataclasses.replace(memory, handle=bytes([memory.handle[0] ^ 1]) + memory.handle[1:])]
            )
        )


# --- errors


def test_a_failed_chunk_fails_its_pages_and_no_other_transfer(rig, monkeypatch):
    def refuse(*arguments, **named):
        raise DriverError("move_units", "unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(rig.driver, "move_units", refuse)
        counter = Count()
        done = rig.run(rig.transfer(counter=counter))
    assert set(done.outcomes) == {Outcome.FAULT}
    assert "unspecified launch failure" in done.error
    assert counter.value == FAILED
    assert set(rig.run(rig.transfer()).outcomes) == {Outcome.OK}


def test_a_device_that_is_lost_is_asked_for_nothing_any_more(monkeypatch):
    made = Rig()

    def lost(event):
        raise DriverError("ready", "device lost", fatal=True)

    with monkeypatch.context() as patch:
        patch.setattr(made.driver, "ready", lost)
        done = made.run(made.transfer())
        assert set(done.outcomes) == {Outcome.FAULT}
        assert "given up: ready: device lost" in done.error
    before = made.driver.calls["move_units"]
    for pack in (False, True):
        done = made.run(made.transfer(counter=Count()), pack=pack)
        assert set(done.outcomes) == {Outcome.FAULT}
        assert "device lost" in done.error
    assert made.driver.calls["move_units"] == before
    made.driver.run_all()
    made.close()


def test_a_silent_device_is_given_up_and_keeps_what_it_may_still_use():
    clock = [0]
    driver = PoolDriver(3)
    made = Rig(driver=driver, timeout_ms=50, clock=lambda: clock[0])
    made.moves.load(made.transfer())
    for _ in range(3):
        made.moves.step()
    driver.hush()
    for clock[0] in (10_000_000, 40_000_000):
        made.moves.step()
        assert not made.moves.poll()
    clock[0] = 200_000_000
    [done] = made.wait()
    assert set(done.outcomes) == {Outcome.FAULT}
    assert "no answer for 0.05 s" in done.error
    gone = []
    made.moves.close_kv(made.handle, lambda: gone.append(True))
    made.store.pins.remove(made.arena.ctypes.data, made.arena.nbytes, lambda: gone.append(False))
    made.store.pins.work()
    assert gone == [True], "Unregister is answered; the host's memory is not given back"
    assert driver.mapped
    assert driver.registered
    made.moves.close()
    driver.speak()
    assert not driver.violations


def test_regions_of_several_devices_and_pages_on_another():
    first = PoolDriver(1)
    drivers = [first, PoolDriver(2, host=first)]
    store = open_cuda(SPEC, lambda: None, DeviceOptions(cuda_staging_bytes=4096), drivers)
    moves = KvTransfers(store, lambda: None, lambda: 0, threaded=True)
    assert moves.device_uuids == tuple(driver.uuid for driver in drivers)
    engine, form = FakeDriver(9), Form()
    planes = Planes(form, np.random.default_rng(0), lambda size: engine.memory[engine.allocate(size)])
    size = len(planes.maps[0])
    memory = SharedMemory(
        MemoryKind.CUDA_IPC,
        size,
        handle=engine.share(planes.maps[0].ctypes.data),
        device_uuid=drivers[1].uuid,
    )
    handle = moves.open_kv(planes.kv([memory]))
    assert drivers[1].mapped
    page_bytes = part(form, 4)
    for segment in (0, 1):
        store.open_segment(segment, "tenant", page_bytes, 4)
    elsewhere = next(s for s in (0, 1) if store.device_of(s).driver is first)
    places = np.zeros((1, 1), np.int64)
    with pytest.raises(UnsupportedError, match=r"another device.*fetch without device=True"):
        moves.load(Transfer(1, handle, DevicePages([elsewhere << 24]), places, 4, page_bytes))
    moves.load(Transfer(2, handle, DevicePages([(1 - elsewhere) << 24]), places, 4, page_bytes))
    moves.close()
    assert [done.outcomes for done in moves.poll()] == [(Outcome.MISS,)]
    assert not drivers[1].mapped
    store.close()
    engine.release(planes.maps[0].ctypes.data)
    assert not drivers[1].violations
