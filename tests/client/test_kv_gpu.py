"""What the client asks of CUDA, on the one in ordinary memory: fences, exports, pools of another process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="an engine's KV is tensors")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import fake_cuda
import torch

from hicache.device import cuda_export, fences, pools
from hicache.device.export import Allocations
from hicache.device.kv import FAILED, MemoryKind, SharedMemory
from hicache.errors import HicacheError, NotFoundError, StaleError, UnsupportedError
from hicache.rpc.client import KvMemory, kv_flows
from hicache.rpc.client.kv import Progress, Timeline
from hicache.rpc.client.kv_handles import LoadBase, StoreBase
from hicache.rpc.client.pools import Pools
from hicache.rpc.client.results import Extent, PoolInfo, RegionInfo


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library, in place of the real one; a test leaves nothing behind but what is pinned for good."""
    library = fake_cuda.fresh()
    library.configure(delay_us=100)
    for module in (fences, pools, cuda_export):
        monkeypatch.setattr(module, "Cudart", library.runtime)
        monkeypatch.setattr(module, "CudaApi", library.api)
    monkeypatch.setattr(torch.cuda, "device", guard(library.runtime()))
    before = library.live()
    yield library
    gc.collect()
    library.drain()
    left = library.live() - before
    assert set(left) <= {"registered"}, left
    assert not library.violations()


def guard(runtime: Any) -> Any:
    """torch.cuda.device of a torch that has no CUDA."""

    @contextlib.contextmanager
    def device(which: Any) -> Iterator[None]:
        before = runtime.device
        runtime.use(which if isinstance(which, int) else which.index)
        yield
        runtime.use(before)

    return device


def soon(ready: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not ready() and time.monotonic() < until:
        time.sleep(0.001)
    return ready()


KEPT: list[Any] = []  # as a process keeps its fences: what is pinned stays mapped


class Rig:
    """A timeline that streams can use, and a stream."""

    def __init__(self, fake: Any) -> None:
        self.memory = KvMemory(8 * kv_flows.COUNTERS)
        self.line: Timeline = kv_flows.map_timeline(1, self.memory.fd)
        self.fences = fences.CudaFences()
        KEPT.append(self.fences)
        self.runtime = fake.runtime()
        self.handle = self.runtime.stream(0)
        self.stream = SimpleNamespace(cuda_stream=self.handle, device=torch.device("cuda", 0))
        self.core: Any = SimpleNamespace(fences=lambda: self.fences)


def test_a_stream_waits_for_layers_and_is_let_go_where_the_load_fails(fake: Any) -> None:
    rig = Rig(fake)
    counter = rig.line.take()
    assert counter is not None
    progress = Progress(0, 4, counter, awaited=True)
    load = LoadBase(rig.core, progress)
    assert load._wait_on(rig.stream, 0) and load._wait_on(rig.stream, 3)
    first, last = (ready for ready in counter._until)
    time.sleep(0.02)
    assert not first() and not last()
    counter.set(1)
    assert soon(first) and not last()
    progress.end(good=False, settled=True)  # shows FAILED
    index = counter.index
    assert soon(last)
    assert rig.line.values[index] == FAILED and rig.line.free == len(rig.line.values)
    rig.runtime.destroy_stream(rig.handle)


def test_a_stream_says_that_layers_are_done(fake: Any) -> None:
    rig = Rig(fake)
    counter = rig.line.take()
    assert counter is not None
    progress = Progress(0, 4, counter)
    store = StoreBase(rig.core, progress)
    for layer in range(4):
        store.layer_done_on(rig.stream, layer)
    assert soon(lambda: counter.get() == 4)
    progress.end(good=True, settled=True)
    assert soon(lambda: rig.line.free == len(rig.line.values))
    rig.runtime.destroy_stream(rig.handle)


def test_where_streams_cannot_use_counters_the_caller_waits(fake: Any) -> None:
    rig = Rig(fake)
    waited: list[int] = []
    rig.stream.synchronize = lambda: waited.append(1)
    counter = rig.line.take()
    assert counter is not None
    store, load = StoreBase(rig.core, Progress(0, 4, counter)), LoadBase(rig.core, Progress(0, 4, counter))
    fake.fail("cuStreamWriteValue64_v2", 801)
    store.layer_done_on(rig.stream, 2)
    assert waited == [1] and counter.get() == 3
    fake.fail("cuStreamWaitValue64_v2", 801)
    assert not load._wait_on(rig.stream, 3)
    assert len(rig.fences._marks._free) == 512  # no mark is lost
    other = Rig(fake)
    fake.fail("cudaHostRegister", 1)
    counter = other.line.take()
    load = LoadBase(other.core, Progress(0, 4, counter))
    assert not load._wait_on(other.stream, 0)
    assert load._wait_on(other.stream, 0)  # it was a passing error
    assert counter is not None
    counter.set(FAILED)
    assert soon(counter._until[0])
    for each in (rig, other):
        each.runtime.destroy_stream(each.handle)


def test_allocations_are_exported_by_handle_or_by_descriptor(fake: Any) -> None:
    runtime = fake.runtime()
    runtime.use(0)
    address = runtime.malloc(1 << 20)
    exporter = cuda_export.CudaExporter(0)
    allocations = Allocations(exporter)
    base, memory, offset = allocations.of(address + 4096, 1000)
    assert (base, memory.kind, offset) == (address, MemoryKind.CUDA_IPC, 4096)
    assert memory.size_bytes >= 1 << 20 and memory.device_uuid == fake.api().uuid(0)
    with pytest.raises(UnsupportedError, match="more than one allocation"):
        allocations.of(address, memory.size_bytes + 1)
    fake.fail("cudaIpcGetMemHandle", 1)
    with pytest.raises(UnsupportedError, match="expandable"):
        Allocations(exporter).of(address, 1)
    runtime.free(address)
    with pytest.raises(UnsupportedError, match="expandable"):
        Allocations(exporter).of(address, 1)


OWNER = textwrap.dedent(
    """
    import ctypes, sys
    sys.path[:0] = [sys.argv[1]]
    import fake_cuda
    fake = fake_cuda.fresh()
    runtime = fake.runtime()
    runtime.use(0)
    address = runtime.malloc(1 << 20)
    memory = (ctypes.c_ubyte * (1 << 20)).from_address(address)
    for at in range(0, 1 << 20, 4096):
        ctypes.memset(address + at, (at // 4096) % 251, 4096)
    print(runtime.ipc_handle(address).hex(), fake.api().uuid(0).hex(), flush=True)
    sys.stdin.read()
    """
)


@pytest.fixture
def owner() -> Iterator[PoolInfo]:
    """A segment of another process: slots of 4096 bytes, each full of its number."""
    fake_cuda.build()
    folder = str(Path(fake_cuda.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        handle, uuid = process.stdout.readline().split()
        region = RegionInfo(9, 1 << 20, 4000, 0, 4096, 256, counted=False)
        yield PoolInfo(region, 1 << 20, bytes.fromhex(handle), bytes.fromhex(uuid))
        process.communicate("", timeout=20)


def test_pages_in_the_pool_of_another_process_are_seen_in_place(
    fake: Any, owner: PoolInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "as_tensor", as_array)
    table = Pools()
    gone: list[int] = []
    with pytest.raises(StaleError, match="given back, or the session ended"):
        table.open(owner, 1)
    table.begin(1)
    table.add(2, [owner])  # of a session that is not this one
    assert table.ids == set()
    extent = Extent(9, 3, 4096 * 5, 5)
    with pytest.raises(NotFoundError, match="does not list"):
        table.find(extent, 4000)
    table.add(1, [owner])
    info, pool = table.find(extent, 4000)
    assert info == owner and pool is None
    pool = table.open(info, 1)
    assert table.open(info, 1) is pool and table.find(extent, 4000) == (owner, pool)
    rows = pool.rows(extent.offset, extent.pages, 4000, 4096)
    assert rows.shape == (3, 4000) and [set(row.tolist()) for row in rows] == [{5}, {6}, {7}]
    for wrong in (Extent(9, 252, 4096 * 5, 5), Extent(9, 1, 1 << 20, 256)):
        with pytest.raises(HicacheError, match="not in region"):
            table.find(wrong, 4000)
    with pytest.raises(HicacheError, match="not in region"):
        table.find(extent, 5000)
    assert table.retire(9, lambda: gone.append(9)) and table.ids == set()
    assert not table.retire(9, lambda: gone.append(10))
    del pool
    gc.collect()
    assert gone == [] and rows[0][0] == 5  # a tensor keeps it mapped
    del rows
    gc.collect()
    assert gone == [9]


def as_array(rows: Any, device: Any) -> Any:
    """What torch does with a GPU: an array over the memory that keeps its source."""
    assert device == torch.device("cuda", 0)
    said = rows.__cuda_array_interface__
    made = SimpleNamespace(__array_interface__=said, source=rows)
    return np.asarray(made)


def test_a_pool_that_cannot_be_mapped_is_named_with_a_way_out(fake: Any, owner: PoolInfo) -> None:
    fd = os.memfd_create("x")
    elsewhere = SharedMemory(MemoryKind.CUDA_FD, 4096, fd=fd, device_uuid=b"?" * 16)
    with pytest.raises(UnsupportedError, match="does not see GPU"):
        pools.GpuPool(elsewhere)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    fake.fail("cudaIpcOpenMemHandle", 201)
    memory = SharedMemory(MemoryKind.CUDA_IPC, owner.size_bytes, owner.handle, device_uuid=owner.device_uuid)
    with pytest.raises(UnsupportedError, match=r"Lease\.load"):
        pools.GpuPool(memory)
    pool = pools.GpuPool(memory)
    assert ctypes.c_ubyte.from_address(pool.address + 4096).value == 1
