"""One suite for every page store: each behaves like a dict, byte for byte, whatever happens to its bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from backends import BACKENDS, PAGES, Backend, page
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from xxhash import xxh3_64_intdigest

from hicache.errors import InvalidArgumentError
from hicache.types import Op, Outcome

PAGE_BYTES = (512, 5000, 65536)

numbers = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES, unique=True)
seeds = st.integers(0, 2**32)


class StoreMachine(RuleBasedStateMachine):
    """A store against a dict. Subclassed per backend, which sets ``make``."""

    def make(self) -> Backend:
        raise AssertionError("set by the test")

    def __init__(self) -> None:
        super().__init__()
        self.backend = self.make()
        self.model: dict[int, bytes] = {}
        self.rotten: set[int] = set()

    def page(self, seed: int) -> bytes:
        return page(seed, self.backend.page_bytes)

    @rule(which=numbers, seed=seeds, checked=st.booleans())
    def put(self, which: list[int], seed: int, checked: bool) -> None:
        pages = {number: self.page(seed + number) for number in which}
        sums = [xxh3_64_intdigest(data) for data in pages.values()]
        views = [memoryview(data) for data in pages.values()]
        done = self.backend.wait(self.backend.submit(Op.PUT, which, views, checksums=sums if checked else ()))
        assert list(done.outcomes) == [Outcome.OK] * len(which)
        assert list(done.checksums) == sums
        self.model.update(pages)
        self.rotten -= set(which)

    @rule(number=st.integers(0, PAGES - 1), seed=seeds)
    def put_with_a_wrong_checksum(self, number: int, seed: int) -> None:
        self.backend.delete([number])
        self.model.pop(number, None)
        self.rotten.discard(number)
        data = self.page(seed)
        wrong = xxh3_64_intdigest(data) ^ 1
        assert self.backend.put({number: data}, checksums=[wrong]) == [Outcome.CORRUPT]
        assert self.backend.get([number]) == [Outcome.MISS]

    @rule(which=numbers)
    def get(self, which: list[int]) -> None:
        expected = [
            Outcome.CORRUPT if number in self.rotten else self.model.get(number, Outcome.MISS)
            for number in which
        ]
        assert self.backend.get(which) == expected
        for number in self.rotten & set(which):  # a corrupt page is gone once it was reported
            del self.model[number]
        self.rotten -= set(which)

    @rule(which=numbers)
    def delete(self, which: list[int]) -> None:
        expected = [Outcome.OK if number in self.model else Outcome.MISS for number in which]
        assert self.backend.delete(which) == expected
        for number in which:
            self.model.pop(number, None)
        self.rotten -= set(which)

    @rule(seed=seeds)
    def corrupt(self, seed: int) -> None:
        rng = random.Random(seed)
        sound = sorted(self.model.keys() - self.rotten)
        if sound:
            number = rng.choice(sound)
            self.backend.corrupt(number, rng)
            self.rotten.add(number)

    @rule(steps=st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), seeds)), min_size=2, max_size=8))
    def burst_on_few_pages(self, steps: list[tuple[int, int | None]]) -> None:
        """PUT and DELETE of one page take effect in submission order, without waiting in between."""
        issued = []
        for number, seed in steps:
            if seed is None:
                issued.append(self.backend.submit(Op.DELETE, [number]))
                self.model.pop(number, None)
            else:
                data = self.page(seed)
                issued.append(self.backend.submit(Op.PUT, [number], [memoryview(data)]))
                self.model[number] = data
            self.rotten.discard(number)
        for batch_id in issued:
            self.backend.wait(batch_id)
        touched = sorted({number for number, _ in steps})
        assert self.backend.get(touched) == [self.model.get(number, Outcome.MISS) for number in touched]

    @rule()
    def flush(self) -> None:
        self.backend.flush()

    @invariant()
    def nothing_is_left_over(self) -> None:
        assert not self.backend.store.poll()

    def teardown(self) -> None:
        sound = sorted(self.model.keys() - self.rotten)
        assert self.backend.get(sound) == [self.model[number] for number in sound]
        self.backend.close()


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("name", BACKENDS)
def test_behaves_like_a_dict(name: str, page_bytes: int) -> None:
    class Machine(StoreMachine):
        def make(self) -> Backend:
            return BACKENDS[name](page_bytes)

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None)
    )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = BACKENDS[request.param](4096)
    yield made
    made.close()


def test_flush_completes_after_what_was_submitted_before(backend: Backend) -> None:
    puts = [backend.submit(Op.PUT, [n], [memoryview(page(n, 4096))]) for n in range(PAGES)]
    backend.flush()
    assert set(puts) <= backend._done.keys() | {c.id for c in backend.store.poll()}


def test_an_empty_batch_completes(backend: Backend) -> None:
    for op in (Op.PUT, Op.GET, Op.DELETE):
        assert not backend.wait(backend.submit(op, [])).outcomes


def test_batches_that_do_not_fit_are_refused_and_change_nothing(backend: Backend) -> None:
    backend.put({0: page(1, 4096)})
    for op, views in (
        (Op.PUT, []),
        (Op.GET, []),
        (Op.PUT, [memoryview(b"short")]),
        (Op.GET, [memoryview(bytes(4096))]),  # read-only
        (Op.GET, [memoryview(bytearray(5000))]),
    ):
        with pytest.raises(InvalidArgumentError):
            backend.submit(op, [0], views)
    with pytest.raises(InvalidArgumentError):
        backend.submit(Op.PUT, [0], [memoryview(page(2, 4096))], checksums=[1, 2])
    assert backend.get([0]) == [page(1, 4096)]


def test_close_finishes_what_was_submitted_and_is_idempotent(backend: Backend) -> None:
    ids = {backend.submit(Op.PUT, [n], [memoryview(page(n, 4096))]) for n in range(PAGES)}
    backend.store.close()
    backend.store.close()
    done = {completion.id: completion for completion in backend.store.poll()}
    assert ids <= done.keys()
    assert all(list(done[i].outcomes) == [Outcome.OK] for i in ids)
