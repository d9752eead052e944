"""A copier on a fake GPU that delays, tears and fails: no wrong page is good, nobody waits for ever, nothing leaks."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

torch = pytest.importorskip("torch", reason="the device room needs torch")

sys.path.insert(0, str(Path(__file__).parent))
from copying_fake import CopyFake  # noqa: E402

from hicache.device import kernels  # noqa: E402
from hicache.device.copying.cuda import CudaCopies  # noqa: E402
from hicache.device.copying.jobs import LoadHandle, LoadJob, StoreHandle, StoreJob  # noqa: E402
from hicache.device.copying.kv import EngineKv  # noqa: E402
from hicache.device.copying.mapped import Span  # noqa: E402
from hicache.errors import CorruptError, HicacheError, NotFoundError, UnavailableError, UnsupportedError  # noqa: E402

LAYERS, HEADS, DIM, BLOCK, BLOCKS, TOKENS = 3, 2, 32, 8, 24, 16
WAIT_S = 15


class Region:
    """Page memory that goes when nothing refers to it: it must not be registered then."""

    def __init__(self, rig, size_bytes):
        self.bytes = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, dtype=np.uint8)
        self.fate = {"retired": False}
        address = self.bytes.ctypes.data
        weakref.finalize(self, rig.unmapped, address)


class Rig:
    """An engine's planes in the fake's memory, and pages in host memory."""

    def __init__(
        self, seed=0, fault_rate=0.0, codec=None, layout="kv-nhd", stage_pages=3, way="auto", **shape
    ):
        self.driver = CopyFake(seed, fault_rate, **shape)
        latent = layout == "latent"
        sizes = [BLOCKS, BLOCK, HEADS, DIM] if layout == "kv-nhd" else [BLOCKS, HEADS, BLOCK, DIM]
        sizes = [BLOCKS, BLOCK, HEADS * DIM] if latent else [2, *sizes]
        count = int(np.prod(sizes))
        rate, self.driver.fault_rate = self.driver.fault_rate, 0.0
        self.memory = self.driver.engines_memory = self.driver.allocate(LAYERS * count * 2)
        raw = self.driver.memory[self.memory]
        raw[:] = np.random.default_rng(seed).integers(0, 250, raw.size, dtype=np.uint8)
        whole = torch.from_numpy(raw).view(torch.bfloat16)
        whole.copy_(torch.randn(whole.shape, generator=torch.Generator().manual_seed(seed)))
        layers = [whole[n * count : (n + 1) * count].view(sizes) for n in range(LAYERS)]
        self.kv = EngineKv.of(layers, layout=layout, page_tokens=TOKENS, codec=codec)
        self.leaks = []
        self.stage_bytes = stage_pages * self.kv.page_bytes + 100
        self.copies = CudaCopies(
            self.kv, self.driver, stage_bytes=self.stage_bytes, way=way, piece_bytes=4 * self.kv.page_bytes
        )
        for jobs in (self.copies._load, self.copies._store):  # lanes are made before anything fails
            made = threading.Event()
            jobs._workers.put(lambda jobs=jobs, made=made: (jobs._lane, made.set()))
            assert made.wait(WAIT_S)
        self.driver.fault_rate = rate

    def unmapped(self, address):
        if any(start <= address < start + size for start, size in self.driver.registered.items()):
            self.leaks.append(address)

    def region(self, slots=20):
        return Region(self, slots * self.kv.page_bytes)

    def spans(self, region, slots):
        """Runs of slots of a region, as spans."""
        rows = region.bytes.reshape(-1, self.kv.page_bytes)
        found, first = [], 0
        for begin, end in slots:
            fate = region.fate
            found.append(Span(first, rows[begin:end], region, lambda fate=fate: fate["retired"]))
            first += end - begin
        return found

    def retire(self, region):
        region.fate["retired"] = True
        self.copies.forget(region)

    def places(self, rng, pages):
        blocks = rng.sample(range(BLOCKS), pages * TOKENS // BLOCK)
        return self.kv.places_of_blocks(np.array(blocks))

    def pages(self, places):
        """The twin's pages of planes."""
        raw = torch.zeros((len(places), self.kv.raw_bytes), dtype=torch.uint8)
        kernels.pack_units(self.kv.planes, torch.from_numpy(places), raw, TOKENS)
        if not self.kv.codec:
            return raw.numpy()
        rows = torch.empty((len(places), self.kv.page_bytes), dtype=torch.uint8)
        kernels.encode_rows(
            raw.view(torch.bfloat16), self.kv.codec, rows, torch.zeros(len(places), dtype=torch.int32)
        )
        return rows.numpy()

    def load(self, spans, places, check=lambda: None, **more):
        sums = [xxh3_64_intdigest(row.data) for span in spans for row in span.rows]
        layers = more.pop("layers", range(LAYERS))
        handle = LoadHandle(layers, len(places), self.copies.hold)
        how = {"checksums": np.array(sums, np.uint64), "verify": True, "number": 0, **more}
        job = LoadJob(spans, places, layers, check=check, handle=handle, after=self.mark(), **how)
        self.copies.load(job)
        return handle

    def store(self, spans, places, *, layered=False, verify=True):
        handle = StoreHandle(range(LAYERS), len(places), layered=layered)
        self.copies.store(StoreJob(spans, places, verify, handle, None if layered else self.mark()))
        return handle

    def mark(self):
        return self.copies.mark(None)

    def settle_pins(self):
        """Until what was to be registered is."""
        for pins in (self.copies.mapped._readable, self.copies.mapped._writable):
            done = threading.Event()
            pins._work.put(done.set)
            assert done.wait(WAIT_S)

    def finish(self):
        self.driver.fault_rate = 0.0
        self.copies.close()
        self.driver.release(self.memory)
        gc.collect()
        assert not self.leaks, "memory went while it was registered"
        assert not self.driver.registered
        assert not self.driver.violations, self.driver.violations[:3]
        assert not self.driver.memory


def encoded(rig, rng, region, slots):
    """Pages that decode to numbers, where pages are quantised."""
    if rig.kv.codec:
        for begin, end in slots:
            raw = torch.randn(
                (end - begin, rig.kv.raw_bytes // 2),
                generator=torch.Generator().manual_seed(rng.randrange(99)),
            )
            rows = torch.from_numpy(region.bytes.reshape(-1, rig.kv.page_bytes)[begin:end])
            kernels.encode_rows(
                raw.to(torch.bfloat16), rig.kv.codec, rows, torch.zeros(end - begin, dtype=torch.int32)
            )


def numbers(rig, spans):
    """What the planes are to hold after a load."""
    rows = torch.from_numpy(np.concatenate([span.rows for span in spans]))
    if not rig.kv.codec:
        return rows.numpy()
    raw = torch.empty((len(rows), rig.kv.raw_bytes // 2), dtype=torch.bfloat16)
    kernels.decode_rows(rows, rig.kv.codec, raw)
    return raw.view(torch.uint8).numpy()


def raw_pages(rig, places):
    raw = torch.zeros((len(places), rig.kv.raw_bytes), dtype=torch.uint8)
    kernels.pack_units(rig.kv.planes, torch.from_numpy(places), raw, TOKENS)
    return raw.numpy()


@pytest.mark.parametrize(
    ("codec", "layout", "way", "registered"),
    [
        (None, "kv-nhd", "kernel", True),
        (None, "kv-hnd", "staged", True),
        (None, "latent", "kernel", False),
        (None, "kv-nhd", "staged", False),
        ("fp8-e4m3", "kv-nhd", "auto", True),
        ("int8-g64", "latent", "auto", False),
        ("int4-g64", "kv-hnd", "auto", True),
    ],
)
def test_there_and_back(codec, layout, way, registered):
    rig = Rig(3, codec=codec, layout=layout, way=way, piece=1 << 63 if registered else 0)
    rng = random.Random(4)
    slots, region = [(2, 6), (9, 11), (8, 9)], rig.region()
    places = rig.places(rng, 7)
    for _ in range(2):  # the first time nothing is registered yet
        store = rig.store(rig.spans(region, slots), places)
        store.wait(WAIT_S)
        wanted = rig.pages(places)
        spans = rig.spans(region, slots)
        assert (np.concatenate([span.rows for span in spans]) == wanted).all()
        assert not store.refused.any()
        assert store.checksums.tolist() == [xxh3_64_intdigest(row.data) for row in wanted]
        to = rig.places(rng, 7)
        load = rig.load(spans, to)
        load.wait(WAIT_S)
        assert (raw_pages(rig, to) == numbers(rig, spans)).all()
        rig.settle_pins()
    assert bool(rig.driver.registered) is registered
    using = rig.copies.mapped.use(spans, writes=True)
    assert using.ready is registered
    rig.copies.mapped.done(using)
    del using
    del spans
    rig.finish()


def test_layers_hold_the_engines_stream():
    rig = Rig(5, stage_pages=2)
    region, rng = rig.region(), random.Random(1)
    spans, places = rig.spans(region, [(0, 5)]), rig.places(rng, 5)
    wanted, seen = numbers(rig, spans), []

    def look(layer):
        width = rig.kv.plane_bytes * 2
        part = slice(layer * width, (layer + 1) * width)
        seen.append((raw_pages(rig, places)[:, part] == wanted[:, part]).all())

    load = rig.load(spans, places)
    for layer in range(LAYERS):
        load.wait_layer(layer, timeout_s=WAIT_S)
        rig.driver.compute(lambda layer=layer: look(layer))
    load.wait(WAIT_S)
    rig.driver.settle(rig.mark())
    assert seen == [True] * LAYERS, "what the engine computes sees the layer"
    rig.finish()


def test_a_layered_store_waits_for_what_computes_the_layers():
    rig = Rig(6)
    region, places = rig.region(), rig.places(random.Random(2), 5)
    final = [
        torch.randn(plane.shape, generator=torch.Generator().manual_seed(n))
        for n, plane in enumerate(rig.kv.planes)
    ]
    store = rig.store(rig.spans(region, [(3, 8)]), places, layered=True)
    for layer in range(LAYERS):
        with pytest.raises(UnavailableError):
            store.wait(0.01)
        for plane in (2 * layer, 2 * layer + 1):
            rig.driver.compute(lambda plane=plane: rig.kv.planes[plane].copy_(final[plane]))
        store.announce(layer, rig.mark())
    store.wait(WAIT_S)
    assert (rig.spans(region, [(3, 8)])[0].rows == rig.pages(places)).all()
    never = rig.store(rig.spans(region, [(3, 8)]), places, layered=True)
    rig.finish()  # nobody waits for ever
    with pytest.raises(UnavailableError, match="cancelled"):
        never.wait(WAIT_S)


def test_partial_layers_and_skipped_units():
    for way in ("kernel", "staged"):
        rig = Rig(7, way=way)
        region, rng = rig.region(), random.Random(3)
        spans, places = rig.spans(region, [(1, 5)]), rig.places(rng, 4)
        before = [plane.clone() for plane in rig.kv.planes]
        rig.load(spans, places, layers=range(1, 2)).wait(WAIT_S)
        for number, (plane, old) in enumerate(zip(rig.kv.planes, before, strict=True)):
            assert torch.equal(plane, old) is (number // 2 != 1)
        wanted, width = numbers(rig, spans), rig.kv.plane_bytes * 2
        assert (raw_pages(rig, places)[:, width : 2 * width] == wanted[:, width : 2 * width]).all()
        places[2, 1] = -1
        rig.load(spans, places).wait(WAIT_S)
        found = raw_pages(rig, places)
        assert (found[[0, 1, 3]] == wanted[[0, 1, 3]]).all()
        rig.finish()


def test_rot_is_seen_where_it_is():
    for codec in (None, "int8-g64"):
        rig = Rig(8, codec=codec)
        region, rng = rig.region(), random.Random(3)
        slots = [(1, 8)]
        encoded(rig, rng, region, slots)
        spans, places = rig.spans(region, slots), rig.places(rng, 7)
        sums = np.array([xxh3_64_intdigest(row.data) for row in spans[0].rows], np.uint64)
        spans[0].rows[4, 77] ^= 1
        for layers in (range(LAYERS), range(1)):
            load = rig.load(spans, places, checksums=sums, number=10, layers=layers)
            with pytest.raises(CorruptError, match="page 14"):
                load.wait(WAIT_S)
            assert load.corrupt_pages == (14,)
        rig.load(spans, places, checksums=sums, verify=False).wait(WAIT_S)
        del spans
        rig.finish()


def test_a_copy_that_arrives_wrong_is_seen():
    """The bytes lie right in host memory and went wrong on their way."""
    rig = Rig(9, way="kernel")
    region, places = rig.region(), rig.places(random.Random(3), 3)
    real = rig.driver.move_units

    def torn(stream, move, *, pack):
        real(stream, move, pack=pack)
        if not pack and move.planes != rig.copies._load._lane._planes:  # not the first layer
            rig.driver.move_units = real
            unit = int(places[1, 0])
            plane = rig.kv.planes[0].view(torch.int16)  # which was copied before
            with rig.driver.lock:
                rig.driver.compute(lambda: plane[unit // BLOCK, unit % BLOCK].bitwise_xor_(1), stream)

    rig.driver.move_units = torn
    load = rig.load(rig.spans(region, [(0, 3)]), places)
    with pytest.raises(CorruptError, match="page 1"):
        load.wait(WAIT_S)
    rig.finish()


def test_the_lease_is_looked_at_before_and_after():
    rig = Rig(10)
    region, places = rig.region(), rig.places(random.Random(3), 3)
    answers = iter([None, NotFoundError("its slots were reused")])

    def check():
        found = next(answers)
        if found:
            raise found

    with pytest.raises(NotFoundError, match="reused"):
        rig.load(rig.spans(region, [(0, 3)]), places, check).wait(WAIT_S)
    rig.finish()


@pytest.mark.parametrize("codec", [None, "int8-g64"])
def test_a_region_that_is_retired_goes_after_its_copies(codec):
    rig = Rig(11, codec=codec)
    rng = random.Random(5)
    gone = []
    for turn in range(6):
        region = rig.region(20 + turn)
        slots = [(1, 4), (6, 8)]
        encoded(rig, rng, region, slots)
        places = rig.places(rng, 5)
        rig.load(rig.spans(region, slots), places).wait(WAIT_S)
        rig.settle_pins()
        assert any(start == region.bytes.ctypes.data for start in rig.driver.registered)
        wanted = numbers(rig, rig.spans(region, slots))
        load = rig.load(rig.spans(region, slots), places)  # goes on beside what follows
        rig.retire(region)
        weakref.finalize(region, gone.append, turn)
        del region
        load.wait(WAIT_S)
        assert (raw_pages(rig, places) == wanted).all()
        del load
        rig.settle_pins()
    gc.collect()
    rig.settle_pins()
    assert sorted(gone) == list(range(6)), "and then it does go"
    assert not len(rig.copies.mapped)
    rig.finish()


def test_a_forgotten_region_is_not_registered_again():
    rig = Rig(12)
    region, places = rig.region(), rig.places(random.Random(3), 3)
    spans = [Span(0, span.rows, region, lambda: True) for span in rig.spans(region, [(0, 3)])]
    rig.load(spans, places).wait(WAIT_S)
    rig.settle_pins()
    assert not rig.driver.registered and not len(rig.copies.mapped)
    assert (raw_pages(rig, places) == numbers(rig, spans)).all()
    del spans
    rig.finish()


def test_read_only_memory_that_cannot_be_registered_is_bounced_with_one_warning(caplog):
    rig = Rig(13, read_only=False)
    places = rig.places(random.Random(3), 3)
    for _ in range(3):
        region = rig.region()
        rig.load(rig.spans(region, [(0, 3)]), places).wait(WAIT_S)
        assert (raw_pages(rig, places) == numbers(rig, rig.spans(region, [(0, 3)]))).all()
        rig.settle_pins()
    assert [record.message for record in caplog.records if "HostRegisterReadOnlySupported" in record.message]
    assert len(caplog.records) == 1
    rig.finish()


def test_ways_are_tried_in_turn_and_the_fastest_stays():
    rig = Rig(14, delays=False)
    region, places = rig.region(), rig.places(random.Random(3), 9)
    for _ in range(10):
        rig.load(rig.spans(region, [(0, 9)]), places).wait(WAIT_S)
        rig.settle_pins()
    choice = rig.copies.choices["load"]["many"]
    assert choice.settled and set(choice.gb_per_s) == {"kernel", "staged"}
    assert choice.way == max(choice.gb_per_s, key=choice.gb_per_s.get)
    assert not rig.copies.choices["load"]["few"].settled
    rig.finish()


def test_a_device_without_kernels_is_refused():
    driver = CopyFake(kernels=False)
    kv = EngineKv.of([torch.zeros(2, 4, 8, 2, 32)], layout="kv-nhd", page_tokens=8)
    with pytest.raises(UnsupportedError, match="triton"):
        CudaCopies(kv, driver, stage_bytes=1 << 20)


# --- anything goes


def walk(seed, jobs, fault_rate, codec):
    """Random jobs, some beside each other, with regions that come and go."""
    rng = random.Random(seed)
    rig = Rig(seed, fault_rate, codec, way="auto", read_only=rng.random() < 0.8)
    outcomes = {"good": 0, "failed": 0}
    regions = []
    free = set(range(BLOCKS // 2))  # of blocks of a page

    def take(pages):
        chosen = rng.sample(sorted(free), pages)
        free.difference_update(chosen)
        blocks = [b for page in chosen for b in (2 * page, 2 * page + 1)]
        return chosen, rig.kv.places_of_blocks(np.array(blocks))

    under_way = []
    for _ in range(jobs):
        if not regions or rng.random() < 0.2:
            region = rig.region(12)
            encoded(rig, rng, region, [(0, 12)])
            regions.append([region, 0])
        if len(regions) > 2:
            rig.retire(regions.pop(0)[0])
        pages = rng.randint(1, 5)
        if len(free) < pages or rng.random() < 0.4:
            while under_way:
                outcomes[under_way.pop(rng.randrange(len(under_way)))()] += 1
            continue
        region, _ = entry = rng.choice(regions)
        chosen, places = take(pages)
        begin = rng.randint(0, 12 - pages)
        slots = (
            [(begin, begin + pages)]
            if rng.random() < 0.7 or pages < 2
            else [(begin + 1, begin + pages), (begin, begin + 1)]
        )
        if rng.random() < 0.6 or under_way:
            under_way.append(loading(rig, rng, region, slots, places, chosen, free))
        else:
            outcomes[storing(rig, rng, region, slots, places, chosen, free)] += 1
        del region, entry
    while under_way:
        outcomes[under_way.pop()()] += 1
    regions.clear()
    rig.finish()
    return outcomes


def loading(rig, rng, region, slots, places, chosen, free):
    spans = rig.spans(region, slots)
    sums = np.array([xxh3_64_intdigest(row.data) for span in spans for row in span.rows], np.uint64)
    bad = rng.random() < 0.1
    if bad:
        sums[rng.randrange(len(sums))] ^= np.uint64(1)
    layers = range(LAYERS) if rng.random() < 0.7 else range(1, rng.randint(2, LAYERS))
    try:
        load = rig.load(spans, places, checksums=sums, layers=layers)
    except HicacheError:
        free.update(chosen)
        return lambda: "failed"

    def settle():
        try:
            load.wait(WAIT_S)
        except HicacheError as error:
            assert load.done, error
            assert bad or rig.driver.fault_rate, error
            free.update(chosen)
            return "failed"
        assert not bad, "a wrong page was called good"
        width = rig.kv.plane_bytes * rig.kv.planes_per_layer
        part = slice(layers.start * width, layers.stop * width)
        assert (raw_pages(rig, places)[:, part] == numbers(rig, spans)[:, part]).all()
        free.update(chosen)
        return "good"

    return settle


def storing(rig, rng, region, slots, places, chosen, free):
    spans, layered = rig.spans(region, slots), rng.random() < 0.4
    wanted = rig.pages(places)
    free.update(chosen)
    try:
        store = rig.store(spans, places, layered=layered)
        for layer in range(LAYERS if layered else 0):
            store.announce(layer, rig.mark())
        store.wait(WAIT_S)
    except HicacheError:
        store.wait_end()
        assert rig.driver.fault_rate
        encoded(rig, rng, region, slots)
        return "failed"
    assert store.checksums.tolist() == [xxh3_64_intdigest(row.data) for row in wanted]
    # what landed is what the checksum says, unless the link failed: then the sidecar refuses it
    assert (np.concatenate([span.rows for span in spans]) == wanted).all()
    return "good"


@pytest.mark.parametrize("codec", [None, "int4-g64"])
@pytest.mark.parametrize("fault_rate", [0.0, 0.01])
def test_walk(seed, codec, fault_rate):
    outcomes = walk(seed, 60, fault_rate, codec)
    assert outcomes["good"] > 5
    assert fault_rate or outcomes["failed"] < 20


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_long_walks(seed):
    for turn in range(200):
        walk(
            seed + turn,
            100,
            random.Random(turn).choice((0.0, 0.001, 0.02, 0.1)),
            random.Random(turn).choice((None, "int4-g64", "fp8-e4m3")),
        )
