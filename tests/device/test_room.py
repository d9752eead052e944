"""The CPU device's room: segments within the capacity, batches that fit, and everything given back at the end."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

pytest.importorskip("torch", reason="the device room needs torch")

import numpy as np

from hicache.errors import ExhaustedError, InvalidArgumentError, UnavailableError
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op


def slot(index, segment=1):
    return segment * SLOTS_PER_SEGMENT + index


def page(seed):
    return np.random.default_rng(seed).integers(0, 256, 1000, np.uint8).tobytes()


def test_no_more_segments_than_the_capacity_holds(open_rig):
    rig = open_rig(segments=2)
    rig.store.open_segment(0, "", 1000, 1)
    rig.store.open_segment(1, "", 1000, 1)
    with pytest.raises(ExhaustedError, match="all 2 segments"):
        rig.store.open_segment(2, "", 1000, 1)
    rig.store.close_segment(0)
    rig.store.open_segment(2, "", 1000, 1)


@pytest.mark.parametrize(
    ("segment", "page_bytes", "slots"),
    [
        (1, 1000, 1),
        (-1, 1000, 1),
        (0, 1000, 0),
        (0, 0, 1),
        (0, 1 << 20, 2),
        (0, (1 << 20) + 1, 1),
        (0, 64, 16385),
    ],
)
def test_segments_that_do_not_fit_are_refused(rig, segment, page_bytes, slots):
    with pytest.raises(InvalidArgumentError):
        rig.store.open_segment(segment, "", page_bytes, slots)


def test_a_segment_may_be_filled_to_its_last_byte(open_rig):
    rig = open_rig(segments=1)
    rig.store.open_segment(0, "", 1 << 16, 16)
    assert rig.store._segments[0].pool.nbytes == 1 << 20


def test_no_memory_is_exhausted_not_a_crash(open_rig):
    rig = open_rig(segments=1, segment_bytes=1 << 60)
    with pytest.raises(ExhaustedError, match="no memory"):
        rig.store.open_segment(0, "", 1 << 50, 1 << 10)


def test_closing_a_segment_gives_its_memory_back(rig):
    rig.put([slot(0)], [page(0)])
    rig.get([slot(0)], 1000)
    memory = weakref.ref(rig.store._segments[1].pool)
    gc.disable()
    try:
        rig.store.close_segment(1)
        for _ in range(200):  # the streams' threads may still be leaving the last batch
            if memory() is None:
                break
            time.sleep(0.01)
        assert memory() is None, "something still holds the pool"
    finally:
        gc.enable()


def test_a_segment_with_pages_on_the_move_is_not_closed(rig):
    gate = rig.hold("put")
    rig.submit(Op.PUT, [slot(0)], [page(0)], 1000)
    with pytest.raises(InvalidArgumentError, match="1 batches move"):
        rig.store.close_segment(1)
    gate.set()
    rig.wait()
    rig.store.close_segment(1)
    with pytest.raises(InvalidArgumentError, match="not open"):
        rig.store.close_segment(1)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"slots": [slot(16)]}, id="slot beyond the segment"),
        pytest.param({"slots": [slot(0, 2)]}, id="segment not open"),
        pytest.param({"slots": [-1]}, id="negative slot"),
        pytest.param({"slots": ["x"]}, id="not a number"),
        pytest.param({"slots": [1 << 70]}, id="not a slot number"),
        pytest.param({"slots": [slot(0), slot(1)]}, id="fewer buffers than slots"),
        pytest.param({"slots": [slot(0), slot(0)], "buffers": [memoryview(bytes(1000))] * 2}, id="put twice"),
        pytest.param({"buffers": [memoryview(bytes(999))]}, id="short buffer"),
        pytest.param({"buffers": [memoryview(bytes(2000))[::2]]}, id="strided buffer"),
        pytest.param({"page_bytes": 999, "buffers": [memoryview(bytes(999))]}, id="other page size"),
        pytest.param({"checksums": [1, 2]}, id="too many checksums"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(rig, change):
    rig.put([slot(0)], [page(0)])
    fields = {"page_bytes": 1000, "slots": [slot(0)], "buffers": [memoryview(bytes(1000))]}
    with pytest.raises(InvalidArgumentError):
        rig.store.submit(Batch(1, Op.PUT, **(fields | change)))
    assert rig.get([slot(0)], 1000)[1] == [page(0)]
    rig.store.close_segment(1)


# --- closing -------------------------------------------------------------------------------------------


def test_close_finishes_what_was_submitted_and_leaves_no_threads(open_rig):
    before = set(threading.enumerate())
    rig = open_rig()
    rig.store.open_segment(1, "", 1000, 16)
    assert len(set(threading.enumerate()) - before) == 2
    wanted = {rig.submit(Op.PUT, [slot(i)], [page(i)], 1000) for i in range(16)}
    wanted |= {rig.submit(Op.GET, [slot(0)], [bytearray(1000)], 1000), rig.submit(Op.FLUSH)}
    rig.store.close()
    assert set(threading.enumerate()) <= before
    assert {c.id for c in rig.store.poll()} == wanted
    rig.store.close()
    assert rig.store.poll() == []


def test_a_closed_store_says_so(rig):
    rig.store.close()
    with pytest.raises(UnavailableError, match="closed"):
        rig.submit(Op.FLUSH)
    with pytest.raises(UnavailableError, match="closed"):
        rig.store.open_segment(5, "", 1000, 1)
