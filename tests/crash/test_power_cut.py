"""A machine that loses power: what was not synced is kept or lost at random. The store keeps what it promises, no more.

With ``sync`` every acknowledged page. Without: nothing, and it says why; unless it was closed cleanly.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_kit import Ledger, Nursery
from crash_shim import CUT, FINE, Control, Disk, shim_env
from crash_world import LAYOUTS

pytestmark = pytest.mark.slow

CUTS, CUTS_SOAK, IMAGES = 6, 120, 2
ANOTHER_BOOT = "00000000-0000-0000-0000-00000000dead"


class Machine:
    """A folder on a disk that can lose power. A life is one process that has the store open."""

    def __init__(self, tmp_path: Path, shim: Path, model: str) -> None:
        self.model = model
        self.root = tmp_path / "root"
        self.root.mkdir()
        self.folder = self.root / "disk"
        self.log, self.diary = tmp_path / "log", tmp_path / "diary"
        self.log.touch()
        self.control = Control(tmp_path / "control")
        self.images = tmp_path / "images"
        self.ledger = Ledger()
        env = shim_env(shim, self.root, log=self.log, control=self.control.path)
        self.nursery = Nursery(**env)

    def live(self, seed: str, *, sync: bool, cut_after: int = 0, steps: int = 60, close: bool = True) -> Disk:
        """One life; returns the medium at its end."""
        disk = Disk(self.root, self.model)
        os.truncate(self.log, 0)
        self.diary.unlink(missing_ok=True)
        self.control.set(CUT if cut_after else FINE, after=cut_after)
        how: dict[str, Any] = {"folder": str(self.folder), "diary": str(self.diary), "seed": seed}
        how |= {"held": self.ledger.held, "sync": sync, **LAYOUTS["shards"]}
        code = self.nursery.wait(self.nursery.fork("write", **how, steps=steps, close=close))
        assert code in ({0, -9} if cut_after else {0}), f"the child ended with {code}"
        self.control.set(FINE)
        played = disk.play(self.log.read_bytes())
        assert played >= (1 if cut_after else 10), "the shim recorded what was written"
        if self.diary.exists():
            self.ledger.read(self.diary)
        return disk

    def after(
        self, disk: Disk, reader: Nursery, rng: random.Random, *, sync: bool
    ) -> tuple[dict[str, Any], str]:
        """Lose power, start the machine, open the store."""
        shutil.rmtree(self.images, ignore_errors=True)
        chance = disk.build(self.images, rng)
        folder = self.images / "disk"
        found = reader.answer("read", folder, boot_id=ANOTHER_BOOT, sync=sync, **LAYOUTS["shards"])
        return found, chance


@pytest.fixture(params=["posix", "journal"])
def machine(request: pytest.FixtureRequest, tmp_path: Path, shim: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, shim, request.param)
    with made.nursery:
        yield made


def cut_with_sync(machine: Machine, nursery: Nursery, rng: random.Random, cuts: int) -> None:
    for number in range(cuts):
        shutil.rmtree(machine.folder, ignore_errors=True)
        machine.ledger = Ledger()
        seed = f"{rng.random()}"
        disk = machine.live(seed, sync=True, cut_after=rng.choice((rng.randint(1, 60), rng.randint(1, 600))))
        for _ in range(IMAGES):
            found, chance = machine.after(disk, nursery, rng, sync=True)
            told = f"cut {number}, {chance}, {machine.ledger.acknowledged} pages acknowledged"
            if found["wiped"]:
                sure = [name for name, versions in machine.ledger.allowed.items() if 0 not in versions]
                assert not sure, f"{told}: {len(sure)} pages lost: {found['wiped']}"
                assert not found["seen"]
                continue
            judge = Ledger()
            judge.allowed = dict(machine.ledger.allowed)
            try:
                judge.judge(found)
            except AssertionError as error:
                raise AssertionError(f"{told}: {error}") from error


def test_with_sync_every_acknowledged_page_is_there(
    machine: Machine, nursery: Nursery, rng: random.Random
) -> None:
    cut_with_sync(machine, nursery, rng, CUTS)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_with_sync_many_cuts(machine: Machine, nursery: Nursery, rng: random.Random) -> None:
    cut_with_sync(machine, nursery, rng, CUTS_SOAK)


def test_without_sync_it_starts_empty_and_says_why(
    machine: Machine, nursery: Nursery, rng: random.Random
) -> None:
    for _ in range(CUTS // 2):
        shutil.rmtree(machine.folder, ignore_errors=True)
        machine.ledger = Ledger()
        disk = machine.live(f"{rng.random()}", sync=False, steps=40, close=False)
        assert machine.ledger.acknowledged, "there was something to lose"
        for _ in range(IMAGES):
            found, chance = machine.after(disk, nursery, rng, sync=False)
            assert "without sync" in found["wiped"] or not found["wiped"], chance
            assert not found["seen"], f"{chance}: a start after a power cut shows pages"
            assert not found["chained"]


def test_without_sync_what_was_closed_cleanly_is_there(
    machine: Machine, nursery: Nursery, rng: random.Random
) -> None:
    for _ in range(2):
        disk = machine.live(f"{rng.random()}", sync=False, steps=60)
        for _ in range(IMAGES):
            found, _ = machine.after(disk, nursery, rng, sync=False)
            judge = Ledger()
            judge.allowed = dict(machine.ledger.allowed)
            judge.judge(found)


def test_a_cut_in_the_life_after_a_clean_end_keeps_all_or_nothing(
    machine: Machine, nursery: Nursery, rng: random.Random
) -> None:
    """The folder must be marked as open before the first byte of it changes."""
    for _ in range(CUTS // 2):
        shutil.rmtree(machine.folder, ignore_errors=True)
        machine.ledger = Ledger()
        machine.live(f"{rng.random()}", sync=False, steps=30)
        disk = machine.live(f"{rng.random()}", sync=False, cut_after=rng.randint(1, 120))
        for _ in range(IMAGES):
            found, chance = machine.after(disk, nursery, rng, sync=False)
            if found["wiped"]:
                assert not found["seen"], chance
                continue
            judge = Ledger()
            judge.allowed = dict(machine.ledger.allowed)
            judge.judge(found)
