"""Room: what fits must find a place, whatever was there before; the bound holds at every instant."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hicache.keys import chain_keys, fingerprint  # noqa: E402
from hicache.tier.disk import Layout  # noqa: E402
from hicache.tier.geometry import SHARD_FILES_BYTES, divide  # noqa: E402
from hicache.tier.lmdb_env import Medium  # noqa: E402
from hicache.types import Namespace, Op, Outcome, PageRecord  # noqa: E402

CAPACITY = 16 << 20
LAYOUT = Layout(shard_bytes=2 << 20)
NOISE = np.random.default_rng(0).bytes(1 << 20)
OK = Outcome.OK


@contextlib.contextmanager
def watched(store: Any, folder: Path, capacity_bytes: int, du: Any) -> Iterator[None]:
    """Looks at what ``du`` shows, and at the store's own figures, all the time."""
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            used, free = du(folder), store._shelf.free_bytes
            if used > capacity_bytes or free < 0:
                seen.append(f"du {used} of {capacity_bytes}, free {free}, {store.progress()!r}")
            done.wait(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert not seen, (len(seen), seen[0])


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def noise(number: int, size: int) -> bytes:
    at = number * 97 % (len(NOISE) - size)
    return NOISE[at : at + size]


Phase = tuple[list[int], float]  # sizes of its pages, how much is written, of what is usable
phases = st.tuples(
    st.lists(st.integers(3000, CAPACITY // 64), min_size=1, max_size=4), st.sampled_from([0.3, 0.6, 1.2])
)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(phases, min_size=2, max_size=3), seed=st.integers(0, 1 << 30))
def test_pages_find_room_until_the_charges_reach_what_is_usable(
    drive: Any, du: Any, plan: list[Phase], seed: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="hicache-test-") as name:
        driver = drive(Path(name), CAPACITY, layout=LAYOUT)
        with watched(driver.store, Path(name), CAPACITY, du):
            fill(driver, plan, random.Random(seed))
        driver.store.close()


def test_large_pages_find_room_among_what_is_left_of_small_ones(tmp_path: Path, drive: Any, du: Any) -> None:
    driver = drive(tmp_path, CAPACITY, layout=LAYOUT)
    with watched(driver.store, tmp_path, CAPACITY, du):
        fill(driver, [([8000], 1.0), ([CAPACITY // 64], 1.0), ([8000, 100_000], 0.5)], random.Random(1))
    assert driver.store.stats.pieces_pages or driver.store.stats.evacuations


def fill(driver: Any, plan: list[Phase], rng: random.Random) -> None:
    """Store pages phase by phase, make room as an engine does: never more charges than what is usable."""
    live: list[tuple[bytes, int]] = []
    usable = driver.store.usable_bytes
    used = number = 0
    for sizes, part in plan:
        written = 0
        while written < part * usable:
            size = rng.choice(sizes)
            count = max(1, (256 << 10) // size)
            worst = (size + size // 16 + 16384) * count
            doomed = []
            while used + worst > usable:
                name, charge = live.pop(rng.randrange(len(live)))
                doomed.append(name)
                used -= charge
            if doomed:
                driver.submit(Op.DELETE, doomed)
            pages = {key(n): noise(n, size) for n in range(number, number + count)}
            number += count
            done = driver.put(pages)
            assert set(done.outcomes) == {OK}, (done.error, size, used, usable)
            live += zip(pages, done.charges, strict=True)
            used += sum(done.charges)
            written += size * count


@given(capacity=st.integers(4 << 20, 1 << 42))
def test_what_is_usable_leaves_a_page_of_room_for_each_shard(capacity: int) -> None:
    geometry = divide(capacity, 64 << 20)
    assert 0.65 * capacity < geometry.usable_bytes < 0.85 * capacity or capacity < 6 << 20
    if geometry.several:
        shards = geometry.data_bytes // (geometry.shard_bytes + SHARD_FILES_BYTES) - 1
        largest = min(8 << 20, capacity // 64)
        assert geometry.usable_bytes <= shards * (geometry.shard_bytes * 0.95 - largest) + largest


class Jammed(Medium):
    """Opening fails, the way that a disk does."""

    jammed = False

    def before(self, step: str, path: Path) -> None:
        if self.jammed and step == "open":
            raise OSError(5, "Input/output error")


def test_a_shard_that_does_not_come_to_be_leaves_nothing(tmp_path: Path, drive: Any) -> None:
    medium = Jammed()
    driver = drive(tmp_path, CAPACITY, layout=Layout(shard_bytes=2 << 20, medium=medium))
    medium.jammed = True
    for number in range(3):
        assert driver.put({key(number): noise(number, 5000)}).outcomes == (Outcome.FAULT,)
    assert not list((tmp_path / "shards").iterdir())
    medium.jammed = False
    assert driver.put({key(1): noise(1, 5000)}).outcomes == (OK,)


def test_deletes_cost_no_commit_for_each_shard_and_page(tmp_path: Path, drive: Any) -> None:
    driver = drive(tmp_path, CAPACITY, layout=LAYOUT)
    rng = random.Random(1)
    names = [key(n) for n in range(600)]
    for at in range(0, 600, 50):
        assert set(driver.put({k: noise(at, 12_000) for k in names[at : at + 50]}).outcomes) == {OK}
    assert len(driver.store._shelf.shards) > 3
    rng.shuffle(names)
    before = driver.store.stats.commits
    # one group: the first put keeps the writer from looking while the rest is queued
    issued = [driver.submit(Op.DELETE, [k]) for k in names[:200]]
    for batch in issued:
        assert driver.wait(batch).outcomes == (OK,)
    assert driver.store.stats.commits - before < 100
    assert set(driver.get(names[:200], 12_000)) == {Outcome.MISS}
    assert Outcome.MISS not in driver.get(names[200:], 12_000)


def test_a_shard_of_mixed_sizes_is_taken_apart_when_there_is_room(
    tmp_path: Path, drive: Any, du: Any
) -> None:
    small = drive(tmp_path, 16 << 20)
    pages = [{key(n): noise(n, size) for n in range(first, first + 150)} for size, first in SIZES_APART]
    for some in pages:
        assert set(small.put(some).outcomes) == {OK}
    small.store.close()
    large = drive(tmp_path, 40 << 20, layout=Layout(shard_bytes=1 << 20))
    assert [s.info.size_class_bytes for s in large.store._shelf.shards] == [0]
    assert not [chain for chain in large.store.recover() if chain.parent == -2]
    for (size, _), some in zip(SIZES_APART, pages, strict=True):
        assert large.get(list(some), size) == list(some.values())  # while pages move
        assert du(tmp_path) <= 40 << 20
    deadline = time.monotonic() + 20
    while any(not s.info.size_class_bytes for s in large.store._shelf.shards):
        assert time.monotonic() < deadline, large.store.progress()
        time.sleep(0.01)
    assert {s.info.size_class_bytes for s in large.store._shelf.shards} == {size for size, _ in SIZES_APART}
    for (size, _), some in zip(SIZES_APART, pages, strict=True):
        assert large.get(list(some), size) == list(some.values())


SIZES_APART = ((3000, 0), (30_000, 1000))


def test_a_namespace_without_pages_is_forgotten_and_nothing_is_lost(tmp_path: Path, drive: Any) -> None:
    space = Namespace("m", 4, 4096)
    name = fingerprint(space)
    first = drive(tmp_path, 16 << 20)
    first.store.put_namespace(name, space)
    first.store.close()
    second = drive(tmp_path, 16 << 20)
    assert not second.store.namespaces()
    second.store.put_namespace(name, space)  # as whoever stores its pages does
    symbol = bytes(16)
    [page] = chain_keys(name, symbol, 16)
    assert second.put({page: noise(1, 4096)}, records=[PageRecord(name, name, symbol)]).outcomes == (OK,)
    second.delete([page])
    second.store.close()
    third = drive(tmp_path, 16 << 20)
    assert third.store.namespaces() == {name: space}  # its shard is there still


@pytest.mark.parametrize("pages", [1, 2, 5, 40])
def test_a_file_whose_last_pages_were_never_written_is_not_taken_for_cut_off(
    tmp_path: Path, drive: Any, pages: int
) -> None:
    for turn in range(3):
        driver = drive(tmp_path, CAPACITY, layout=LAYOUT)
        assert not driver.store.wiped
        names = [key(turn * 100 + n) for n in range(pages)]
        driver.put({name: noise(1, 1500) for name in names})
        driver.delete(names)
        for shard in driver.store._shelf.shards:
            needed = (shard.db.env.info()["last_pgno"] + 1) * 4096
            assert (shard.info.path / "data.mdb").stat().st_size >= needed
        driver.store.close()
