"""Helpers of the tier tests."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from hicache.types import Batch, Completion, Op, Outcome


class Driver:
    """Waits for a disk store's batches."""

    def __init__(self, path: Path, capacity_bytes: int = 16 << 20, **options: Any) -> None:
        from hicache.tier.disk import DiskStore

        self._woken = threading.Event()
        self._ids = itertools.count(1)
        self._done: dict[int, Completion] = {}
        self.store = DiskStore(path, capacity_bytes, self._woken.set, **options)

    def submit(self, op: Op, keys: list[bytes], buffers: list[Any] | None = None, **fields: Any) -> int:
        views = [memoryview(buffer) for buffer in buffers or []]
        size = views[0].nbytes if views else 0
        batch = Batch(next(self._ids), op, size, keys=keys, buffers=views, **fields)
        self.store.submit(batch)
        return batch.id

    def wait(self, batch_id: int) -> Completion:
        while batch_id not in self._done:
            self._woken.clear()
            self._done.update({completion.id: completion for completion in self.store.poll()})
            if batch_id not in self._done:
                assert self._woken.wait(30), "no completion in 30 s"
        return self._done.pop(batch_id)

    def put(self, pages: dict[bytes, bytes], **fields: Any) -> Completion:
        return self.wait(self.submit(Op.PUT, list(pages), list(pages.values()), **fields))

    def get(self, keys: list[bytes], page_bytes: int) -> list[bytes | Outcome]:
        into = [bytearray(page_bytes) for _ in keys]
        done = self.wait(self.submit(Op.GET, keys, into))
        return [
            bytes(data) if outcome is Outcome.OK else outcome
            for data, outcome in zip(into, done.outcomes, strict=True)
        ]

    def delete(self, keys: list[bytes]) -> Completion:
        return self.wait(self.submit(Op.DELETE, keys))

    def flush(self) -> Completion:
        return self.wait(self.submit(Op.FLUSH, []))


@pytest.fixture
def drive() -> Any:
    """Opens drivers; closes their stores at the end."""
    opened: list[Driver] = []

    def make(path: Path, capacity_bytes: int = 16 << 20, **options: Any) -> Driver:
        opened.append(Driver(path, capacity_bytes, **options))
        return opened[-1]

    yield make
    for driver in opened:
        driver.store.close()


def disk_use(folder: Path) -> int:
    """What ``du`` shows: allocated bytes of the folder and its files."""
    total = 0
    waiting = [folder]
    while waiting:
        entry = waiting.pop()
        try:
            total += entry.stat().st_blocks * 512
            if entry.is_dir():
                waiting += entry.iterdir()
        except FileNotFoundError:
            continue
    return total


@pytest.fixture
def du() -> Any:
    return disk_use
