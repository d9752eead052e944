"""Random walks of transfers beside a store's batches, on the fake device: delays, reorderings, faults, a death."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from transfer_walk import TransferWalk

SHAPES = [{}, {"batch": False}, {"piece": 0}, {"delays": False}]


def walk(seed, page_moves, fault_rate):
    made = TransferWalk(seed, fault_rate, **SHAPES[seed % len(SHAPES)])
    while made.page_moves < page_moves:
        made.act()
    made.finish()
    return made


@pytest.mark.parametrize("seed", range(5))
def test_no_wrong_page_no_lost_transfer_and_nothing_touched_after_its_end(seed):
    done = walk(seed, 400, fault_rate=0.02 if seed % 2 else 0.0)
    assert done.ends["load ok"] > 25
    assert done.ends["slots ok"] > 5
    assert done.ends["pack ok"] > 15
    if seed % 2:
        assert done.ends["load fault"] > 1


@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_dies_ends_everything_and_host_memory_goes_on(seed):
    made = TransferWalk(100 + seed, 0.0)
    while made.page_moves < 60 + 10 * seed:
        made.act()
    made.driver.die()
    made._check = lambda completion: made.open.pop(completion.id)  # what the store says then is not for here
    made._close = lambda slots: None  # a device that was given up opens no segment again
    before = made.ends.copy()
    for _ in range(60):
        made.act()
    made.land()
    made.settle()
    assert made.ends["slots fault"] + made.ends["slots miss"] > before["slots fault"] + before["slots miss"]
    assert made.ends["load ok"] > before["load ok"], "regions in host memory do not need the device"
    made.moves.close()
    made.store.close()
    assert not made.driver.violations


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_three_hundred_thousand_page_moves():
    """HICACHE_TEST_TRANSFER_PAGES pages, a new seed every 5,000."""
    wanted = int(os.environ.get("HICACHE_TEST_TRANSFER_PAGES", "300000"))
    moved = seed = 0
    while moved < wanted:
        seed += 1
        moved += walk(1000 + seed, 5000, fault_rate=(0.0, 0.002, 0.02, 0.1)[seed % 4]).page_moves
    print(f"{moved} pages moved, {seed} seeds")
