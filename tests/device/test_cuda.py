"""The CUDA store's parts on the fake: threads, engines, pinned memory, errors, the runtime's calls."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from cuda_fake import FakeDriver
from pool_fake import PoolDriver

from hicache.device import DeviceOptions, engines
from hicache.device.cuda import CudaDevice
from hicache.device.cuda_driver import cpu_list
from hicache.device.driver import DriverError
from hicache.device.pinned import Pins
from hicache.errors import ConfigError, ExhaustedError, InvalidArgumentError, UnavailableError
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec

PAGE = 4096
SPEC = TierSpec("device", TierKind.DEVICE, 4 << 16, 1 << 16)


class Rig:
    """A store of one segment of 16 slots."""

    def __init__(self, driver=None, *, threaded=False, engine="auto", stage_pages=4):
        self.driver = driver or FakeDriver(1)
        self.told = threading.Event()
        options = DeviceOptions(cuda_staging_bytes=stage_pages * PAGE, copy_engine=engine)
        self.store = CudaDevice(SPEC, self.told.set, options, self.driver, threaded=threaded)
        self.store.open_segment(0, "tenant", PAGE, 16)
        self.next_id = 0

    def submit(self, op, slots=(), buffers=(), **columns):
        self.next_id += 1
        size = PAGE if op in {Op.PUT, Op.GET} else 0
        views = list(map(memoryview, buffers))
        self.store.submit(Batch(self.next_id, op, page_bytes=size, slots=slots, buffers=views, **columns))
        return self.next_id

    def finish(self, count=1):
        """The next completions, by stepping or by waiting."""
        done = []
        for _ in range(100_000):
            if self.store._pumps:
                assert self.told.wait(20)
                self.told.clear()
            else:
                self.store.step()
            done += self.store.poll()
            if len(done) >= count:
                return done
        raise AssertionError("no completion")

    def put(self, slots, pages):
        self.submit(Op.PUT, slots, pages)
        return self.finish()[0]

    def get(self, slots):
        buffers = [bytearray(PAGE) for _ in slots]
        self.submit(Op.GET, slots, buffers)
        return self.finish()[0], buffers


def pages(count, seed=0):
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (count, PAGE), np.uint8)]


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.store.close()
    assert not made.driver.violations


def test_threads_move_pages_and_close_finishes_what_was_submitted():
    made = Rig(threaded=True)
    data = pages(16)
    assert set(made.put(range(16), data).outcomes) == {Outcome.OK}
    done, found = made.get([3, 15, 0])
    assert [bytes(page) for page in found] == [data[3], data[15], data[0]]
    assert list(done.checksums) == [xxh3_64_intdigest(page) for page in found]
    late = {made.submit(Op.PUT, [slot], [data[0]]) for slot in range(16)}
    made.store.close()
    assert {done.id for done in made.store.poll()} == late
    made.store.close()
    assert not made.driver.violations
    with pytest.raises(UnavailableError):
        made.submit(Op.GET, [0], [bytearray(PAGE)])


def test_the_next_batch_is_launched_while_the_last_one_flies(rig):
    rig.driver.delays = True
    for slot in range(3):
        rig.submit(Op.PUT, [slot], pages(1, slot))
    rig.store._writes.step()
    assert len(rig.store._writes._flying) == 3


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_every_engine_moves_pages(engine):
    made = Rig(engine=engine)
    data = pages(16)
    made.put(range(16), data)
    order = [5, 6, 7, 0, 12, 11]
    assert [bytes(page) for page in made.get(order)[1]] == [data[slot] for slot in order]
    assert made.driver.calls["batch"] == 0 or engine == "batch"
    if engine in {"kernel", "staged"}:
        assert made.driver.calls["move_rows"]
    made.store.close()
    assert not made.driver.violations


def test_auto_measures_each_shape_once_and_says_what_it_found(rig):
    rig.driver.delays = False
    for _ in range(2):
        rig.put([0], pages(1))
        rig.put(range(4), pages(4))
        rig.get(range(4))
    found = rig.store.stats.choices
    ways = {("to device", PAGE, many) for many in ("few", "many")}
    assert set(found) == ways | {("to host", PAGE, many) for _, _, many in ways}
    for choice in found.values():
        assert set(choice.gb_per_s) == set(engines.ENGINES)
        assert choice.gb_per_s[choice.engine] == max(choice.gb_per_s.values())
    before = rig.driver.calls["batch"]
    rig.put([1], pages(1))
    assert rig.driver.calls["batch"] - before <= 1


def test_an_engine_that_the_device_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"'batch'.*has auto, kernel, staged, dma"):
        Rig(FakeDriver(batch=False), engine="batch")


def test_rows_side_by_side_are_one_copy():
    at = np.array([0, 10, 20, 50, 60], np.int64)
    rows = engines.Rows(at + 1000, at + 2000, 10, to_host=True)
    assert engines._runs(rows) == ([1000, 1050], [2000, 2050], [30, 20])
    assert rows.aligned_to == 2


def test_pinned_buffers_are_copied_directly_and_others_are_not(rig):
    arena = np.zeros((4, PAGE), np.uint8)
    rig.store.pins.add(arena.ctypes.data, arena.nbytes)
    rig.store.step()
    assert rig.store.stats.registered_bytes == arena.nbytes
    for row, page in enumerate(pages(4, 2)):
        arena[row] = np.frombuffer(page, np.uint8)
    rig.put(range(4), list(arena))
    assert rig.store.stats.direct_bytes == 4 * PAGE
    rig.get(range(4))
    assert rig.store.stats.bounced_bytes == 4 * PAGE
    gone = []
    rig.store.pins.remove(arena.ctypes.data, arena.nbytes, lambda: gone.append(True))
    assert not rig.store.pins.cover([arena[0]])
    assert not gone
    rig.store.step()
    assert gone == [True]
    assert not rig.driver.registered


def test_the_host_tiers_segments_are_registered_while_they_are_open(rig):
    pytest.importorskip("lmdb", reason="the tier room's package")
    from hicache.tier.host import HostStore

    spec = TierSpec("host", TierKind.HOST, 2 << 20, 1 << 20, header_bytes_per_slot=8)
    host = HostStore(spec, lambda: None, prefault=False)
    host.on_memory(rig.store.pins.add, rig.store.pins.remove)
    host.open_segment(0, "tenant", PAGE, 8)
    rig.store.step()
    assert list(rig.driver.registered.values()) == [1 << 20]
    views = host.views(range(8))
    for view, page in zip(views, pages(8), strict=True):
        view[:] = page
    rig.put(range(8), views)
    for view in views:
        view[:] = bytes(PAGE)
    rig.submit(Op.GET, range(8), views)
    rig.finish()
    assert list(map(bytes, views)) == pages(8)
    assert rig.store.stats.direct_bytes == 16 * PAGE
    memory = host._segments[0].memory
    host.close_segment(0)
    assert memory.fd >= 0, "memory was given back while it was registered"
    rig.store.step()
    assert memory.fd < 0
    assert not rig.driver.registered
    host.open_segment(1, "tenant", PAGE, 8)
    rig.store.step()
    rig.store.close()
    assert not rig.driver.registered
    memory = host._segments[1].memory
    host.close()
    assert memory.fd < 0


def test_memory_that_cannot_be_registered_is_bounced_and_one_warning_says_why(caplog):
    driver = FakeDriver(piece=0)
    pins = Pins(driver, threaded=False)
    arena = np.zeros((2, PAGE), np.uint8)
    with caplog.at_level(logging.WARNING):
        pins.add(arena.ctypes.data, PAGE)
        pins.add(arena.ctypes.data + PAGE, PAGE)
        pins.work()
    assert not pins.cover([arena[0]])
    [record] = caplog.records
    assert "ulimit -l" in record.getMessage()
    pins.close()


def test_memory_is_registered_in_pieces_and_a_page_across_two_is_bounced():
    driver = FakeDriver()
    pins = Pins(driver, threaded=True, piece_bytes=2 * PAGE)
    arena = np.zeros((5, PAGE), np.uint8)
    pins.add(arena.ctypes.data, arena.nbytes)
    pins.remove(0, 0, (registered := threading.Event()).set)
    assert registered.wait(20)
    assert sorted(driver.registered.values()) == [PAGE, 2 * PAGE, 2 * PAGE]
    assert pins.cover([arena[0], arena[1], arena[4]])
    flat = arena.reshape(-1)
    assert not pins.cover([flat[2 * PAGE - 8 : 3 * PAGE - 8]])
    pins.close()
    assert not driver.registered


def test_a_page_that_changes_on_the_way_is_a_fault_not_rot(rig):
    rig.put([0], pages(1))
    lane = rig.store._reads
    rig.submit(Op.GET, [0], [bytearray(PAGE)])
    for _ in range(1000):
        if lane._flying:
            break
        lane._launch()
    rig.driver.run_all()
    lane._flying[0].stage.host[7] ^= 1
    done = rig.finish()[0]
    assert done.outcomes == (Outcome.FAULT,)
    assert "did not arrive so" in done.error
    assert rig.get([0])[0].outcomes == (Outcome.OK,)


def test_a_device_that_is_lost_answers_everything_with_a_fault_and_says_why():
    class Lost(FakeDriver):
        lost = False

        def ready(self, event):
            if self.lost:
                raise DriverError("ready", "device lost", fatal=True)
            return super().ready(event)

    made = Rig(Lost())
    made.put([0], pages(1))
    made.driver.lost = True
    for _ in range(3):
        done = made.put([1, 2], pages(2))
        assert set(done.outcomes) == {Outcome.FAULT}
        assert "device was given up" in done.error
    assert "device lost" in made.store.stats.problem
    done, _ = made.get([0])
    assert done.outcomes == (Outcome.FAULT,)
    made.submit(Op.FLUSH)
    assert made.finish()[0].outcomes == ()
    made.driver.lost = False
    made.driver.run_all()
    made.store.close()


def test_a_buffer_released_too_early_is_a_fault(rig):
    gone = memoryview(bytearray(PAGE))
    rig.next_id += 1
    rig.store.submit(Batch(rig.next_id, Op.PUT, page_bytes=PAGE, slots=[2], buffers=[gone]))
    gone.release()
    done = rig.finish()[0]
    assert done.outcomes == (Outcome.FAULT,)
    assert "ValueError" in done.error


def test_segments_take_their_memory_again():
    rig = Rig(PoolDriver(1))
    address = rig.store._segments[0].address
    rig.store.close_segment(0)
    with pytest.raises(InvalidArgumentError, match="not open"):
        rig.store.close_segment(0)
    rig.store.open_segment(3, "another", PAGE, 8)
    assert rig.store._segments[3].address == address
    rig.put([(3 << 24) + 1], pages(1))
    rig.submit(Op.PUT, [3 << 24], pages(1))
    with pytest.raises(InvalidArgumentError, match="1 batches move"):
        rig.store.close_segment(3)
    rig.finish()
    rig.store.close()
    assert not rig.driver.violations


def test_without_memory_a_segment_is_not_opened(rig, monkeypatch):
    def refuse(size_bytes):
        raise DriverError("cudaMalloc", "out of memory (2)")

    monkeypatch.setattr(rig.driver, "allocate", refuse)
    with pytest.raises(ExhaustedError, match=r"no memory for segment 1.*out of memory"):
        rig.store.open_segment(1, "tenant", PAGE, 16)


def test_pages_larger_than_a_stage_get_larger_stages():
    made = Rig(stage_pages=1)
    large = TierSpec("device", TierKind.DEVICE, 4 << 20, 1 << 20)
    made.store._spec = large
    made.store.close_segment(0)
    made.store._spare.clear()
    size = 5 * PAGE
    made.store.open_segment(1, "tenant", size, 4)
    made.store.open_segment(2, "tenant", PAGE, 4)
    data = np.random.default_rng(3).integers(0, 256, size, np.uint8).tobytes()
    made.put([2 << 24], pages(1))
    made.store.submit(Batch(99, Op.PUT, page_bytes=size, slots=[1 << 24], buffers=[memoryview(data)]))
    assert made.finish()[0].outcomes == (Outcome.OK,)
    made.store.close()
    assert not made.driver.violations


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("", set()), ("5", {5})])
def test_lists_of_processors(text, cpus):
    assert cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("speeds", "wanted"),
    [
        ({"kernel": 50.0, "staged": 52.0, "batch": 50.0, "dma": 49.9}, "batch"),
        ({"kernel": 50.0, "staged": 52.0, "batch": 49.0, "dma": 49.3}, "staged"),
        ({"kernel": 50.0, "dma": 12.0}, "kernel"),
        ({"dma": 12.0}, "dma"),
    ],
)
def test_copy_engines_are_preferred_where_they_are_nearly_as_fast(speeds, wanted):
    assert engines.best(speeds) == wanted
