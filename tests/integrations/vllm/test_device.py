"""Copies on streams: against streams that do what they are given later, in order, and in no hurry; and on a GPU."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from worker_kit import (
    FACTS,
    NAMES,
    PART,
    AnySource,
    Pages,
    Staging,
    load_order,
    make_caches,
    make_settings,
    part_of,
    save_order,
    step,
    torch,
)

from hicache.errors import UnsupportedError
from hicache.integrations.vllm import worker as worker_module
from hicache.integrations.vllm.device import DeviceBlocks
from hicache.integrations.vllm.layout import LayerTensor, PartLayout, plan
from hicache.integrations.vllm.messages import StepOrders
from hicache.integrations.vllm.worker import Worker

DELAY_S = 0.005


class LazyStream:
    """Does its work in order, in a thread of its own, each a moment after it was given."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, work: Callable[[], None]) -> threading.Event:
        done = threading.Event()
        self._work.put(lambda: (time.sleep(DELAY_S), work(), done.set()))
        return done

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(10)


class LazyLauncher:
    """A device in this process: its memory is torch's, its time is its own."""

    def __init__(self) -> None:
        self.engine = LazyStream()
        self.streams: list[LazyStream] = [self.engine]
        self.fails = False

    def stream(self) -> LazyStream:
        self.streams.append(LazyStream())
        return self.streams[-1]

    def mark(self) -> threading.Event:
        return self.engine.give(lambda: None)

    def launch(self, stream: LazyStream, work: Callable[[], None], after: Any) -> threading.Event:
        if self.fails and after is not None:
            raise RuntimeError("out of memory")

        def run() -> None:
            if after is not None:
                after.wait(10)
            work()

        return stream.give(run)

    def wait(self, event: threading.Event) -> None:
        assert event.wait(20)

    def pinned(self, size_bytes: int) -> Any:
        return torch.zeros(size_bytes, dtype=torch.uint8)


@pytest.fixture
def launcher() -> Iterator[LazyLauncher]:
    launcher = LazyLauncher()
    yield launcher
    for stream in launcher.streams:
        stream.close()


@pytest.fixture
def device_worker(
    launcher: LazyLauncher, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """A worker whose tensors are taken for a device's."""
    caches = make_caches(FACTS, 1)
    monkeypatch.setattr(worker_module, "HostBlocks", lambda layout: DeviceBlocks(layout, caches, launcher))
    worker = Worker(FACTS, make_settings(), 0, source=AnySource())
    worker.register(caches)
    yield worker, caches
    worker.close()


def test_a_load_is_there_when_its_layer_is_computed_and_not_before_the_engine_is_done_with_the_blocks(
    device_worker: tuple[Worker, dict[str, Any]], launcher: LazyLauncher
) -> None:
    worker, caches = device_worker
    pages = Pages(5, PART, 2, spans=[2, 3])
    ids = [9, 10, 11, 40, 3]
    for name in NAMES:  # the step before still writes to these blocks
        launcher.engine.give(lambda name=name: caches[name][3:41].zero_())
    out = step(worker, StepOrders(1, loads=(load_order(pages, ids),)), NAMES)
    assert out.failed_blocks == set()
    assert [part_of(caches, [block]) for block in ids] == [row.tobytes() for row in pages.data]


def test_saves_go_on_beside_the_next_steps_and_are_reported_once(
    device_worker: tuple[Worker, dict[str, Any]], launcher: LazyLauncher, staging: Staging
) -> None:
    worker, caches = device_worker
    hold = threading.Event()
    launcher.engine.give(lambda: hold.wait(20))

    def compute(name: str) -> None:
        launcher.engine.give(lambda: caches[name][5:9].fill_(7))

    orders = StepOrders(1, saves=(save_order(1, [staging.run(0, 4)], [5, 6, 7, 8]),))
    out = step(worker, orders, NAMES, compute)
    assert out.report.saved == {}, "not waited for"
    hold.set()
    saved: dict[int, int] = {}
    until = time.monotonic() + 20
    while not saved and time.monotonic() < until:
        saved.update(step(worker, StepOrders(1), NAMES).report.saved)
        time.sleep(0.001)
    assert saved == {1: 1}
    assert staging.read(0, 4 * PART) == b"".join(part_of(caches, [block]) for block in (5, 6, 7, 8))
    assert (caches[NAMES[0]][5:9] == 7).all()
    assert step(worker, StepOrders(1), NAMES).report.saved == {}


def test_blocks_that_a_step_gives_to_others_are_read_before_it_computes(
    device_worker: tuple[Worker, dict[str, Any]], staging: Staging
) -> None:
    worker, caches = device_worker
    wanted = part_of(caches, [5])
    step(worker, StepOrders(1, saves=(save_order(1, [staging.run(0, 1)], [5]),)), NAMES)
    worker.preempted(StepOrders(1, flush=(1,)))
    for name in NAMES:
        caches[name][5] = 0
    worker.end_step()
    assert worker.take_report().void == set()
    assert staging.read(0, PART) == wanted


def test_what_was_computed_on_a_failed_load_is_not_saved(
    device_worker: tuple[Worker, dict[str, Any]], staging: Staging
) -> None:
    worker, _ = device_worker
    pages = Pages(1, PART, 2)
    pages.rot(0)
    orders = StepOrders(1, loads=(load_order(pages, [1]),), saves=(save_order(1, [staging.run(0, 1)], [5]),))
    report = step(worker, orders, NAMES).report.merged(step(worker, StepOrders(1, flush=(1,)), NAMES).report)
    assert (report.saved, report.void) == ({1: 1}, {1})


def test_a_launch_that_fails_costs_the_load_and_voids_the_save(
    device_worker: tuple[Worker, dict[str, Any]], launcher: LazyLauncher, staging: Staging
) -> None:
    worker, caches = device_worker
    launcher.fails = True
    before = part_of(caches, range(10))
    out = step(worker, StepOrders(1, loads=(load_order(Pages(2, PART, 2), [1, 2]),)), NAMES)
    assert out.failed_blocks == {1, 2}
    report = step(worker, StepOrders(1, saves=(save_order(2, [staging.run(0, 1)], [5]),)), NAMES).report
    report = report.merged(step(worker, StepOrders(1, flush=(2,)), NAMES).report)
    assert (report.saved, report.void) == ({2: 1}, {2})
    assert part_of(caches, range(10)) == before
    assert staging.read(0, PART) == bytes(PART)


def test_other_devices_are_refused() -> None:
    tensor = LayerTensor("a", (4, 4), (4, 1), 2, 0, 1, 32, "xpu")
    layout = PartLayout({"a": tensor}, [("a", 8)], (4, 1))
    with pytest.raises(UnsupportedError, match="xpu"):
        DeviceBlocks(layout, {"a": torch.zeros(4, 4)})


def check_round_trip(caches: dict[str, Any], launcher: LazyLauncher | None) -> None:
    """Any blocks of several layers, pages of two blocks, the first block of which is the engine's own."""
    named = {name: LayerTensor.of(name, tensor) for name, tensor in caches.items()}
    each = next(iter(caches.values()))[0].numel() * 2
    layout = PartLayout(named, [(name, each) for name in caches], (FACTS.num_blocks, 2))
    blocks = DeviceBlocks(layout, caches, launcher)
    rng = np.random.default_rng(4)
    ids = rng.permutation(FACTS.num_blocks)[:19].tolist()
    rows = [rng.integers(0, 256, (10, layout.part_bytes), dtype=np.uint8)]
    for move in plan(ids, [10], 2, 1):
        for layer in range(len(caches)):
            blocks.load(rows, move, layer, blocks.mark())
    stored = [np.zeros_like(rows[0])]
    for move in plan(ids, [10], 2, 1):
        for layer in range(len(caches)):
            blocks.save(stored, move, layer, blocks.mark())
    for layer in layout.layers:
        begin, end = layer.begin, layer.begin + 2 * each
        assert (stored[0][:, begin:end].reshape(-1)[each:] == rows[0][:, begin:end].reshape(-1)[each:]).all()
        assert not stored[0][0, begin : begin + each].any()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_blocks_of_any_layout_travel_over_streams(launcher: LazyLauncher, order: tuple[int, ...]) -> None:
    caches = {
        name: tensor.permute(order).contiguous().permute(*np.argsort(order).tolist())
        for name, tensor in make_caches(FACTS, 3).items()
    }
    check_round_trip(caches, launcher)


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_blocks_of_any_layout_travel_over_cuda_streams(order: tuple[int, ...]) -> None:
    caches = {
        name: tensor.cuda().permute(order).contiguous().permute(*np.argsort(order).tolist())
        for name, tensor in make_caches(FACTS, 3).items()
    }
    check_round_trip(caches, None)


@pytest.mark.gpu
def test_a_worker_on_a_gpu(staging: Staging) -> None:
    caches = {name: tensor.cuda() for name, tensor in make_caches(FACTS, 3).items()}
    host = {name: tensor.cpu() for name, tensor in caches.items()}
    worker = Worker(FACTS, make_settings(), 0, source=AnySource())
    worker.register(caches)
    step(worker, StepOrders(1, saves=(save_order(1, [staging.run(0, 3)], [5, 60, 2]),)), NAMES)
    report = step(worker, StepOrders(1, flush=(1,)), NAMES).report
    assert report.void == set()
    assert staging.read(0, 3 * PART) == b"".join(part_of(host, [block]) for block in (5, 60, 2))
    pages = Pages(4, PART, 2)
    out = step(worker, StepOrders(1, loads=(load_order(pages, [1, 2, 3, 9]),)), NAMES)
    assert out.failed_blocks == set()
    host = {name: tensor.cpu() for name, tensor in caches.items()}
    assert [part_of(host, [block]) for block in (1, 2, 3, 9)] == [row.tobytes() for row in pages.data]
    worker.close()
