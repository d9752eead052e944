"""Staging memory and memory of the caller's own: pages committed without a copy, and no place with two owners."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import hicache
from hicache.errors import CorruptError, ExhaustedError, InvalidArgumentError, NotFoundError
from hicache.rpc.client.region import WriteMemory
from hicache.rpc.client.reservation import ReservationState, foreign
from hicache.rpc.client.results import Reserved
from hicache.rpc.client.staging import ForeignMemory, Staging, places

PAGE = 16 << 10
PAGES = 12
TOKENS = np.arange(64 * PAGES, dtype=np.int32)
DATA = np.random.default_rng(5).integers(0, 256, (PAGES, PAGE), dtype=np.uint8)

CHILD = textwrap.dedent(
    """
    import mmap, os, pickle, sys

    runs, pages = pickle.load(sys.stdin.buffer)
    at = 0
    for run in runs:
        fd = os.open(run.path, os.O_RDWR)
        assert os.fstat(fd).st_ino == run.inode
        memory = mmap.mmap(fd, run.size_bytes)
        os.close(fd)
        size = len(pages[0])
        for index in range(run.pages):
            begin = run.offset + index * size
            memory[begin : begin + size] = pages[at]
            at += 1
    assert at == len(pages)
    """
)


def test_another_process_writes_what_is_committed(sidecar: Any) -> None:
    with hicache.Client(sidecar.target) as client:
        cache = client.namespace(model="m", page_bytes=PAGE)
        staging = client.staging(PAGE, PAGES)
        assert staging.pages == len(staging) == sum(run.pages for run in staging.runs) == PAGES
        payload = pickle.dumps((staging.runs, [row.tobytes() for row in DATA]))
        child = subprocess.run(
            [sys.executable, "-c", CHILD], input=payload, capture_output=True, timeout=60, check=False
        )
        assert child.returncode == 0, child.stderr.decode()
        assert (staging.row(3) == DATA[3]).all()
        with cache.reserve(TOKENS) as room:
            room.adopt({page: (staging, page) for page in range(PAGES)})
            assert room.commit().stored_pages == PAGES
        assert client.core.memory.used_bytes == 0, "the places are free again"
        staging.free()
        into = np.zeros((PAGES, PAGE), np.uint8)
        assert cache.load(TOKENS, into) == PAGES
        assert (into == DATA).all()


def test_a_streaming_client_adopts_as_well(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target, data_plane="stream") as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            staging = client.staging(PAGE, PAGES)
            for page in range(PAGES):
                staging.row(page)[:] = DATA[page]
            fd = memfd(DATA)
            memory = client.adopt_memory(fd, DATA.nbytes)
            os.close(fd)
            async with await cache.reserve(TOKENS) as room:
                room.adopt({page: (staging, page) for page in range(6)})
                room.adopt({page: (memory, page * PAGE) for page in range(6, PAGES)})
                assert (await room.commit()).stored_pages == PAGES
            into = np.zeros((PAGES, PAGE), np.uint8)
            assert await cache.load(TOKENS, into) == PAGES
            assert (into == DATA).all()

    asyncio.run(scenario())


def memfd(data: Any) -> int:
    fd = os.memfd_create("engine", os.MFD_CLOEXEC)
    os.write(fd, data.tobytes())
    return fd


def test_an_engines_own_memory_is_committed_from_where_it_lies(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            pool = np.concatenate(
                [np.zeros((1, PAGE), np.uint8), DATA[::-1]]
            )  # upside down, behind something
            fd = memfd(pool)
            memory = client.adopt_memory(fd, pool.nbytes)
            os.close(fd)
            async with await cache.reserve(TOKENS) as room:
                room.adopt({page: (memory, (PAGES - page) * PAGE) for page in range(PAGES)})
                assert (await room.commit(verify=False)).stored_pages == PAGES
            into = np.zeros((PAGES, PAGE), np.uint8)
            assert await cache.load(TOKENS, into) == PAGES
            assert (into == DATA).all()
            assert client.core.memory.mapped_bytes == 0, "no memory of the client's own was needed"
            memory.close()
            memory.close()
            await cache.store(TOKENS + 1, DATA)  # tells the server that the region is gone
            async with await cache.reserve(TOKENS + 2) as room:
                with pytest.raises(InvalidArgumentError, match="closed"):
                    room.adopt({0: (memory, 0)})

    asyncio.run(scenario())


def test_foreign_memory_that_changes_is_refused_never_stored_wrong(sidecar: Any) -> None:
    """Also where the caller asked for no checksums: nobody knows when its owner writes."""
    with hicache.Client(sidecar.target) as client:
        cache = client.namespace(model="m", page_bytes=PAGE)
        fd = memfd(DATA)
        memory = client.adopt_memory(fd, DATA.nbytes)
        with cache.reserve(TOKENS) as room:
            room.adopt({page: (memory, page * PAGE) for page in range(PAGES)})
            call = client._driver._call

            def late(step: Any) -> Any:
                if step.method == "Commit":
                    assert len(step.request.checksums) == PAGES
                    os.pwrite(fd, b"changed", 5 * PAGE)
                return call(step)

            client._driver._call = late
            with pytest.raises(CorruptError):
                room.commit(verify=False)
            client._driver._call = call
        os.close(fd)
        assert cache.match(TOKENS).matched_pages <= 5


def test_what_is_no_memory_is_refused(sidecar: Any, tmp_path: Any) -> None:
    with hicache.Client(sidecar.target) as client:
        fd = memfd(DATA)
        for size_bytes in (0, DATA.nbytes + 1):
            with pytest.raises(InvalidArgumentError, match="no memory"):
                client.adopt_memory(fd, size_bytes)
        os.close(fd)
        with pytest.raises(InvalidArgumentError, match="cannot be used"):
            client.adopt_memory(fd, 10)
        reading, writing = os.pipe()
        with pytest.raises(InvalidArgumentError, match="no memory"):
            client.adopt_memory(reading, 10)
        os.close(reading)
        os.close(writing)
        assert client.core.memory.discarded() == []


def test_staging_takes_what_there_is(sidecar: Any) -> None:
    with hicache.Client(sidecar.target, write_limit_bytes=5 * PAGE) as client:
        staging = client.staging(PAGE, 12)
        assert staging.pages == 5
        with pytest.raises(ExhaustedError, match="write_limit_bytes"):
            client.staging(PAGE, 1)
        staging.free()
        staging.free()
        for index in (-1, 0, 5):
            with pytest.raises(InvalidArgumentError):
                staging.row(index)
        assert client.staging(PAGE, 2).pages == 2
        for bad in ((0, 1), (PAGE, 0), (PAGE, -1)):
            with pytest.raises(InvalidArgumentError):
                client.staging(*bad)


def test_an_unanswered_commit_poisons_the_staging_it_was_in(sidecar: Any) -> None:
    with hicache.Client(sidecar.target, timeout_s=0.5) as client:
        cache = client.namespace(model="m", page_bytes=PAGE)
        staging = client.staging(PAGE, 4)
        room = cache.reserve(TOKENS)
        for index in range(4):
            staging.row(index)[:] = DATA[index]
        room.adopt({0: (staging, 0), 1: (staging, 1)})
        call = client._driver._call

        def lost(step: Any) -> Any:
            if step.method == "Commit":
                raise hicache.errors.UnavailableError("no answer")
            return call(step)

        client._driver._call = lost
        with pytest.raises(hicache.errors.UnavailableError):
            room.commit(last=False)
        client._driver._call = call
        inode = staging.runs[0].inode
        assert client.staging(PAGE, 1).runs[0].inode != inode, "nothing in it is handed out again"
        with pytest.raises(InvalidArgumentError):
            staging.row(0)
        assert (staging.row(2) == DATA[2]).all(), "places that were not sent are still the staging's"
        room.abort()
        staging.free()
        assert client.core.memory.mapped_bytes == client.core.options.write_step_bytes, (
            "and it is given up at last"
        )


# --- without a sidecar


LIMIT, STEP, SMALL = 64 << 10, 16 << 10, 4096


def reservation(memory: WriteMemory, missing: int = 8, present: int = 2) -> ReservationState:
    return ReservationState(Reserved(5, present, missing, 1000), 1, SMALL, memory)


@pytest.fixture
def memory() -> Iterator[WriteMemory]:
    made = WriteMemory(LIMIT, STEP)
    yield made
    made.close()


def test_adopting_takes_all_or_none(memory: WriteMemory) -> None:
    state, staging = reservation(memory), Staging(memory, SMALL, 3)
    larger = Staging(memory, 2 * SMALL, 1)
    used = memory.used_bytes
    for bad, words in (
        ({2: (staging, 0), 3: (staging, 0)}, "adopted or freed"),
        ({2: (staging, 0), 3: (staging, 3)}, "not there"),
        ({2: (staging, 0), 1: (staging, 1)}, "not missing"),
        ({2: (staging, 0), 10: (staging, 1)}, "not missing"),
        ({2: (staging, 0), 3: ("x", 1)}, "no staging"),
        ({2: (Staging(WriteMemory(LIMIT, STEP), SMALL, 1), 0)}, "another client"),
        ({2: (larger, 0)}, "pages of"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            state.adopt(places(bad))  # type: ignore[arg-type]
        assert state.select([]) == {} and state.first_open == 2
        assert [staging.row(index).nbytes for index in range(3)] == [SMALL] * 3, "all are still there"
    state.adopt(places({3: (staging, 0)}))
    with pytest.raises(InvalidArgumentError, match="written already"):
        state.adopt(places({3: (staging, 1)}))
    state.write(4, bytes(SMALL))
    with pytest.raises(InvalidArgumentError, match="written already"):
        state.adopt(places({4: (staging, 1)}))
    sent = state.select(None)
    with pytest.raises(InvalidArgumentError, match="committed already"):
        state.adopt(places({3: (staging, 1)}))
    state.committed(sent)
    state.end()
    with pytest.raises(NotFoundError):
        state.adopt(places({5: (staging, 1)}))
    staging.free()
    assert memory.used_bytes == used - 3 * SMALL


def test_a_buffer_set_aside_ahead_gives_way_to_an_adopted_page(memory: WriteMemory) -> None:
    staging = Staging(memory, SMALL, 2)
    state = reservation(memory, missing=4)
    state.write(2, bytes(SMALL))  # sets buffers aside for those after it, too
    state.adopt(places({3: (staging, 1)}))
    assert state.first_open == 4
    state.end()
    staging.free()
    assert memory.used_bytes == 0


def test_foreign_pages_are_told_apart(memory: WriteMemory) -> None:
    fd = memfd(np.zeros(3 * SMALL, np.uint8))
    own = ForeignMemory(memory, fd, 3 * SMALL)
    os.close(fd)
    state = reservation(memory)
    for offset in (-1, 2 * SMALL + 1, 3 * SMALL):
        with pytest.raises(InvalidArgumentError, match="not in memory"):
            state.adopt(places({2: (own, offset)}))
    state.adopt(places({2: (own, 2 * SMALL), 3: (own, 2 * SMALL)}))
    sent = state.select(None)
    assert foreign(sent)
    state.unanswered(sent)
    assert memory.used_bytes == 0
    state.end()


class Ownership(RuleBasedStateMachine):
    """Staging, adopting, committing with every outcome, freeing: each place has one owner, poisoned memory none."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = WriteMemory(LIMIT, STEP)
        self.stagings: list[tuple[Staging, set[int]]] = []  # and the places that are still its own
        self.states: list[ReservationState] = []
        self.poisoned: set[int] = set()  # inodes

    @rule(pages=st.integers(1, 6))
    def stage(self, pages: int) -> None:
        try:
            staging = Staging(self.memory, SMALL, pages)
        except ExhaustedError:
            return
        assert not {run.inode for run in staging.runs} & self.poisoned
        self.stagings.append((staging, set(range(staging.pages))))
        for index in range(staging.pages):
            staging.row(index)[:] = id(staging) % 251

    @rule()
    def reserve(self) -> None:
        self.states.append(reservation(self.memory, missing=6, present=0))

    @precondition(lambda self: self.states and self.stagings)
    @rule(data=st.data())
    def adopt(self, data: Any) -> None:
        state = data.draw(st.sampled_from(self.states))
        staging, own = data.draw(st.sampled_from(self.stagings))
        pages = data.draw(st.lists(st.integers(0, 5), unique=True, max_size=3))
        at = data.draw(st.lists(st.integers(0, 5), min_size=len(pages), max_size=len(pages)))
        wanted = {page: (staging, index) for page, index in zip(pages, at, strict=True)}
        good = len(set(at)) == len(at) and set(at) <= own
        try:
            state.adopt(places(wanted))
        except InvalidArgumentError:
            return  # none was taken: the invariant below sees it
        assert good
        own.difference_update(at)

    @precondition(lambda self: self.states)
    @rule(data=st.data(), page=st.integers(0, 5))
    def write(self, data: Any, page: int) -> None:
        state = data.draw(st.sampled_from(self.states))
        with contextlib.suppress(InvalidArgumentError, ExhaustedError):
            state.write(page, bytes(SMALL))

    @precondition(lambda self: self.states)
    @rule(data=st.data(), how=st.sampled_from(["committed", "refused", "unanswered"]))
    def commit(self, data: Any, how: str) -> None:
        state = data.draw(st.sampled_from(self.states))
        sent = state.select(None)
        if how == "unanswered":
            self.poisoned |= {os.fstat(buffer.region.fd).st_ino for buffer in sent.values()}
        getattr(state, how)(sent)

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        state = data.draw(st.sampled_from(self.states))
        self.states.remove(state)
        state.end()

    @precondition(lambda self: self.stagings)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        chosen = data.draw(st.sampled_from(self.stagings))
        self.stagings.remove(chosen)
        chosen[0].free()

    @invariant()
    def every_place_has_one_owner(self) -> None:
        spans: list[tuple[int, int]] = []
        for staging, own in self.stagings:
            for index in range(staging.pages):
                if index in own:
                    spans.append((staging.row(index).__array_interface__["data"][0], SMALL))
                else:
                    with pytest.raises(InvalidArgumentError):
                        staging.row(index)
        for state in self.states:
            for buffer in (
                state._prepared | {-1 - page: each for page, each in state._ahead.items()}
            ).values():
                spans.append((buffer.bytes.__array_interface__["data"][0], SMALL))
        assert len({begin for begin, _ in spans}) == len(spans)
        assert self.memory.used_bytes == len(spans) * SMALL

    def teardown(self) -> None:
        for state in self.states:
            state.end()
        for staging, _ in self.stagings:
            staging.free()
        assert self.memory.used_bytes == 0
        self.memory.close()


TestOwnership = Ownership.TestCase


def test_runs_tell_how_to_map(memory: WriteMemory) -> None:
    staging = Staging(memory, SMALL, 10)  # more than one region's worth
    assert staging.pages == 10 and len(staging.runs) >= 1
    index = 0
    for run in staging.runs:
        fd = os.open(run.path, os.O_RDWR)
        try:
            assert os.fstat(fd).st_ino == run.inode
            with mmap.mmap(fd, run.size_bytes) as view:
                for place in range(run.pages):
                    view[run.offset + place * SMALL] = index + 1
                    assert staging.row(index)[0] == index + 1
                    index += 1
        finally:
            os.close(fd)
    staging.free()
