"""The client's own memory: no page is handed out twice, none beyond the limit, poisoned ones never again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hicache.errors import ExhaustedError, InvalidArgumentError, NotFoundError
from hicache.rpc.client.region import Registration, WriteMemory, WriteRegion
from hicache.rpc.client.reservation import ReservationState, checksums, pieces, regions
from hicache.rpc.client.results import Reserved

LIMIT, STEP = 1 << 20, 256 << 10


class Allocations(RuleBasedStateMachine):
    """Random allocations of several page sizes, frees in any order, poisonings."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = WriteMemory(LIMIT, STEP)
        self.held: list[tuple[WriteRegion, int, int]] = []
        self.poisoned: set[WriteRegion] = set()

    @rule(page_bytes=st.sampled_from([100, 4096, 5000, 65536, 100_000]), count=st.integers(1, 12))
    def allocate(self, page_bytes: int, count: int) -> None:
        try:
            block = self.memory.allocate(page_bytes, count)
        except ExhaustedError:
            assert self.held, "memory without any page in use has room"
            return
        assert 1 <= block.pages <= count
        assert block.region not in self.poisoned
        align = 4096 if page_bytes >= 65536 else 64
        assert block.offset % align == 0
        for index in range(block.pages):
            self.held.append((block.region, block.offset + index * page_bytes, page_bytes))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.memory.free(*self.held.pop(index))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def poison(self, data: Any) -> None:
        region = data.draw(st.sampled_from(self.held))[0]
        self.memory.poison(region)
        self.poisoned.add(region)

    @invariant()
    def no_byte_is_handed_out_twice(self) -> None:
        by_region: dict[WriteRegion, list[tuple[int, int]]] = {}
        for region, offset, size in self.held:
            by_region.setdefault(region, []).append((offset, offset + size))
        for region, spans in by_region.items():
            spans.sort()
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
            assert spans[-1][1] <= region.size_bytes

    @invariant()
    def it_stays_within_its_limit(self) -> None:
        assert self.memory.mapped_bytes <= LIMIT
        assert self.memory.used_bytes == sum(size for _, _, size in self.held)

    def teardown(self) -> None:
        for held in self.held:
            self.memory.free(*held)
        assert self.memory.used_bytes == 0
        for region in self.memory._regions:
            assert region.spans == [(0, region.size_bytes)], "free spans are joined again"
        self.memory.close()


TestAllocations = Allocations.TestCase


def test_a_poisoned_region_is_discarded_when_it_is_empty() -> None:
    memory = WriteMemory(LIMIT, STEP)
    block = memory.allocate(4096, 2)
    block.region.registration = Registration(1, 77)
    memory.poison(block.region)
    memory.free(block.region, block.offset, 4096)
    assert memory.allocate(4096, 1).region is not block.region
    assert memory.discarded() == []
    memory.free(block.region, block.offset + 4096, 4096)
    assert memory.discarded() == [Registration(1, 77)]
    assert block.region.fd == -1
    memory.close()


def test_a_page_beyond_the_limit_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgumentError, match="write_limit_bytes"):
        WriteMemory(LIMIT, STEP).allocate(LIMIT + 1, 1)


# --- reservations on top of it


def reservation(memory: WriteMemory, missing: int = 8, present: int = 2) -> ReservationState:
    return ReservationState(Reserved(5, present, missing, 1000), 1, 4096, memory)


def test_consecutive_pages_make_one_piece() -> None:
    memory = WriteMemory(LIMIT, STEP)
    state = reservation(memory)
    for page in (2, 3, 4, 6, 7):
        state.write(page, bytes([page]) * 4096)
    chosen = state.select(None)
    assert list(chosen) == [2, 3, 4, 6, 7]
    ids = {region: 9 for region in regions(chosen)}
    found = pieces(chosen, ids, 4096)
    assert [(piece.first_page, piece.pages) for piece in found] == [(2, 3), (6, 2)]
    region = regions(chosen)[0]
    for piece in found:
        for index in range(piece.pages):
            begin = piece.offset + index * 4096
            assert set(region.bytes[begin : begin + 4096]) == {piece.first_page + index}
    assert len(set(checksums(chosen))) == 5
    state.committed(chosen)
    state.end()
    assert memory.used_bytes == 0


def test_buffers_are_kept_until_the_commit_is_answered() -> None:
    memory = WriteMemory(STEP, STEP)
    state = reservation(memory, missing=STEP // 4096, present=0)
    state.write(0, bytes(4096))
    sending = state.select([0])
    with pytest.raises(
        ExhaustedError
    ):  # the reservation has set aside all there is, and keeps what is being sent
        memory.allocate(4096, 1)
    with pytest.raises(InvalidArgumentError, match="committed already"):
        state.buffer(0)
    state.refused(sending)
    assert state.select(None) == sending
    state.committed(sending)
    assert memory.allocate(4096, 1).offset == sending[0].offset
    state.end()


def test_pages_of_an_unanswered_commit_are_never_used_again() -> None:
    memory = WriteMemory(LIMIT, STEP)
    state = reservation(memory)
    view = state.buffer(2)
    sending = state.select(None)
    region = sending[2].region
    state.unanswered(sending)
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
    assert memory.allocate(4096, 1).region is not region
    state.end()
    memory.close()


def test_what_cannot_be_prepared_is_refused() -> None:
    memory = WriteMemory(LIMIT, STEP)
    state = reservation(memory)
    for page in (-1, 0, 1, 10):
        with pytest.raises(InvalidArgumentError, match="not missing"):
            state.buffer(page)
    with pytest.raises(InvalidArgumentError, match="has not been written"):
        state.select([3])
    assert state.first_open == 2
    state.buffer(2)
    assert state.first_open == 3
    state.end()
    with pytest.raises(NotFoundError, match="has ended"):
        state.buffer(3)
    nothing = ReservationState(Reserved(0, 4, 0, 0), 1, 4096, memory)
    assert nothing.ended and nothing.first_open is None
    with pytest.raises(NotFoundError, match="nothing was missing"):
        nothing.buffer(4)
    assert memory.used_bytes == 0
    memory.close()
