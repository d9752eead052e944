"""A sidecar with a device tier (in ordinary memory): leases there and in the host's, from wherever the pages are."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from e2e_actor import Actor, prompt
from e2e_kit import assert_idle, assert_sound, serving, tiers, wait_until, within_capacity

from hicache.errors import ExhaustedError, NotFoundError, UnsupportedError

pytest.importorskip("torch", reason="the device tier needs torch")

DEVICE, HOST, DISK = 0, 1, 2
PAGES = 12


def flags(folder: Path, device: str = "1MiB", host: str = "4MiB") -> tuple[str, ...]:
    return tiers(folder, host, "64MiB", "--device", "cpu", "--device-bytes", device)


def leave(actor: Actor, talk: int, *gone: int) -> None:
    """Have a talk leave tiers; what it must be copied for is copied by then."""
    tokens = prompt(talk, PAGES)
    for tier in gone:
        wait_until(
            f"the talk leaves tier {tier}",
            lambda tier=tier: not any(vars_of(actor.client.admin.evict(actor.ns, tokens, tier=tier))),
        )


def vars_of(result: object) -> tuple[int, int]:
    return result.pages, result.kept_pages  # type: ignore[attr-defined]


def test_pages_are_read_from_the_device_wherever_they_were(tmp_path: Path) -> None:
    with serving(tmp_path, *flags(tmp_path)) as sidecar, Actor(sidecar.target) as actor:
        actor.store(1, PAGES, durable=True)
        with actor.ns.fetch(prompt(1, PAGES), wait_ms=10_000) as lease:  # a copy in the host, too
            assert lease.zero_copy and lease.granted_pages == PAGES
        for gone, source in (((), "device"), ((DEVICE,), "host"), ((DEVICE, HOST), "disk")):
            leave(actor, 1, *gone)
            with actor.ns.fetch(prompt(1, PAGES + 3), wait_ms=10_000, device=True) as lease:
                assert lease.tier_pages == {source: PAGES}
                seen = actor.look(lease, 1)
                assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (PAGES, 0, False)
        stats = {tier.name: tier for tier in assert_idle(actor.client).tiers}
        assert [stats[name].hit_pages for name in ("device", "host", "disk")] == [2 * PAGES, PAGES, PAGES]


def test_leases_in_both_tiers_hold_on_to_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, *flags(tmp_path)) as sidecar, Actor(sidecar.target) as actor:
        actor.store(1, PAGES)
        host = actor.ns.fetch(prompt(1, PAGES), wait_ms=10_000)
        with actor.ns.fetch(prompt(1, PAGES), wait_ms=10_000, device=True) as device:
            for tier in (DEVICE, HOST):
                assert vars_of(actor.client.admin.evict(actor.ns, prompt(1, PAGES), tier=tier)) == (0, PAGES)
            assert actor.look(device, 1).wrong_bytes == actor.look(host, 1).wrong_bytes == 0
        leave(actor, 1, DEVICE)
        assert actor.look(host, 1).granted == PAGES and host.still_valid()
        host.release()
        assert_idle(actor.client)


def test_without_a_device_tier_it_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "4MiB", "")) as sidecar, Actor(sidecar.target) as actor:
        actor.store(1, 2)
        with pytest.raises(UnsupportedError):
            actor.ns.fetch(prompt(1, 2), device=True)
        assert actor.read(1, 2).granted == 2


class Player(threading.Thread):
    """One client at random: what it reads is what was stored; what nobody has stored does not match."""

    def __init__(self, target: str, seed: int, longest: dict[int, int], until: float) -> None:
        super().__init__(daemon=True)
        self.actor = Actor(target)
        self.rng = random.Random(seed)
        self.longest = longest  # of each talk, how many pages anybody has begun to store
        self.until = until
        self.pages = {"device": 0, "host": 0}
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            with self.actor:
                while time.monotonic() < self.until:
                    self.turn()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.problem = error

    def turn(self) -> None:
        talk, pages, draw = self.rng.randint(1, 8), self.rng.randint(1, 20), self.rng.random()
        if draw < 0.35:
            self.longest[talk] = max(self.longest[talk], pages)
            try:
                self.actor.store(talk, pages, wait_ms=200)
            except ExhaustedError:
                return
        elif draw < 0.95:
            self.read(talk, pages, device=self.rng.random() < 0.6)
        else:
            tier = self.rng.choice([DEVICE, HOST])
            self.actor.client.admin.evict(self.actor.ns, prompt(talk, pages), tier=tier)

    def read(self, talk: int, pages: int, *, device: bool) -> None:
        most = max(self.longest.values())  # talks of one group begin alike
        with self.actor.ns.fetch(
            prompt(talk, pages), wait_ms=self.rng.choice([0, 300]), device=device
        ) as lease:
            assert lease.matched_pages <= min(pages, most)
            try:
                seen = self.actor.look(lease, talk)
            except NotFoundError:  # a page of it was lost meanwhile
                return
            assert (seen.wrong_bytes, seen.corrupt) == (0, False)
            self.pages["device" if device else "host"] += seen.granted


def test_two_clients_at_random(tmp_path: Path) -> None:
    """Tiers that are too small for what is stored: leases in both, promotions, evictions, all at once."""
    with serving(tmp_path, *flags(tmp_path, "512KiB", "1MiB")) as sidecar:
        longest = dict.fromkeys(range(1, 9), 0)
        until = time.monotonic() + 3.0
        players = [Player(sidecar.target, seed, longest, until) for seed in (1, 2)]
        for player in players:
            player.start()
        for player in players:
            player.join(30)
            assert not player.is_alive(), "a client hangs"
            assert player.problem is None, repr(player.problem)
        with Actor(sidecar.target) as actor:
            within_capacity(assert_idle(actor.client))
            assert_sound(actor.client)
        for where in ("device", "host"):
            assert sum(player.pages[where] for player in players) > 20, where
