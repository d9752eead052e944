"""Client regions live as long as they are needed; arena regions retire when everybody has let go."""

from __future__ import annotations

import os

import pytest
from runtime_helpers import memfd, open_fds

from hicache.errors import InvalidArgumentError, NotFoundError
from hicache.runtime.regions import RegionRegistry
from hicache.tier.segment import SegmentLayout


class Store:
    """A mappable store with segments 0 and 1."""

    def layout(self, segment: int) -> SegmentLayout:
        return SegmentLayout(segment, "t", 1 << 20, 4096, 10, 4096, 4096)

    def fd(self, segment: int) -> int:
        return 1000 + segment

    def checksums(self, slots):  # type: ignore[no-untyped-def]
        return [0 for _ in slots]

    generations = checksums


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
    registry.arena_retired(1, 0, lambda: closed.append(True))
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
    registry.arena_retired(1, 0, lambda: closed.append(True))
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


def test_a_segment_that_opens_again_is_another_region(registry: RegionRegistry) -> None:
    registry.arena_opened(1, 0, "red", Store())
    (before,) = registry.arenas("red")
    registry.arena_retired(1, 0, lambda: None)
    registry.arena_opened(1, 0, "blue", Store())
    (after,) = registry.arenas("blue")
    assert after.region_id != before.region_id


def test_a_segment_that_was_never_opened_retires_at_once(registry: RegionRegistry) -> None:
    closed: list[bool] = []
    registry.arena_retired(1, 5, lambda: closed.append(True))
    assert closed
