"""kill -9 of the sidecar: what was acknowledged as durable survives, what was not is never wrong."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import numpy as np
import pytest
from e2e_actor import PAGE_BYTES, SHARED_PAGES, Actor, LoadThread, prompt
from e2e_kit import assert_idle, assert_sound, serving, tiers, wait_recovered, wait_until

from hicache.errors import HicacheError, NotFoundError, StaleError, UnavailableError

CYCLES = 5
#: What a client in the middle of something may be told when its sidecar dies.
TYPED = {"UnavailableError", "StaleError", "NotFoundError", "ConflictError"}


@pytest.mark.slow
def test_five_kills_under_load(tmp_path: Path, seed: int, rng: random.Random) -> None:
    """Two clients stay connected all along: one acknowledges every store as durable, one does not."""
    with serving(tmp_path, *tiers(tmp_path, "4MiB", "512MiB")) as sidecar, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Actor(sidecar.target, timeout_s=5.0)) for _ in range(2)]
        loads = [
            stack.enter_context(LoadThread(actor, seed + number, 10_000 * (number + 1), durable=not number))
            for number, actor in enumerate(clients)
        ]
        epochs = set()
        for cycle in range(CYCLES):
            with Actor(sidecar.target) as judge:
                wait_recovered(judge.client)
                epochs.add(judge.client.core.session.epoch)
                held = judge.store(cycle, 10, durable=True)
                assert held.durable == 10
                lease = judge.ns.fetch(prompt(cycle, 10), ttl_ms=60_000)
                done = [load.turns for load in loads]
                wait_until(
                    "both clients get on",
                    lambda done=done: all(
                        load.turns > was + 3 for load, was in zip(loads, done, strict=True)
                    ),
                )
                time.sleep(rng.uniform(0, 0.4))
                promised = dict(loads[0].durable)
                sidecar.kill()
                sidecar.start()
                wait_until("the client is attached again", lambda: judge.client.attached, 10)
                wait_until("it is a new session", lambda lease=lease: not lease.still_valid(), 10)
                with pytest.raises(StaleError):
                    lease.copy_into(np.empty((10, PAGE_BYTES), np.uint8))
                lease.release()
                wait_recovered(judge.client)
                for talk, pages in promised.items():
                    seen = judge.read(talk, pages)
                    assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (pages, 0, False), f"talk {talk}"
                for talk in range(cycle + 1):
                    assert judge.read(talk, 10).granted == 10
                for talk in rng.sample(list(loads[1].tried), 20) if len(loads[1].tried) > 20 else ():
                    seen = judge.read(talk, loads[1].tried[talk])
                    assert (seen.wrong_bytes, seen.corrupt) == (0, False), f"talk {talk}"
                assert_sound(judge.client)
        assert len(epochs) == CYCLES, "every start has an epoch of its own"
        for load in loads:
            assert load.crash is None
            assert load.wrong_bytes == 0
            assert set(load.errors) <= TYPED, load.errors
        print(f"durable talks {len(loads[0].durable)}, errors seen {[load.errors for load in loads]}")
        stack.pop_all().close()
        with Actor(sidecar.target) as judge:
            assert_idle(judge.client)


def test_a_client_that_stays_connected_loses_its_leases_and_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path)) as sidecar, Actor(sidecar.target) as actor:
        actor.store(1, 8, durable=True)
        epoch = actor.client.core.session.epoch
        lease = actor.ns.fetch(prompt(1, 8), ttl_ms=60_000)
        room = actor.ns.reserve(prompt(6, 8), ttl_ms=60_000)
        made = actor.maker.make(actor.seeds(prompt(6, 8)))
        for page in room.missing:
            room.write(page, made[page])
        sidecar.kill()
        wait_until("the client has noticed", lambda: not actor.client.attached, 5)
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            actor.ns.match(prompt(1, 8), timeout_s=0.5)
        assert time.monotonic() - began < 2
        sidecar.start()
        assert actor.matched(1, 8) in {0, 8}, "the first call after the restart goes through"
        assert actor.client.core.session.epoch != epoch
        wait_recovered(actor.client)
        assert not lease.still_valid()
        found = np.empty((8, PAGE_BYTES), np.uint8)
        for call in (lambda: lease.copy_into(found), lambda: lease.renew(1000), lease.views):
            with pytest.raises((StaleError, NotFoundError)):
                call()
        with pytest.raises((StaleError, NotFoundError)):
            room.commit()
        lease.release()
        room.abort()
        assert actor.read(1, 8).granted == 8
        assert actor.matched(6, 8) == SHARED_PAGES, "of what was reserved nothing is there"
        assert actor.store(6, 8).stored == 5
        assert actor.read(6, 8).wrong_bytes == 0
        assert_idle(actor.client)


def test_giving_back_what_a_dead_sidecar_lent_does_not_block(tmp_path: Path) -> None:
    """An engine leaves its ``with`` blocks while its sidecar is gone: that must cost it nothing."""
    with serving(tmp_path, *tiers(tmp_path, disk="")) as sidecar, Actor(sidecar.target) as actor:
        actor.store(1, 8)
        leases = [actor.ns.fetch(prompt(1, 8)) for _ in range(3)]
        room = actor.ns.reserve(prompt(6, 8))
        sidecar.kill()
        wait_until("the client has noticed", lambda: not actor.client.attached, 5)
        began = time.monotonic()
        for lease in leases:
            lease.release()
        room.abort()
        took_s = time.monotonic() - began
        assert took_s < 1.5, f"three releases and one abort took {took_s:.1f} s"


def test_with_nothing_on_disk_a_restart_is_a_cold_start(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, disk="")) as sidecar, Actor(sidecar.target) as actor:
        with contextlib.suppress(HicacheError):
            assert actor.store(1, 8, durable=True).durable == 0, "no tier of it is durable"
        actor.store(1, 8)
        sidecar.kill()
        sidecar.start()
        assert actor.matched(1, 8) == 0
        actor.store(1, 8)
        assert actor.read(1, 8).wrong_bytes == 0
