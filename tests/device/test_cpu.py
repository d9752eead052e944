"""The CPU device: asynchronous, in order within a stream, bounded, and never wrong about a page."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("torch", reason="the device room needs torch")

import hypothesis
import numpy as np
import torch
import xxhash
from hypothesis import strategies as st

from hicache.device import kernels
from hicache.errors import InvalidArgumentError
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op, Outcome, slot_stride

OK, MISS, CORRUPT, FAULT = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FAULT


def slot(index, segment=1):
    return segment * SLOTS_PER_SEGMENT + index


def page(seed, size=1000):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def digest(data):
    return xxhash.xxh3_64_intdigest(data)


# --- moving pages --------------------------------------------------------------------------------------


def test_pages_come_back_with_their_checksums(rig):
    pages = [page(i) for i in range(5)]
    slots = [slot(i) for i in (7, 0, 15, 3, 4)]
    put = rig.put(slots, pages)
    assert (list(put.outcomes), list(put.checksums)) == ([OK] * 5, [digest(p) for p in pages])
    got, buffers = rig.get(slots[::-1], 1000)
    assert (list(got.outcomes), buffers) == ([OK] * 5, pages[::-1])
    assert list(got.checksums) == [digest(p) for p in pages[::-1]]


@pytest.mark.parametrize("page_bytes", [1, 63, 64, 4096, 65535, 65536, 100_000])
@pytest.mark.parametrize("staging_bytes", [1, 1 << 17])
def test_any_page_size_moves_through_any_staging(open_rig, page_bytes, staging_bytes):
    """A batch larger than the staging buffer goes in chunks; a slot larger than it makes it grow."""
    rig = open_rig(staging_bytes=staging_bytes)
    rig.store.open_segment(1, "", page_bytes, 8)
    pages = [page(i, page_bytes) for i in range(8)]
    slots = [slot(i) for i in (3, 1, 2, 7, 6, 5, 4, 0)]
    assert set(rig.put(slots, pages).outcomes) == {OK}
    got, buffers = rig.get([*slots, slots[0]], page_bytes)
    assert set(got.outcomes) == {OK}
    assert buffers == [*pages, pages[0]]


def test_a_batch_may_span_segments(rig):
    rig.store.open_segment(0, "", 1000, 2)
    slots = [slot(3), slot(0, 0), slot(1), slot(1, 0)]
    pages = [page(i) for i in range(4)]
    assert set(rig.put(slots, pages).outcomes) == {OK}
    assert rig.get(slots, 1000)[1] == pages


def test_buffers_of_any_contiguous_format_are_bytes(rig):
    floats = np.arange(250, dtype=np.float32)
    rig.submit(Op.PUT, [slot(0)], [floats], 1000)
    rig.wait()
    back = np.zeros((10, 25), np.float32)
    rig.submit(Op.GET, [slot(0)], [back], 1000)
    assert list(rig.wait()[0].outcomes) == [OK]
    assert back.tobytes() == floats.tobytes()


def test_sources_may_be_read_only_and_destinations_may_not(rig):
    assert list(rig.put([slot(0)], [page(0)]).outcomes) == [OK]  # bytes are read-only
    with pytest.raises(InvalidArgumentError, match="read-only"):
        rig.submit(Op.GET, [slot(0)], [bytes(1000)], 1000)


def test_an_empty_batch_completes(rig):
    for op in (Op.PUT, Op.GET, Op.DELETE):
        rig.submit(op, page_bytes=1000)
        assert list(rig.wait()[0].outcomes) == []


def test_a_later_put_replaces_the_page(rig):
    first, second = [page(0)], [page(1)]
    rig.submit(Op.PUT, [slot(0)], first, 1000)
    rig.submit(Op.PUT, [slot(0)], second, 1000)
    rig.submit(Op.FLUSH)
    rig.wait(3)
    assert rig.get([slot(0)], 1000)[1] == second


# --- slots that hold nothing ---------------------------------------------------------------------------


def test_slots_start_empty_and_a_missed_buffer_is_untouched(rig):
    rig.put([slot(2)], [page(2)])
    got, buffers = rig.get([slot(1), slot(2), slot(3)], 1000)
    assert (list(got.outcomes), list(got.checksums)) == ([MISS, OK, MISS], [0, digest(page(2)), 0])
    assert buffers == [b"\xee" * 1000, page(2), b"\xee" * 1000]


def test_delete_empties_and_says_whether_there_was_a_page(rig):
    rig.put([slot(1)], [page(1)])
    assert list(rig.delete([slot(0), slot(1)]).outcomes) == [MISS, OK]
    assert list(rig.get([slot(1)], 1000)[0].outcomes) == [MISS]


def test_free_empties_at_once(rig):
    rig.put([slot(1), slot(2)], [page(1), page(2)])
    rig.store.free([slot(1)])
    assert list(rig.get([slot(1), slot(2)], 1000)[0].outcomes) == [MISS, OK]


def test_a_slot_freed_under_a_put_stays_empty_and_the_next_put_holds(rig):
    gate = rig.hold("put")
    rig.submit(Op.PUT, [slot(0), slot(1)], [page(0), page(1)], 1000)
    rig.store.free([slot(0)])
    gate.set()
    put = rig.wait()[0]
    assert (list(put.outcomes), list(put.checksums)) == ([FAULT, OK], [0, digest(page(1))])
    assert "freed" in put.error
    assert list(rig.get([slot(0), slot(1)], 1000)[0].outcomes) == [MISS, OK]
    assert list(rig.put([slot(0)], [page(2)]).outcomes) == [OK]


def test_a_reopened_segment_is_empty(rig):
    rig.put([slot(0)], [page(0)])
    rig.store.close_segment(1)
    rig.store.open_segment(1, "other", 500, 16)
    assert list(rig.get([slot(0)], 500)[0].outcomes) == [MISS]


# --- checksums -----------------------------------------------------------------------------------------


def test_put_refuses_pages_that_differ_from_their_checksums(rig):
    rig.put([slot(1)], [page(9)])
    pages = [page(i) for i in range(3)]
    sums = [digest(pages[0]), digest(pages[1]) ^ 1, digest(pages[2])]
    put = rig.put([slot(0), slot(1), slot(2)], pages, checksums=sums)
    assert (list(put.outcomes), list(put.checksums)) == ([OK, CORRUPT, OK], [sums[0], 0, sums[2]])
    got, buffers = rig.get([slot(0), slot(1), slot(2)], 1000)
    assert list(got.outcomes) == [OK, MISS, OK]
    assert buffers == [pages[0], b"\xee" * 1000, pages[2]]


@hypothesis.given(st.integers(0, 15), st.integers(0, 999), st.integers(0, 7))
@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_in_the_pool_is_corrupt_once_then_gone(rig, index, byte, bit):
    pages = [page(i) for i in range(16)]
    slots = [slot(i) for i in range(16)]
    rig.put(slots, pages)
    rig.store._segments[1].pool[index, byte] ^= 1 << bit
    got, buffers = rig.get(slots, 1000)
    wanted = [CORRUPT if i == index else OK for i in range(16)]
    assert list(got.outcomes) == wanted
    assert got.checksums[index] == 0
    assert [bytes(b) for b in buffers] == [b"\xee" * 1000 if i == index else pages[i] for i in range(16)], (
        "a rotten page must not reach a buffer"
    )
    assert list(rig.get(slots, 1000)[0].outcomes) == [MISS if i == index else OK for i in range(16)]
    assert list(rig.put([slots[index]], [page(99)]).outcomes) == [OK]
    assert rig.get([slots[index]], 1000)[1] == [page(99)]


def test_the_padding_of_a_slot_carries_no_bytes_of_other_pages(open_rig):
    rig = open_rig(staging_bytes=1 << 16)
    rig.store.open_segment(0, "a", 1024, 8)
    rig.store.open_segment(1, "b", 1000, 8)
    rig.put([slot(i, 0) for i in range(8)], [b"\xff" * 1024] * 8)
    rig.put([slot(i) for i in range(8)], [page(i) for i in range(8)])
    assert slot_stride(1000) == 1024
    assert not rig.store._segments[1].pool[:, 1000:].any()


# --- asynchrony ----------------------------------------------------------------------------------------


def test_submit_returns_before_the_copy_and_poll_does_not_wait(rig):
    for stream, op in (("put", Op.PUT), ("get", Op.GET), ("put", Op.DELETE)):
        gate = rig.hold(stream)
        buffers = [] if op is Op.DELETE else [bytearray(1000)]
        rig.submit(op, [slot(0)], buffers, 1000)
        assert rig.store.poll() == []
        assert not rig.told.is_set()
        gate.set()
        assert [c.id for c in rig.wait()] == [rig.next_id]


def test_completions_arrive_in_order_within_a_stream(rig):
    wanted = [rig.submit(Op.PUT, [slot(i % 16)], [page(i)], 1000) for i in range(200)]
    assert [c.id for c in rig.wait(200)] == wanted
    wanted = [rig.submit(Op.GET, [slot(i % 16)], [bytearray(1000)], 1000) for i in range(200)]
    assert [c.id for c in rig.wait(200)] == wanted


def test_streams_do_not_wait_for_each_other(rig):
    rig.put([slot(0)], [page(0)])
    gate = rig.hold("put")
    rig.submit(Op.PUT, [slot(1)], [page(1)], 1000)
    got, buffers = rig.get([slot(0)], 1000)
    assert (list(got.outcomes), buffers) == ([OK], [page(0)])
    gate.set()
    rig.wait()


def test_a_get_that_overtakes_its_put_misses(rig):
    gate = rig.hold("put")
    rig.submit(Op.PUT, [slot(0)], [page(0)], 1000)
    assert list(rig.get([slot(0)], 1000)[0].outcomes) == [MISS]
    gate.set()
    rig.wait()


def test_flush_waits_for_both_streams(rig):
    gates = [rig.hold("put"), rig.hold("get")]
    first = rig.submit(Op.PUT, [slot(0)], [page(0)], 1000)
    flush = rig.submit(Op.FLUSH)
    gates[0].set()
    assert [c.id for c in rig.wait()] == [first]
    assert rig.store.poll() == []
    gates[1].set()
    assert [c.id for c in rig.wait()] == [flush]


def test_a_page_overwritten_under_its_reader_is_a_miss_and_the_new_page_stays(rig, monkeypatch):
    rig.put([slot(0), slot(1)], [page(0), page(1)])
    gather = kernels.gather_pages

    def overtaken(*arguments):
        reached.set()
        overwritten.wait(20)
        gather(*arguments)

    reached, overwritten = threading.Event(), threading.Event()
    monkeypatch.setattr(kernels, "gather_pages", overtaken)
    buffers = [bytearray(1000), bytearray(1000)]
    read = rig.submit(Op.GET, [slot(0), slot(1)], buffers, 1000)
    assert reached.wait(20)
    rig.put([slot(1)], [page(2)])
    overwritten.set()
    done = rig.wait()[0]
    assert (done.id, list(done.outcomes)) == (read, [OK, MISS])
    assert buffers == [page(0), bytes(1000)]
    assert rig.get([slot(1)], 1000)[1] == [page(2)]


def test_reads_and_writes_of_the_same_slots_at_once_never_give_a_wrong_page(open_rig):
    """Pages are replaced and freed under readers: each read is a page that was put, or a miss."""
    rig = open_rig(segments=1, staging_bytes=1 << 16)
    rig.store.open_segment(1, "", 20_000, 8)
    # on a busy machine every read of a round may be overtaken: then once more
    assert any(read_under_writers(rig) for _ in range(20))


def read_under_writers(rig) -> int:
    """Pages that were read whole while others were written to their slots."""
    pages = [page(i, 20_000) for i in range(24)]
    known = set(pages)
    slots = [slot(i) for i in range(8)]
    reads, seen = {}, 0
    for turn in range(150):
        rig.submit(Op.PUT, slots, [pages[(turn + i) % 24] for i in range(8)], 20_000)
        buffers = [bytearray(20_000) for _ in slots]
        reads[rig.submit(Op.GET, slots, buffers, 20_000)] = buffers
        if turn % 10 == 0:
            rig.store.free(slots[:2])
    for done in rig.wait(300):
        for outcome, buffer in zip(done.outcomes, reads.get(done.id, []), strict=False):
            assert outcome in {OK, MISS}
            assert outcome is MISS or bytes(buffer) in known
            seen += outcome is OK
    return seen


def test_a_fault_is_an_outcome_and_the_stream_goes_on(rig):
    gate = rig.hold("put")
    view = memoryview(bytearray(1000))
    rig.store.submit(Batch(77, Op.PUT, page_bytes=1000, slots=[slot(0)], buffers=[view]))
    view.release()
    gate.set()
    done = rig.wait()[0]
    assert (done.id, list(done.outcomes), list(done.checksums)) == (77, [FAULT], [0])
    assert "ValueError" in done.error
    assert list(rig.get([slot(0)], 1000)[0].outcomes) == [MISS]
    assert list(rig.put([slot(0)], [page(0)]).outcomes) == [OK]


def test_the_streams_take_one_core_and_leave_torchs_setting_alone(open_rig):
    before = torch.get_num_threads()
    rig = open_rig()
    inside, later = [], []
    rig.store._writes.launch(lambda: inside.append(torch.get_num_threads()))
    rig.submit(Op.FLUSH)
    rig.wait()
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (inside, torch.get_num_threads(), later) == ([1], before, [before])
