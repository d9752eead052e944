"""The backends of the conformance suite. A new store registers a factory in ``BACKENDS``; see ``Backend``.

A backend speaks page numbers; it turns them into slots or keys and waits for completions.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import random
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hicache.types import Batch, Completion, Op, Outcome, PageStore, TierKind, TierSpec, segment_slots

PAGES = 12  # numbers 0..PAGES-1 are in use


class Backend(ABC):
    """One store under test, of pages of ``page_bytes``."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._ids = itertools.count(1)
        self._woken = threading.Event()
        self._done: dict[int, Completion] = {}
        self.store: PageStore = self.open()

    @abstractmethod
    def open(self) -> PageStore:
        """The store, with ``self.notify`` as its notify and room for PAGES pages."""

    @abstractmethod
    def address(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The Batch fields that name these pages: slots or keys (and records)."""

    @abstractmethod
    def corrupt(self, number: int, rng: random.Random) -> None:
        """Flip one bit of a stored page's bytes, behind the store's back. The store is idle."""

    def buffer(self) -> memoryview:
        """A destination of a GET; a store that needs special memory overrides this."""
        return memoryview(bytearray(self.page_bytes))

    def notify(self) -> None:
        self._woken.set()

    def submit(
        self, op: Op, numbers: Sequence[int], buffers: Sequence[memoryview] = (), **fields: Any
    ) -> int:
        """Queue a batch, return its id."""
        batch = Batch(
            next(self._ids), op, self.page_bytes, buffers=buffers, **self.address(numbers), **fields
        )
        self.store.submit(batch)
        return batch.id

    def wait(self, batch_id: int) -> Completion:
        """The batch's completion."""
        while batch_id not in self._done:
            self._woken.clear()
            found = self.store.poll()
            for completion in found:
                assert completion.id not in self._done, "a batch completed twice"
                self._done[completion.id] = completion
            if not found:
                assert self._woken.wait(30), "no completion in 30 s"
        return self._done.pop(batch_id)

    def put(self, pages: dict[int, bytes], **fields: Any) -> list[Outcome]:
        views = [memoryview(data) for data in pages.values()]
        return list(self.wait(self.submit(Op.PUT, list(pages), views, **fields)).outcomes)

    def get(self, numbers: Sequence[int]) -> list[bytes | Outcome]:
        views = [self.buffer() for _ in numbers]
        done = self.wait(self.submit(Op.GET, numbers, views))
        return [
            bytes(view) if outcome is Outcome.OK else outcome
            for view, outcome in zip(views, done.outcomes, strict=True)
        ]

    def delete(self, numbers: Sequence[int]) -> list[Outcome]:
        return list(self.wait(self.submit(Op.DELETE, numbers)).outcomes)

    def flush(self) -> None:
        assert not self.wait(self.submit(Op.FLUSH, ())).error

    def close(self) -> None:
        self.store.close()


class HostBackend(Backend):
    """Host memory; pages are spread over two segments."""

    workers = 1

    def open(self) -> PageStore:
        from hicache.tier.host import HostStore

        spec = TierSpec("host", TierKind.HOST, 2 << 20, 1 << 20, header_bytes_per_slot=8)
        store = HostStore(spec, self.notify, workers=self.workers, prefault=False)
        slots = min(PAGES // 2, segment_slots(spec, self.page_bytes))
        assert slots == PAGES // 2, "the test's pages are too large for its segments"
        for segment in (0, 1):
            store.open_segment(segment, "default", self.page_bytes, slots)
        self.host = store
        return store

    def address(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"slots": [(number % 2 << 24) + number // 2 for number in numbers]}

    def corrupt(self, number: int, rng: random.Random) -> None:
        [view] = self.host.views(self.address([number])["slots"])
        view[rng.randrange(len(view))] ^= 1 << rng.randrange(8)


class HostBackendThreaded(HostBackend):
    """Host memory with several workers."""

    workers = 3


class DiskBackend(Backend):
    """LMDB in a temporary folder."""

    shard_bytes = 0

    def open(self) -> PageStore:
        from hicache.tier.disk import DiskStore, Layout

        self.folder = tempfile.mkdtemp(prefix="hicache-test-")
        layout = Layout(shard_bytes=self.shard_bytes)
        self.disk = DiskStore(self.folder, 16 << 20, self.notify, layout=layout)
        return self.disk

    def address(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"keys": [hashlib.sha256(b"%d" % number).digest() for number in numbers]}

    def corrupt(self, number: int, rng: random.Random) -> None:
        from hicache.tier.shelf import Look

        [key] = self.address([number])["keys"]
        with Look(self.disk._shelf) as look:
            db = next(look.find(key)).db
        with db.env.begin(write=True, db=db.pages) as txn:
            record = bytearray(txn.get(key))
            record[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
            txn.put(key, record)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder)


class DiskBackendSharded(DiskBackend):
    """Several small shards."""

    shard_bytes = 1 << 20


def _disk(page_bytes: int, kind: type[DiskBackend] = DiskBackend) -> Backend:
    for module in ("lmdb", "zstandard"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    return kind(page_bytes)


#: name -> factory(page_bytes). Register a backend here.
BACKENDS: dict[str, Callable[[int], Backend]] = {
    "host": HostBackend,
    "host-3-workers": HostBackendThreaded,
    "disk": _disk,
    "disk-shards": lambda page_bytes: _disk(page_bytes, DiskBackendSharded),
    "device-cpu": lambda page_bytes: importlib.import_module("device_backend").make(page_bytes),
    "device-fake": lambda page_bytes: importlib.import_module("device_backend").make(page_bytes, "fake"),
    "device-fake-plain": lambda page_bytes: importlib.import_module("device_backend").make(
        page_bytes, "fake-plain"
    ),
    "device-many": lambda page_bytes: importlib.import_module("device_backend").make(page_bytes, "many"),
    "device-cudart": lambda page_bytes: importlib.import_module("device_backend").make(page_bytes, "cudart"),
    "device-cudart-plain": lambda page_bytes: importlib.import_module("device_backend").make(
        page_bytes, "cudart-plain"
    ),
    "device-cuda": lambda page_bytes: importlib.import_module("device_backend").make(page_bytes, "cuda"),
}


def page(seed: int, page_bytes: int) -> bytes:
    """A page's content: noise, bf16-like numbers or zeros, by seed; any two seeds differ."""
    rng = np.random.default_rng(seed)
    kind = seed % 3
    if kind == 0:
        data = rng.bytes(page_bytes)
    elif kind == 1:
        floats = rng.standard_normal(page_bytes // 2 + 1, dtype=np.float32)
        data = (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:page_bytes]
    else:
        data = bytes(page_bytes)
    return (seed.to_bytes(8, "little") + data)[:page_bytes]
