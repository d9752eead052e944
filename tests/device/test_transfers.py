"""Transfers between host memory and engines' memfds."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from transfer_rig import Count, Form, Planes, forms, part, same, sealed, sums, twin

from hicache.device import DeviceOptions, open_device, units
from hicache.device.kv import FAILED, MemoryKind, PagedKv, SharedMemory, check_apart
from hicache.device.opening import KvTransfers, open_transfers
from hicache.device.transfers import DevicePages, HostPages, HostSlots, Transfer
from hicache.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec

SPEC = TierSpec("device", TierKind.DEVICE, 4 << 20, 1 << 20)


class Rig:
    """Transfers with threads, a region, and pages of random bytes."""

    def __init__(self, form=None, *, pages=4, page_tokens=4, unit_tokens=4, seed=0, store=None, skip=0.0):
        self.rng = np.random.default_rng(seed)
        self.form = form or Form()
        self.planes = Planes(self.form, self.rng)
        self.told = threading.Event()
        self.moves = open_transfers(store, self.told.set, now_ns=time.monotonic_ns)
        self.handle = self.moves.open_kv(self.planes.kv())
        self.page_tokens = page_tokens
        self.page_bytes = self.form.page_offset + part(self.form, page_tokens)
        self.rows = self.rng.integers(0, 256, (pages, self.page_bytes), np.uint8)
        self.places = self.form.places(random.Random(seed), pages, page_tokens, unit_tokens, skip=skip)
        self.next_id = 0

    def transfer(self, pages=None, **more):
        self.next_id += 1
        pages = pages or HostPages([row.data for row in self.rows], sums(self.rows))
        return Transfer(
            self.next_id, self.handle, pages, self.places, self.page_tokens, self.page_bytes, **more
        )

    def wait(self, count=1):
        found = []
        while len(found) < count:
            assert self.told.wait(20), "a transfer never ended"
            self.told.clear()
            found += self.moves.poll()
        return found

    def expect(self, pack, **more):
        """Maps and rows as the twin leaves them."""
        maps, rows = self.planes.copy(), self.rows.copy()
        twin(self.planes, self.places, rows, page_tokens=self.page_tokens, pack=pack, maps=maps, **more)
        return maps, rows

    def close(self):
        self.moves.close()
        self.planes.close()


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


def slots_of(rows):
    return HostSlots(np.array([row.ctypes.data for row in rows], np.int64), rows.shape[1], [rows])


@pytest.mark.parametrize("pack", [False, True])
def test_slots_given_by_their_addresses_do_as_buffers_do(rig, pack):
    maps, rows = rig.expect(pack=pack)
    pages = HostPages(slots_of(rig.rows), () if pack else np.array(sums(rig.rows), np.uint64))
    (rig.moves.pack if pack else rig.moves.load)(rig.transfer(pages))
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.OK}
    assert list(done.checksums) == sums(rows)
    assert same(rig.planes.maps, maps)
    assert (rig.rows == rows).all()


def test_slots_of_another_size_or_number_are_refused(rig):
    for pages, why in (
        (HostPages(slots_of(rig.rows[:, :-1])), "slots of"),
        (HostPages(slots_of(rig.rows[:-1])), "3 pages, places of 4"),
        (HostPages(slots_of(rig.rows), np.zeros(3, np.uint64)), "4 pages, 3 checksums"),
    ):
        with pytest.raises(InvalidArgumentError, match=why):
            rig.moves.load(rig.transfer(pages))


def test_a_load_writes_what_the_twin_writes_and_counts_layers(rig):
    maps, _ = rig.expect(pack=False)
    counter = Count()
    rig.moves.load(rig.transfer(counter=counter))
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.OK}
    assert list(done.checksums) == sums(rig.rows)
    assert same(rig.planes.maps, maps)
    assert counter.seen == [1, 2]


def test_a_pack_reads_what_the_twin_reads_and_waits_for_each_layer(rig):
    _, rows = rig.expect(pack=True)
    counter = Count()
    rig.moves.pack(rig.transfer(counter=counter))
    time.sleep(0.01)
    assert not rig.moves.poll()
    counter.value = 1
    time.sleep(0.01)
    assert not rig.moves.poll()
    counter.value = 2
    [done] = rig.wait()
    assert np.array_equal(rig.rows, rows)
    assert list(done.checksums) == sums(rows)
    assert not counter.seen


def test_a_waiting_pack_holds_up_neither_loads_nor_other_packs(rig):
    for _ in range(5):
        rig.moves.pack(rig.transfer(counter=Count()))
    rig.moves.load(rig.transfer())
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.OK}
    rig.moves.close()
    assert [set(late.outcomes) for late in rig.moves.poll()] == [{Outcome.FAULT}] * 5


def test_a_layer_that_does_not_come_in_time_is_a_fault(rig):
    rig.moves.pack(rig.transfer(counter=Count(1), deadline_ns=time.monotonic_ns() + 5_000_000))
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.FAULT}
    assert set(done.checksums) == {0}
    assert "deadline" in done.error


def test_a_corrupt_page_is_told_and_the_counter_says_failed(rig):
    wrong = sums(rig.rows)
    wrong[2] ^= 1
    counter = Count()
    rig.moves.load(rig.transfer(HostPages([row.data for row in rig.rows], wrong), counter=counter))
    [done] = rig.wait()
    assert done.outcomes == (Outcome.OK, Outcome.OK, Outcome.CORRUPT, Outcome.OK)
    assert done.checksums[2] == 0
    assert counter.value == FAILED


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(forms(), st.data())
def test_transfers_do_what_the_twin_does(shape, data):
    form, page_tokens, unit_tokens, layers = shape
    made = Rig(
        form,
        pages=data.draw(st.integers(1, 9)),
        page_tokens=page_tokens,
        unit_tokens=unit_tokens,
        seed=data.draw(st.integers(0, 1 << 16)),
        skip=data.draw(st.sampled_from([0.0, 0.3])),
    )
    pack = data.draw(st.booleans())
    maps, rows = made.expect(pack, layers=layers)
    counter = Count(1 << 40 if pack else 0) if data.draw(st.booleans()) else None
    transfer = made.transfer(first_layer=layers[0], layers=layers[1], counter=counter)
    (made.moves.pack if pack else made.moves.load)(transfer)
    [done] = made.wait()
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert np.array_equal(made.rows, rows)
    assert same(made.planes.maps, maps)
    assert list(done.checksums) == sums(rows)
    if counter is not None and not pack:
        assert counter.seen == list(range(1, layers[1] + 1))
    made.close()


@settings(max_examples=60, deadline=None)
@given(forms(), st.integers(1, 200), st.permutations([0, 1, 2]))
def test_a_unit_that_is_moved_in_pieces_is_the_same(shape, piece_bytes, order):
    form, _, tokens, _ = shape
    sizes, strides, step = (tokens, form.heads, form.dim), [0, 0, 0], 1
    for axis in order:
        strides[axis] = step
        step *= sizes[axis]
    kv = dataclasses.make_dataclass("Kv", ["element_bytes", "heads", "head_size", "strides"])
    kv = kv(form.width, form.heads, form.dim, (0, *strides))
    plane = np.random.default_rng(1).integers(0, 256, step * form.width, np.uint8)
    page, back = np.zeros_like(plane), np.zeros_like(plane)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "PIECE_BYTES_MAX", piece_bytes)
        view = units.UnitView.of(kv, tokens)
    ends = [np.array([memory.ctypes.data], np.int64) for memory in (plane, page, back)]
    view.move(ends[0], ends[1], pack=True)
    items = plane.view(f"V{form.width}")
    wanted = np.lib.stride_tricks.as_strided(items, sizes, [stride * form.width for stride in strides])
    assert np.ascontiguousarray(wanted).tobytes() == page.tobytes()
    view.move(ends[2], ends[1], pack=False)
    assert np.array_equal(back, plane)


def test_units_of_more_bytes_than_a_chunk_and_many_chunks():
    form = Form(blocks=40, block_tokens=64, heads=8, dim=128)
    made = Rig(form, pages=10, page_tokens=64, unit_tokens=64)
    maps, _ = made.expect(pack=False)
    made.moves.load(made.transfer())
    [done] = made.wait()
    assert set(done.outcomes) == {Outcome.OK}, done.error
    assert same(made.planes.maps, maps)
    made.close()


# --- slots of the device "cpu"


@pytest.fixture
def slots():
    """A rig whose pages lie in slots 3 to 6 of a device store, too."""
    told = threading.Event()
    store = open_device("cpu", SPEC, told.set, DeviceOptions())
    made = Rig(store=store)
    store.open_segment(0, "tenant", made.page_bytes, 16)
    views = [memoryview(bytes(row)) for row in made.rows]
    store.submit(Batch(1, Op.PUT, page_bytes=made.page_bytes, slots=[3, 4, 5, 6], buffers=views))
    assert told.wait(20)
    store.poll()
    made.store = store
    yield made
    made.close()
    store.close()


@pytest.mark.parametrize("verify", [True, False])
def test_pages_of_the_cpu_device_are_loaded_from_where_they_lie(slots, verify):
    maps, _ = slots.expect(pack=False)
    slots.moves.check(slots.handle, device_pages=True)
    slots.moves.load(slots.transfer(DevicePages([3, 4, 5, 6], verify)))
    [done] = slots.wait()
    assert set(done.outcomes) == {Outcome.OK}
    assert list(done.checksums) == sums(slots.rows)
    assert same(slots.planes.maps, maps)


def test_slots_that_hold_nothing_are_missed(slots):
    counter = Count()
    slots.moves.load(slots.transfer(DevicePages([3, 12, 5, 6]), counter=counter))
    [done] = slots.wait()
    assert [outcome is Outcome.OK for outcome in done.outcomes] == [True, False, True, True]
    assert done.outcomes[1] is Outcome.MISS
    assert counter.value == FAILED


def test_slots_that_rotted_are_corrupt_and_emptied(slots):
    loan = slots.store.lend([4])
    ctypes.memset(int(loan.addresses[0]), 0x77, 9)
    loan.end()
    slots.moves.load(slots.transfer(DevicePages([3, 4, 5, 6])))
    assert slots.wait()[0].outcomes[1] is Outcome.CORRUPT
    slots.moves.load(slots.transfer(DevicePages([3, 4, 5, 6])))
    assert slots.wait()[0].outcomes[1] is Outcome.MISS


def test_slots_that_are_overwritten_while_they_are_read_are_never_taken_for_right(slots):
    rng, faces = random.Random(1), [bytes([n]) * slots.page_bytes for n in range(1, 9)]
    found = {Outcome.OK: 0, Outcome.MISS: 0}
    for number in range(120):
        views = [memoryview(rng.choice(faces)) for _ in range(4)]
        batch = Batch(100 + number, Op.PUT, page_bytes=slots.page_bytes, slots=[3, 4, 5, 6], buffers=views)
        slots.store.submit(batch)
        slots.moves.load(slots.transfer(DevicePages([3, 4, 5, 6])))
        if rng.random() < 0.3:
            slots.store.free([rng.randrange(3, 7)])
        [done] = slots.wait()
        rows = np.zeros_like(slots.rows)
        twin(slots.planes, slots.places, rows, page_tokens=4, pack=True)
        for page, outcome in enumerate(done.outcomes):
            found[outcome] += 1
            if outcome is Outcome.OK:
                assert xxh3_64_intdigest(rows[page].tobytes()) == done.checksums[page]
                assert rows[page].tobytes() in {*faces, slots.rows[page].tobytes()}
    assert found[Outcome.OK], found


def test_slots_that_are_freed_or_closed_under_a_loan_are_not_still_there(slots):
    loan = slots.store.lend([3, 4])
    assert loan.still().tolist() == [True, True]
    slots.store.free([3])
    assert loan.still().tolist() == [False, True]
    slots.store.close_segment(0)
    assert loan.still().tolist() == [False, False]
    loan.end()
    with pytest.raises(InvalidArgumentError, match="segment 0 is not open"):
        slots.moves.load(slots.transfer(DevicePages([3, 4, 5, 6])))


def test_pages_of_another_size_are_refused(slots):
    slots.store.open_segment(1, "tenant", 8, 4)
    with pytest.raises(InvalidArgumentError, match="slots of"):
        slots.moves.load(slots.transfer(DevicePages([1 << 24] * 4)))


# --- what cannot be


def test_without_a_device_its_pages_are_refused_with_advice(rig):
    with pytest.raises(UnsupportedError, match="fetch without device=True"):
        rig.moves.check(rig.handle, device_pages=True)
    with pytest.raises(UnsupportedError):
        rig.moves.load(rig.transfer(DevicePages([1, 2, 3, 4])))
    with pytest.raises(UnsupportedError, match="host memory first"):
        rig.moves.pack(rig.transfer(DevicePages([1, 2, 3, 4])))
    rig.moves.check(rig.handle, device_pages=False)
    assert rig.moves.memory_kinds == ("memfd",)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"first_layer": 1, "layers": 2}, "layers 1 to 3 of 2"),
        ({"first_layer": -1}, "layers -1"),
        ({"pages": HostPages([b"short"])}, "contiguous"),
        ({"pages": HostPages([])}, "0 pages"),
    ],
)
def test_what_does_not_go_together_is_refused(rig, more, why):
    if "pages" in more:
        more = {"pages": HostPages([memoryview(page) for page in more["pages"].buffers])}
    with pytest.raises(InvalidArgumentError, match=why):
        rig.moves.load(rig.transfer(**more))


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: sealed(4096, seals=fcntl.F_SEAL_GROW), "not sealed against shrinking.*F_SEAL_SHRINK"),
        (lambda: sealed(1024), "has 1024 bytes, not the 4096"),
        (lambda: os.open("/dev/null", os.O_RDWR), "must be a memfd"),
        (lambda: sealed(4096, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "F_SEAL_WRITE"),
    ],
)
def test_memory_that_may_be_torn_or_cannot_be_written_is_refused(rig, make, why):
    good = Planes(Form(layers=1, per_layer=1, blocks=1), np.random.default_rng(0))
    before = descriptors()
    kv = good.kv([SharedMemory(MemoryKind.MEMFD, 4096, fd=make())])
    with pytest.raises(InvalidArgumentError, match=why):
        rig.moves.open_kv(kv)
    assert descriptors() == before, "its descriptor was left open"
    good.close()


def test_cuda_memory_is_refused_where_there_is_no_cuda_device(rig):
    memory = SharedMemory(MemoryKind.CUDA_IPC, 1 << 20, handle=bytes(64), device_uuid=bytes(16))
    with pytest.raises(UnsupportedError, match=r"no CUDA device.*client copy"):
        rig.moves.open_kv(rig.planes.kv([memory]))


def test_a_counter_that_raises_fails_its_transfer_and_no_other(rig):
    class Broken(Count):
        def get(self):
            raise ValueError("the timeline is closed")

        set = None

    rig.moves.pack(rig.transfer(counter=Broken()))
    rig.moves.load(rig.transfer())
    outcomes = {done.id: (set(done.outcomes), done.error) for done in rig.wait(2)}
    assert outcomes[1][0] == {Outcome.FAULT}
    assert "timeline is closed" in outcomes[1][1]
    assert outcomes[2][0] == {Outcome.OK}


# --- ends


def test_a_region_is_unmapped_when_its_last_transfer_has_ended_and_not_before(rig):
    gone = threading.Event()
    rig.moves.pack(rig.transfer(counter=Count()))
    time.sleep(0.01)
    before = descriptors()
    rig.moves.close_kv(rig.handle, gone.set)
    [done] = rig.wait()
    assert "closed while a layer was waited for" in done.error
    assert gone.wait(20)
    assert descriptors() == before - 1
    for late in (rig.moves.load, rig.moves.pack):
        with pytest.raises(UnavailableError):
            late(rig.transfer())
    with pytest.raises(UnavailableError):
        rig.moves.close_kv(rig.handle, gone.set)


def test_closing_ends_everything_once(rig):
    for _ in range(20):
        rig.moves.load(rig.transfer())
        rig.moves.pack(
            rig.transfer(
                HostPages([memoryview(bytearray(rig.page_bytes)) for _ in rig.rows]), counter=Count()
            )
        )
    rig.moves.close()
    rig.moves.close()
    ended = [done.id for done in rig.moves.poll()]
    assert sorted(ended) == list(range(1, 41))
    with pytest.raises(UnavailableError):
        rig.moves.load(rig.transfer())
    with pytest.raises(UnavailableError):
        rig.moves.open_kv(rig.planes.kv())


ENGINE = """
import fcntl, mmap, os, sys
fd = os.memfd_create("engine", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, int(sys.argv[1]))
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
memory = mmap.mmap(fd, int(sys.argv[1]))
print(fd, flush=True)
for line in sys.stdin:
    at, size = map(int, line.split())
    print(memory[at:at + size].hex(), flush=True)
"""


def test_another_process_sees_what_was_loaded_and_may_die(rig):
    size = len(rig.planes.maps[0])
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        fd = os.open(f"/proc/{engine.pid}/fd/{int(engine.stdout.readline())}", os.O_RDWR)
        rig.handle = rig.moves.open_kv(rig.planes.kv([SharedMemory(MemoryKind.MEMFD, size, fd=fd)]))
        rig.planes.maps[0][:] = 0
        maps, _ = rig.expect(pack=False)
        rig.moves.load(rig.transfer())
        assert set(rig.wait()[0].outcomes) == {Outcome.OK}
        engine.stdin.write(f"0 {size}\n")
        engine.stdin.flush()
        assert bytes.fromhex(engine.stdout.readline()) == maps[0].tobytes()
    finally:
        engine.kill()
        engine.communicate()
    rig.moves.load(rig.transfer())
    assert set(rig.wait()[0].outcomes) == {Outcome.OK}, "its memory stays mapped"


class Never:
    """A counter of an engine that does not compute."""

    def __init__(self):
        self.looks = 0

    def get(self):
        self.looks += 1
        return 0

    def set(self, value):
        raise AssertionError(value)


def test_many_packs_that_wait_cost_a_load_little():
    """Steps, not time: each of a load's steps lets a few of those that wait be looked at, however many they are."""
    planes, moves = (
        Planes(Form(), np.random.default_rng(1)),
        KvTransfers(None, lambda: None, time.monotonic_ns, threaded=False),
    )
    handle = moves.open_kv(planes.kv())
    page_bytes = part(Form(), 4)
    places = Form().places(random.Random(1), 2, 4, 4)

    def transfer(number, counter=None):
        pages = HostPages([memoryview(bytearray(page_bytes)) for _ in range(2)])
        return Transfer(number, handle, pages, places, 4, page_bytes, counter=counter)

    waiting = [Never() for _ in range(500)]
    for number, counter in enumerate(waiting):
        moves.pack(transfer(number, counter))
    for _ in range(12 * len(waiting)):
        moves.step()
    before = sum(counter.looks for counter in waiting)
    assert min(counter.looks for counter in waiting) >= 2  # each has its turn
    moves.load(transfer(1000))
    steps = 0
    while not (ended := moves.poll()):
        moves.step()
        steps += 1
    assert [done.id for done in ended] == [1000]
    assert sum(counter.looks for counter in waiting) - before <= 8 * (steps // 9 + 1)
    assert steps < 500  # no round of those that wait is made for a step of the load
    moves.close()
    assert len(moves.poll()) == len(waiting)


def test_a_unit_that_falls_into_too_many_pieces_fails_and_takes_no_memory():
    """A head of a large prime size can only be cut into single elements, of which there are millions."""
    size = 16_777_213
    fd = sealed(size)
    kv = PagedKv(
        (SharedMemory(MemoryKind.MEMFD, size, fd=fd),), (0,), (0,), 1, 1, 1, 1, size, 1, (size, size, size, 1)
    )
    began_ns = time.process_time_ns()
    with pytest.raises(ValueError, match="16777213 pieces"):
        units.UnitView.of(kv, 1)
    assert time.process_time_ns() - began_ns < 1e9
    moves = KvTransfers(None, lambda: None, time.monotonic_ns, threaded=False)
    page = memoryview(bytearray(size))
    moves.load(Transfer(1, moves.open_kv(kv), HostPages([page]), np.zeros((1, 1), np.int64), 1, size))
    while not (ended := moves.poll()):
        moves.step()
    assert ended[0].outcomes == (Outcome.FAULT,) and "pieces" in ended[0].error
    moves.close()


def test_a_load_may_not_write_a_token_twice() -> None:
    check_apart(np.array([[0, 4], [-1, -1], [8, 12]]), 4)
    for places in ([[0, 4], [4, 8]], [[0], [2]], [[12], [9]]):
        with pytest.raises(InvalidArgumentError, match="go to one place"):
            check_apart(np.array(places), 4)


def test_strides_stay_words() -> None:
    memory = SharedMemory(MemoryKind.CUDA_IPC, 4096, handle=bytes(64), device_uuid=bytes(16))
    with pytest.raises(InvalidArgumentError, match="strides"):
        PagedKv((memory,), (0,), (0,), 1, 1, 16, 1, 8, 2, (1 << 62, 8, 8, 1))
