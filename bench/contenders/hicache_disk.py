"""hicache's disk store as a contender of ``bench/disk.py``, through the seam that the runtime uses.

``spec["codec"]``: ``default``, ``fast``, ``raw``, or ``zstd1``: zstd level 1 over the whole page, put in the place of
our codec (same threads, same store, same checks), which is what "compress with zstd" would have meant here.

demote         PUT of all pages, until the last one is acknowledged (survives kill -9)
demote_sync    the same with an fdatasync a group (survives a power cut)
promote        GET of all pages into host memory, from the page cache
promote_cold   GET of all pages after the kernel has forgotten the file
decode_bare    the codec alone, one thread, records in memory
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import disk_common  # noqa: E402
import numpy as np  # noqa: E402
import zstandard  # noqa: E402
from contender import serve  # noqa: E402

from hicache.keys import chain_keys, fingerprint  # noqa: E402
from hicache.tier import codec, disk  # noqa: E402
from hicache.tier.codec import record  # noqa: E402
from hicache.tier.codec.estimate import Plan  # noqa: E402
from hicache.tier.codec.forms import Form  # noqa: E402
from hicache.tier.disk import DiskStore  # noqa: E402
from hicache.types import Batch, Namespace, Op, Outcome, PageRecord  # noqa: E402

READERS = 2
BATCH_PAGES = 16


class Zstd1:
    """A page codec that writes one zstd-1 frame a page; our decoder reads those, as it reads any frame."""

    def __init__(self, _namespace: object = None, *, setting: str = "") -> None:
        self._local = threading.local()

    def encode(self, page: memoryview, key: bytes) -> codec.Encoded:
        if not hasattr(self._local, "compressor"):
            self._local.compressor = zstandard.ZstdCompressor(level=1)
        raw = np.frombuffer(page, dtype=np.uint8)
        frame = np.frombuffer(self._local.compressor.compress(page), dtype=np.uint8)
        packed = np.empty(codec.HEADER_BYTES + len(frame), dtype=np.uint8)
        np.copyto(packed[codec.HEADER_BYTES :], frame)
        return record.store_packed(raw, key, Plan(codec.Codec.ZSTD, Form.OPAQUE), packed)


class Bench:
    """One store and the pages that go through it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.codec = str(spec.pop("codec"))
        self.hints = dict(spec.pop("hints", {}))
        self.spec = disk_common.DiskSpec(**spec)
        self.pages = self.spec.load()
        self.page_bytes = self.pages.shape[1]
        self.round = 0
        self.folder = Path(self.spec.folder)
        self.namespace = Namespace(
            model="bench", page_tokens=16, page_bytes=self.page_bytes, kv_dtype="bfloat16", **self.hints
        )
        self.fingerprint = fingerprint(self.namespace)
        self.rung = threading.Event()
        self.store: DiskStore | None = None
        if self.codec == "zstd1":
            disk.PageCodec = Zstd1  # type: ignore[assignment,misc]
        self.setting = {"default": "lossless", "fast": "lossless-fast", "zstd1": "lossless", "raw": "raw"}[
            self.codec
        ]

    def open(self, *, sync: bool = False) -> DiskStore:
        capacity = max(self.pages.nbytes * 4, 64 << 20)
        store = DiskStore(
            self.folder,
            capacity,
            self.rung.set,
            sync=sync,
            readers=READERS,
            compress_workers=2,
            page_codec=self.setting,
        )
        store.put_namespace(self.fingerprint, self.namespace)
        self.store = store
        return store

    def keys(self) -> tuple[list[bytes], list[PageRecord]]:
        """A prompt that was never stored: its page keys and records."""
        self.round += 1
        width = self.namespace.symbol_bytes
        count = len(self.pages)
        numbers = np.zeros((count, width // 4), np.int32)
        numbers[:, 0], numbers[:, 1] = self.round, np.arange(count)
        prompt = numbers.tobytes()
        chain = [self.fingerprint, *chain_keys(self.fingerprint, prompt, width)]
        records = [
            PageRecord(self.fingerprint, chain[i], prompt[i * width : (i + 1) * width]) for i in range(count)
        ]
        return chain[1:], records

    def move(self, store: DiskStore, op: Op, keys: list[bytes], **columns: Any) -> None:
        """All pages in batches, submitted at once; returns when the last completion is there."""
        waiting = 0
        for start in range(0, len(keys), BATCH_PAGES):
            end = start + BATCH_PAGES
            cut = {name: column[start:end] for name, column in columns.items()}
            waiting += 1
            store.submit(
                Batch(waiting, op, self.page_bytes if op is not Op.DELETE else 0, keys=keys[start:end], **cut)
            )
        while waiting:
            self.rung.wait(60)
            self.rung.clear()
            for done in store.poll():
                waiting -= 1
                if any(outcome is not Outcome.OK for outcome in done.outcomes):
                    raise RuntimeError(f"{op.value}: {done.outcomes[0]} {done.error}")

    def put(self, store: DiskStore) -> list[bytes]:
        keys, records = self.keys()
        self.move(store, Op.PUT, keys, buffers=[memoryview(p) for p in self.pages], records=records)
        return keys

    def demote(self, *, sync: bool) -> Callable[[], dict[str, Any]]:
        disk_common.fresh(self.folder)
        store = self.open(sync=sync)
        before: list[bytes] = []

        def sample() -> dict[str, Any]:
            nonlocal before
            if before:
                self.move(store, Op.DELETE, before)
            taken = disk_common.timed_pages(lambda: before.extend(self.put(store)), len(self.pages))
            before = before[-len(self.pages) :]
            return taken

        return sample

    def fill(self) -> tuple[list[bytes], float]:
        disk_common.fresh(self.folder)
        store = self.open()
        keys = self.put(store)
        store.close()
        return keys, disk_common.disk_bytes(self.folder) / self.pages.nbytes

    def promote(self, *, cold: bool) -> Callable[[], dict[str, Any]]:
        keys, space = self.fill()
        into = np.empty_like(self.pages)
        into[:] = 1  # first touch is not the store's
        buffers = [memoryview(page) for page in into]
        store = None if cold else self.open()

        def sample() -> dict[str, Any]:
            used = store
            if used is None:
                disk_common.drop_from_page_cache(self.folder)
                used = self.open()
            into[:, :64] = 0
            taken = disk_common.timed_pages(
                lambda: self.move(used, Op.GET, keys, buffers=buffers), len(keys), disk_over_raw=space
            )
            if used is not store:
                used.close()
            if not np.array_equal(into[-1], self.pages[-1]):
                raise RuntimeError("the page read is not the page stored")
            return taken

        return sample

    def decode_bare(self) -> Callable[[], dict[str, Any]]:
        pages = self.pages[:32]
        key = bytes(32)
        page_codec = disk.PageCodec(self.namespace, setting=self.setting)
        records = [page_codec.encode(memoryview(p), key).record for p in pages]
        into = [memoryview(np.ones_like(p)) for p in pages]

        def run() -> None:
            for stored, buffer in zip(records, into, strict=True):
                if codec.decode(stored, key, buffer).outcome is not Outcome.OK:
                    raise RuntimeError("a record does not decode")

        return lambda: disk_common.timed_pages(run, len(pages))


def prepare(spec: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Any]]]]:
    bench = Bench(spec)

    def clean(make: Callable[[], Callable[[], dict[str, Any]]]) -> Callable[[], Callable[[], dict[str, Any]]]:
        def set_up() -> Callable[[], dict[str, Any]]:
            if bench.store is not None:
                bench.store.close()
                bench.store = None
            return make()

        return set_up

    return {
        "demote": clean(lambda: bench.demote(sync=False)),
        "demote_sync": clean(lambda: bench.demote(sync=True)),
        "promote": clean(lambda: bench.promote(cold=False)),
        "promote_cold": clean(lambda: bench.promote(cold=True)),
        "decode_bare": clean(bench.decode_bare),
    }


if __name__ == "__main__":
    serve(
        "hicache",
        prepare,  # type: ignore[arg-type]
        lambda: {name: metadata.version(name) for name in ("lmdb", "zstandard", "numpy")},
    )
