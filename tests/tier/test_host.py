"""Host memory: sealed segments, generations, layout, prefault, and reading a client's region."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hicache.errors import InvalidArgumentError, UnavailableError
from hicache.tier.host import HostStore
from hicache.tier.region import read_region
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op, Outcome, TierKind, TierSpec, segment_slots

SPEC = TierSpec("host", TierKind.HOST, 8 << 20, 2 << 20, header_bytes_per_slot=8)
PAGE_BYTES = 65536


@pytest.fixture
def store() -> Iterator[HostStore]:
    made = HostStore(SPEC, lambda: None, prefault=False)
    yield made
    made.close()


def opened(store: HostStore, segment: int = 0, page_bytes: int = PAGE_BYTES) -> list[int]:
    slots = segment_slots(SPEC, page_bytes)
    store.open_segment(segment, "tenant", page_bytes, slots)
    return [segment * SLOTS_PER_SEGMENT + index for index in range(slots)]


def run(store: HostStore, batch: Batch) -> list[Outcome]:
    store.submit(batch)
    while not (done := store.poll()):
        time.sleep(0.001)
    return list(done[0].outcomes)


def test_imports_without_the_disk_modules() -> None:
    code = (
        "import sys; sys.modules['lmdb'] = None; sys.modules['zstandard'] = None\n"
        "import hicache.tier.host, hicache.tier.region"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what a client can and cannot do with the descriptor


def test_a_client_maps_a_segment_read_only_and_sees_pages_and_generations(store: HostStore) -> None:
    slots = opened(store)
    layout = store.layout(0)
    store.views(slots)[3][:] = b"k" * PAGE_BYTES
    with mmap.mmap(store.fd(0), layout.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
        start = layout.first_slot_offset + 3 * layout.stride
        assert seen[start : start + PAGE_BYTES] == b"k" * PAGE_BYTES
        assert int.from_bytes(seen[3 * 8 : 4 * 8], "little") == 1
        store.free([slots[3]])
        assert int.from_bytes(seen[3 * 8 : 4 * 8], "little") == 2


CLIENT = """
import array, fcntl, mmap, os, socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
size = int(sys.argv[2])
_, rights, _, _ = peer.recvmsg(1, 64)
fd = array.array("i", rights[0][2])[0]
seen = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
assert seen[:8] == (1).to_bytes(8, "little"), seen[:8]
def refused(what, call):
    try:
        call()
    except (OSError, ValueError) as exc:
        print(what, "refused")
    else:
        print(what, "ALLOWED")
for name, one in (("descriptor", fd), ("reopened", os.open(f"/proc/self/fd/{fd}", os.O_RDWR))):
    refused(f"{name}: map writable", lambda: mmap.mmap(one, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
    refused(f"{name}: write", lambda: os.pwrite(one, b"x", 0))
    refused(f"{name}: shrink", lambda: os.ftruncate(one, 4096))
    refused(f"{name}: grow", lambda: os.ftruncate(one, size * 2))
    refused(f"{name}: more seals", lambda: fcntl.fcntl(one, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE))
"""


def test_another_process_can_only_read(store: HostStore) -> None:
    opened(store)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(theirs.fileno()), str(store.layout(0).size_bytes)],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        fd = array.array("i", [store.fd(0)])
        ours.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.tobytes())])
        out, _ = client.communicate(timeout=30)
    assert client.returncode == 0
    assert "ALLOWED" not in out
    assert out.count("refused") == 10


def test_a_client_keeps_its_mapping_when_the_segment_is_closed_and_reopened(store: HostStore) -> None:
    slots = opened(store)
    store.views(slots[:1])[0][:] = b"a" * PAGE_BYTES
    layout = store.layout(0)
    with mmap.mmap(store.fd(0), layout.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as old:
        store.close_segment(0)
        again = opened(store)
        store.views(again[:1])[0][:] = b"b" * PAGE_BYTES
        assert old[layout.first_slot_offset : layout.first_slot_offset + 4] == b"aaaa"


# -- bookkeeping


@pytest.mark.parametrize("page_bytes", [1, 100, 4096, 65535, 65536, 200_001])
def test_slots_do_not_overlap_and_fit(store: HostStore, page_bytes: int) -> None:
    slots = opened(store, 1, page_bytes)
    layout = store.layout(1)
    assert layout.first_slot_offset >= 8 * layout.slots
    assert layout.stride >= page_bytes
    assert layout.first_slot_offset + layout.slots * layout.stride <= layout.size_bytes
    views = store.views(slots)
    for index, view in enumerate(views):
        view[:] = bytes([index % 251]) * page_bytes
    assert all(bytes(view) == bytes([index % 251]) * page_bytes for index, view in enumerate(views))
    assert set(store.columns(slots)[1].tolist()) == {1}


def test_addresses_are_those_of_the_views_and_outlive_the_segment(store: HostStore) -> None:
    slots = [*reversed(opened(store)), *opened(store, 1)]
    views = store.views(slots)
    found, keep = store.addresses(slots, PAGE_BYTES)
    assert found.tolist() == [np.frombuffer(view, np.uint8).ctypes.data for view in views]
    with pytest.raises(InvalidArgumentError, match="slots of"):
        store.addresses(slots, PAGE_BYTES - 1)
    views[0][:] = b"k" * PAGE_BYTES
    views.clear()
    store.close_segment(0)
    assert ctypes.string_at(int(found[0]), PAGE_BYTES) == b"k" * PAGE_BYTES
    assert len(keep) == 2


def test_freeing_moves_generations_on_and_empties(store: HostStore) -> None:
    slots = opened(store)
    store.seal(slots[:2], [7, 8])
    assert store.checksums(slots[:2]) == [7, 8]
    store.free(slots[:1])
    checksums, generations = store.columns(slots[:3])
    assert checksums.tolist() == [7, 8, 0]
    assert generations.tolist() == [2, 1, 1]
    into = [memoryview(bytearray(PAGE_BYTES))]
    assert run(store, Batch(1, Op.GET, PAGE_BYTES, slots=slots[:1], buffers=into)) == [Outcome.MISS]


def test_a_page_copied_in_through_its_view_and_sealed_is_read_back(store: HostStore) -> None:
    from xxhash import xxh3_64_intdigest

    [slot] = opened(store)[:1]
    data = os.urandom(PAGE_BYTES)
    store.views([slot])[0][:] = data
    store.seal([slot], [xxh3_64_intdigest(data)])
    into = memoryview(bytearray(PAGE_BYTES))
    assert run(store, Batch(1, Op.GET, PAGE_BYTES, slots=[slot], buffers=[into])) == [Outcome.OK]
    assert into == data


def test_segments_that_make_no_sense_are_refused(store: HostStore) -> None:
    opened(store)
    for segment, page_bytes, slots in ((0, 4096, 1), (1, 4096, 10_000), (1, 0, 1), (1, 4096, 0)):
        with pytest.raises(InvalidArgumentError):
            store.open_segment(segment, "t", page_bytes, slots)
    with pytest.raises(InvalidArgumentError):
        store.views([99])
    with pytest.raises(InvalidArgumentError):
        store.close_segment(5)


def test_a_closed_store_refuses_work() -> None:
    store = HostStore(SPEC, lambda: None, prefault=True)
    store.close()
    with pytest.raises(UnavailableError):
        store.submit(Batch(1, Op.FLUSH))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def memfd_maps() -> int:
    return Path("/proc/self/maps").read_text().count("hicache-host")


def test_closing_segments_gives_descriptors_and_mappings_back(store: HostStore) -> None:
    before, maps = open_files(), memfd_maps()
    data = memoryview(bytes(PAGE_BYTES))
    for _ in range(20):
        slots = opened(store)
        assert run(store, Batch(1, Op.PUT, PAGE_BYTES, slots=slots[:1], buffers=[data])) == [Outcome.OK]
        store.close_segment(0)
    deadline = time.monotonic() + 5
    while (open_files(), memfd_maps()) != (before, maps) and time.monotonic() < deadline:
        time.sleep(0.01)  # a worker lets go a moment after it reported
    assert (open_files(), memfd_maps()) == (before, maps)


def test_prefault_fills_spares_up_to_the_capacity_and_refills_after_close() -> None:
    store = HostStore(SPEC, lambda: None, prefault=True)

    def populated_is(expected: int) -> None:
        deadline = time.monotonic() + 10
        while store.populated_bytes != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.populated_bytes == expected

    populated_is(8 << 20)
    opened(store)
    populated_is(6 << 20)
    store.close_segment(0)
    populated_is(8 << 20)
    store.close()


def test_idle_bookkeeping_is_a_few_bytes_a_slot(store: HostStore) -> None:
    import tracemalloc

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    slots = len(opened(store, 0, 64))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # ``opened`` returns the slots as a list; what the store keeps is 9 bytes each
    assert grown < 16 * slots + 10_000


# -- regions of clients


@pytest.fixture
def region() -> Iterator[int]:
    fd = os.memfd_create("client")
    os.pwrite(fd, np.arange(64 * 1024, dtype=np.uint8).tobytes(), 0)
    yield fd
    os.close(fd)


def test_reads_scattered_and_adjacent_pages(region: int) -> None:
    content = os.pread(region, 65536, 0)
    offsets = [0, 16, 32, 4096, 100, 116, 65520]
    buffers = [memoryview(bytearray(16)) for _ in offsets]
    assert read_region(region, offsets, buffers) == [Outcome.OK] * len(offsets)
    assert [bytes(b) for b in buffers] == [content[o : o + 16] for o in offsets]


def test_reads_more_adjacent_pages_than_one_call_takes(region: int) -> None:
    offsets = list(range(0, 64 * 1024, 16))
    whole = memoryview(bytearray(64 * 1024))
    assert set(read_region(region, offsets, [whole[o : o + 16] for o in offsets])) == {Outcome.OK}
    assert whole == os.pread(region, 65536, 0)


def test_pages_beyond_the_end_are_faults_and_the_others_are_read(region: int) -> None:
    os.ftruncate(region, 1000)
    offsets = [0, 500, 900, 1400, 100, 1 << 62, -5]
    buffers = [memoryview(bytearray(500)) for _ in offsets]
    ok, bad = Outcome.OK, Outcome.FAULT
    assert read_region(region, offsets, buffers) == [ok, ok, bad, bad, ok, bad, bad]


def test_a_descriptor_that_cannot_be_read_is_a_fault(region: int) -> None:
    buffers = [memoryview(bytearray(4)), memoryview(bytearray(4))]
    write_only = os.open("/dev/null", os.O_WRONLY)
    assert read_region(write_only, [0, 4], buffers) == [Outcome.FAULT] * 2
    os.close(write_only)
    assert read_region(write_only, [0, 4], buffers) == [Outcome.FAULT] * 2
