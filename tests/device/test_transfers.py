"""Transfers between host memory and engines' memfds."""

from __future__ import annotations

import fcntl
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from transfer_rig import Count, Form, Planes, part, sealed, sums, twin

from hicache.device import DeviceOptions, open_device
from hicache.device.kv import FAILED, MemoryKind, SharedMemory
from hicache.device.opening import KvTransfers, open_transfers
from hicache.device.transfers import DevicePages, HostPages, Transfer
from hicache.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec

SPEC = TierSpec("device", TierKind.DEVICE, 4 << 20, 1 << 20)


class Rig:
    """Transfers with threads, a region, and pages of random bytes."""

    def __init__(self, form=None, *, pages=4, page_tokens=4, unit_tokens=4, seed=0, store=None, kv=True):
        self.rng = np.random.default_rng(seed)
        self.form = form or Form()
        self.planes = Planes(self.form, self.rng)
        self.told = threading.Event()
        self.moves = open_transfers(store, self.told.set, now_ns=time.monotonic_ns)
        self.handle = self.moves.open_kv(self.planes.kv()) if kv else None
        self.page_tokens = page_tokens
        self.page_bytes = self.form.page_offset + part(self.form, page_tokens)
        self.rows = self.rng.integers(0, 256, (pages, self.page_bytes), np.uint8)
        self.places = self.form.places(random.Random(seed), pages, page_tokens, unit_tokens, skip=0)
        self.next_id = 0

    def transfer(self, pages=None, **more):
        self.next_id += 1
        pages = pages or HostPages([row.data for row in self.rows], sums(self.rows))
        return Transfer(
            self.next_id, self.handle, pages, self.places, self.page_tokens, self.page_bytes, **more
        )

    def wait(self, count=1):
        found = []
        while len(found) < count:
            assert self.told.wait(20), "a transfer never ended"
            self.told.clear()
            found += self.moves.poll()
        return found

    def expect(self, pack, **more):
        """Maps and rows as the twin leaves them."""
        maps, rows = self.planes.copy(), self.rows.copy()
        twin(self.planes, self.places, rows, page_tokens=self.page_tokens, pack=pack, maps=maps, **more)
        return maps, rows

    def close(self):
        self.moves.close()
        self.planes.close()


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


def same(maps, others):
    return all(np.array_equal(one, other) for one, other in zip(maps, others, strict=True))


def test_a_load_writes_what_the_twin_writes_and_counts_layers(rig):
    maps, _ = rig.expect(pack=False)
    counter = Count()
    rig.moves.load(rig.transfer(counter=counter))
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.OK}
    assert list(done.checksums) == sums(rig.rows)
    assert same(rig.planes.maps, maps)
    assert counter.seen == [1, 2]


def test_a_pack_reads_what_the_twin_reads_and_waits_for_each_layer(rig):
    _, rows = rig.expect(pack=True)
    counter = Count()
    rig.moves.pack(rig.transfer(counter=counter))
    time.sleep(0.01)
    assert not rig.moves.poll()
    counter.value = 1
    time.sleep(0.01)
    assert not rig.moves.poll()
    counter.value = 2
    [done] = rig.wait()
    assert np.array_equal(rig.rows, rows)
    assert list(done.checksums) == sums(rows)
    assert not counter.seen


def test_a_waiting_pack_holds_up_neither_loads_nor_other_packs(rig):
    for _ in range(5):
        rig.moves.pack(rig.transfer(counter=Count()))
    rig.moves.load(rig.transfer())
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.OK}
    rig.moves.close()
    assert [set(late.outcomes) for late in rig.moves.poll()] == [{Outcome.FAULT}] * 5


def test_a_layer_that_does_not_come_in_time_is_a_fault(rig):
    rig.moves.pack(rig.transfer(counter=Count(1), deadline_ns=time.monotonic_ns() + 5_000_000))
    [done] = rig.wait()
    assert set(done.outcomes) == {Outcome.FAULT}
    assert set(done.checksums) == {0}
    assert "deadline" in done.error


def test_a_corrupt_page_is_told_and_the_counter_says_failed(rig):
    wrong = sums(rig.rows)
    wrong[2] ^= 1
    counter = Count()
    rig.moves.load(rig.transfer(HostPages([row.data for row in rig.rows], wrong), counter=counter))
    [done] = rig.wait()
    assert done.outcomes == (Outcome.OK, Outcome.OK, Outcome.CORRUPT, Outcome.OK)
    assert done.checksums[2] == 0
    assert counter.value == FAILED
