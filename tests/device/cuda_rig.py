"""A CUDA store on the fake, stepped by the test, against a model: no wrong page, no lost slot, no lost batch."""

from __future__ import annotations

import collections
import random

import numpy as np
from cuda_fake import FakeDriver
from xxhash import xxh3_64_intdigest

from hicache.device import DeviceOptions
from hicache.device.cuda import CudaDevice
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op, Outcome, TierKind, TierSpec

PAGE_BYTES, SLOTS, SEGMENTS = 256, 24, 2
SEGMENT_BYTES = 1 << 13
FACES = 61  # different pages


class Walk:
    """Random batches, random progress. ``pages`` counts the pages that were asked to move."""

    def __init__(self, seed: int, fault_rate: float, **shape) -> None:
        self.rng = random.Random(seed)
        self.told = 0
        self.store = self._make(seed, fault_rate, **shape)
        self.segments: set[int] = set()
        self.faces = [random.Random(face).randbytes(PAGE_BYTES) for face in range(FACES)]
        self.sums = [xxh3_64_intdigest(face) for face in self.faces]
        self.arena = np.zeros((16, PAGE_BYTES), np.uint8)
        self.store.pins.add(self.arena.ctypes.data, self.arena.nbytes)
        self.held: dict[int, int | None] = {}  # slot -> face, as of the last completion
        self.might: dict[int, collections.Counter] = {}  # slot -> faces of PUTs under way
        self.changing: collections.Counter[int] = collections.Counter()  # slots with writes under way
        self.freed: dict[int, int] = collections.Counter()  # how often each slot was freed
        self.open: dict[int, tuple] = {}
        self.order: dict[Op, collections.deque] = {op: collections.deque() for op in ("put", "get")}
        self.pages = self.next_id = 0
        self.outcomes: collections.Counter[str] = collections.Counter()

    def _make(self, seed, fault_rate, **shape):
        self.driver = FakeDriver(seed, fault_rate, **shape)
        spec = TierSpec("device", TierKind.DEVICE, SEGMENTS * SEGMENT_BYTES, SEGMENT_BYTES)
        options = DeviceOptions(cuda_staging_bytes=6 * PAGE_BYTES)
        return CudaDevice(spec, self._tell, options, self.driver, threaded=False)

    def _tell(self) -> None:
        self.told += 1

    # --- what is asked

    def act(self) -> None:
        """One call, then some progress."""
        rng = self.rng
        if len(self.segments) < SEGMENTS:
            self._open_segment()
        kind = rng.choices(("put", "get", "delete", "free", "flush", "close"), (40, 45, 8, 4, 2, 1))[0]
        getattr(self, f"_{kind}")(self._some_slots())
        for _ in range(rng.randrange(6)):
            self.progress()

    def progress(self) -> None:
        """Step one lane or both, take what is done."""
        lane = self.rng.randrange(3)
        if lane == 2:
            self.store.step()
        else:
            self.store._lanes[lane].step()
        for completion in self.store.poll():
            self._check(completion)

    def settle(self) -> None:
        """Until nothing is under way."""
        for _ in range(200_000):
            if not self.open:
                return
            self.store.step()
            for completion in self.store.poll():
                self._check(completion)
        raise AssertionError(f"batches never completed: {sorted(self.open)}")

    def finish(self) -> None:
        """Everything that is held can be read; everything is given back."""
        self.settle()
        self.driver.fault_rate = 0.0
        slots = sorted(self.held)
        for start in range(0, len(slots), 8):
            self._get(slots[start : start + 8])
            self.settle()
        self.store.close()
        assert not self.driver.violations, self.driver.violations[:3]

    def _some_slots(self) -> list[int]:
        rng = self.rng
        size = rng.choice((1, 1, 2, 4, 8, 16))
        used = 4 if rng.random() < 0.3 else SLOTS  # some slots are always busy
        every = [s * SLOTS_PER_SEGMENT + i for s in sorted(self.segments) for i in range(used)]
        return rng.sample(every, min(size, len(every)))

    def _submit(self, op: Op, slots, faces=(), buffers=(), **columns) -> None:
        self.next_id += 1
        before = {
            slot: (self.held[slot], {face for face, n in self.might[slot].items() if n}) for slot in slots
        }
        freed = {slot: self.freed[slot] for slot in slots}
        self.open[self.next_id] = (op, tuple(slots), tuple(faces), tuple(buffers), before, freed, columns)
        self.order["get" if op is Op.GET else "put"].append(self.next_id)
        if op is not Op.GET:
            self.changing.update(slots)
        for slot, face in zip(slots, faces, strict=False):
            self.might[slot][face] += 1
            for _, theirs, _, _, seen, _, _ in self.open.values():
                if slot in theirs:
                    seen[slot][1].add(face)
        page_bytes = PAGE_BYTES if op in {Op.PUT, Op.GET} else 0
        views = [memoryview(buffer) for buffer in buffers]
        self.pages += len(slots)
        self.store.submit(
            Batch(self.next_id, op, page_bytes=page_bytes, slots=slots, buffers=views, **columns)
        )

    def _put(self, slots) -> None:
        faces = [self.rng.randrange(FACES) for _ in slots]
        checksums = ()
        if self.rng.random() < 0.5:
            checksums = [self.sums[face] ^ (self.rng.random() < 0.02) for face in faces]
        direct = len(slots) <= 8 and self.rng.random() < 0.3 and not self._arena_busy()
        buffers = [self.faces[face] for face in faces]
        if direct:
            for row, face in enumerate(buffers):
                self.arena[row] = np.frombuffer(face, np.uint8)
            buffers = [self.arena[row] for row in range(len(slots))]
        self._submit(Op.PUT, slots, faces, buffers, checksums=checksums)

    def _get(self, slots) -> None:
        if len(slots) <= 8 and self.rng.random() < 0.3 and not self._arena_busy():
            self.arena[:] = 0xEE
            buffers = [self.arena[8 + row] for row in range(len(slots))]
        else:
            buffers = [bytearray(PAGE_BYTES) for _ in slots]
        self._submit(Op.GET, slots, (), buffers)

    def _arena_busy(self) -> bool:
        return any(isinstance(b, np.ndarray) for entry in self.open.values() for b in entry[3])

    def _delete(self, slots) -> None:
        self._submit(Op.DELETE, slots)

    def _free(self, slots) -> None:
        self.store.free(slots)
        for slot in slots:
            self.held[slot] = None
            self.freed[slot] += 1

    def _flush(self, slots) -> None:
        self.next_id += 1
        self.open[self.next_id] = (Op.FLUSH, (), (), (), {}, {}, set(self.open))
        self.store.submit(Batch(self.next_id, Op.FLUSH))

    def _open_segment(self) -> None:
        segment = next(s for s in range(SEGMENTS) if s not in self.segments)
        self.store.open_segment(segment, "tenant", PAGE_BYTES, SLOTS)
        self._opened(segment)

    def _opened(self, segment: int) -> None:
        self.segments.add(segment)
        for index in range(SLOTS):
            slot = segment * SLOTS_PER_SEGMENT + index
            self.held[slot], self.might[slot] = None, collections.Counter()

    def _close(self, slots) -> None:
        segment = slots[0] // SLOTS_PER_SEGMENT
        self.settle()
        self.store.close_segment(segment)
        self.segments.discard(segment)
        for slot in [slot for slot in self.held if slot // SLOTS_PER_SEGMENT == segment]:
            del self.held[slot], self.might[slot]

    # --- what came of it

    def _check(self, completion) -> None:
        op, slots, faces, buffers, before, freed, columns = self.open.pop(completion.id)
        if op is Op.FLUSH:
            assert not columns & self.open.keys(), "a flush completed before what it followed"
            return
        lane = self.order["get" if op is Op.GET else "put"]
        assert lane.popleft() == completion.id, "a lane's batches completed out of order"
        assert len(completion.outcomes) == len(slots)
        self.outcomes.update(f"{op.value} {outcome.value}" for outcome in completion.outcomes)
        check = {Op.PUT: self._check_put, Op.GET: self._check_get, Op.DELETE: self._check_delete}[op]
        for place, slot in enumerate(slots):
            if op is not Op.GET:
                self.changing[slot] -= 1
            check(place, slot, completion, faces, buffers, before, freed, columns)

    def _check_put(self, place, slot, completion, faces, buffers, before, freed, columns) -> None:
        outcome, face = completion.outcomes[place], faces[place]
        given = columns["checksums"][place] if columns["checksums"] else self.sums[face]
        self.might[slot][face] -= 1
        if outcome is Outcome.OK:
            assert completion.checksums[place] == self.sums[face] == given
            # freed after it had landed, and before the owner heard of it: gone again
            self.held[slot] = face if freed[slot] == self.freed[slot] else None
        else:
            assert outcome is Outcome.FAULT or (outcome is Outcome.CORRUPT and given != self.sums[face])
            if outcome is Outcome.FAULT and not self.driver.fault_rate:
                assert freed[slot] != self.freed[slot], f"a fault without a cause: {completion.error}"
            self.held[slot] = None

    def _check_get(self, place, slot, completion, faces, buffers, before, freed, columns) -> None:
        outcome, (was, might) = completion.outcomes[place], before[slot]
        quiet = not might and freed[slot] == self.freed[slot] and not self.changing[slot]
        if outcome is Outcome.OK:
            data = bytes(buffers[place])
            allowed = {face for face in (was, *might) if face is not None}
            assert data in {self.faces[face] for face in allowed}, "a wrong page"
            assert completion.checksums[place] == xxh3_64_intdigest(data)
        elif outcome is Outcome.MISS:
            assert not (quiet and was is not None and self.held.get(slot) == was), "a lost slot"
        else:
            assert outcome is Outcome.FAULT, "a page rotted"
            assert self.driver.fault_rate, f"a fault without a cause: {completion.error}"

    def _check_delete(self, place, slot, completion, faces, buffers, before, freed, columns) -> None:
        outcome = completion.outcomes[place]
        assert outcome in {Outcome.OK, Outcome.MISS}
        if freed[slot] == self.freed[slot]:
            assert (outcome is Outcome.OK) == (self.held[slot] is not None), "a delete in front of its turn"
        self.held[slot] = None
