"""Leases over hand-made arena regions: nothing but what was leased ever comes out."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xxhash

from hicache.errors import (
    CorruptError,
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnsupportedError,
)
from hicache.rpc.client.arena import Arena
from hicache.rpc.client.calls import parse_grant
from hicache.rpc.client.lease import LeaseState, PageSink, Terms
from hicache.rpc.client.results import Extent, Grant, RegionInfo
from hicache.rpc.pb import cache_pb2

PAGE, STRIDE, SLOTS, HEADER = 5000, 8192, 8, 4096
SIZE = HEADER + SLOTS * STRIDE


class Server:
    """The writing side of one arena region."""

    def __init__(self, region_id: int = 3, *, stride: int = STRIDE, page_bytes: int = PAGE) -> None:
        size = HEADER + SLOTS * stride
        self.fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self.bytes = np.frombuffer(mmap.mmap(self.fd, size), np.uint8)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10)
        self.generations = self.bytes[: 8 * SLOTS].view("<u8")
        self.generations[:] = 1
        self.info = RegionInfo(region_id, size, page_bytes, HEADER, stride, SLOTS)
        for slot in range(SLOTS):
            self.page(slot)[:] = np.random.default_rng(slot).integers(0, 256, page_bytes, dtype=np.uint8)

    def page(self, slot: int) -> Any:
        begin = HEADER + slot * self.info.slot_stride
        return self.bytes[begin : begin + self.info.page_bytes]

    def grant(self, *runs: tuple[int, int]) -> Grant:
        """A lease of these (first slot, pages)."""
        slots = [slot for first, pages in runs for slot in range(first, first + pages)]
        return Grant(
            lease=11,
            matched_pages=len(slots),
            granted_pages=len(slots),
            expires_in_ms=1000,
            operation=0,
            tier_pages=(len(slots), 0),
            pending_pages=0,
            pending_ms=0,
            extents=tuple(
                Extent(self.info.region_id, pages, HEADER + first * self.info.slot_stride, first)
                for first, pages in runs
            ),
            checksums=np.array([xxhash.xxh3_64_intdigest(self.page(slot)) for slot in slots], np.uint64),
            generations=self.generations[slots].copy(),
        )


class World:
    """A clock, a session, an arena with one region, and a lease in it."""

    def __init__(self, **layout: Any) -> None:
        self.now_ns = 0
        self.incarnation = 1
        self.server = Server(**layout)
        self.arena = Arena()
        self.arena.add(self.server.info, self.server.fd)

    def lease(self, *runs: tuple[int, int]) -> LeaseState:
        info = self.server.info
        region = self.arena.find(info.region_id)
        assert region is not None
        lease = LeaseState(
            Terms(1, info.page_bytes, ("host", "disk"), lambda: self.now_ns, lambda: self.incarnation)
        )
        lease.adopt(self.server.grant(*runs), {info.region_id: region}, deadline_ns=900)
        return lease

    def expected(self, *slots: int) -> Any:
        return np.stack([self.server.page(slot) for slot in slots])


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    os.close(made.server.fd)


def rows(count: int, page_bytes: int = PAGE) -> Any:
    return np.zeros((count, page_bytes), np.uint8)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("layout", [{}, {"stride": 4096, "page_bytes": 4096}], ids=["padded", "dense"])
def test_every_part_of_a_lease_is_copied_right(verify: bool, layout: dict[str, int]) -> None:
    world = World(**layout)
    lease = world.lease((4, 3), (0, 2))
    slots = [4, 5, 6, 0, 1]
    assert lease.tier_pages == {"host": 5}
    for first in range(6):
        for count in range(6 - first):
            into = rows(count, world.server.info.page_bytes)
            lease.copy(into, first, verify=verify)
            if count:
                assert (into == world.expected(*slots[first : first + count])).all()
    apart = [np.zeros(world.server.info.page_bytes, np.uint8) for _ in range(3)]
    lease.copy(apart, 1, verify=verify)
    assert (np.stack(apart) == world.expected(5, 6, 0)).all()
    assert [bytes(view) for view in lease.views(verify=True)] == [bytes(p) for p in world.expected(*slots)]
    assert all(view.readonly for view in lease.views(verify=False))


def test_a_moved_generation_refuses_the_copy(world: World) -> None:
    lease = world.lease((2, 3))
    assert lease.still_valid()
    world.server.generations[3] += 1
    assert not lease.still_valid()
    for verify in (True, False):
        with pytest.raises(NotFoundError, match="slots were reused"):
            lease.copy(rows(3), 0, verify=verify)
    with pytest.raises(NotFoundError, match="slots were reused"):
        lease.views(verify=False)


def test_a_slot_reused_while_it_is_copied_is_no_corruption(world: World, monkeypatch: Any) -> None:
    lease = world.lease((2, 3))

    def overtake(*args: Any) -> None:
        world.server.generations[2] += 1
        world.server.page(2)[:] = 0
        copyto(*args)

    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", overtake)
    with pytest.raises(NotFoundError, match="slots were reused"):
        lease.copy(rows(3), 0, verify=True)


def test_a_wrong_checksum_is_corruption(world: World) -> None:
    lease = world.lease((2, 3))
    world.server.page(3)[17] ^= 1
    with pytest.raises(CorruptError, match="page 1 differs"):
        lease.copy(rows(3), 0, verify=True)
    with pytest.raises(CorruptError, match="page 1 differs"):
        lease.views(verify=True)
    lease.copy(rows(3), 0, verify=False)
    lease.copy(rows(1), 2, verify=True)  # the other pages are sound


def test_a_lease_past_its_deadline_is_refused(world: World) -> None:
    lease = world.lease((2, 3))
    world.now_ns = 899
    assert lease.still_valid()
    world.now_ns = 900
    assert not lease.still_valid()
    with pytest.raises(NotFoundError, match="has expired"):
        lease.copy(rows(3), 0, verify=False)


def test_a_deadline_that_passes_while_copying_is_noticed(world: World, monkeypatch: Any) -> None:
    lease = world.lease((2, 3))

    def slow(*args: Any) -> None:
        world.now_ns = 5000
        copyto(*args)

    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", slow)
    with pytest.raises(NotFoundError, match="has expired"):
        lease.copy(rows(3), 0, verify=True)


def test_a_lost_session_loses_its_leases(world: World) -> None:
    lease = world.lease((0, 1))
    world.incarnation = 2
    assert not lease.still_valid()
    with pytest.raises(StaleError, match="restarted"):
        lease.views(verify=False)


def test_pages_outside_are_refused(world: World) -> None:
    lease = world.lease((0, 4))
    assert lease.pages_from(1, None) == 3
    for first, count in ((-1, 1), (0, 5), (4, 1), (2, -1), (5, None)):
        with pytest.raises(InvalidArgumentError, match="not in a lease"):
            lease.pages_from(first, count)


@pytest.mark.parametrize(
    "change",
    [{"offset": HEADER + 1}, {"first_slot": 7}, {"pages": 9}, {"first_slot": 1}],
    ids=["offset", "slot", "pages", "other slot"],
)
def test_extents_outside_their_region_are_refused(world: World, change: dict[str, int]) -> None:
    region = world.arena.find(3)
    assert region is not None
    with pytest.raises(HicacheError, match="not in region 3"):
        region.check(dataclasses.replace(Extent(3, 2, HEADER, 0), **change), PAGE)
    with pytest.raises(HicacheError, match="not in region 3"):
        region.check(Extent(3, 2, HEADER, 0), PAGE - 1)


# --- regions


def test_a_retired_region_is_confirmed_when_nothing_refers_to_it(world: World) -> None:
    lease = world.lease((0, 2))
    view = lease.views(verify=False)[1]
    expected = bytes(world.server.page(1))
    world.arena.retire(3)
    assert world.arena.unknown([3]) == {3}
    gc.collect()
    assert not world.arena.unmapped
    lease.end(StaleError("its memory was given back"))
    gc.collect()
    assert not world.arena.unmapped, "a caller's view still shows it"
    assert bytes(view) == expected
    del view
    gc.collect()
    assert list(world.arena.unmapped) == [3]


def test_a_region_never_mapped_is_confirmed_at_once(world: World) -> None:
    world.arena.retire(99)
    assert list(world.arena.unmapped) == [99]


def test_a_forgotten_region_is_not_confirmed(world: World) -> None:
    world.arena.clear()
    gc.collect()
    assert not world.arena.unmapped


def test_the_mapping_cannot_be_written(world: World) -> None:
    region = world.arena.find(3)
    assert region is not None
    assert not region.bytes.flags.writeable and region.memory.readonly
    with pytest.raises(ValueError, match="read-only"):
        region.bytes[0] = 1


@pytest.mark.parametrize(
    "change",
    [{"size_bytes": SIZE + 1}, {"slots": SLOTS + 1}, {"page_bytes": STRIDE + 1}, {"first_slot_offset": 8}],
    ids=lambda change: next(iter(change)),
)
def test_regions_that_would_kill_their_reader_are_refused(world: World, change: dict[str, int]) -> None:
    info = dataclasses.replace(world.server.info, region_id=4, **change)
    with pytest.raises(UnsupportedError):
        world.arena.add(info, world.server.fd)


def test_an_unsealed_region_is_refused(world: World) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, SIZE)
    with pytest.raises(UnsupportedError, match="no sealed memory"):
        world.arena.add(dataclasses.replace(world.server.info, region_id=4), fd)
    os.close(fd)


# --- grants and streams


def test_columns_that_do_not_add_up_are_refused() -> None:
    def response(**change: Any) -> Any:
        columns = {
            "pages": [2, 1], "region_id": [1, 1], "offset": [0, 9], "first_slot": [0, 5],
            "checksums": [1, 2, 3], "generations": [1, 1, 1],
        }  # fmt: skip
        granted = change.pop("granted_pages", 3)
        extents = cache_pb2.Extents(**(columns | change))
        return cache_pb2.FetchResponse(lease_id=1, matched_pages=9, granted_pages=granted, extents=extents)

    grant = parse_grant(response())
    assert [extent.pages for extent in grant.extents] == [2, 1]
    assert list(grant.checksums) == [1, 2, 3]
    for change in (
        {"granted_pages": 4},
        {"checksums": [1, 2]},
        {"generations": []},
        {"pages": [3, 0]},
        {"pages": [1, 1, 1]},
    ):
        with pytest.raises(HicacheError, match="do not add up"):
            parse_grant(response(**change))


def chunk(page: int, offset: int, data: bytes, checksum: int = 0) -> Any:
    return cache_pb2.PageChunk(page=page, offset=offset, data=data, checksum=checksum)


def test_a_stream_fills_pages_and_goes_on_after_a_break() -> None:
    data = os.urandom(20)
    into = rows(2, 10)
    sink = PageSink(into, 4, verify=True)
    sink.take(chunk(4, 0, data[:6]))
    sink.take(chunk(4, 6, data[6:10], xxhash.xxh3_64_intdigest(data[:10])))
    sink.take(chunk(5, 0, b"lost"))
    sink.restart()
    assert (sink.next_page, sink.missing_pages) == (5, 1)
    sink.take(chunk(5, 0, data[10:], xxhash.xxh3_64_intdigest(data[10:])))
    assert not sink.missing_pages
    assert into.tobytes() == data


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([(1, 0, b"x" * 10)], HicacheError),  # not the page asked for
        ([(0, 1, b"x" * 9)], HicacheError),  # a gap
        ([(0, 0, b"x" * 11)], HicacheError),  # too long
        ([(0, 0, b"")], HicacheError),  # no progress
        ([(0, 0, b"x" * 10)], CorruptError),  # wrong checksum
        ([(0, 0, b"x" * 5), (0, 0, b"x" * 5)], HicacheError),  # twice
    ],
)
def test_a_disorderly_stream_is_refused(chunks: list[tuple[int, int, bytes]], error: Any) -> None:
    sink = PageSink(rows(1, 10), 0, verify=True)
    with pytest.raises(error):
        for page, offset, data in chunks:
            sink.take(chunk(page, offset, data))
