"""Sidecars, and the backend over stand-ins for SGLang's classes."""

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

from sglang_kit import PoolTransferResult, Storage, StorageConfig, StorageMetrics
from sidecars import BareSidecar

BACKEND = "hicache.integrations.sglang.backend"
Open = Callable[..., Any]


def running() -> Iterator[BareSidecar]:
    with tempfile.TemporaryDirectory(prefix="hc-") as home:
        found = BareSidecar(Path(home))
        found.start()
        yield found
        if found.process is not None:
            found.send_signal(signal.SIGCONT)
        found.kill()


@pytest.fixture(scope="module")
def shared_sidecar() -> Iterator[BareSidecar]:
    """For tests that leave it as it is; emptied after each."""
    yield from running()


@pytest.fixture
def own_sidecar() -> Iterator[BareSidecar]:
    """For tests that harm it."""
    yield from running()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's modules, as far as the backend imports them."""
    storage: Any = types.ModuleType("sglang.srt.mem_cache.hicache_storage")
    storage.HiCacheStorage, storage.PoolTransferResult = Storage, PoolTransferResult
    metrics: Any = types.ModuleType("sglang.srt.observability.metrics_collector")
    metrics.StorageMetrics = StorageMetrics
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.observability"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (storage, metrics):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(metadata, "version", lambda _: "0.5.23")
    sys.modules.pop(BACKEND, None)
    yield
    sys.modules.pop(BACKEND, None)


@pytest.fixture
def make_backend(stand_ins: None) -> Iterator[Open]:
    """Makes backends: ``make_backend(pool, config={...}, endpoint=..., other key of the JSON=value)``."""
    opened: list[Any] = []

    def make(pool: Any, *, config: dict[str, Any] | None = None, **extra: Any) -> Any:
        from hicache.integrations.sglang import HiCacheStorageBackend

        given = {"interface_v1": 1, "allocator": "shm", **extra}
        backend = HiCacheStorageBackend(StorageConfig(given, **(config or {})), {})
        opened.append(backend)
        if pool is not None:
            backend.register_mem_pool_host(pool)
        return backend

    yield make
    for backend in opened:
        backend.close()


@pytest.fixture
def open_backend(make_backend: Open, shared_sidecar: BareSidecar) -> Iterator[Open]:
    """``make_backend`` on the shared sidecar."""
    made: list[Any] = []

    def make(pool: Any, **given: Any) -> Any:
        made.append(make_backend(pool, endpoint=shared_sidecar.target, **given))
        return made[-1]

    yield make
    if made:
        made[0]._link.client.admin.clear()
