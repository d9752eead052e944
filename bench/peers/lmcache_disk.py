"""LMCache's file-system adapters of its L2 tier as contenders of ``bench/disk.py``. Runs in ``bench/.venvs/lmcache``.

``spec["codec"]``: ``fs`` (aiofiles) or ``fs_native`` (its C++ connector, four workers). One object a page, no fsync (it
has none), no checksum (it has none). Keys and objects are made before the clock starts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "contenders")]

import disk_common  # noqa: E402
import torch  # noqa: E402
from contender import serve  # noqa: E402
from lmcache.cli.commands.bench.l2_adapter_bench import data  # noqa: E402
from lmcache.v1.distributed.l2_adapters import fs_l2_adapter, fs_native_l2_adapter  # noqa: E402

ALIGN_BYTES = 4096
BATCH_PAGES = 16


class Bench:
    """One adapter over one folder."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.kind = str(spec.pop("codec"))
        spec.pop("hints", None)
        self.spec = disk_common.DiskSpec(**spec)
        self.folder = Path(self.spec.folder)
        pages = self.spec.load()
        self.count, self.page_bytes = pages.shape
        self.source = data.make_aligned_tensor(pages.nbytes, ALIGN_BYTES)
        self.into = data.make_aligned_tensor(pages.nbytes, ALIGN_BYTES)
        self.stored = data.make_memory_objects(self.source, self.count, self.page_bytes, 0)
        self.loaded = data.make_memory_objects(self.into, self.count, self.page_bytes, 0)
        self.source.copy_(torch.from_numpy(pages.reshape(-1)))
        self.round = 0
        self.adapter: Any = None

    def open(self) -> Any:
        fields = {"base_path": str(self.folder)}
        if self.kind == "fs":
            self.adapter = fs_l2_adapter.FSL2Adapter(fs_l2_adapter.FSL2AdapterConfig.from_dict(fields))
        else:
            config = fs_native_l2_adapter.FSNativeL2AdapterConfig.from_dict(fields)
            memory = data.create_l1_memory_desc(self.into, ALIGN_BYTES)
            self.adapter = fs_native_l2_adapter._create_fs_native_l2_adapter(config, memory)
        return self.adapter

    def keys(self) -> list[Any]:
        self.round += 1
        return data.make_object_keys(self.count, "bench", self.round * self.count)

    def batches(self, keys: list[Any], objects: list[Any]) -> list[tuple[list[Any], list[Any]]]:
        return [
            (keys[at : at + BATCH_PAGES], objects[at : at + BATCH_PAGES])
            for at in range(0, len(keys), BATCH_PAGES)
        ]

    def store(self, keys: list[Any]) -> None:
        waiting = {self.adapter.submit_store_task(k, o) for k, o in self.batches(keys, self.stored)}
        while waiting:
            data.wait_eventfd(self.adapter.get_store_event_fd(), 60)
            for task, result in self.adapter.pop_completed_store_tasks().items():
                if not result.is_successful():
                    raise RuntimeError("a store failed")
                waiting.discard(task)

    def load(self, keys: list[Any]) -> None:
        waiting = {self.adapter.submit_load_task(k, o): len(k) for k, o in self.batches(keys, self.loaded)}
        while waiting:
            data.wait_eventfd(self.adapter.get_load_event_fd(), 60)
            for task in list(waiting):
                found = self.adapter.query_load_result(task)
                if found is not None and found.popcount() != waiting.pop(task):
                    raise RuntimeError("a load failed")

    def demote(self) -> Callable[[], dict[str, Any]]:
        disk_common.fresh(self.folder)
        self.open()

        def sample() -> dict[str, Any]:
            for path in self.folder.glob("*.data"):
                path.unlink()
            keys = self.keys()
            return disk_common.timed_pages(lambda: self.store(keys), self.count)

        return sample

    def promote(self, *, cold: bool) -> Callable[[], dict[str, Any]]:
        disk_common.fresh(self.folder)
        self.open()
        keys = self.keys()
        self.store(keys)
        space = disk_common.disk_bytes(self.folder) / (self.count * self.page_bytes)

        def sample() -> dict[str, Any]:
            if cold:
                disk_common.drop_from_page_cache(self.folder)
            self.into.view(self.count, -1)[:, :64] = 0
            taken = disk_common.timed_pages(lambda: self.load(keys), self.count, disk_over_raw=space)
            if not torch.equal(self.into, self.source):
                raise RuntimeError("the pages read are not the pages stored")
            return taken

        return sample

    def close(self) -> None:
        if self.adapter is not None:
            self.adapter.close()
            self.adapter = None
            time.sleep(0.1)


def prepare(spec: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Any]]]]:
    bench = Bench(spec)

    def clean(make: Callable[[], Callable[[], dict[str, Any]]]) -> Callable[[], Callable[[], dict[str, Any]]]:
        def set_up() -> Callable[[], dict[str, Any]]:
            bench.close()
            return make()

        return set_up

    return {
        "demote": clean(bench.demote),
        "promote": clean(lambda: bench.promote(cold=False)),
        "promote_cold": clean(lambda: bench.promote(cold=True)),
    }


if __name__ == "__main__":
    serve(
        "lmcache",
        prepare,  # type: ignore[arg-type]
        lambda: {name: metadata.version(name) for name in ("lmcache", "torch")},
    )
