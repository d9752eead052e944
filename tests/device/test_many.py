"""Several devices behind one store: who gets a segment, split batches, order, and the death of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from cuda_rig import PAGE_BYTES, SEGMENT_BYTES, SLOTS, Walk
from pool_fake import PoolDriver

from hicache.device import DeviceOptions
from hicache.device.cuda import CudaDevice, CudaDevices
from hicache.device.many import ManyDevices, shares
from hicache.device.pinned import Pins
from hicache.device.store import device_indices
from hicache.errors import ConfigError, ExhaustedError, InvalidArgumentError, UnavailableError
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op, Outcome, TierKind, TierSpec

STRIDE = SLOTS_PER_SEGMENT


def make(drivers, segments, notify=lambda: None, **options) -> CudaDevices:
    spec = TierSpec("device", TierKind.DEVICE, segments * SEGMENT_BYTES, SEGMENT_BYTES)
    chosen = DeviceOptions(cuda_staging_bytes=6 * PAGE_BYTES, **options)
    pins = Pins(drivers[0], threaded=False)

    def opener(driver):
        return lambda part: CudaDevice(part, notify, chosen, driver, pins=pins, threaded=False)

    return CudaDevices(spec, [opener(driver) for driver in drivers], pins)


def two(seed=0, **shape) -> list[PoolDriver]:
    first = PoolDriver(seed, **shape)
    return [first, PoolDriver(seed + 1, host=first, **shape)]


class ManyWalk(Walk):
    """The walk over two devices and four segments; with ``dies`` one of them does, at that many pages."""

    segment_count = 4

    def __init__(self, seed, fault_rate, dies=0, **shape):
        self.dies = dies
        super().__init__(seed, fault_rate, **shape)

    def _make(self, seed, fault_rate, **shape):
        self.drivers = two(seed, fault_rate=fault_rate, **shape)
        self.driver = self.drivers[0]
        self.mortal = self.drivers[seed % 2]
        self.where = {}
        return make(self.drivers, self.segment_count, self._tell)

    def act(self):
        if self.dies and self.pages >= self.dies and not self.mortal.dead:
            self.mortal.die()
        if not self.segments or self.rng.random() < 0.2:
            self._open_segment()
        super().act()

    def progress(self):
        device = self.rng.choice(self.store.devices)
        for lane in device._lanes:
            if self.rng.random() < 0.7:
                lane.step()
        device.pins.work()
        for completion in self.store.poll():
            self._check(completion)

    def settle(self):
        for _ in range(200_000):
            if not self.open:
                return
            self.progress()
        raise AssertionError(f"batches never completed: {sorted(self.open)}")

    def _open_segment(self):
        wanted = [s for s in range(self.segment_count) if s not in self.segments]
        if not wanted:
            return
        try:
            self.store.open_segment(wanted[0], "tenant", PAGE_BYTES, SLOTS)
        except ExhaustedError:
            assert self.mortal.dead, "no room, and both devices live"
            return
        self._opened(wanted[0])
        self.where[wanted[0]] = self.drivers[self.store._where[wanted[0]]]
        assert not self.store.device_of(wanted[0]).problem, "a segment went to a device that was given up"

    def _check_put(self, place, slot, *rest):
        self.driver = self.where[slot // STRIDE]
        super()._check_put(place, slot, *rest)

    def _check_get(self, place, slot, *rest):
        self.driver = self.where[slot // STRIDE]
        super()._check_get(place, slot, *rest)

    def _check_delete(self, place, slot, completion, *rest):
        if self.where[slot // STRIDE].dead:  # a PUT that it did not even begin has left the slot as it was
            self.held[slot] = None
        else:
            super()._check_delete(place, slot, completion, *rest)

    def finish(self):
        super().finish()
        for driver in self.drivers:
            assert driver.dead or not driver.violations, driver.violations[:3]


def walk(seed, pages, fault_rate, dies=0):
    made = ManyWalk(seed, fault_rate, dies)
    while made.pages < pages:
        made.act()
    made.finish()
    return made


@pytest.mark.parametrize("seed", range(4))
def test_no_wrong_page_and_no_lost_slot(seed):
    done = walk(seed, 1500, fault_rate=0.02 if seed % 2 else 0.0)
    assert done.outcomes["put ok"] > 100
    assert done.outcomes["get ok"] > 50
    assert all(device._memory for device in done.store.devices), "one device got nothing to do"


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_dies_takes_only_its_segments_with_it(seed):
    done = walk(seed, 2500, 0.0, dies=1000)
    assert done.outcomes["put fault"] + done.outcomes["get fault"] > 0
    [dead, alive] = sorted(done.store.stats, key=lambda stats: not stats.problem)
    assert "given up" in dead.problem
    assert "bus" in dead.problem
    assert not alive.problem
    assert done.outcomes["get ok"] > 50


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_thousand_operations():
    moved = seed = 0
    while moved < 200_000:
        seed += 1
        moved += walk(1000 + seed, 10_000, (0.0, 0.002, 0.02, 0.0)[seed % 4], dies=5_000 * (seed % 2)).pages
    print(f"{moved} page operations, {seed} seeds")


def test_segments_go_where_most_room_is():
    store = make(two(), 5)
    for segment in range(4):
        store.open_segment(segment, "t", PAGE_BYTES, SLOTS)
    assert [store._where[segment] for segment in range(4)] == [0, 0, 1, 0]
    store.close_segment(0)
    store.close_segment(1)
    store.open_segment(7, "t", PAGE_BYTES, SLOTS)
    assert store._where[7] == 0
    for segment in (0, 1):
        store.open_segment(segment, "t", PAGE_BYTES, SLOTS)
    with pytest.raises(ExhaustedError, match="all 5 segments are open"):
        store.open_segment(9, "t", PAGE_BYTES, SLOTS)
    store.close()


def test_the_room_of_a_device_that_was_given_up_is_said_to_be_missing():
    drivers = two()
    store = make(drivers, 2)
    store.open_segment(0, "t", PAGE_BYTES, SLOTS)
    drivers[0].die()
    store.submit(Batch(1, Op.GET, PAGE_BYTES, slots=[0], buffers=[memoryview(bytearray(PAGE_BYTES))]))
    for device in store.devices:
        while device.step():
            pass
    assert len(store.poll()) == 1
    store.open_segment(1, "t", PAGE_BYTES, SLOTS)
    assert store._where[1] == 1
    store.close_segment(0)
    with pytest.raises(ExhaustedError, match=r"but those of fake \(seed 0\), which was given up"):
        store.open_segment(0, "t", PAGE_BYTES, SLOTS)
    store.close()


def test_another_device_is_tried_where_one_has_no_memory():
    drivers = two()
    store = make(drivers, 2)
    drivers[0].dead = True
    store.open_segment(0, "t", PAGE_BYTES, SLOTS)
    assert store._where[0] == 1
    store.close()


def test_completions_keep_their_order_whatever_the_devices_do():
    store = make(two(delays=False), 2)
    for segment in (0, 1):
        store.open_segment(segment, "t", PAGE_BYTES, SLOTS)
    page = memoryview(bytes(PAGE_BYTES))
    store.submit(Batch(1, Op.PUT, PAGE_BYTES, slots=[0, STRIDE], buffers=[page, page]))
    store.submit(Batch(2, Op.PUT, PAGE_BYTES, slots=[STRIDE + 1], buffers=[page]))
    store.submit(Batch(3, Op.FLUSH))
    last = store.devices[1]
    for _ in range(50):
        last.step()
    assert not store.poll(), "batch 2 is done, and batch 1 before it is not"
    for _ in range(50):
        store.devices[0].step()
    found = store.poll()
    assert [completion.id for completion in found] == [1, 2, 3]
    assert found[0].outcomes == (Outcome.OK, Outcome.OK)
    assert all(found[0].checksums)
    store.close()


def test_columns_of_slots_on_several_devices_come_in_the_slots_order():
    store = make(two(delays=False), 2)
    for segment in (0, 1):
        store.open_segment(segment, "t", PAGE_BYTES, SLOTS)
    assert store.device_of(0) is not store.device_of(1)
    slots = [STRIDE + 1, 0, STRIDE, 1]
    pages = [memoryview(bytes([at + 1]) * PAGE_BYTES) for at in range(4)]
    store.submit(Batch(1, Op.PUT, PAGE_BYTES, slots=slots, buffers=pages))
    for _ in range(50):
        for device in store.devices:
            device.step()
    [done] = store.poll()
    checksums, before = store.columns(slots)
    assert checksums.tolist() == list(done.checksums)
    assert len(set(done.checksums)) == 4
    store.free([STRIDE])
    assert (store.columns(slots)[1] - before).tolist() == [0, 0, 1, 0]
    assert [column.tolist() for column in store.columns([])] == [[], []]
    store.close()


def test_a_batch_that_one_device_refuses_is_taken_by_none():
    store = make(two(), 2)
    store.open_segment(0, "t", PAGE_BYTES, SLOTS)
    store.open_segment(1, "t", 2 * PAGE_BYTES, SLOTS // 2)
    pages = [memoryview(bytes(PAGE_BYTES))] * 2
    for wrong in (
        {"buffers": pages},
        {"buffers": pages[:1]},
        {"buffers": pages, "checksums": [1]},
        {"buffers": pages, "slots": [0, 5 * STRIDE]},
        {"buffers": pages, "slots": [0, "x"]},
    ):
        with pytest.raises(InvalidArgumentError):
            store.submit(Batch(1, Op.PUT, PAGE_BYTES, **{"slots": [0, STRIDE], **wrong}))
    store.close_segment(0)  # nothing moves its pages
    store.close()
    with pytest.raises(UnavailableError):
        store.submit(Batch(1, Op.FLUSH))
    assert not store.poll()


def test_room_is_divided_as_evenly_as_segments_are():
    assert shares(16, 3) == [6, 5, 5]
    assert shares(2, 2) == [1, 1]
    with pytest.raises(ConfigError, match="1 segments, too few for 2 devices"):
        shares(1, 2)


def test_devices_that_were_opened_are_closed_where_a_later_one_cannot_be():
    drivers = two()
    spec = TierSpec("device", TierKind.DEVICE, 2 * SEGMENT_BYTES, SEGMENT_BYTES)

    def fails(part):
        raise ConfigError("no")

    opens = [lambda part: CudaDevice(part, lambda: None, DeviceOptions(), drivers[0], threaded=False), fails]
    with pytest.raises(ConfigError):
        ManyDevices(spec, opens)
    assert not drivers[0].violations


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cuda", [0]),
        ("cuda:3", [3]),
        ("cuda:0,cuda:2", [0, 2]),
        ("cuda:1-3", [1, 2, 3]),
        ("cuda,cuda:1", [0, 1]),
    ],
)
def test_names_of_devices(name, found):
    assert device_indices(name) == found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cuda:0,cuda:0", "names a device twice"),
        ("cuda:0-1,cuda:1", "names a device twice"),
        ("cuda:2-1", "ends before it begins"),
        ("cuda:0,", "no device is called ''"),
        ("cuda:0-", "no device is called 'cuda:0-'"),
        ("cpu,cuda:0", "'cpu' stands alone"),
        ("cpu,cpu", "'cpu' stands alone"),
        ("cuda:0,1", "no device is called '1'"),
    ],
)
def test_names_that_are_none(name, why):
    with pytest.raises(InvalidArgumentError, match=why):
        device_indices(name)
