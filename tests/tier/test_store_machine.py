"""The disk store against a plain dict, with faults, crashes, restarts, other capacities and mixed page sizes."""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hicache.keys import chain_keys, fingerprint  # noqa: E402
from hicache.tier.disk import Layout  # noqa: E402
from hicache.tier.lmdb_env import Medium  # noqa: E402
from hicache.types import Namespace, Op, Outcome, PageRecord  # noqa: E402

CAPACITIES = (5 << 20, 6 << 20, 9 << 20)
SHARD_BYTES = 640 << 10
SIZES = (1500, 9000, 40_000)
PAGES = 200  # numbers 1..199 of each size; the parent of page n is page n // 2
SPACES = [Namespace("m", 4, size) for size in SIZES]
OK, MISS, FULL, FAULT = Outcome.OK, Outcome.MISS, Outcome.FULL, Outcome.FAULT

Page = tuple[int, int]  # size class, number


class Flaky(Medium):
    """Fails steps by a seed; once ``countdown`` is over the process counts as dead: every step fails."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rate = 0.0
        self.countdown = -1

    def before(self, step: str, path: Path) -> None:
        if self.countdown == 0:
            raise lmdb.DiskError("dead")
        self.countdown -= self.countdown > 0
        if self.rng.random() < self.rate:
            errors = [lmdb.DiskError("Input/output error"), OSError(28, "No space left on device")]
            if step in ("put", "delete", "commit"):
                errors += [lmdb.MapFullError("full")] * 3
            raise self.rng.choice(errors)


@functools.cache
def key_of(page: Page) -> bytes:
    return chain_keys(parent_of(page), page[1].to_bytes(16, "little"), 16)[0]


def parent_of(page: Page) -> bytes:
    size, number = page
    return key_of((size, number // 2)) if number > 1 else fingerprint(SPACES[size])


def record_of(page: Page) -> PageRecord:
    return PageRecord(fingerprint(SPACES[page[0]]), parent_of(page), page[1].to_bytes(16, "little"))


def is_below(number: int, top: int) -> bool:
    while number > top:
        number //= 2
    return number == top


def content(page: Page, seed: int) -> bytes:
    rng = np.random.default_rng((seed, *page))
    return rng.bytes(SIZES[page[0]]) if (seed + page[1]) % 3 else bytes(SIZES[page[0]] - 8) + rng.bytes(8)


class Model:
    """What each page may be: one value when the store said so, several after a fault. None: not stored."""

    def __init__(self) -> None:
        self.pages: dict[Page, set[bytes | None]] = {}

    def may_be(self, page: Page) -> set[bytes | None]:
        return self.pages.get(page, {None})

    def know(self, page: Page, value: bytes | None) -> None:
        self.pages[page] = {value}
        if value is None:
            del self.pages[page]

    def doubt(self, page: Page, value: bytes | None) -> None:
        self.pages[page] = self.may_be(page) | {value}

    def surely(self) -> set[Page]:
        return {page for page, values in self.pages.items() if None not in values}


Tools = tuple[Any, Any]  # the fixtures ``drive`` and ``du``


class Walk:
    """One store, one model, and the steps that both take."""

    def __init__(self, tools: Tools, folder: Path, capacity_bytes: int, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.model = Model()
        self.drive, self.disk_use = tools
        self.sync = bool(seed % 2)
        self.steps = 0
        self.open(capacity_bytes)

    def open(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.medium = Flaky(self.seed)
        layout = Layout(shard_bytes=SHARD_BYTES, medium=self.medium)
        self.driver: Any = self.drive(
            self.folder, capacity_bytes, layout=layout, sync=self.sync, wall_ms=lambda: self.steps
        )
        for space in SPACES:
            self.driver.store.put_namespace(fingerprint(space), space)

    def put(self, size: int, numbers: list[int], seed: int) -> None:
        """Each page with the ancestors that may be missing; two batches on their way at once."""
        wanted: dict[Page, None] = {}
        for number in numbers:
            path = [number >> shift for shift in range(number.bit_length() - 1, -1, -1)]
            wanted |= {
                (size, at): None for at in path if at == number or (size, at) not in self.model.surely()
            }
        pages = list(wanted)
        issued = []
        for part in (pages[: len(pages) // 2], pages[len(pages) // 2 :]):
            data = [content(page, seed) for page in part]
            records = [record_of(page) for page in part]
            keys = [key_of(page) for page in part]
            issued.append((part, data, self.driver.submit(Op.PUT, keys, data, records=records)))
        for part, data, batch in issued:
            done = self.driver.wait(batch)
            for page, value, outcome in zip(part, data, done.outcomes, strict=True):
                if outcome is OK:
                    self.model.know(page, value)
                elif outcome is FAULT:
                    assert done.error
                    self.model.doubt(page, value)
                else:
                    assert outcome is FULL and done.error

    def delete(self, page: Page) -> None:
        """A page and all below it, leaves last or first."""
        below = [p for p in self.model.pages if p[0] == page[0] and is_below(p[1], page[1])]
        below.sort(reverse=bool(self.seed % 3))
        done = self.driver.delete([key_of(p) for p in below]) if below else None
        for p, outcome in zip(below, done.outcomes if done else (), strict=True):
            values = self.model.may_be(p)
            if outcome is FAULT:
                self.model.doubt(p, None)
            else:
                assert (outcome is OK and values != {None}) or (outcome is MISS and None in values)
                self.model.know(p, None)

    def get(self, pages: list[Page]) -> None:
        for size in range(len(SIZES)):
            mine = [page for page in pages if page[0] == size]
            found = self.driver.get([key_of(page) for page in mine], SIZES[size]) if mine else []
            for page, value in zip(mine, found, strict=True):
                assert value is MISS or isinstance(value, bytes), value
                assert (None if value is MISS else value) in self.model.may_be(page), page

    def heat(self, pages: list[Page]) -> None:
        self.driver.store.put_heat([key_of(p) for p in pages], [self.steps] * len(pages), [1] * len(pages))

    def restart(self, capacity_bytes: int) -> None:
        """Close (a dead one cannot say goodbye), open again, compare what comes back."""
        smaller = capacity_bytes < self.capacity_bytes
        used_bytes = self.driver.store.used_bytes
        self.driver.store.close()
        self.open(capacity_bytes)
        assert not self.driver.store.wiped
        # charges above what the capacity promises: it became smaller, or the walk filled the margin
        too_full = used_bytes > self.driver.store.usable_bytes * 0.9
        recovery = self.driver.store.recover()
        names = {key_of((s, n)): (s, n) for s in range(len(SIZES)) for n in range(1, PAGES)}
        found = set()
        for chain in recovery:
            assert chain.parent != -2, "a page without its ancestors"
            found |= {names[key] for key in chain.keys}
        orphans = {names[key] for key in recovery.orphans}
        assert not orphans or too_full, "pages were dropped without need"
        assert found | orphans <= self.model.pages.keys()
        # a shrink may have begun before the recovery read
        gone = self.model.surely() - found - orphans
        assert not gone or too_full, gone
        done = self.driver.delete(list(recovery.orphans))
        assert set(done.outcomes) <= {OK, MISS}, done.error
        for page in orphans | gone:
            self.model.know(page, None)
        self.quiet()
        assert self.driver.store.used_bytes <= self.driver.store.usable_bytes * 1.1
        if smaller:  # where files cannot be made to fit otherwise, more than the surplus goes
            self.see_what_is_left()
        self.get(sorted(self.model.pages))

    def see_what_is_left(self) -> None:
        for size in range(len(SIZES)):
            mine = [page for page in self.model.pages if page[0] == size]
            found = self.driver.get([key_of(page) for page in mine], SIZES[size]) if mine else []
            for page, value in zip(mine, found, strict=True):
                if value is MISS:
                    self.model.know(page, None)

    def quiet(self) -> None:
        for _ in range(3000):
            if not self.driver.store.progress():
                return
            time.sleep(0.005)
        raise AssertionError(self.driver.store.progress())

    def check(self) -> None:
        self.steps += 1
        store = self.driver.store
        what = store.progress()  # first: a shrink may end between two looks, it never begins
        used, free = self.disk_use(self.folder), store._shelf.free_bytes
        told = f"step {self.steps}: du {used} of {self.capacity_bytes}, free {free}, {what!r}"
        told += f", shards {[(s.info.number, s.file_bytes) for s in store._shelf.shards]}"
        assert "shrinking" in what or used <= self.capacity_bytes, told
        assert "shrinking" in what or free >= 0, told

    def end(self) -> None:
        self.medium.rate = 0.0
        self.get(sorted(self.model.pages))
        self.restart(self.capacity_bytes)
        self.driver.store.close()


class StoreMachine(RuleBasedStateMachine):
    """Hypothesis chooses the steps."""

    tools: Tools

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="hicache-test-")
        self.walk = Walk(self.tools, Path(self.folder), CAPACITIES[1], 1)

    @rule(
        size=st.integers(0, len(SIZES) - 1),
        numbers=st.lists(st.integers(1, PAGES - 1), min_size=1, max_size=12),
        seed=st.integers(0, 5),
    )
    def put(self, size: int, numbers: list[int], seed: int) -> None:
        self.walk.put(size, numbers, seed)

    @rule(size=st.integers(0, len(SIZES) - 1), number=st.integers(1, PAGES - 1))
    def delete(self, size: int, number: int) -> None:
        self.walk.delete((size, number))

    @rule(size=st.integers(0, len(SIZES) - 1), numbers=st.lists(st.integers(1, PAGES - 1), max_size=9))
    def get(self, size: int, numbers: list[int]) -> None:
        self.walk.get([(size, number) for number in numbers])
        self.walk.heat([(size, number) for number in numbers])

    @rule(rate=st.sampled_from([0.0, 0.02, 0.2]))
    def faults(self, rate: float) -> None:
        self.walk.medium.rate = rate

    @rule(steps=st.integers(0, 60))
    def die_after(self, steps: int) -> None:
        self.walk.medium.countdown = steps

    @rule(capacity=st.sampled_from(CAPACITIES))
    def restart(self, capacity: int) -> None:
        self.walk.restart(capacity)

    @rule()
    def compact(self) -> None:
        self.walk.driver.store.compact()

    @invariant()
    def bound(self) -> None:
        self.walk.check()

    def teardown(self) -> None:
        self.walk.end()
        shutil.rmtree(self.folder)


def test_the_store_is_a_dict_that_may_fail(drive: Any, du: Any) -> None:
    class Machine(StoreMachine):
        tools = (drive, du)

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=12, stateful_step_count=20, deadline=None)
    )


def random_step(walk: Walk, rng: random.Random) -> None:
    size = min(rng.randrange(5), len(SIZES) - 1)
    numbers = [rng.randrange(1, PAGES) for _ in range(rng.randrange(1, 20))]
    roll = rng.random()
    if roll < 0.45:
        walk.put(size, numbers, rng.randrange(6))
    elif roll < 0.65:
        walk.delete((size, rng.randrange(4, PAGES)))
    elif roll < 0.85:
        walk.get([(size, number) for number in numbers])
        walk.heat([(size, number) for number in numbers])
    elif roll < 0.90:
        walk.medium.rate = rng.choice([0.0, 0.0, 0.01, 0.1])
    elif roll < 0.93:
        walk.medium.countdown = rng.randrange(80)
    elif roll < 0.95:
        walk.driver.store.compact()
    else:
        walk.restart(rng.choice(CAPACITIES))


@pytest.mark.parametrize("seed", range(4))
def test_a_seeded_walk(tmp_path: Path, drive: Any, du: Any, seed: int) -> None:
    rng = random.Random(seed)
    walk = Walk((drive, du), tmp_path, CAPACITIES[seed % 3], seed)
    for _ in range(120):
        random_step(walk, rng)
        walk.check()
    walk.end()


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(100, 104))
def test_a_long_seeded_walk(tmp_path: Path, drive: Any, du: Any, seed: int) -> None:
    rng = random.Random(seed)
    walk = Walk((drive, du), tmp_path, CAPACITIES[seed % 3], seed)
    for _ in range(3000):
        random_step(walk, rng)
        walk.check()
    walk.end()
