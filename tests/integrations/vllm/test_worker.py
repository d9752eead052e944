from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from worker_kit import (
    FACTS,
    NAMES,
    PART,
    Pages,
    Staging,
    block_of,
    load_order,
    make_caches,
    make_facts,
    make_settings,
    make_worker,
    part_of,
    save_order,
    step,
)

from hicache.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from hicache.integrations.vllm.messages import StepOrders, StepReport
from hicache.integrations.vllm.worker import Worker

# --- loads


def test_a_load_that_a_step_needs_is_there_layer_by_layer(worker: Worker, caches: dict[str, Any]) -> None:
    pages = Pages(5, PART, 2, spans=[2, 3])
    ids = [9, 10, 11, 40, 3]
    seen = []

    def compute(name: str) -> None:
        begin = NAMES.index(name) * FACTS.layers[0].block_bytes
        wanted = pages.data[:, begin : begin + FACTS.layers[0].block_bytes]
        seen.append([block_of(caches[name], block) for block in ids] == [row.tobytes() for row in wanted])

    out = step(worker, StepOrders(1, loads=(load_order(pages, ids),)), NAMES, compute)
    assert seen == [True] * len(NAMES)
    assert out.failed_blocks == set()
    assert out.finished == set(), "only asynchronous loads are reported as finished"
    assert out.report.loaded == {"r": 1}
    assert (out.report.stats.loaded_pages, out.report.stats.loaded_bytes) == (5, 5 * PART)
    assert out.report.stats.load_ns > 0
    assert pages.verified == set(range(5))
    assert worker.take_report() == StepReport(), "told once"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_blocks_that_the_engine_has_already_are_left_alone(
    caches: dict[str, Any], asynchronous: bool
) -> None:
    worker = make_worker(FACTS, caches, page_tokens=96)
    pages = Pages(4, 3 * PART, 2)
    before = part_of(caches, range(64))
    ids = [20, 21, 22, 23]  # page 1 without its first 2 blocks, and page 2
    order = load_order(pages, ids, first_page=1, pages=2, skip_blocks=2, asynchronous=asynchronous)
    out = step(worker, StepOrders(3, loads=(order,)), NAMES)
    _until_finished(worker, ({"r"} if asynchronous else set()) - out.finished)
    after = {name: [block_of(caches[name], block) for block in range(64)] for name in NAMES}
    each = FACTS.layers[0].block_bytes
    for number, name in enumerate(NAMES):
        layer = pages.data[:, 3 * number * each : 3 * (number + 1) * each]
        assert b"".join(after[name][20:24]) == layer[1, 2 * each :].tobytes() + layer[2].tobytes()
        assert b"".join(after[name][:20] + after[name][24:]) == b"".join(
            before[(number * 64 + block) * each :][:each] for block in range(64) if block not in ids
        )
    worker.close()


def _until_finished(worker: Worker, wanted: set[str]) -> None:
    found: set[str] = set()
    until = time.monotonic() + 20
    while not wanted <= found and time.monotonic() < until:
        found |= worker.finished_loads()
        time.sleep(0.001)
    assert found == wanted


def test_an_asynchronous_load_never_holds_a_step_up_and_is_reported_once(
    worker: Worker, caches: dict[str, Any]
) -> None:
    pages = Pages(6, PART, 3)
    pages.gate = threading.Event()
    orders = StepOrders(1, loads=(load_order(pages, range(6), asynchronous=True),))
    out = step(worker, orders, NAMES)
    assert (out.finished, out.failed_blocks, out.report) == (set(), set(), StepReport())
    pages.gate.set()
    _until_finished(worker, {"r"})
    assert worker.failed_blocks() == set()
    assert worker.take_report().loaded == {"r": 1}
    assert part_of(caches, [4]) == pages.data[4].tobytes()
    assert worker.finished_loads() == set()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_corrupt_pages_are_told_by_page_and_by_block(worker: Worker, asynchronous: bool) -> None:
    pages = Pages(5, PART, 4, spans=[3, 2])
    pages.rot(1)  # between the lease and the load
    pages.rot(3)
    order = load_order(pages, [7, 8, 9, 10, 11], asynchronous=asynchronous)
    out = step(worker, StepOrders(1, loads=(order,)), NAMES)
    if asynchronous:
        _until_finished(worker, {"r"} - out.finished)
        failed, report = out.failed_blocks | worker.failed_blocks(), out.report.merged(worker.take_report())
    else:
        failed, report = out.failed_blocks, out.report
    assert failed == {8, 10}
    assert report.corrupt == (("r", 1), ("r", 3))
    assert report.failed == {"r"}
    assert report.loaded == {"r": 1}, "the lease is done with, well or not"
    assert (report.stats.failed_loads, report.stats.corrupt_pages, report.stats.loaded_pages) == (1, 2, 3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lease_that_is_over_fails_all_blocks_and_blames_no_page(worker: Worker, asynchronous: bool) -> None:
    pages = Pages(3, PART, 5)
    pages.rot(0)
    pages.valid = False  # expired, or its slots were reused: what differs is not corrupt
    order = load_order(pages, [1, 2, 3], asynchronous=asynchronous)
    out = step(worker, StepOrders(1, loads=(order,)), NAMES)
    _until_finished(worker, ({"r"} if asynchronous else set()) - out.finished)
    report = out.report.merged(worker.take_report())
    assert out.failed_blocks | worker.failed_blocks() == {1, 2, 3}
    assert report.corrupt == ()
    assert report.failed == {"r"}


def test_a_lease_that_ends_while_its_pages_are_copied_fails(worker: Worker) -> None:
    pages = Pages(3, PART, 5)
    calls = []

    def ends_after_the_first_look() -> None:
        calls.append(1)
        pages.valid = len(calls) == 1

    pages.on_check = ends_after_the_first_look
    out = step(worker, StepOrders(1, loads=(load_order(pages, [1, 2, 3]),)), NAMES)
    assert out.failed_blocks == {1, 2, 3}
    assert len(calls) == 2


def test_failed_blocks_are_told_before_the_step_ends_too(
    worker: Worker, caches: dict[str, Any], staging: Staging
) -> None:
    """Where vLLM speculates, it asks for them first and calls wait_for_save last."""
    pages = Pages(3, PART, 5)
    pages.rot(2)
    orders = StepOrders(
        1, loads=(load_order(pages, [1, 2, 3]),), saves=(save_order(1, [staging.run(0, 1)], [9]),)
    )
    worker.preempted(orders)
    worker.begin(orders)
    assert worker.finished_loads() == set()
    assert worker.failed_blocks() == {3}
    assert worker.take_report().corrupt == (("r", 2),)
    worker.end_step()
    assert worker.take_report().void == {1}
    worker.preempted(StepOrders(1, saves=(save_order(2, [staging.run(0, 1)], [9]),)))
    worker.end_step()
    assert (worker.failed_blocks(), worker.take_report().void) == (set(), frozenset())


def test_a_source_that_fails_or_breaks_costs_the_load_only(worker: Worker) -> None:
    pages = Pages(2, PART, 6)
    pages.failure = UnavailableError("the sidecar is gone")
    out = step(worker, StepOrders(1, loads=(load_order(pages, [1, 2]),)), NAMES)
    assert out.failed_blocks == {1, 2}

    def breaks() -> None:
        raise ZeroDivisionError

    sound = Pages(2, PART, 6)
    sound.on_check = breaks
    out = step(worker, StepOrders(1, loads=(load_order(sound, [1, 2]),)), NAMES)
    assert out.failed_blocks == {1, 2}
    good = Pages(2, PART, 6)
    assert not step(worker, StepOrders(1, loads=(load_order(good, [1, 2]),)), NAMES).failed_blocks


def test_a_step_waits_for_its_load_no_longer_than_it_may(caches: dict[str, Any]) -> None:
    worker = make_worker(FACTS, caches, load_timeout_ms=150)
    pages = Pages(2, PART, 7)
    pages.gate = threading.Event()
    before = part_of(caches, [1, 2])
    begun = time.monotonic()
    out = step(worker, StepOrders(1, loads=(load_order(pages, [1, 2]),)), NAMES)
    assert 0.1 < time.monotonic() - begun < 10
    assert out.failed_blocks == {1, 2}
    assert out.report.failed == {"r"}
    pages.gate.set()  # the thread goes on, and must not write
    time.sleep(0.1)
    assert part_of(caches, [1, 2]) == before
    worker.close()


def test_an_asynchronous_load_that_takes_too_long_is_reported_as_failed(caches: dict[str, Any]) -> None:
    worker = make_worker(FACTS, caches, load_timeout_ms=50)
    pages = Pages(2, PART, 7)
    pages.gate = threading.Event()
    out = step(worker, StepOrders(1, loads=(load_order(pages, [1, 2], asynchronous=True),)), NAMES)
    _until_finished(worker, {"r"} - out.finished)
    assert out.failed_blocks | worker.failed_blocks() == {1, 2}
    before = part_of(caches, [1, 2])
    pages.gate.set()
    time.sleep(0.05)
    assert part_of(caches, [1, 2]) == before, "blocks that were given up belong to others"
    worker.close()


def test_a_cancelled_load_stops_writing_before_the_step_begins(
    worker: Worker, caches: dict[str, Any]
) -> None:
    pages = Pages(4, PART, 8)
    pages.gate = threading.Event()
    step(worker, StepOrders(1, loads=(load_order(pages, range(4), asynchronous=True),)), NAMES)
    out = step(worker, StepOrders(1, cancelled=("r", "unknown")), NAMES)
    assert out.finished == {"r"}, "vLLM holds the blocks until it hears this"
    before = part_of(caches, range(4))
    pages.gate.set()
    time.sleep(0.05)
    assert part_of(caches, range(4)) == before


def test_a_copy_that_is_under_way_is_waited_for_before_its_blocks_are_given_away(worker: Worker) -> None:
    pages = Pages(4, PART, 8)
    copying, go_on = threading.Event(), threading.Event()
    blocks = worker._desk.loading.blocks  # type: ignore[union-attr]
    real, calls = blocks.load, []

    def slow(*args: Any) -> None:
        calls.append("begins")
        copying.set()
        go_on.wait(20)
        real(*args)
        calls.append("ends")

    blocks.load = slow  # type: ignore[method-assign]
    step(worker, StepOrders(1, loads=(load_order(pages, range(4), asynchronous=True),)), NAMES)
    assert copying.wait(20)
    threading.Timer(0.05, go_on.set).start()
    worker.preempted(StepOrders(1, cancelled=("r",)))
    assert calls == ["begins", "ends"], "of three layers one had begun: it has ended, and no other begins"
    time.sleep(0.02)
    assert calls == ["begins", "ends"]
    worker.end_step()
    assert worker.finished_loads() == {"r"}


def test_several_loads_of_one_step(worker: Worker, caches: dict[str, Any]) -> None:
    first, second, third = Pages(3, PART, 1), Pages(2, PART, 2), Pages(4, PART, 3)
    second.rot(0)
    orders = StepOrders(
        1,
        loads=(
            load_order(first, [0, 1, 2], request_id="a"),
            load_order(second, [3, 4], request_id="b"),
            load_order(third, [5, 6, 7, 8], request_id="c", asynchronous=True),
        ),
    )
    out = step(worker, orders, NAMES)
    _until_finished(worker, {"c"} - out.finished)
    assert part_of(caches, [2]) == first.data[2].tobytes()
    assert part_of(caches, [8]) == third.data[3].tobytes()
    report = out.report.merged(worker.take_report())
    assert report.loaded == {"a": 1, "b": 1, "c": 1}
    assert report.failed == {"b"}
    assert out.failed_blocks == {3}


def test_a_large_load_is_shared_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hicache.integrations.vllm.loads.SHARE_BYTES", 4 * PART)
    facts = make_facts(blocks=512)
    caches = make_caches(facts, 3)
    worker = make_worker(facts, caches)
    pages = Pages(500, PART, 9, spans=[100, 300, 100])
    ids = np.random.default_rng(5).permutation(512)[:500].tolist()
    out = step(worker, StepOrders(1, loads=(load_order(pages, ids),)), NAMES)
    assert out.failed_blocks == set()
    assert pages.verified == set(range(500))
    assert all(part_of(caches, [block]) == pages.data[page].tobytes() for page, block in enumerate(ids))
    worker.close()


# --- the frame


def test_tensors_that_the_facts_do_not_describe_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="rank 1 of 1"):
        Worker(FACTS, make_settings(), 1)
    worker = Worker(make_facts(layout="LBNHC"), make_settings(), 0)
    with pytest.raises(UnsupportedError, match="strides"):
        worker.register(make_caches(FACTS, 1))
    worker.close()


def test_other_tensors_end_the_loads_into_the_old_ones(worker: Worker, caches: dict[str, Any]) -> None:
    pages = Pages(2, PART, 7)
    pages.gate = threading.Event()
    step(worker, StepOrders(1, loads=(load_order(pages, [1, 2], asynchronous=True),)), NAMES)
    fresh, before = make_caches(FACTS, 5), part_of(caches, [1, 2])
    worker.register(fresh)
    pages.gate.set()
    out = step(worker, StepOrders(1), NAMES)
    assert (out.finished, out.failed_blocks) == ({"r"}, {1, 2})
    good = Pages(2, PART, 8)
    step(worker, StepOrders(1, loads=(load_order(good, [1, 2]),)), NAMES)
    assert part_of(fresh, [2]) == good.data[1].tobytes()
    assert part_of(caches, [1, 2]) == before


def test_a_worker_whose_sidecar_is_absent_computes_everything(caches: dict[str, Any]) -> None:
    """It starts, steps and ends without waiting for it."""
    worker = Worker(FACTS, make_settings(rpc_timeout_ms=200, reconnect_ms=10), 0)
    begun = time.monotonic()
    worker.register(caches)
    assert step(worker, StepOrders(1), NAMES).report == StepReport()
    assert time.monotonic() - begun < 5
    worker.close()
    worker.close()


def test_closing_ends_what_is_under_way(caches: dict[str, Any], staging: Staging) -> None:
    worker = make_worker(FACTS, caches)
    pages = Pages(2, PART, 7)
    pages.gate = threading.Event()
    step(worker, StepOrders(1, loads=(load_order(pages, [1, 2], asynchronous=True),)), NAMES)
    worker.preempted(StepOrders(1, saves=(save_order(1, [staging.run(0, 1)], [3]),)))
    before = part_of(caches, [1, 2])
    threading.Timer(0.05, pages.gate.set).start()
    worker.close()
    assert part_of(caches, [1, 2]) == before
    assert staging.read(0, PART) == bytes(PART), "an unfinished step saves nothing"
