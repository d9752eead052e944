"""The pool's memory: wiped between domains, shared with other processes, left alone where the device is silent."""

from __future__ import annotations

import logging
import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from pool_fake import PoolDriver

from hicache.device import DeviceOptions, open_device
from hicache.device.cuda import SHARED_GRAIN_BYTES, CudaDevice
from hicache.device.driver import DriverError
from hicache.device.kv import MemoryKind
from hicache.device.pinned import Pins
from hicache.errors import ExhaustedError, UnavailableError, UnsupportedError
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op, Outcome, TierKind, TierSpec

PAGE, SLOTS, SEGMENT = 512, 8, 1 << 12
SPEC = TierSpec("device", TierKind.DEVICE, 3 * SEGMENT, SEGMENT)
DOMAINS = ("ash", "birch", "cedar")


def cuda(driver=None, *, share=True, threaded=False, now_ns=lambda: 0, **options) -> CudaDevice:
    chosen = DeviceOptions(cuda_staging_bytes=4 * PAGE, share=share, **options)
    driver = driver or PoolDriver(1)
    return CudaDevice(SPEC, lambda: None, chosen, driver, threaded=threaded, now_ns=now_ns)


def face(domain: str) -> bytes:
    return domain.encode().ljust(8, b".") * (PAGE // 8)


def run(store, batch=None):
    """Everything that is under way, to its end."""
    if batch is not None:
        store.submit(batch)
    done = []
    for _ in range(10_000):
        busy = store.step()
        done += store.poll()
        if not busy and all(lane.idle for lane in store._lanes):
            return done
    raise AssertionError("it never ends")


def put(store, segment, domain, count=SLOTS):
    slots = [segment * SLOTS_PER_SEGMENT + index for index in range(count)]
    return Batch(segment + 1, Op.PUT, PAGE, slots=slots, buffers=[memoryview(face(domain))] * count)


def foreign(memory, domain: str) -> list[str]:
    """The other domains of which a byte stands in a mapping."""
    data = bytes(memory)
    return [other for other in DOMAINS if other != domain and other.encode() in data]


# --- wiping

steps = st.lists(
    st.tuples(
        st.sampled_from(("open", "close", "close_unsure", "put", "work")),
        st.integers(0, 2),
        st.sampled_from(DOMAINS),
    ),
    max_size=40,
)


class World:
    """A store, the domains that opened its segments, and all that was ever handed out of it."""

    def __init__(self, seed, fault_rate):
        self.driver = PoolDriver(seed, fault_rate)
        self.store = cuda(self.driver)
        self.rng = random.Random(seed)
        self.opened: dict[int, str] = {}
        self.seen: dict[int, np.ndarray] = {}  # of each open segment, once it was handed out
        self.stale: list[tuple[str, np.ndarray]] = []  # what somebody may still map of closed segments

    def open(self, segment, domain):
        if segment not in self.opened:
            self.store.open_segment(segment, domain, PAGE, SLOTS)
            self.opened[segment] = domain

    def put(self, segment, _):
        if segment in self.opened:
            run(self.store, put(self.store, segment, self.opened[segment]))

    def close(self, segment, _, *, sure=True):
        if segment in self.opened:
            run(self.store)
            domain, seen = self.opened.pop(segment), self.seen.pop(segment, None)
            if not sure and seen is not None:
                self.stale.append((domain, seen))
            self.store.close_segment(segment, reusable=sure or seen is None)

    def close_unsure(self, segment, domain):
        self.close(segment, domain, sure=False)

    def work(self, *_):
        for _ in range(self.rng.randrange(5)):
            self.store.step()

    def look(self):
        for segment in self.opened:
            try:
                self.seen[segment] = self.driver.seen(self.store.shared(segment).handle)
            except UnavailableError:
                assert segment not in self.seen
        mapped = [(self.opened[segment], memory) for segment, memory in self.seen.items()]
        for domain, memory in (*mapped, *self.stale):
            assert not foreign(memory, domain)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(0, 1 << 30), st.sampled_from((0.0, 0.0, 0.1)))
def test_no_byte_of_another_domain_is_ever_in_what_is_shared(todo, seed, fault_rate):
    """Opens and closes by domain in any order; whoever was handed memory looks at it as often as it likes."""
    world = World(seed, fault_rate)
    for what, segment, domain in todo:
        getattr(world, what)(segment, domain)
        world.look()
    world.driver.fault_rate = 0.0
    run(world.store)
    world.store.close()
    assert not world.driver.violations, world.driver.violations[:3]


def test_memory_that_somebody_may_still_map_is_not_used_again():
    store = cuda()
    store.open_segment(0, "ash", PAGE, SLOTS)
    run(store)
    address = store._segments[0].address
    assert store.shared(0).handle == address.to_bytes(64, "little")
    store.close_segment(0, reusable=False)
    assert address not in store._memory
    assert not store._spare
    run(store)
    assert address not in store._driver.memory, "it was not given back"
    store.close()
    assert not store._driver.violations


def test_what_is_shared_is_whole_granules_and_wiped_even_when_fresh():
    driver = PoolDriver(1)
    store = cuda(driver)
    store.open_segment(0, "ash", PAGE, SLOTS)
    with pytest.raises(UnavailableError, match="has not been wiped yet"):
        store.shared(0)
    run(store)
    memory = store.shared(0)
    assert memory.kind is MemoryKind.CUDA_IPC
    assert memory.size_bytes % SHARED_GRAIN_BYTES == 0
    assert memory.device_uuid == driver.uuid
    assert store.layout(0).size_bytes == memory.size_bytes == len(driver.seen(memory.handle))
    assert not driver.seen(memory.handle).any()
    with pytest.raises(UnsupportedError, match="not by a descriptor"):
        store.fd(0)
    store.close()


def test_unshared_memory_is_wiped_only_for_another_domain():
    driver = PoolDriver(1)
    store = cuda(driver, share=False)
    for domain, fills in (("ash", 0), ("ash", 0), ("birch", 1), ("birch", 1), ("ash", 2)):
        store.open_segment(0, domain, PAGE, SLOTS)
        run(store, put(store, 0, domain))
        assert driver.calls["fill"] == fills
        assert not foreign(driver.memory[store._segments[0].address], domain)
        store.close_segment(0)
    with pytest.raises(UnsupportedError, match="--share-device"):
        store.open_segment(0, "ash", PAGE, SLOTS) or store.shared(0)
    store.close()


def test_a_domain_gets_its_own_memory_back_where_it_can():
    store = cuda(share=False)
    for segment, domain in enumerate(DOMAINS):
        store.open_segment(segment, domain, PAGE, SLOTS)
    before = {domain: store._segments[at].address for at, domain in enumerate(DOMAINS)}
    for segment in range(3):
        store.close_segment(segment)
    for segment, domain in enumerate(reversed(DOMAINS)):
        store.open_segment(segment, domain, PAGE, SLOTS)
        assert store._segments[segment].address == before[domain]
    assert not store._driver.calls["fill"]
    store.close()


def test_the_first_put_waits_for_the_wipe_and_survives_it():
    driver = PoolDriver(7)
    store = cuda(driver)
    store.open_segment(0, "ash", PAGE, SLOTS)
    [done] = run(store, put(store, 0, "ash"))
    assert set(done.outcomes) == {Outcome.OK}
    assert bytes(driver.seen(store.shared(0).handle)[:PAGE]) == face("ash")
    sums, before = store.columns([0, 3])
    assert sums.tolist() == [done.checksums[0], done.checksums[3]]
    store.free([3])
    assert store.columns([0, 3])[1].tolist() == [before[0], before[1] + 1]
    store.close()


def test_a_segment_that_cannot_be_wiped_takes_no_pages_and_is_not_shared(monkeypatch, caplog):
    driver = PoolDriver(1)
    store = cuda(driver)

    def refuse(*_):
        raise DriverError("cudaMemsetAsync", "invalid argument (1)")

    monkeypatch.setattr(driver, "fill", refuse)
    store.open_segment(0, "ash", PAGE, SLOTS)
    [done] = run(store, put(store, 0, "ash"))
    assert set(done.outcomes) == {Outcome.FAULT}
    assert "was not wiped" in done.error
    with pytest.raises(UnavailableError, match="was not wiped"):
        store.shared(0)
    monkeypatch.undo()
    store.close_segment(0)
    store.open_segment(0, "ash", PAGE, SLOTS)
    [done] = run(store, put(store, 0, "ash"))
    assert set(done.outcomes) == {Outcome.OK}
    store.close()


# --- ordinary memory


def cpu(*, share):
    told = threading.Event()
    return open_device("cpu", SPEC, told.set, DeviceOptions(share=share)), told


def finish(store, told, batch):
    store.submit(batch)
    assert told.wait(20)
    told.clear()
    return store.poll()[0]


def test_another_process_can_read_the_cpu_pool_and_nobody_else_can_write_it():
    store, told = cpu(share=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store.open_segment(0, "ash", PAGE, SLOTS)
    memory = store.shared(0)
    assert memory.kind is MemoryKind.MEMFD
    assert memory.fd == store.fd(0)
    seen = mmap.mmap(memory.fd, memory.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    assert not any(bytes(seen))
    assert Outcome.OK in finish(store, told, put(store, 0, "ash")).outcomes
    layout = store.layout(0)
    start = layout.first_slot_offset + 3 * layout.stride
    assert seen[start : start + PAGE] == face("ash")
    with pytest.raises(PermissionError):
        mmap.mmap(memory.fd, memory.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for change in (lambda: os.ftruncate(memory.fd, 0), lambda: os.pwrite(memory.fd, b"x", 0)):
        with pytest.raises(PermissionError):
            change()
    seen.close()
    store.close_segment(0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    store.open_segment(1, "ash", PAGE, SLOTS)
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_closed_segment_of_the_cpu_pool_shows_nothing_of_the_next_one():
    store, told = cpu(share=True)
    store.open_segment(0, "ash", PAGE, SLOTS)
    finish(store, told, put(store, 0, "ash"))
    kept = mmap.mmap(store.fd(0), SEGMENT, mmap.MAP_SHARED, mmap.PROT_READ)
    store.close_segment(0, reusable=False)
    store.open_segment(0, "birch", PAGE, SLOTS)
    finish(store, told, put(store, 0, "birch"))
    assert not foreign(kept, "ash")
    seen = mmap.mmap(store.fd(0), SEGMENT, mmap.MAP_SHARED, mmap.PROT_READ)
    assert not foreign(seen, "birch")
    kept.close()
    seen.close()
    store.close()


def test_the_cpu_pool_is_not_shared_unless_told_to():
    store, _ = cpu(share=False)
    store.open_segment(0, "ash", PAGE, SLOTS)
    for ask in (store.shared, store.fd):
        with pytest.raises(UnsupportedError, match="--share-device"):
            ask(0)
    store.close()


def test_without_descriptors_a_shared_segment_is_not_opened(monkeypatch):
    store, _ = cpu(share=True)

    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ExhaustedError, match="Too many open files"):
        store.open_segment(0, "ash", PAGE, SLOTS)
    store.close()


# --- silence


class Time:
    now = 0

    def __call__(self):
        return self.now


def silent(caplog, *, op=Op.GET):
    """A store whose device has stopped with one batch under way, and its clock."""
    driver, clock = PoolDriver(3, delays=False), Time()
    store = cuda(driver, share=False, now_ns=clock, timeout_ms=5_000)
    store.open_segment(0, "ash", PAGE, SLOTS)
    run(store, put(store, 0, "ash"))
    arena = np.zeros((SLOTS, PAGE), np.uint8)
    store.pins.add(arena.ctypes.data, arena.nbytes)
    store.step()
    driver.hush()
    rows = [memoryview(row) for row in arena]
    store.submit(Batch(9, op, PAGE, slots=list(range(SLOTS)), buffers=rows))
    for _ in range(20):
        store.step()
    assert not store.poll()
    return store, driver, clock, arena


def test_a_device_without_an_answer_is_given_up_and_its_memory_left_alone(caplog):
    store, driver, clock, arena = silent(caplog)
    clock.now += 4_999_000_000
    store.step()
    assert not store.poll()
    clock.now += 2_000_000
    store.step()
    [done] = store.poll()
    assert set(done.outcomes) == {Outcome.FAULT}
    assert "no answer for 5 s" in done.error
    assert "no answer for 5 s" in store.stats.problem
    with pytest.raises(ExhaustedError, match="given up"):
        store.open_segment(1, "ash", PAGE, SLOTS)
    store.submit(put(store, 0, "ash"))
    for _ in range(3):
        store.step()
    assert set(store.poll()[0].outcomes) == {Outcome.FAULT}
    memory = dict(driver.memory)
    with caplog.at_level(logging.ERROR):
        store.close()
    assert "gives no answer: 1 segments are left to it" in caplog.text
    assert driver.memory.keys() == memory.keys(), "memory that the device may write to was given back"
    assert driver.registered
    later = []
    store.pins.remove(arena.ctypes.data, arena.nbytes, lambda: later.append(True))
    assert not later, "host memory that the device may write to would be unmapped"
    driver.speak()  # what was queued happens after all
    assert not driver.violations
    assert not store.poll()


def test_slow_is_not_silent(caplog):
    """Each answer starts the time anew."""
    driver, clock = PoolDriver(3), Time()
    store = cuda(driver, share=False, now_ns=clock, timeout_ms=1_000)
    store.open_segment(0, "ash", PAGE, SLOTS)
    run(store)
    for _ in range(6):
        store.submit(put(store, 0, "ash", count=4))
    done = []
    for _ in range(400):
        clock.now += 30_000_000
        store.step()
        done += store.poll()
    assert len(done) == 6
    assert all(set(each.outcomes) == {Outcome.OK} for each in done)
    assert clock.now > 5 * 1_000_000_000
    store.close()


def test_a_measurement_without_an_answer_is_given_up_too():
    driver, clock = PoolDriver(3), Time()
    store = cuda(
        driver,
        share=False,
        now_ns=lambda: (setattr(clock, "now", clock.now + 1_000_000), clock.now)[1],
        timeout_ms=100,
    )
    driver.hush()
    store.open_segment(0, "ash", PAGE, SLOTS)
    store.submit(put(store, 0, "ash"))
    for _ in range(10):
        store.step()
    [done] = store.poll()
    assert "no answer" in done.error
    store.close()


def test_close_ends_while_a_call_of_the_driver_does_not_return(monkeypatch):
    driver = PoolDriver(3, delays=False)
    store = cuda(driver, share=False, threaded=True, now_ns=time.monotonic_ns, timeout_ms=100)
    store.open_segment(0, "ash", PAGE, SLOTS)
    stuck, entered = threading.Event(), threading.Event()

    def hangs(*_):
        entered.set()
        stuck.wait(20)

    monkeypatch.setattr(driver, "ready", hangs)
    store.submit(put(store, 0, "ash"))
    assert entered.wait(20)
    store.close()
    [done] = store.poll()
    assert set(done.outcomes) == {Outcome.FAULT}
    stuck.set()


def test_threads_give_a_silent_device_up_by_themselves():
    driver = PoolDriver(3, delays=False)
    told = threading.Event()
    options = DeviceOptions(cuda_staging_bytes=4 * PAGE, timeout_ms=50)
    store = CudaDevice(SPEC, told.set, options, driver, now_ns=time.monotonic_ns)
    store.open_segment(0, "ash", PAGE, SLOTS)
    driver.hush()
    store.submit(put(store, 0, "ash"))
    assert told.wait(20)
    assert "no answer for 0.05 s" in store.poll()[0].error
    store.close()


# --- calibration


def test_engines_are_found_before_the_first_batch():
    driver = PoolDriver(1, delays=False)
    store = cuda(driver, share=False)
    store.open_segment(0, "ash", PAGE, SLOTS)
    while store.step():
        pass
    assert {shape[1] for shape in store.stats.choices} == {PAGE}
    assert len(store.stats.choices) == 4  # both directions, few and many
    before = dict(driver.calls)
    store.open_segment(1, "ash", PAGE, SLOTS)
    run(store)
    assert driver.calls["move_rows"] == before["move_rows"]
    store.open_segment(2, "ash", 2 * PAGE, SLOTS // 2)
    run(store)
    assert len(store.stats.choices) == 8
    store.close()
    assert not driver.violations


def test_nothing_is_measured_where_the_engine_was_said():
    store = cuda(share=False, copy_engine="dma")
    store.open_segment(0, "ash", PAGE, SLOTS)
    run(store)
    assert not store.stats.choices
    store.close()


def test_what_is_done_later_may_fail(caplog):
    pins = Pins(PoolDriver(1), threaded=False)

    def fails():
        raise DriverError("cudaFree", "unknown error (999)")

    pins.later(fails)
    pins.work()
    assert "was not given back" in caplog.text
    pins.close()
