"""Transfers and a CUDA store on the fake, stepped by the test, against a model.

Never a wrong page that is said to be right, no transfer lost or ended twice, no byte of an engine's touched for no
transfer or after its end, counters that only rise and say FAILED if and only if a page has failed.
"""

from __future__ import annotations

import collections
import dataclasses
import random

import numpy as np
from cuda_fake import FakeDriver
from cuda_rig import FACES, PAGE_BYTES, SLOTS, Walk
from pool_fake import PoolDriver
from transfer_rig import Count, Form, Planes
from xxhash import xxh3_64_intdigest

from hicache.device import DeviceOptions
from hicache.device.cuda import CudaDevice
from hicache.device.kv import FAILED, MemoryKind, SharedMemory
from hicache.device.opening import KvTransfers
from hicache.device.transfers import DevicePages, HostPages, Transfer
from hicache.errors import UnsupportedError
from hicache.types import SLOTS_PER_SEGMENT, Op, Outcome, TierKind, TierSpec

PAGE_TOKENS, TOKEN_BYTES, ROWS, REGIONS = 4, 16, 24, 3
FORM = Form(layers=2, per_layer=2, blocks=24, block_tokens=4, heads=1, dim=8, width=2)


class Region:
    """An engine's planes, what must lie in them, and who uses which tokens. ``kind``: memfd, or of CUDA."""

    def __init__(self, walk, kind):
        self.walk, self.kind = walk, kind
        rng = np.random.default_rng(walk.rng.randrange(1 << 30))
        self.planes = Planes(FORM, rng, None if kind is MemoryKind.MEMFD else walk.take)
        self.maps = self.planes.maps
        self.model = [memory.copy() for memory in self.maps]
        self.busy = set()  # tokens
        self.open, self.closing, self.gone, self.flying = True, False, False, 0
        try:
            self.handle = walk.moves.open_kv(self.planes.kv(self._memories()))
        except UnsupportedError:
            self.release()
            raise
        self.starts = self.handle.planes.tolist()  # as they are mapped here

    def _memories(self):
        if self.kind is MemoryKind.MEMFD:
            return None
        engine, uuid = self.walk.engine, self.walk.driver.uuid
        return [
            SharedMemory(self.kind, len(m), handle=engine.share(m.ctypes.data), device_uuid=uuid)
            for m in self.maps
        ]

    def spans(self, places, unit_tokens, layers):
        """(plane, unit's first token, page, where in the page) of every unit of some layers."""
        units = places.shape[1]
        size = unit_tokens * TOKEN_BYTES
        for plane in range(layers[0] * FORM.per_layer, (layers[0] + layers[1]) * FORM.per_layer):
            for (page, unit), place in np.ndenumerate(places):
                if place >= 0:
                    yield plane, int(place), page, (plane * units + unit) * size

    def at(self, plane, place, size, model=False):
        memory = (self.model if model else self.maps)[self.planes.plane_memory[plane]]
        start = self.planes.plane_offset[plane] + place * TOKEN_BYTES
        return memory[start : start + size]

    def check(self):
        """Nothing but what transfers under way may write differs from the model."""
        for memory, model in zip(self.maps, self.model, strict=True):
            if np.array_equal(memory, model):
                continue
            mine = np.zeros(len(model), np.bool_)
            for number, plane in enumerate(self.planes.plane_memory):
                if self.maps[plane] is memory:
                    for token in self.busy:
                        start = self.planes.plane_offset[number] + token * TOKEN_BYTES
                        mine[start : start + TOKEN_BYTES] = True
            assert np.array_equal(memory[~mine], model[~mine]), (
                "an engine's memory was touched for no transfer"
            )

    def release(self):
        self.open = False
        self.check()
        self.planes.close()
        if self.kind is not MemoryKind.MEMFD:
            for memory in self.maps:
                self.walk.engine.release(memory.ctypes.data)


@dataclasses.dataclass
class Flight:
    """A transfer under way."""

    transfer: Transfer
    region: Region
    pack: bool
    unit_tokens: int
    layers: tuple[int, int]
    rows: list
    faces: list
    wrong: list
    before: dict
    freed: dict
    arena: list
    addresses: list
    tokens: set


class TransferWalk(Walk):
    """``page_moves`` counts the pages of transfers that have ended."""

    def __init__(self, seed, fault_rate, **shape):
        self.flights = {}
        self.now_ns = 0
        self.page_moves = 0
        self.ends = collections.Counter()
        self.engine = FakeDriver(1_000_000 + seed)
        self.claims = collections.Counter()
        self.writes = collections.Counter()  # PUTs and DELETEs of each slot that were submitted, and closings
        super().__init__(seed, fault_rate, **shape)
        self.moves = KvTransfers(self.store, self._tell, lambda: self.now_ns, threaded=False)
        self.driver.claimed = self._claimed
        self.regions = []
        self.room = np.zeros((ROWS, PAGE_BYTES), np.uint8)
        self.free_rows = set(range(ROWS))
        self.registered = "no"
        self._repin()

    def _make(self, seed, fault_rate, **shape):
        rng = random.Random(seed)
        self.driver = PoolDriver(seed, fault_rate, **shape)
        spec = TierSpec("device", TierKind.DEVICE, 2 << 13, 1 << 13)
        options = DeviceOptions(
            cuda_staging_bytes=rng.choice((2, 3, 6)) * PAGE_BYTES,
            copy_engine=rng.choice(("auto", "auto", "kernel", "staged", "dma")),
        )
        return CudaDevice(spec, self._tell, options, self.driver, threaded=False)

    def _submit(self, op, slots, *columns, **named):
        if op is not Op.GET:
            self.writes.update(slots)
        super()._submit(op, slots, *columns, **named)

    def _close(self, slots):
        self.writes.update(
            slot for slot in self.held if slot // SLOTS_PER_SEGMENT == slots[0] // SLOTS_PER_SEGMENT
        )
        super()._close(slots)

    def take(self, size):
        return self.engine.memory[self.engine.allocate(size)]

    def _claimed(self, address):
        return self.claims[address] > 0

    # --- what is asked

    def act(self):
        super().act()
        self._keep_regions()
        kinds = ("load", "load_slots", "pack", "rise", "close_region", "repin", "tick")
        for _ in range(2):
            getattr(self, f"_{self.rng.choices(kinds, (30, 30, 30, 40, 2, 3, 10))[0]}")()
            for _ in range(self.rng.randrange(6)):
                self.progress()

    def progress(self):
        pick = self.rng.randrange(6)
        mover = next(iter(self.moves._movers.values()))
        if pick < 2:
            super().progress()
        elif pick == 2:
            self.moves._host.step()
        elif pick == 3:
            self.moves.step()
        else:
            mover._lanes[pick == 4].step()
        for done in self.moves.poll():
            self._ended(done)

    def _keep_regions(self):
        while sum(region.open and not region.closing for region in self.regions) < REGIONS:
            kind = self.rng.choice((MemoryKind.MEMFD, MemoryKind.CUDA_IPC, MemoryKind.CUDA_IPC))
            try:
                self.regions.append(Region(self, kind))
            except UnsupportedError:
                assert self.driver.fault_rate, "a region was refused without a cause"
                return

    def _some_pages(self, region):
        """(places, tokens of a unit, layers): units that nobody uses; None where there are too few."""
        rng = self.rng
        unit_tokens = rng.choice((1, 2, 4))
        units, pages = PAGE_TOKENS // unit_tokens, rng.choice((1, 1, 2, 4, 8))
        free = [
            start
            for start in range(0, FORM.blocks * FORM.block_tokens, unit_tokens)
            if not any(start + token in region.busy for token in range(unit_tokens))
        ]
        if len(free) < pages * units:
            return None
        places = np.array(rng.sample(free, pages * units), np.int64).reshape(pages, units)
        if rng.random() < 0.2:
            places[rng.randrange(pages), rng.randrange(units)] = -1
        first = rng.choice((0, 0, 1))
        return places, unit_tokens, (first, rng.randint(1, FORM.layers - first))

    def _fly(self, kind, *, pack=False):
        """Queue a transfer of some pages of ``kind``: (pages, what is known of them)."""
        ready = [r for r in self.regions if r.open and not r.closing]
        if kind == "slots":
            ready = [r for r in ready if r.kind is not MemoryKind.MEMFD]
        region = self.rng.choice(ready) if ready else None
        found = self._some_pages(region) if region else None
        if found is None:
            return
        places, unit_tokens, layers = found
        if pack and layers[1] < FORM.layers and self.rng.random() < 0.7:
            layers = (0, FORM.layers)
        known = self._slots(len(places)) if kind == "slots" else self._buffers(len(places), pack)
        if known is None:
            return
        pages, rows, faces, wrong, before, freed, arena = known
        self.next_id += 1
        counter = self.rng.choice((None, Count(0)))
        deadline = self.now_ns + self.rng.randrange(200) if pack and self.rng.random() < 0.3 else 0
        transfer = Transfer(
            self.next_id,
            region.handle,
            pages,
            places,
            PAGE_TOKENS,
            PAGE_BYTES,
            layers[0],
            layers[1],
            counter,
            deadline,
        )
        tokens = {int(p) + t for p in places.reshape(-1) if p >= 0 for t in range(unit_tokens)}
        every = [
            region.starts[plane] + place * TOKEN_BYTES
            for plane, place, _, _ in region.spans(places, unit_tokens, layers)
        ]
        self.claims.update(every)
        region.busy |= tokens
        region.flying += 1
        self.flights[self.next_id] = Flight(
            transfer,
            region,
            pack,
            unit_tokens,
            layers,
            rows,
            faces,
            wrong,
            before,
            freed,
            arena,
            every,
            tokens,
        )
        (self.moves.pack if pack else self.moves.load)(transfer)

    def _buffers(self, count, pack):
        faces = [self.rng.randrange(FACES) for _ in range(count)]
        arena = []
        if self.rng.random() < 0.6 and len(self.free_rows) >= count:
            arena = self.rng.sample(sorted(self.free_rows), count)
            self.free_rows -= set(arena)
            rows = [self.room[at] for at in arena]
        else:
            rows = [np.zeros(PAGE_BYTES, np.uint8) for _ in range(count)]
        for row, face in zip(rows, faces, strict=True):
            row[:] = np.frombuffer(self.faces[face], np.uint8)
        wrong = [not pack and self.rng.random() < 0.03 for _ in faces]
        sums = [self.sums[face] ^ bad for face, bad in zip(faces, wrong, strict=True)]
        pages = HostPages([row.data for row in rows], [] if pack else sums)
        return pages, rows, faces, wrong, {}, {}, arena

    def _slots(self, count):
        slots = [s * SLOTS_PER_SEGMENT + i for s in sorted(self.segments) for i in range(SLOTS)]
        if self.rng.random() < 0.9:  # some that hold nothing are asked for, too
            slots = [slot for slot in slots if self.held[slot] is not None]
        if len(slots) < count:
            return None
        slots = self.rng.sample(slots, count)
        before = {s: (self.held[s], {face for face, n in self.might[s].items() if n}) for s in slots}
        return (
            DevicePages(slots, verify=self.rng.random() < 0.9),
            [],
            list(slots),
            [],
            before,
            {s: (self.freed[s], self.changing[s], self.writes[s]) for s in slots},
            [],
        )

    def _load(self):
        self._fly("host")

    def _load_slots(self):
        self._fly("slots")
        for _ in range(self.rng.choice((0, 0, 60))):
            self.progress()

    def _pack(self):
        self._fly("host", pack=True)

    def _rise(self):
        """An engine says that a layer or more of a pack is there."""
        waiting = [f for f in self.flights.values() if f.pack and f.transfer.counter is not None]
        if waiting:
            counter = self.rng.choice(waiting).transfer.counter
            counter.value = min(counter.value + self.rng.randint(1, 2), FORM.layers)

    def _tick(self):
        self.now_ns += self.rng.randrange(50)

    def _repin(self):
        """The arena is registered, or unregistered under transfers that use it."""
        if self.registered == "going":
            return
        if self.registered == "no":
            self.store.pins.add(self.room.ctypes.data, self.room.nbytes)
            self.registered = "yes"
            return
        self.registered = "going"

        def gone():
            self.registered = "no"

        self.store.pins.remove(self.room.ctypes.data, self.room.nbytes, gone)

    def _close_region(self):
        ready = [region for region in self.regions if region.open and not region.closing]
        if ready:
            region = self.rng.choice(ready)
            region.closing = True

            def then():
                assert not region.flying or region.flying == len(self._untold(region)), (
                    "closed under a transfer"
                )
                region.gone = True

            self.moves.close_kv(region.handle, then)
            self._forget()

    def _untold(self, region):
        """Transfers of the region that have ended and that nobody has asked for yet."""
        ended = {done.id for done in self.moves._done}
        return [f for number, f in self.flights.items() if f.region is region and number in ended]

    def _forget(self):
        for region in list(self.regions):
            if region.gone and not region.flying:
                region.release()
                self.regions.remove(region)

    # --- what came of it

    def _ended(self, done):
        flight = self.flights.pop(done.id)  # KeyError: ended twice, or never begun
        region, pages = flight.region, len(flight.transfer.places)
        region.flying -= 1
        self.claims.subtract(flight.addresses)
        self.page_moves += pages
        assert len(done.outcomes) == len(done.checksums) == pages
        kind = "pack" if flight.pack else "load" if flight.rows else "slots"
        self.ends.update(f"{kind} {outcome.value}" for outcome in done.outcomes)
        check = self._check_pack if flight.pack else self._check_load
        size = flight.unit_tokens * TOKEN_BYTES
        for page, outcome in enumerate(done.outcomes):
            check(flight, page, outcome, done)
        for plane, place, _, _ in region.spans(flight.transfer.places, flight.unit_tokens, flight.layers):
            region.at(plane, place, size, model=True)[:] = region.at(plane, place, size)
        region.busy -= flight.tokens
        self.free_rows |= set(flight.arena)
        self._check_counter(flight, done)
        region.check()
        self._forget()

    def _check_counter(self, flight, done):
        counter = flight.transfer.counter
        if counter is None or flight.pack:
            assert counter is None or not counter.seen
            return
        failed = any(outcome is not Outcome.OK for outcome in done.outcomes)
        assert counter.value == (FAILED if failed else flight.layers[1]), (counter.seen, done)

    def _bytes_of(self, flight, page):
        """Of the engine's memory: (where in the page, the bytes)."""
        size = flight.unit_tokens * TOKEN_BYTES
        for plane, place, at, where in flight.region.spans(
            flight.transfer.places, flight.unit_tokens, flight.layers
        ):
            if at == page:
                yield where, flight.region.at(plane, place, size).tobytes()

    def _check_load(self, flight, page, outcome, done):
        if flight.before:
            self._check_slot(flight, page, outcome, done)
            return
        face = flight.faces[page]
        if outcome is Outcome.OK:
            assert not flight.wrong[page], "a page that does not have its checksum is said to be right"
            assert done.checksums[page] == self.sums[face]
            for where, found in self._bytes_of(flight, page):
                assert found == self.faces[face][where : where + len(found)], "a wrong page"
        elif outcome is Outcome.CORRUPT:
            assert flight.wrong[page], "a page rotted"
        else:
            assert outcome is Outcome.FAULT and self.may_fail, done
            assert done.error

    def _check_slot(self, flight, page, outcome, done):
        slot = flight.faces[page]
        was, might = flight.before[slot]
        if outcome is Outcome.OK:
            allowed = {face for face in (was, *might) if face is not None}
            faces = [face for face in allowed if self.sums[face] == done.checksums[page]]
            assert faces, "a page from nowhere"
            for where, found in self._bytes_of(flight, page):
                assert found == self.faces[faces[0]][where : where + len(found)], "a wrong page"
        elif outcome is Outcome.MISS:
            freed, changing, writes = flight.freed[slot]
            quiet = not changing and freed == self.freed[slot] and writes == self.writes[slot]
            assert not (quiet and was is not None), "a lost slot"
        else:
            assert outcome is Outcome.FAULT and self.may_fail, done

    def _check_pack(self, flight, page, outcome, done):
        row, face = flight.rows[page], flight.faces[page]
        if outcome is Outcome.OK:
            wanted = bytearray(self.faces[face])
            for where, found in self._bytes_of(flight, page):
                wanted[where : where + len(found)] = found
            assert row.tobytes() == bytes(wanted), "a wrong page"
            assert done.checksums[page] == xxh3_64_intdigest(row.data)
            return
        assert outcome is Outcome.FAULT and done.error
        transfer = flight.transfer
        late = transfer.deadline_ns and transfer.deadline_ns <= self.now_ns
        assert self.may_fail or late or flight.region.closing, done

    @property
    def may_fail(self):
        return bool(self.driver.fault_rate)

    # --- the end

    def land(self):
        """Until no transfer is under way."""
        for _ in range(200_000):
            for flight in self.flights.values():
                if flight.pack and flight.transfer.counter is not None:
                    flight.transfer.counter.value = FORM.layers
            if not self.flights:
                return
            self.moves.step()
            self.store.step()
            for done in self.moves.poll():
                self._ended(done)
            for completion in self.store.poll():
                self._check(completion)
        raise AssertionError(f"transfers never ended: {sorted(self.flights)}")

    def finish(self):
        self.land()
        self.settle()
        for region in list(self.regions):
            if not region.closing:
                region.closing = True
                self.moves.close_kv(region.handle, lambda region=region: setattr(region, "gone", True))
        self._forget()
        assert not self.regions, "a region was never unmapped"
        self.moves.close()
        assert not self.driver.mapped
        super().finish()
        assert not self.engine.violations
        assert not self.engine.memory
