"""A sidecar for each test, and the backend over stand-ins for SGLang's classes."""

from __future__ import annotations

import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sglang_kit import PoolTransferResult, Sidecar, Storage, StorageConfig, StorageMetrics


@pytest.fixture
def sidecar() -> Iterator[Sidecar]:
    with tempfile.TemporaryDirectory(prefix="hc-") as home:
        found = Sidecar(Path(home))
        found.start()
        yield found
        if found.process is not None:
            found.signal(signal.SIGCONT)
        found.kill()


Open = Callable[..., Any]


@pytest.fixture
def open_backend(monkeypatch: pytest.MonkeyPatch, sidecar: Sidecar) -> Iterator[Open]:
    """Makes backends: ``open_backend(pool, key=value of the JSON, config={...})``."""
    if "sglang" not in sys.modules:
        storage: Any = types.ModuleType("sglang.srt.mem_cache.hicache_storage")
        storage.HiCacheStorage, storage.PoolTransferResult = Storage, PoolTransferResult
        metrics: Any = types.ModuleType("sglang.srt.observability.metrics_collector")
        metrics.StorageMetrics = StorageMetrics
        names = ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.observability")
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for module in (storage, metrics):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(metadata, "version", lambda _: "0.5.23")
    monkeypatch.delitem(sys.modules, "hicache.integrations.sglang.backend", raising=False)
    opened: list[Any] = []

    def make(pool: Any, *, config: dict[str, Any] | None = None, **extra: Any) -> Any:
        from hicache.integrations.sglang import HiCacheStorageBackend

        given = {"endpoint": sidecar.endpoint, "interface_v1": 1, "allocator": "shm", **extra}
        backend = HiCacheStorageBackend(StorageConfig(given, **(config or {})), {})
        opened.append(backend)
        if pool is not None:
            backend.register_mem_pool_host(pool)
        return backend

    yield make
    for backend in opened:
        backend.close()
    sys.modules.pop("hicache.integrations.sglang.backend", None)
