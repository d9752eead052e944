"""Twenty times the capacity with random evictions: bound, open files, reader slots and memory stay what they are."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

import lmdb
import numpy as np

from hicache.tier.disk import Layout
from hicache.types import Op, Outcome


def anonymous_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def readers_of(shards: Iterable[Any]) -> Iterator[int]:
    """Reader slots of each shard that is still there: the writer compacts behind the last batch."""
    for shard in shards:
        with contextlib.suppress(lmdb.Error):
            yield shard.db.env.info()["num_readers"]


def churn(driver: Any, folder: Path, du: Any, capacity: int, turns: int) -> None:
    rng = random.Random(1)
    noise = np.random.default_rng(1).bytes(400_000)
    live: list[tuple[bytes, int, int, int]] = []  # key, size, offset of its content, charge
    used, written, number = 0, 0, 0
    begin: tuple[int, int] | None = None
    while written < turns * capacity:
        size = rng.choice([20_000, 20_000, 100_000])
        while used + 8 * (size + 9000) > driver.store.usable_bytes:
            key, _, _, charge = live.pop(rng.randrange(len(live)))
            driver.submit(Op.DELETE, [key])
            used -= charge
        starts = [rng.randrange(len(noise) - size) for _ in range(8)]
        pages = {rng.randbytes(32): noise[at : at + size] for at in starts}
        done = driver.put(pages)
        assert set(done.outcomes) == {Outcome.OK}, done.error
        rows = zip(pages, starts, done.charges, strict=True)
        live += [(key, size, at, charge) for key, at, charge in rows]
        used += sum(done.charges)
        written += 8 * size
        number += 1
        if number % 50 == 0:
            assert du(folder) <= capacity
            for key, size_, at, _ in rng.sample(live, 5):
                assert driver.get([key], size_) == [noise[at : at + size_]]
        if begin is None and written > 3 * capacity:
            begin = (len(os.listdir("/proc/self/fd")), anonymous_kib())  # noqa: PTH208
    assert begin is not None
    shards = driver.store._shelf.shards
    assert len(os.listdir("/proc/self/fd")) <= begin[0] + 3 * len(shards)  # noqa: PTH208
    assert anonymous_kib() < begin[1] + (96 << 10)
    readers = list(readers_of(shards))
    assert readers and max(readers) <= 8
    assert driver.store._shelf.check_readers() == 0


def test_churn_is_bounded(tmp_path: Path, drive: Any, du: Any) -> None:
    driver = drive(tmp_path, 16 << 20, layout=Layout(shard_bytes=2 << 20))
    churn(driver, tmp_path, du, 16 << 20, turns=4)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sync", [False, True])
def test_twenty_times_the_capacity(tmp_path: Path, drive: Any, du: Any, sync: bool) -> None:
    driver = drive(tmp_path, 256 << 20, sync=sync)
    churn(driver, tmp_path, du, 256 << 20, turns=20)
