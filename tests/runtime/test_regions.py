"""Client regions live as long as they are needed; arena regions retire when everybody has let go."""

from __future__ import annotations

import os

import numpy as np
import pytest
from runtime_helpers import memfd, open_fds

from hicache.device.kv import MemoryKind, SharedMemory
from hicache.errors import InvalidArgumentError, NotFoundError, UnavailableError
from hicache.runtime.regions import RegionRegistry
from hicache.tier.segment import SegmentLayout


class Store:
    """A mappable store with segments 0 and 1."""

    def layout(self, segment: int) -> SegmentLayout:
        return SegmentLayout(segment, "t", 1 << 20, 4096, 10, 4096, 4096)

    def fd(self, segment: int) -> int:
        return 1000 + segment

    def columns(self, slots):  # type: ignore[no-untyped-def]
        return np.zeros(len(slots), np.uint64), np.zeros(len(slots), np.uint64)


@pytest.fixture
def registry() -> RegionRegistry:
    return RegionRegistry()


def test_a_client_region_is_its_sessions_own(registry: RegionRegistry) -> None:
    before = open_fds()
    info = registry.register(1, memfd(b"x" * 100))
    assert info.size_bytes == 100
    assert registry.find(1, info.region_id).info == info
    for session, region in ((2, info.region_id), (1, info.region_id + 1)):
        with pytest.raises(NotFoundError):
            registry.find(session, region)
    registry.unregister(2, info.region_id)  # not another's
    registry.find(1, info.region_id)
    registry.unregister(1, info.region_id)
    registry.unregister(1, info.region_id)
    assert open_fds() == before


def test_a_session_that_ends_leaves_no_descriptor(registry: RegionRegistry) -> None:
    before = open_fds()
    held = registry.find(1, registry.register(1, memfd(b"a")).region_id)
    registry.register(1, memfd(b"b"))
    other = registry.register(2, memfd(b"c"))
    held.hold()
    registry.end_session(1)
    assert held.fd >= 0
    held.release()
    registry.end_session(1)
    assert registry.find(2, other.region_id)
    registry.close()
    assert open_fds() == before


def test_a_descriptor_that_is_not_open_is_refused(registry: RegionRegistry) -> None:
    fd = memfd(b"x")
    os.close(fd)
    with pytest.raises(InvalidArgumentError):
        registry.register(1, fd)


def test_arenas_belong_to_their_tenant(registry: RegionRegistry) -> None:
    registry.arena_opened(1, 0, "red", Store())
    registry.arena_opened(1, 1, "blue", Store())
    (red,) = registry.arenas("red")
    assert (red.size_bytes, red.page_bytes, red.slots, red.slot_stride) == (1 << 20, 4096, 10, 4096)
    assert registry.arena_at(1, 0) == red
    assert registry.arena_fd("red", red.region_id) == 1000
    with pytest.raises(NotFoundError):
        registry.arena_fd("blue", red.region_id)


def test_a_region_that_nobody_maps_retires_at_once(registry: RegionRegistry) -> None:
    registry.arena_opened(1, 0, "red", Store())
    (arena,) = registry.arenas("red")
    closed: list[bool] = []
    registry.arena_retired(1, 0, closed.append)
    assert closed
    assert registry.arenas("red") == []
    with pytest.raises(NotFoundError):
        registry.arena_fd("red", arena.region_id)


def test_a_region_retires_when_all_who_map_it_have_let_go_or_ended(registry: RegionRegistry) -> None:
    registry.arena_opened(1, 0, "red", Store())
    (arena,) = registry.arenas("red")
    told: list[tuple[str, int]] = []

    def tell(tenant: str, region: int) -> set[int]:
        told.append((tenant, region))
        return {1, 2, 3}

    registry.on_retired = tell
    closed: list[bool] = []
    registry.arena_retired(1, 0, closed.append)
    assert told == [("red", arena.region_id)]
    registry.released(1, arena.region_id)
    registry.released(1, arena.region_id)
    registry.released(9, arena.region_id)
    registry.released(2, arena.region_id + 7)
    registry.end_session(2)
    assert not closed
    assert registry.retiring == 1
    registry.released(3, arena.region_id)
    assert closed == [True]
    registry.released(3, arena.region_id)
    assert closed == [True]
    assert registry.retiring == 0


@pytest.mark.parametrize("dead", [True, False])
def test_memory_that_a_process_may_keep_mapped_is_said_to_be_unsure(
    registry: RegionRegistry, *, dead: bool
) -> None:
    for segment in (0, 1, 2):
        registry.arena_opened(1, segment, "red", Store())
    kept, let_go, other = (registry.arena_at(1, segment).region_id for segment in (0, 1, 2))
    registry.on_retired = lambda _, region: {1} if region != other else set()
    closed: list[bool] = []
    if not dead:
        registry.may_stay_mapped([other, 999])  # a session that ended before the segment is closed
    registry.arena_retired(1, 2, closed.append)
    assert closed == [dead]
    registry.arena_retired(1, 0, closed.append)
    registry.arena_retired(1, 1, closed.append)
    registry.released(1, let_go)
    assert closed == [dead, True]
    if not dead:
        registry.may_stay_mapped([kept])
    registry.end_session(1)
    assert closed == [dead, True, dead]
    registry.arena_opened(1, 0, "red", Store())
    registry.on_retired = lambda *_: set()
    registry.arena_retired(1, 0, closed.append)
    assert closed[-1], "what was said of a region is of no other"


class Pool(Store):
    """A device's pool: segment 0 may be mapped, segment 1 not yet."""

    wiped = False

    def shared(self, segment: int) -> SharedMemory:
        if segment and not self.wiped:
            raise UnavailableError("not wiped yet")
        return SharedMemory(MemoryKind.MEMFD, 1 << 20, fd=1000 + segment)

    def close_segment(self, segment: int, *, reusable: bool) -> None:
        raise AssertionError


def test_a_pools_regions_are_listed_when_they_may_be_mapped(registry: RegionRegistry) -> None:
    pool = Pool()
    registry.arena_opened(1, 0, "red", Store())
    registry.pool_opened(0, 0, "red", pool)
    registry.pool_opened(0, 1, "red", pool)
    assert [arena.memory is not None for arena in registry.arenas("red")] == [False, True]
    with pytest.raises(UnavailableError):
        registry.arena_fd("red", registry.arena_at(0, 1).region_id)
    pool.wiped = True
    listed = registry.arenas("red")
    assert [arena.memory.fd for arena in listed if arena.memory is not None] == [1000, 1001]
    assert registry.arena_fd("red", listed[2].region_id) == 1001
    with pytest.raises(NotFoundError):
        registry.arena_fd("blue", listed[2].region_id)
    assert registry.arenas("blue") == []
    registry.arena_retired(0, 1, lambda _: None)
    assert len(registry.arenas("red")) == 2


def test_a_segment_that_opens_again_is_another_region(registry: RegionRegistry) -> None:
    registry.arena_opened(1, 0, "red", Store())
    (before,) = registry.arenas("red")
    registry.arena_retired(1, 0, lambda _: None)
    registry.arena_opened(1, 0, "blue", Store())
    (after,) = registry.arenas("blue")
    assert after.region_id != before.region_id


def test_a_segment_that_was_never_opened_retires_at_once(registry: RegionRegistry) -> None:
    closed: list[bool] = []
    registry.arena_retired(1, 5, closed.append)
    assert closed
