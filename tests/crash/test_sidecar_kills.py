"""``kill -9`` of a real sidecar under load from two clients: what was acknowledged as durable is read back right."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from crash_world import disk_use
from e2e_actor import Actor, LoadThread
from e2e_kit import assert_sound, serving, tiers, wait_recovered
from sidecars import Sidecar

pytestmark = pytest.mark.slow

KILLS_IN_MAKE_TEST = 2
DISK_BYTES = 96 << 20
#: What a client in the middle of something may be told when its sidecar dies.
TYPED = {"UnavailableError", "StaleError", "NotFoundError", "ConflictError", "ExhaustedError"}
#: Talks stored since the disk was last full of them: older ones may have been evicted.
FRESH_TALKS = 150


def one_kill(
    sidecar: Sidecar, rng: random.Random, first_talk: int, seed: int
) -> tuple[LoadThread, LoadThread]:
    """Load, kill, start again."""
    with Actor(sidecar.target, timeout_s=2.0) as sure, Actor(sidecar.target, timeout_s=2.0) as quick:
        wait_recovered(sure.client)
        durable = LoadThread(sure, seed, first_talk)
        visible = LoadThread(quick, seed + 1, first_talk + 50_000, durable=False)
        with durable, visible:
            deadline = time.monotonic() + 20
            while durable.turns < 3 and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.6))
            sidecar.kill()
    sidecar.start()
    return durable, visible


def kill_often(folder: Path, seed: int, rng: random.Random, kills: int) -> None:
    acknowledged = 0
    with serving(folder, *tiers(folder, "4MiB", "96MiB")) as sidecar:
        for cycle in range(kills):
            told = f"kill {cycle} of HICACHE_TEST_SEED={seed}"
            loads = one_kill(sidecar, rng, 100_000 * (cycle + 1), seed + cycle)
            for load in loads:
                assert load.crash is None, told
                assert load.wrong_bytes == 0, told
                assert set(load.errors) <= TYPED, (told, load.errors)
            assert disk_use(folder / "disk") <= DISK_BYTES, told
            with Actor(sidecar.target) as judge:
                wait_recovered(judge.client)
                for talk, pages in list(loads[0].durable.items())[-FRESH_TALKS:]:
                    seen = judge.read(talk, pages)
                    assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (pages, 0, False), (
                        f"{told}: talk {talk}"
                    )
                    acknowledged += pages
                for talk in rng.sample(sorted(loads[1].tried), min(20, len(loads[1].tried))):
                    seen = judge.read(talk, loads[1].tried[talk])
                    assert (seen.wrong_bytes, seen.corrupt) == (0, False), f"{told}: talk {talk}"
                assert_sound(judge.client)
    print(f"{kills} kills, {acknowledged} durable pages read back")
    assert acknowledged > 3 * kills


def test_durable_pages_survive_the_sidecar(tmp_path: Path, seed: int, rng: random.Random) -> None:
    kill_often(tmp_path, seed, rng, KILLS_IN_MAKE_TEST)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_durable_pages_survive_many_kills(tmp_path: Path, seed: int, rng: random.Random, kills: int) -> None:
    """A twentieth of HICACHE_TEST_KILLS."""
    kill_often(tmp_path, seed, rng, max(1, kills // 20))
