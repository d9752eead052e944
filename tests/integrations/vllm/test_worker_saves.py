from __future__ import annotations

from typing import Any

import pytest
from worker_kit import (
    FACTS,
    NAMES,
    PART,
    Pages,
    Staging,
    load_order,
    make_caches,
    make_facts,
    make_worker,
    part_of,
    save_order,
    step,
)

from hicache.errors import UnavailableError
from hicache.integrations.vllm import saves
from hicache.integrations.vllm.messages import StepOrders, StepReport
from hicache.integrations.vllm.worker import Worker

# --- saves


@pytest.mark.parametrize("threaded", [False, True])
def test_saves_are_done_when_the_step_ends(
    worker: Worker,
    caches: dict[str, Any],
    staging: Staging,
    threaded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saves, "THREAD_BYTES", 1 if threaded else 1 << 40)
    runs = [staging.run(3 * PART, 2), staging.run(10 * PART, 1)]

    def compute(name: str) -> None:  # what a layer computes in this step is saved
        caches[name][5:9] = 7

    orders = StepOrders(1, saves=(save_order(1, runs, [5, 6, 60]), save_order(2, [staging.run(0, 1)], [8])))
    out = step(worker, orders, NAMES, compute)
    assert out.report.saved == {1: 1, 2: 1}
    assert out.report.void == frozenset()
    assert (out.report.stats.saved_pages, out.report.stats.saved_bytes) == (4, 4 * PART)
    for offset, block in ((3, 5), (4, 6), (10, 60), (0, 8)):
        assert staging.read(offset * PART, PART) == part_of(caches, [block])
    assert staging.read(PART, 2 * PART) == bytes(2 * PART)
    assert staging.read(5 * PART, 5 * PART) == bytes(5 * PART)


def test_pages_of_several_blocks_are_saved_layer_by_layer(caches: dict[str, Any], staging: Staging) -> None:
    worker = make_worker(FACTS, caches, page_tokens=64)
    out = step(worker, StepOrders(2, saves=(save_order(1, [staging.run(0, 2)], [9, 3, 4, 5]),)), NAMES)
    assert out.report.saved == {1: 1}
    assert staging.read(0, 4 * PART) == part_of(caches, [9, 3]) + part_of(caches, [4, 5])
    worker.close()


def test_memory_that_is_not_the_one_meant_voids_the_job(worker: Worker, staging: Staging) -> None:
    other = Staging(64 * PART)
    good, wrong = staging.run(0, 1), staging.run(0, 1, inode=staging.run(0, 1).inode + 1)
    bad = [
        wrong,
        other.run(0, 1, path="/proc/self/fd/9999"),
        other.run(0, 1, size_bytes=65 * PART),
        other.run(64 * PART, 1),
        staging.run(0, 1, size_bytes=32 * PART),
    ]
    orders = [save_order(number, [run], [number]) for number, run in enumerate([good, *bad])]
    out = step(worker, StepOrders(1, saves=tuple(orders)), NAMES)
    assert out.report.saved == dict.fromkeys(range(6), 1), "this rank is done with all of them"
    assert out.report.void == set(range(1, 6))
    assert out.report.stats.void_saves == 5
    other.close()


def test_staging_memory_is_mapped_once_and_let_go_of_when_its_owner_closed_it(
    worker: Worker, caches: dict[str, Any]
) -> None:
    first = Staging(8 * PART)
    for job in range(3):
        step(worker, StepOrders(1, saves=(save_order(job, [first.run(job * PART, 1)], [job]),)), NAMES)
    assert len(worker._maps) == 1
    first.close()
    second = Staging(8 * PART)
    step(worker, StepOrders(1, saves=(save_order(9, [second.run(0, 1)], [1]),)), NAMES)
    assert len(worker._maps) == 1
    assert second.read(0, PART) == part_of(caches, [1])
    second.close()


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_what_was_computed_on_a_failed_load_is_not_saved(
    caches: dict[str, Any], staging: Staging, steps_ahead: int
) -> None:
    """Nor by steps that were scheduled before the failure was known, nor for requests that share the blocks."""
    worker = make_worker(make_facts(steps_ahead=steps_ahead), caches)
    pages = Pages(2, PART, 1)
    pages.rot(1)
    orders = StepOrders(
        1,
        loads=(load_order(pages, [1, 2]),),
        saves=(save_order(1, [staging.run(0, 1)], [3]), save_order(2, [staging.run(PART, 1)], [4])),
    )
    assert step(worker, orders, NAMES).report.void == {1, 2}
    for later in range(3):
        job = 10 + later
        out = step(worker, StepOrders(1, saves=(save_order(job, [staging.run(0, 1)], [3]),)), NAMES)
        assert out.report.void == ({job} if later < steps_ahead else set())
        assert out.report.saved == {job: 1}
    worker.close()


def test_an_asynchronous_load_that_failed_spoils_no_save(worker: Worker, staging: Staging) -> None:
    """Nobody computes on its blocks: vLLM hears of them before the request runs."""
    pages = Pages(2, PART, 1)
    pages.failure = UnavailableError("gone")
    step(worker, StepOrders(1, loads=(load_order(pages, [1, 2], asynchronous=True),)), NAMES)
    out = step(worker, StepOrders(1, saves=(save_order(1, [staging.run(0, 1)], [3]),)), NAMES)
    assert out.report.void == frozenset()


# --- ranks


def test_each_rank_has_its_part_of_each_page(staging: Staging) -> None:
    facts = make_facts(world=2)
    caches = [make_caches(facts, rank) for rank in range(2)]
    workers = [make_worker(facts, caches[rank], rank=rank) for rank in range(2)]
    report = StepReport()
    for worker in workers:
        orders = StepOrders(1, saves=(save_order(1, [staging.run(0, 3)], [4, 5, 6]),))
        report = report.merged(step(worker, orders, NAMES).report)
    assert report.saved == {1: 2}
    for page, block in enumerate([4, 5, 6]):
        stored = staging.read(page * 2 * PART, 2 * PART)
        assert stored == part_of(caches[0], [block]) + part_of(caches[1], [block])

    pages = [Pages(5, 2 * PART, 3) for _ in range(2)]
    for rank, worker in enumerate(workers):
        step(worker, StepOrders(1, loads=(load_order(pages[rank], range(10, 15)),)), NAMES)
        part = pages[rank].data[:, rank * PART : (rank + 1) * PART]
        assert b"".join(part_of(caches[rank], [block]) for block in range(10, 15)) == part.tobytes()
    assert [pages[0].verified, pages[1].verified] == [{0, 2, 4}, {1, 3}], "ranks share the checksums"
    for worker in workers:
        worker.close()


def test_a_rank_that_did_not_save_makes_the_page_void(staging: Staging) -> None:
    facts = make_facts(world=2)
    workers = [make_worker(facts, make_caches(facts, rank), rank=rank) for rank in range(2)]
    runs = [staging.run(0, 1), staging.run(0, 1, inode=1)]
    reports = [
        step(worker, StepOrders(1, saves=(save_order(1, [run], [4]),)), NAMES).report
        for worker, run in zip(workers, runs, strict=True)
    ]
    merged = reports[0].merged(reports[1])
    assert merged.saved == {1: 2}
    assert merged.void == {1}
    for worker in workers:
        worker.close()


def test_a_corrupt_page_is_found_by_the_rank_that_checks_it() -> None:
    facts = make_facts(world=2)
    found = []
    for rank in range(2):
        pages = Pages(4, 2 * PART, 3)
        pages.rot(3)
        worker = make_worker(facts, make_caches(facts, rank), rank=rank)
        out = step(worker, StepOrders(1, loads=(load_order(pages, [1, 2, 3, 4]),)), NAMES)
        found.append((out.report.corrupt, out.failed_blocks))
        worker.close()
    assert found == [((), set()), ((("r", 3),), {4})]
