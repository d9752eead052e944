"""When a latched tier is tried, how often, and what its port owes."""

from __future__ import annotations

import pytest
from runtime_helpers import FakeClock
from test_ports import KEYED, Store, ask

from hicache.runtime.ports import TierPort
from hicache.runtime.watch import LONGEST_MS, STEADY_MS, Watch
from hicache.types import Completion, Op, Outcome


@pytest.fixture
def store() -> Store:
    return Store()


def answer(port: TierPort, store: Store, outcome: Outcome) -> None:
    """Complete the batch that the store got last."""
    batch = store.batches[-1]
    store.done.append(Completion(batch.id, (outcome,) * (len(batch.keys) or 1), error="EIO"))
    port.poll()


def latch(port: TierPort, store: Store) -> None:
    ask(port, Op.PUT)
    answer(port, store, Outcome.FAULT)


def probes(store: Store) -> int:
    return sum(batch.op is Op.PROBE for batch in store.batches)


def until_probe(clock: FakeClock, store: Store) -> int:
    """Milliseconds until the next probe."""
    before, waited = probes(store), 0
    while probes(store) == before:
        clock.advance(500)
        waited += 500
        assert waited <= 2 * LONGEST_MS
    return waited


def test_intervals_grow_and_start_again_after_a_steady_time(store: Store) -> None:
    clock = FakeClock()
    port = TierPort(0, KEYED, store)
    port.now_ms = clock.now_ms
    Watch(port, clock)
    latch(port, store)
    waits = []
    for _ in range(7):
        waits.append(until_probe(clock, store))
        answer(port, store, Outcome.FAULT)
    assert waits == [1000, 2000, 4000, 8000, 16000, 30000, 30000]
    assert (port.health.state, port.degraded_ms) == ("read-only", sum(waits))
    until_probe(clock, store)
    answer(port, store, Outcome.OK)
    assert (port.health.state, port.health.reason, port.degraded_ms) == ("ok", "", 0)
    latch(port, store)  # at once: it is not trusted
    assert until_probe(clock, store) == 30000
    answer(port, store, Outcome.OK)
    clock.advance(STEADY_MS)
    latch(port, store)
    assert until_probe(clock, store) == 1000


def test_nothing_is_tried_after_the_end(store: Store) -> None:
    clock = FakeClock()
    port = TierPort(0, KEYED, store)
    watch = Watch(port, clock)
    latch(port, store)
    until_probe(clock, store)
    watch.close()
    answer(port, store, Outcome.OK)
    clock.advance(10 * LONGEST_MS)
    assert (probes(store), port.health.state) == (1, "read-only")


def test_a_latched_tier_refuses_writes_and_owes_deletes(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    restored: list[TierPort] = []
    port.on_restored = restored.append
    latch(port, store)
    known = len(store.batches)
    put, delete = ask(port, Op.PUT, 2), ask(port, Op.DELETE, 3)
    port.poll()
    assert put[0].outcomes == (Outcome.FAULT,) * 2
    assert "EIO" in put[0].error
    assert delete[0].outcomes == (Outcome.OK,) * 3
    assert len(store.batches) == known
    found = ask(port, Op.GET)
    answer(port, store, Outcome.OK)
    assert found[0].outcomes == (Outcome.OK,)
    port.restore()
    assert (store.batches[-1].op, len(store.batches[-1].keys)) == (Op.DELETE, 3)
    assert restored == [port]


def test_what_is_owed_at_the_end_is_tried_once_more(store: Store) -> None:
    port = TierPort(0, KEYED, store)
    ask(port, Op.DELETE, 2)
    answer(port, store, Outcome.FAULT)
    assert port.health.state == "read-only"
    port.finish()
    assert (store.batches[-1].op, len(store.batches[-1].keys), store.closed) == (Op.DELETE, 2, 1)


def test_how_long_the_oldest_batch_takes(store: Store) -> None:
    clock = FakeClock()
    port = TierPort(0, KEYED, store)
    port.now_ms = clock.now_ms
    ask(port, Op.PUT)
    clock.advance(700)
    ask(port, Op.GET)
    assert port.oldest_batch_ms == 700
    store.complete(store.batches[0])
    port.poll()
    assert port.oldest_batch_ms == 0
    clock.advance(5)
    assert port.oldest_batch_ms == 5
