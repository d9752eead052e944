"""SGLang's file backend of HiCache (``HiCacheFile``) as a contender of ``bench/disk.py``; in ``bench/.venvs/sglang``.

One file a page, no fsync (it has none), no checksum (it has none), one thread, as its prefetch thread calls it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "contenders")]

import _stubs  # noqa: E402
import disk_common  # noqa: E402
import torch  # noqa: E402
from contender import serve  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")
_stubs.install(
    ["triton", "IPython", "torchvision", "sentencepiece", "compressed_tensors", "gguf", "partial_json_parser"]
)

from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig  # noqa: E402

CONFIG = {
    "tp_rank": 0,
    "tp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "attn_cp_rank": 0,
    "attn_cp_size": 1,
    "is_mla_model": False,
    "enable_storage_metrics": False,
    "is_page_first_layout": True,
    "model_name": "bench",
}


class Bench:
    """One backend over one folder."""

    def __init__(self, spec: dict[str, Any]) -> None:
        spec.pop("codec")
        spec.pop("hints", None)
        self.spec = disk_common.DiskSpec(**spec)
        self.folder = Path(self.spec.folder)
        self.pages = torch.from_numpy(self.spec.load())
        self.into = torch.ones_like(self.pages)
        self.round = 0

    def open(self) -> HiCacheFile:
        disk_common.fresh(self.folder)
        return HiCacheFile(HiCacheStorageConfig(**CONFIG), file_path=str(self.folder))

    def keys(self) -> list[str]:
        self.round += 1
        return [f"{self.round:032x}{page:032x}" for page in range(len(self.pages))]

    def store(self, backend: HiCacheFile, keys: list[str]) -> None:
        if not backend.batch_set(keys, list(self.pages)):
            raise RuntimeError("a store failed")

    def load(self, backend: HiCacheFile, keys: list[str]) -> None:
        if any(found is None for found in backend.batch_get(keys, list(self.into))):
            raise RuntimeError("a load failed")

    def demote(self) -> Callable[[], dict[str, Any]]:
        backend = self.open()

        def sample() -> dict[str, Any]:
            for path in self.folder.glob("*.bin"):
                path.unlink()
            keys = self.keys()
            return disk_common.timed_pages(lambda: self.store(backend, keys), len(keys))

        return sample

    def promote(self, *, cold: bool) -> Callable[[], dict[str, Any]]:
        backend = self.open()
        keys = self.keys()
        self.store(backend, keys)
        space = disk_common.disk_bytes(self.folder) / self.pages.nbytes

        def sample() -> dict[str, Any]:
            if cold:
                disk_common.drop_from_page_cache(self.folder)
            self.into[:, :64] = 0
            taken = disk_common.timed_pages(lambda: self.load(backend, keys), len(keys), disk_over_raw=space)
            if not torch.equal(self.into, self.pages):
                raise RuntimeError("the pages read are not the pages stored")
            return taken

        return sample


def prepare(spec: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Any]]]]:
    bench = Bench(spec)
    return {
        "demote": bench.demote,
        "promote": lambda: bench.promote(cold=False),
        "promote_cold": lambda: bench.promote(cold=True),
    }


if __name__ == "__main__":
    serve(
        "sglang",
        prepare,  # type: ignore[arg-type]
        lambda: {name: metadata.version(name) for name in ("sglang", "torch")},
    )
