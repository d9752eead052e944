"""``kill -9`` of a writing store: what was acknowledged is there, nothing else is, the bound holds."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from crash_kit import Ledger, Nursery, until_said
from crash_world import CAPACITY_BYTES, disk_use

KILLS_IN_MAKE_TEST = 30
#: Part of the kills that come while the store opens.
EARLY = 0.15


def one_kill(nursery: Nursery, folder: Path, ledger: Ledger, diary: Path, seed: str) -> None:
    rng = random.Random(seed)
    diary.unlink(missing_ok=True)
    how = {"folder": str(folder), "diary": str(diary), "seed": seed, "held": ledger.held}
    child = nursery.fork("write", **how, capacity_bytes=CAPACITY_BYTES)
    early = rng.random() < EARLY
    until_said(diary, "B" if early else "R")
    time.sleep(rng.uniform(0, 0.02 if early else 0.15))
    os.kill(child, signal.SIGKILL)
    code = nursery.wait(child)
    assert code == -signal.SIGKILL, f"the child ended by itself: {code}"
    ledger.read(diary)
    assert disk_use(folder) <= CAPACITY_BYTES
    found = nursery.answer("read", folder, capacity_bytes=CAPACITY_BYTES)
    ledger.judge(found)
    assert found["disk_bytes"] <= CAPACITY_BYTES
    assert disk_use(folder) <= CAPACITY_BYTES


def kill_often(nursery: Nursery, tmp_path: Path, seed: int, kills: int) -> None:
    ledger, folder, diary = Ledger(), tmp_path / "disk", tmp_path / "diary"
    for cycle in range(kills):
        try:
            one_kill(nursery, folder, ledger, diary, f"{seed}/{cycle}")
            if cycle % 10 == 0:
                looked = nursery.answer("inspect", folder)
                assert not looked["problems"]
                assert looked["pages"] == len(ledger.held)
        except AssertionError as error:
            raise AssertionError(f"kill {cycle} of HICACHE_TEST_SEED={seed}: {error}") from error
    print(
        f"seed {seed}: {kills} kills, {ledger.batches} batches, {ledger.acknowledged} pages acknowledged, "
        f"{len(ledger.held)} there at the end"
    )
    assert ledger.acknowledged > 10 * kills


def test_nothing_acknowledged_is_lost_and_nothing_else_is_seen(
    nursery: Nursery, tmp_path: Path, seed: int
) -> None:
    kill_often(nursery, tmp_path, seed, KILLS_IN_MAKE_TEST)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_hundred_kills(nursery: Nursery, tmp_path: Path, seed: int, kills: int) -> None:
    """HICACHE_TEST_KILLS says how many."""
    kill_often(nursery, tmp_path, seed, kills)
