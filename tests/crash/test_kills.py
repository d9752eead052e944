"""``kill -9`` of a writing store: what was acknowledged is there, nothing else is, the bound holds."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from crash_kit import Ledger, Nursery, until_said
from crash_world import LAYOUTS, disk_use

KILLS_IN_MAKE_TEST = 15
#: Part of the kills that come while the store opens.
EARLY = 0.15


def one_kill(
    nursery: Nursery, folder: Path, ledger: Ledger, diary: Path, seed: str, layout: dict[str, int]
) -> None:
    rng = random.Random(seed)
    diary.unlink(missing_ok=True)
    how = {"folder": str(folder), "diary": str(diary), "seed": seed, "held": ledger.held}
    child = nursery.fork("write", **how, **layout, scrub=rng.choice((0, 1 << 26)))
    early = rng.random() < EARLY
    until_said(diary, "B" if early else "R")
    time.sleep(rng.uniform(0, 0.02 if early else 0.15))
    os.kill(child, signal.SIGKILL)
    code = nursery.wait(child)
    assert code == -signal.SIGKILL, f"the child ended by itself: {code}"
    ledger.read(diary)
    assert disk_use(folder) <= layout["capacity_bytes"]
    found = nursery.answer("read", folder, **layout)
    ledger.judge(found)
    assert found["disk_bytes"] <= layout["capacity_bytes"]
    assert disk_use(folder) <= layout["capacity_bytes"]


def kill_often(nursery: Nursery, tmp_path: Path, seed: int, kills: int, layout: str) -> None:
    ledger, folder, diary = Ledger(), tmp_path / "disk", tmp_path / "diary"
    cycle = 0
    while cycle < kills or (
        ledger.acknowledged <= 10 * kills and cycle < 10 * kills
    ):  # a busy machine writes less
        try:
            one_kill(nursery, folder, ledger, diary, f"{seed}/{cycle}", LAYOUTS[layout])
            if cycle % 10 == 0:
                looked = nursery.answer("inspect", folder)
                assert not looked["problems"]
                assert looked["pages"] == len(ledger.held)
        except AssertionError as error:
            raise AssertionError(f"kill {cycle} of HICACHE_TEST_SEED={seed}: {error}") from error
        cycle += 1
    print(
        f"seed {seed}: {cycle} kills, {ledger.batches} batches, {ledger.acknowledged} pages acknowledged, "
        f"{len(ledger.held)} there at the end"
    )
    assert ledger.acknowledged > 10 * kills


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_acknowledged_is_lost_and_nothing_else_is_seen(
    nursery: Nursery, tmp_path: Path, seed: int, layout: str
) -> None:
    kill_often(nursery, tmp_path, seed, KILLS_IN_MAKE_TEST, layout)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_hundred_kills(nursery: Nursery, tmp_path: Path, seed: int, kills: int, layout: str) -> None:
    """HICACHE_TEST_KILLS says how many, over all layouts."""
    kill_often(nursery, tmp_path, seed, kills // len(LAYOUTS), layout)
