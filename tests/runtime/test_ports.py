"""Ports over a scripted store: completions find their way, writes wait for recovery, the medium is watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from hicache.errors import ExhaustedError, InvalidArgumentError
from hicache.runtime.ports import READ_FAULTS_TO_GIVE_UP, TierPort
from hicache.types import SLOTS_PER_SEGMENT, Batch, Completion, Op, Outcome, TierKind, TierSpec

KEYED = TierSpec("disk", TierKind.DISK, 1 << 20, keyed=True, durable=True)
SLOTTED = TierSpec("device", TierKind.DEVICE, 1 << 20, 1 << 18)
PAGE_BYTES = 64


class Store:
    """Completes what a test tells it to."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.done: list[Completion] = []
        self.calls: list[tuple[object, ...]] = []
        self.refuse: Exception | None = None
        self.closed = 0

    def submit(self, batch: Batch) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.batches.append(batch)

    def complete(self, batch: Batch, outcome: Outcome = Outcome.OK) -> None:
        pages = len(batch.keys) or len(batch.slots)
        self.done.append(Completion(batch.id, (outcome,) * pages))

    def poll(self) -> list[Completion]:
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        self.closed += 1

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.calls.append(("open", segment, domain, page_bytes, slots))

    def close_segment(self, segment: int) -> None:
        self.calls.append(("close", segment))

    def free(self, slots: Sequence[int]) -> None:
        self.calls.append(("free", *slots))


@pytest.fixture
def store() -> Store:
    return Store()


def ask(port: TierPort, op: Op, count: int = 1) -> list[Completion]:
    found: list[Completion] = []
    keys = [bytes([number]) * 32 for number in range(count)]
    port.submit(op, found.append, page_bytes=PAGE_BYTES, keys=keys)
    return found


def test_each_completion_reaches_its_batch(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    first, second = ask(port, Op.GET), ask(port, Op.GET)
    assert port.in_flight == 2
    store.complete(store.batches[1])
    port.poll()
    assert (len(first), len(second), port.in_flight) == (0, 1, 1)
    store.complete(store.batches[0])
    port.poll()
    assert (len(first), port.in_flight) == (1, 0)


def test_what_a_store_refuses_comes_back_as_fault(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    rings: list[bool] = []
    port.on_local = lambda: rings.append(True)
    store.refuse = InvalidArgumentError("no such slot")
    found = ask(port, Op.PUT, 2)
    assert not found  # never from within submit
    assert rings
    port.poll()
    assert found[0].outcomes == (Outcome.FAULT, Outcome.FAULT)
    assert "no such slot" in found[0].error
    assert port.health.state == "ok"  # a refusal says nothing of the medium


def test_held_writes_wait_in_order_and_reads_do_not(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    port.hold_writes()
    for op in (Op.PUT, Op.DELETE, Op.GET, Op.FLUSH):
        ask(port, op)
    assert [batch.op for batch in store.batches] == [Op.GET]
    port.submit_now(Op.DELETE, [b"o" * 32])
    port.release_writes()
    assert [batch.op for batch in store.batches] == [Op.GET, Op.DELETE, Op.PUT, Op.DELETE, Op.FLUSH]
    ask(port, Op.PUT)
    assert store.batches[-1].op is Op.PUT


def test_what_is_held_at_the_end_is_refused(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    port.hold_writes()
    found = ask(port, Op.PUT)
    port.finish()
    port.finish()
    port.poll()
    assert found[0].outcomes == (Outcome.FAULT,)
    assert store.closed == 1


def latches(port: TierPort) -> list[str]:
    told: list[str] = []
    port.on_latched = lambda latched: told.append(latched.health.state)
    return told


def play(port: TierPort, store: Store, op: Op, outcome: Outcome) -> None:
    known = len(store.batches)
    ask(port, op)
    if len(store.batches) > known:  # what a latched tier is not asked any more is answered by its port
        store.complete(store.batches[-1], outcome)
    port.poll()


def test_a_write_fault_latches_the_tier_once(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    told = latches(port)
    for outcome in (Outcome.OK, Outcome.FULL, Outcome.CORRUPT):
        play(port, store, Op.PUT, outcome)
    assert told == []
    play(port, store, Op.PUT, Outcome.FAULT)
    play(port, store, Op.PUT, Outcome.FAULT)
    assert told == ["read-only"]


def test_read_faults_in_a_row_take_the_tier_off(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    told = latches(port)
    for _ in range(READ_FAULTS_TO_GIVE_UP - 1):
        play(port, store, Op.GET, Outcome.FAULT)
    play(port, store, Op.GET, Outcome.MISS)
    for _ in range(READ_FAULTS_TO_GIVE_UP):
        assert told == []
        play(port, store, Op.GET, Outcome.FAULT)
    assert told == ["off"]


def test_memory_does_not_latch(store: Store) -> None:
    port = TierPort(0, SLOTTED, store)
    told = latches(port)
    play(port, store, Op.PUT, Outcome.FAULT)
    assert told == []


# --- segments


def test_a_segment_closes_when_no_batch_moves_its_pages(store: Store) -> None:
    port = TierPort(0, SLOTTED, store)
    port.open_segment(2, "t", PAGE_BYTES, 4)
    closed: list[bool] = []
    port.submit(Op.GET, lambda _: None, page_bytes=PAGE_BYTES, slots=[2 * SLOTS_PER_SEGMENT])
    port.close_segment(2, lambda: closed.append(True))
    assert not closed
    store.complete(store.batches[0])
    port.poll()
    assert closed == [True]
    assert store.calls[-1] == ("close", 2)
    port.open_segment(3, "t", PAGE_BYTES, 4)
    port.close_segment(3, lambda: closed.append(True))
    assert closed == [True, True]


def test_a_segment_without_memory_is_opened_when_it_is_wanted(store: Store) -> None:
    port = TierPort(0, SLOTTED, store)
    opened: list[tuple[int, str]] = []
    port.on_opened = lambda _, segment, domain: opened.append((segment, domain))
    store.refuse = ExhaustedError("no memory")
    port.open_segment(1, "t", PAGE_BYTES, 4)
    slot = SLOTS_PER_SEGMENT
    port.free([slot, 3])  # the store knows nothing of the first
    port.reopen([slot])
    assert opened == []
    store.refuse = None
    port.reopen([3, slot])
    port.reopen([slot])
    assert opened == [(1, "t")]
    assert store.calls == [("free", 3), ("open", 1, "t", PAGE_BYTES, 4)]


def test_a_segment_that_never_opened_is_closed_without_the_store(store: Store) -> None:
    port = TierPort(0, SLOTTED, store)
    store.refuse = ExhaustedError("no memory")
    port.open_segment(1, "t", PAGE_BYTES, 4)
    closed: list[bool] = []
    then: Callable[[], None] = lambda: closed.append(True)  # noqa: E731
    port.close_segment(1, then)
    assert closed == [True]
    assert store.calls == []
