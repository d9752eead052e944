"""Counters, places, exports and old servers: paged KV in the client without a server."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="an engine's KV is tensors")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from kv_client_kit import Engine, Form

from hicache.device import kernels
from hicache.device.driver import DriverError
from hicache.device.kv import FAILED, MemoryKind, PagedKv, SharedMemory
from hicache.errors import ExhaustedError, InvalidArgumentError, UnsupportedError
from hicache.rpc.client import KvMemory, flows, kv_flows, kv_tensors
from hicache.rpc.client.kv import Counter, Progress, Timeline, Timelines
from hicache.rpc.client.kv_handles import LoadBase, StoreBase
from hicache.rpc.client.results import Capabilities, TierInfo
from hicache.rpc.client.session import Link

# --- counters


def timeline(counters: int = 3) -> Timeline:
    return Timeline(7, np.zeros(counters, np.uint64))


def test_a_counter_is_another_transfers_only_when_nobody_writes_it() -> None:
    line = timeline()
    first, second, third = (line.take() for _ in range(3))
    assert first and second and third and line.take() is None
    first.set(3)
    first.give_back(settled=True)
    first.give_back(settled=False)  # once is enough
    first.set(9)
    first.raise_to(9)
    assert line.values[first.index] == 3  # it is not ours any more
    again = line.take()
    assert again is not None and again.index == first.index and again.get() == 0
    second.give_back(settled=False)  # the server may still write it
    assert line.take() is None
    ran: list[bool] = []
    assert third.hold(lambda: lambda: bool(ran))
    third.give_back(settled=True)
    assert line.free == 0 and line.take() is None  # a stream still waits
    assert not third.hold(lambda: pytest.fail("nothing is queued"))
    ran.append(True)
    assert line.free == 1 and line.take() is not None


def test_counters_are_raised_and_never_lowered() -> None:
    counter = timeline().take()
    assert counter is not None
    for value in (2, 1, 5, 4):
        counter.raise_to(value)
    assert counter.get() == 5
    assert counter.address == counter.timeline.address + 8 * counter.index


def test_timelines_of_sessions_that_are_over_give_no_counters() -> None:
    lines = Timelines()
    assert lines.take(1) is None
    lines.add(1, timeline(1))
    assert lines.take(1) is not None and lines.take(1) is None
    lines.add(1, timeline(1))
    held = lines.take(1)
    lines.add(2, timeline(1))
    assert lines.take(1) is None and lines.take(2) is not None
    lines.add(1, timeline(1))  # was late
    assert lines.take(1) is None
    assert held is not None
    held.give_back(settled=True)


def test_the_end_of_a_load_lets_go_of_whoever_waits() -> None:
    line = timeline(1)
    counter = line.take()
    progress = Progress(2, 4, counter, awaited=True)
    load = LoadBase(None, progress)  # type: ignore[arg-type]
    assert counter is not None and load._arrived(2) is None and load.layers_done == 0
    counter.set(2)
    assert load._arrived(3) is True and load._arrived(4) is None and load.layers_done == 2
    counter.set(FAILED)
    assert load._arrived(2) is False and load.failed and load.layers_done == 0
    counter.set(2)
    progress.end(good=False, settled=False)
    assert line.values[0] == FAILED and load.failed and load.done
    progress.end(good=True, settled=True)  # the first time counts
    assert load.failed and line.take() is None


def test_a_store_that_failed_does_not_say_that_its_layers_are_done() -> None:
    line = timeline(1)
    counter = line.take()
    progress = Progress(0, 4, counter)
    store = StoreBase(None, progress)  # type: ignore[arg-type]
    store.layer_done(1)
    progress.end(good=False, settled=False)
    store.layer_done(3)
    assert line.values[0] == 2


class FakeFences:
    """Streams that run when they are told to."""

    def __init__(self, line: Timeline) -> None:
        self.line = line
        self.queue: list[tuple[str, int, int]] = []
        self.ran = 0
        self.admitted: list[tuple[int, int]] = []
        self.refuses = False

    def admit(self, address: int, size_bytes: int, owner: object) -> None:
        if self.refuses:
            raise UnsupportedError("no streams here")
        assert owner is self.line
        self.admitted.append((address, size_bytes))

    def wait(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        return self._add("wait", address, value)

    def write(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        return self._add("write", address, value)

    def _add(self, what: str, address: int, value: int) -> Callable[[], bool]:
        self.queue.append((what, (address - self.line.address) // 8, value))
        place = len(self.queue)
        return lambda: self.ran >= place


class FakeStream:
    def __init__(self) -> None:
        self.synchronized = 0

    def synchronize(self) -> None:
        self.synchronized += 1


class FakeCore:
    def __init__(self, fences: Any) -> None:
        self.fences = lambda: fences


def test_streams_wait_for_layers_and_keep_the_counter_until_they_have() -> None:
    line = timeline(1)
    fences = FakeFences(line)
    core: Any = FakeCore(fences)
    counter = line.take()
    progress = Progress(1, 3, counter, awaited=True)
    load, stream = LoadBase(core, progress), FakeStream()
    assert load._wait_on(stream, 1) and load._wait_on(stream, 3) and not load._wait_on(None, 3)
    assert fences.queue == [("wait", 0, 1), ("wait", 0, 3)]
    assert fences.admitted == [(line.address, 8)] * 2
    progress.end(good=True, settled=True)
    assert (
        load._wait_on(stream, 2) and load._wait_on(None, 2) and len(fences.queue) == 2
    )  # there is nothing to wait for
    assert line.take() is None
    fences.ran = 1
    assert line.take() is None
    fences.ran = 2
    assert line.take() is not None


def test_streams_say_that_layers_are_done_or_are_waited_for() -> None:
    line = timeline(2)
    fences = FakeFences(line)
    core: Any = FakeCore(fences)
    progress = Progress(0, 3, line.take())
    store, stream = StoreBase(core, progress), FakeStream()
    store.layer_done_on(stream, 0)
    assert fences.queue == [("write", progress.counter.index, 1)] and not stream.synchronized  # type: ignore[union-attr]
    store.layer_done_on(None, 1)
    assert progress.counter.get() == 2 and not stream.synchronized  # type: ignore[union-attr]
    fences.refuses = True
    store.layer_done_on(stream, 2)
    assert stream.synchronized == 1 and progress.counter.get() == 3  # type: ignore[union-attr]
    progress.end(good=True, settled=True)
    store.layer_done_on(stream, 2)
    assert stream.synchronized == 1 and line.free == 1
    fences.ran = 1
    assert line.free == 2
    without = StoreBase(core, Progress(0, 3, None))
    without.layer_done_on(stream, 1)
    assert stream.synchronized == 1


def test_counters_under_many_threads() -> None:
    """Whoever holds a counter finds it as he left it."""
    line = timeline(4)
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(200):
            counter: Counter | None = None
            while counter is None:
                counter = line.take()
            counter.raise_to(number * 1000 + turn + 1)
            if counter.get() != number * 1000 + turn + 1:
                wrong.append(number)
            counter.give_back(settled=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and line.free == 4


# --- places


@given(
    block=st.sampled_from([1, 4, 8, 16, 32, 64]),
    page=st.sampled_from([4, 16, 64]),
    ids=st.lists(st.integers(-1, 9), max_size=32),
)
def test_places_are_those_of_the_kernels(block: int, page: int, ids: list[int]) -> None:
    kv = paged(block)
    per_page = max(1, page // block)
    ids = ids[: len(ids) // per_page * per_page]
    found = kv_tensors.places(kv, ids, page)
    units = torch.tensor(ids, dtype=torch.int64)
    if block <= page:
        expected = kernels.places_of_blocks(units.view(-1, per_page), block, page)
    else:
        parts = block // page
        inside = torch.arange(parts).expand(len(ids), parts)
        split = torch.where(units[:, None] < 0, -1, units[:, None] * parts + inside)
        expected = kernels.places_of_blocks(split.reshape(-1), block, page)
    assert found.dtype == np.int64 and found.shape == tuple(expected.shape)
    assert (np.maximum(found, -1) == np.maximum(expected.numpy(), -1)).all()
    kv.check_places(found, page)


def paged(block: int, blocks: int = 10) -> PagedKv:
    size = blocks * block * 4
    memory = SharedMemory(MemoryKind.CUDA_IPC, size, handle=bytes(64), device_uuid=bytes(16))
    return PagedKv((memory,), (0,), (0,), 1, blocks, block, 1, 2, 2, (block * 2, 2, 2, 1))


def test_block_ids_that_cannot_be() -> None:
    kv = paged(8)
    assert kv_tensors.places(kv, torch.tensor([[1, 2], [3, -1]]), 16).tolist() == [[8, 16], [24, -1]]
    for ids, page, why in (
        ([1, 2, 3], 16, "no whole pages"),
        ([10], 8, "block 10 is not one of 10"),
        ([0.5], 8, "must be integers"),
        ([1], 12, "do not divide"),
        ([1], 0, "pages of 0 tokens"),
    ):
        with pytest.raises(InvalidArgumentError, match=why):
            kv_tensors.places(kv, ids, page)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (None, "list of tensors, not NoneType"),
        ([np.zeros((2, 4, 8, 2, 4))], "torch tensors, not ndarray"),
        ([(torch.zeros(4, 8, 2, 4), None)], "torch tensors, not NoneType"),
    ],
)
def test_what_is_no_tensor_is_named(layers: Any, why: str) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        kv_tensors.paged_kv(layers, "kv-nhd")


def test_an_offset_that_no_message_holds_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidArgumentError, match="within 63 bits"):
        dataclasses.replace(paged(8), page_offset=1 << 70)


# --- memory


def test_kv_memory_is_cut_into_tensors() -> None:
    memory = KvMemory(4096)
    one = memory.tensor([3, 5], torch.bfloat16)
    two = memory.tensor((4,), torch.int64)
    one.fill_(1)
    assert two.tolist() == [0] * 4 and two.data_ptr() % 256 == 0
    assert bytes(memory.bytes[:30]) == one.contiguous().view(torch.uint8).numpy().tobytes()
    with pytest.raises(ExhaustedError, match="every tensor begins"):
        memory.tensor([4096], torch.uint8)
    for shape in ([], [0], [-1, 2]):
        if shape != []:
            with pytest.raises(InvalidArgumentError):
                memory.tensor(shape, torch.uint8)
    with pytest.raises(InvalidArgumentError, match=r"torch\.dtype, not 'bfloat16'"):
        memory.tensor([4], "bfloat16")
    for size in (0, "1GiB"):
        with pytest.raises(InvalidArgumentError):
            KvMemory(size)  # type: ignore[arg-type]
    memory.close()
    memory.close()
    one.fill_(2)  # still mapped
    with pytest.raises(UnsupportedError, match="kv_memory"):
        kv_tensors.paged_kv([one.view(1, 3, 5)], "latent")


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_descriptions_of_tensors_hold_each_memory_once_and_leak_no_descriptor() -> None:
    form = Form("nhd", pairs=True)
    engine, other = Engine(form), Engine(form)
    before = open_fds()
    kv = kv_tensors.paged_kv([*engine.tensors[:2], *other.tensors[:1]], "nhd", page_offset=64)
    assert (len(kv.memories), kv.planes, kv.layers, kv.planes_per_layer) == (2, 6, 3, 2)
    assert kv.plane_memory == (0, 0, 0, 0, 1, 1) and kv.page_offset == 64
    assert (
        kv.plane_offset[0] == 0
        and kv.plane_offset[1] == engine.tensors[0][1].data_ptr() - engine.memory.address
    )
    owned = kv_tensors.own_memories(kv)
    assert open_fds() == before + 4
    kv_tensors.close_memories(owned.memories)
    kv_tensors.close_memories(kv.memories)
    flat = [tensor for pair in engine.tensors for tensor in pair]
    same = kv_tensors.paged_kv(flat, "nhd", planes_per_layer=2)
    assert same.layers == form.layers
    kv_tensors.close_memories(same.memories)
    with pytest.raises(UnsupportedError, match="ordinary host memory"):
        kv_tensors.paged_kv([flat[0], torch.zeros(form.shape, dtype=form.dtype)], "nhd")
    with pytest.raises(InvalidArgumentError, match="planes differ"):
        kv_tensors.paged_kv([flat[0], flat[1].transpose(0, 1)], "nhd")
    with pytest.raises(InvalidArgumentError, match="no layers"):
        kv_tensors.paged_kv([], "nhd")
    with pytest.raises(InvalidArgumentError, match="not layers of 3"):
        kv_tensors.paged_kv(flat, "nhd", planes_per_layer=3)
    with pytest.raises(UnsupportedError, match="KV on meta"):
        kv_tensors.paged_kv([flat[0].to("meta")], "nhd")
    with pytest.raises(InvalidArgumentError, match="cannot be used"):
        kv_tensors.own_memories(dataclasses.replace(same, memories=(*same.memories[:-1], closed(same))))
    assert open_fds() == before


def closed(kv: PagedKv) -> SharedMemory:
    return dataclasses.replace(kv.memories[-1], fd=1 << 20)


class FakeExporter:
    """CUDA of a process: allocations at addresses, some of which have no handle, or no descriptor."""

    def __init__(self, allocations: dict[int, int], *, handles: bool = True, fds: bool = True) -> None:
        self.allocations = allocations
        self.handles, self.fds = handles, fds
        self.asked: list[int] = []

    def allocation(self, address: int) -> tuple[int, int]:
        for base, size in self.allocations.items():
            if base <= address < base + size:
                return base, size
        raise DriverError("cuMemGetAddressRange_v2", "not found")

    def handle(self, base: int) -> bytes:
        self.asked.append(base)
        if not self.handles:
            raise DriverError("cudaIpcGetMemHandle", "invalid value")
        return base.to_bytes(64)

    def descriptor(self, base: int) -> int:
        if not self.fds:
            raise DriverError("cuMemRetainAllocationHandle", "invalid value")
        return os.memfd_create("vmm")

    def device_uuid(self) -> bytes:
        return b"u" * 16


class CudaTensor:
    """A CPU tensor that says it is on a GPU."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return torch.device("cuda", 0) if name == "device" else getattr(self.tensor, name)


def test_cuda_tensors_are_exported_once_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "planes", lambda layer, layout: [layer])
    whole = torch.zeros(4, 8, 16, 2, 8)
    layers = [CudaTensor(layer) for layer in whole]
    base, size = whole.data_ptr() - 512, whole.nbytes + 1024
    exporter = FakeExporter({base: size})
    kv = kv_tensors.paged_kv(layers, "nhd", exporter=lambda _: exporter)
    assert exporter.asked == [base]
    (memory,) = kv.memories
    assert (memory.kind, memory.size_bytes, memory.handle) == (MemoryKind.CUDA_IPC, size, base.to_bytes(64))
    assert memory.device_uuid == b"u" * 16
    assert kv.plane_offset == tuple(512 + at * whole[0].nbytes for at in range(4))
    by_fd = kv_tensors.paged_kv(layers, "nhd", exporter=lambda _: FakeExporter({base: size}, handles=False))
    assert by_fd.memories[0].kind is MemoryKind.CUDA_FD
    kv_tensors.close_memories(by_fd.memories)
    before = open_fds()
    cut = {base: 512 + whole[0].nbytes, base + 512 + whole[0].nbytes: 4096}
    for allocations, options in (
        ({base: size}, {"handles": False, "fds": False}),
        (cut, {"handles": False}),  # the pieces of an expandable segment
        ({}, {}),
    ):
        refuses = FakeExporter(allocations, **options)
        with pytest.raises(UnsupportedError, match="expandable"):
            kv_tensors.paged_kv(layers, "nhd", exporter=lambda _, found=refuses: found)
    assert open_fds() == before


# --- servers that cannot


def link(kv_memory: tuple[str, ...] = ("memfd",), fd_path: str = "/x", **fields: Any) -> Link:
    tiers = fields.pop("tiers", (TierInfo("host", "host", 1, durable=False, client_readable=True),))
    capabilities = Capabilities("0.9", b"e", tiers, "/x", 1, 1, 1, kv_memory=kv_memory, **fields)
    return Link(1, b"s", fd_path, capabilities, "t")


def test_a_server_that_cannot_map_the_memory_is_named_with_a_way_out() -> None:
    on_gpu = paged(8)
    kv = dataclasses.replace(
        on_gpu, memories=(SharedMemory(MemoryKind.MEMFD, on_gpu.memories[0].size_bytes, fd=0),)
    )
    kv_flows.check_kv(link(), kv)
    kv_flows.check_kv(link(("memfd", "cuda-ipc"), device_uuids=(bytes(16),)), on_gpu)
    for at, asked, why in (
        (link(()), kv, r"version 0\.9\) does not copy.*upgrade it; or read pages"),
        (link(fd_path=""), kv, "unix socket"),
        (link(), on_gpu, "maps memfd, and not cuda-ipc"),
        (link(("cuda-ipc",), device_uuids=(b"v" * 16,)), on_gpu, "which the sidecar does not have"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            kv_flows.check_kv(at, asked)


def test_a_device_lease_is_not_asked_of_servers_that_have_none() -> None:
    tiers = (TierInfo("device", "device", 1, durable=False, client_readable=False),)
    flows.check_device(link(tiers=tiers))
    with pytest.raises(UnsupportedError, match="no device tier"):
        flows.check_device(link())
    with pytest.raises(UnsupportedError, match="upgrade it"):
        flows.check_device(link((), tiers=tiers))


def test_timelines_are_mapped_only_where_they_cannot_shrink() -> None:
    with pytest.raises(UnsupportedError, match="no sealed memory"):
        kv_flows.map_timeline(1, os.memfd_create("t"))
    small = KvMemory(8)
    with pytest.raises(UnsupportedError, match="no sealed memory"):
        kv_flows.map_timeline(1, small.fd)
    good = KvMemory(8 * kv_flows.COUNTERS)
    line = kv_flows.map_timeline(1, good.fd)
    counter = line.take()
    assert counter is not None
    counter.set(FAILED)
    assert good.bytes.view("<u8")[counter.index] == FAILED


def test_the_public_name_of_the_client_offers_all_of_it() -> None:
    import hicache.client
    import hicache.rpc.client as inner

    assert all(getattr(hicache.client, name) is getattr(inner, name) for name in inner.__all__)
