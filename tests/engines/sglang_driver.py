"""Runs in ``.venv-sglang``: SGLang's own host pools and cache controller around our backend, driven by lines of JSON.

Everything between the requests below and the sidecar is SGLang's: the factory that loads the backend from the JSON,
the pools and their shm allocator, the controller's threads that back up and prefetch. Only what would start a GPU is
left out: the controller is made without the device part of its constructor. One request a line on stdin, one answer on
stdout.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "peers"))

import _stubs
import numpy as np
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")
_stubs.install(
    ["triton", "IPython", "torchvision", "sentencepiece", "compressed_tensors", "gguf", "partial_json_parser"]
)

from sglang.srt.managers.cache_controller import HiCacheController  # noqa: E402
from sglang.srt.mem_cache.device_pool_info import (  # noqa: E402
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402
from sglang.srt.runtime_context import get_parallel  # noqa: E402

LAYERS, HEADS, HEAD_SIZE, CPU = 4, 2, 64, torch.device("cpu")


def pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def mha_pool(spec: dict[str, Any]) -> MHATokenToKVPoolHost:
    heads, layers = spec.get("heads", HEADS), spec.get("layers", LAYERS)
    size, dtype = spec.get("head_size", HEAD_SIZE), getattr(torch, spec.get("dtype", "float16"))
    sides = [tuple(torch.zeros(1, heads, size, dtype=dtype) for _ in range(layers)) for _ in "kv"]
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=sides[0],
            v=sides[1],
            k_data_ptrs=pointers(sides[0]),
            v_data_ptrs=pointers(sides[1]),
            layout=KVBufferLayout.NHD,
        ),
        page_size=spec["page_size"],
        head_num=heads,
        head_dim=size,
        v_head_dim=size,
        dtype=dtype,
        device=CPU,
    )
    return MHATokenToKVPoolHost(info, start_layer=0, end_layer=layers, **shape(spec))


def mla_pool(spec: dict[str, Any]) -> MLATokenToKVPoolHost:
    rows = tuple(torch.zeros(1, 1, 80, dtype=torch.float16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=pointers(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=spec["page_size"],
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        kv_cache_dim=80,
        dtype=torch.float16,
        device=CPU,
    )
    return MLATokenToKVPoolHost(info, start_layer=0, end_layer=LAYERS, target_layer_num=LAYERS, **shape(spec))


def shape(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "host_to_device_ratio": 1.0,
        "host_size": 0,
        "page_size": spec["page_size"],
        "layout": spec["layout"],
        "pin_memory": False,
        "allocator_type": spec["allocator"],
        "device_capacity_tokens": spec["tokens"],
    }


class Controller(HiCacheController):
    """SGLang's controller without the device: what its constructor sets for storage, then its own attach."""

    def __init__(self, spec: dict[str, Any], pool: Any) -> None:
        self.tp_group = self.attn_cp_group = self.attn_tp_group = self.pp_group = None
        self.host_memory_mode = "cache"
        self.mem_pool_host = self.storage_host_pool = pool
        kind = MLATokenToKVPool if spec["pool"] == "mla" else object
        self.mem_pool_device = kind.__new__(kind)
        self.page_size = spec["page_size"]
        self.enable_storage = False
        self.enable_storage_metrics = True
        self.storage_backend = None
        self.prefetch_hits_sync_groups, self.prefetch_completion_sync_groups = [], []
        self.storage_stop_event = threading.Event()
        rank, ranks = spec.get("rank", 0), spec.get("ranks", 1)
        get_parallel().override_permanently(
            tp_rank=rank, tp_size=ranks, pp_rank=0, pp_size=1, attn_dcp_size=1, attn_dcp_rank=0
        )
        self.attach_storage_backend(spec["backend"], 1, spec["model"], dict(spec["extra"]))


class Host:
    """One engine process: a pool, a controller, and what tests ask of them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.pool = (mla_pool if spec["pool"] == "mla" else mha_pool)(spec)
        self.controller = Controller(spec, self.pool)
        self.backend = self.controller.storage_backend

    # --- helpers

    def indices(self, pages: list[int]) -> torch.Tensor:
        size = self.spec["page_size"]
        spans = [torch.arange(page * size, (page + 1) * size) for page in pages]
        return torch.cat(spans) if spans else torch.arange(0)

    def bytes_of(self, page: int) -> bytes:
        flat = self.pool.get_data_page(page * self.spec["page_size"])
        return bytes(flat.contiguous().view(torch.uint8).numpy())

    def fill(self, pages: list[int], seed: int) -> list[str]:
        for page in pages:
            flat = self.pool.get_dummy_flat_data_page()
            rng = np.random.default_rng([seed, page])
            raw = torch.from_numpy(rng.integers(0, 256, flat.nbytes, dtype=np.uint8))
            self.pool.set_from_flat_data_page(page * self.spec["page_size"], raw.view(flat.dtype))
        return self.digests(pages)

    def digests(self, pages: list[int]) -> list[str]:
        import hashlib

        return [hashlib.sha256(self.bytes_of(page)).hexdigest() for page in pages]

    def head(self, page: int, size_bytes: int) -> str:
        return self.bytes_of(page)[:size_bytes].hex()

    def hashes(self, tokens: list[int]) -> list[str]:
        found = get_storage_hash_str(tokens, None, page_size=self.spec["page_size"])
        return list(found)

    # --- SGLang's own paths

    def backup(self, tokens: list[int], pages: list[int], prefix_keys: list[str] | None = None) -> int:
        """Store through the controller's backup thread; answers the tokens that it counts as stored."""
        self.controller.write_storage(self.indices(pages), tokens, self.hashes(tokens), prefix_keys)
        return int(self.controller.ack_backup_queue.get(timeout=60).completed_tokens)

    def prefetch(
        self, tokens: list[int], pages: list[int], prefix_keys: list[str] | None = None
    ) -> list[int]:
        """Look up and load through the controller's prefetch threads: tokens found, and tokens loaded."""
        self.controller.prefetch("request", tokens, None, prefix_keys)
        operation = self.controller.prefetch_hit_queue.get(timeout=60)
        found = operation.storage_hit_count
        operation.host_indices = self.indices(pages)[:found]
        self.controller.prefetch_buffer.put(operation)
        loaded = 0
        while True:
            ack = self.controller.ack_prefetch_queue.get(timeout=60)
            loaded = max(loaded, ack.completed_tokens or 0)
            if ack.completed_req:
                return [found, loaded]

    # --- the backend's methods

    def exists(self, keys: list[str], prefix_keys: list[str] | None = None) -> int:
        return int(self.backend.batch_exists(keys, HiCacheStorageExtraInfo(prefix_keys=prefix_keys)))

    def get_v1(self, keys: list[str], pages: list[int]) -> list[bool]:
        return list(self.backend.batch_get_v1(keys, self.indices(pages)))

    def set_v1(self, keys: list[str], pages: list[int]) -> list[bool]:
        return list(self.backend.batch_set_v1(keys, self.indices(pages)))

    def get_flat(self, keys: list[str]) -> list[bool]:
        into = [self.pool.get_dummy_flat_data_page() for _ in keys]
        return [found is not None for found in self.backend.batch_get(keys, into)]

    def side_pool(self, keys: list[str], pages: list[int]) -> dict[str, Any]:
        """Store and load pages of a second pool (v2), and what a look-up with it says."""
        side = mha_pool({**self.spec, "layout": "page_first_direct", "heads": 1})
        self.backend.register_mem_host_pool_v2(side, PoolName.SWA)
        size = self.spec["page_size"]
        side.kv_buffer.copy_(torch.arange(side.kv_buffer.numel()).reshape(side.kv_buffer.shape) % 251)
        before = [bytes(side.get_data_page(page * size).view(torch.uint8).numpy()) for page in pages]
        last = PoolTransfer(PoolName.SWA, self.indices(pages[-1:]), keys=keys[-1:])
        last.hit_policy = PoolHitPolicy.TRAILING_PAGES
        stored = self.backend.batch_set_v2([last])
        hit = self.backend.batch_exists_v2(keys, [last])
        side.kv_buffer.zero_()
        loaded = self.backend.batch_get_v2([last])
        after = bytes(side.get_data_page(pages[-1] * size).view(torch.uint8).numpy())
        return {
            "stored": stored[PoolName.SWA],
            "loaded": loaded[PoolName.SWA],
            "hit": hit.kv_hit_pages,
            "restorable": hit.restorable_prefix_pages,
            "same": after == before[-1],
        }

    def counts(self) -> dict[str, Any]:
        counts = self.backend.counts["kv"]
        return {name: getattr(counts, name) for name in counts.__slots__}

    def in_place(self) -> bool:
        """Whether the pool's own memory is what the sidecar copies from."""
        return bool(self.backend._pools.kv.pool.mapped)

    def crowd(self, keys: list[str], pages: list[int], into: list[int], rounds: int) -> list[str]:
        """SGLang's three threads at once for a while; answers what went wrong."""
        wrong: list[str] = []
        right = self.digests(pages)

        def store() -> bool:
            return all(self.set_v1(keys, pages))

        def query() -> bool:
            return 0 <= self.exists(keys) <= len(keys)

        def load() -> bool:
            flags = self.get_v1(keys, into)
            return all(got == right[i] for i, got in enumerate(self.digests(into)) if flags[i])

        def repeat(what: Callable[[], bool]) -> None:
            wrong.extend(what.__name__ for _ in range(rounds) if not what())

        threads = [threading.Thread(target=repeat, args=(what,)) for what in (store, query, load)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return wrong + [f"{thread.name} still runs" for thread in threads if thread.is_alive()]

    def stats(self) -> dict[str, Any]:
        found = self.backend.get_stats()
        return {"loads": found.prefetch_pgs, "stores": found.backup_pgs}

    def clear(self) -> bool:
        return bool(self.backend.clear())

    def close(self) -> None:
        self.controller.detach_storage_backend()


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    host: Host | None = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        began = time.monotonic()
        try:
            if name == "start":
                assert host is None, "the one before was closed"
                host = Host(*arguments)
                answer: Any = type(host.backend).__module__
            elif name == "close":
                if host is not None:
                    host.close()
                host, answer = None, True
            else:
                answer = getattr(host, name)(*arguments)
            reply = {"answer": answer, "seconds": time.monotonic() - began}
        except Exception as error:  # noqa: BLE001  # whatever SGLang let through is the test's to see
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
