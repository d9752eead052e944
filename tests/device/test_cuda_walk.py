"""Random walks of the CUDA store on the fake device: delays, reorderings, faults."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch", reason="the device room needs torch")

from cuda_rig import Walk

SHAPES = [{}, {"kernels": False}, {"batch": False}, {"kernels": False, "batch": False}, {"piece": 0}]


def walk(seed: int, pages: int, fault_rate: float) -> Walk:
    made = Walk(seed, fault_rate, **SHAPES[seed % len(SHAPES)])
    while made.pages < pages:
        made.act()
    made.finish()
    return made


@pytest.mark.parametrize("seed", range(10))
def test_no_wrong_page_and_no_lost_slot(seed):
    done = walk(seed, 1500, fault_rate=0.02 if seed % 2 else 0.0)
    assert done.outcomes["put ok"] > 100
    assert done.outcomes["get ok"] > 50
    if seed % 2:
        assert done.outcomes["put fault"] > 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_operations():
    """The bar: 1,000,000 page operations (HICACHE_TEST_GPU_PAGES), a new seed every 20,000."""
    wanted = int(os.environ.get("HICACHE_TEST_GPU_PAGES", "1000000"))
    moved = seed = 0
    while moved < wanted:
        seed += 1
        moved += walk(1000 + seed, 20_000, fault_rate=(0.0, 0.002, 0.02, 0.1)[seed % 4]).pages
    print(f"{moved} page operations, {seed} seeds")
