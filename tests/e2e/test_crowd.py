"""Many client processes at once, some of them killed while they hold things."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from e2e_actor import Actor
from e2e_kit import WorkerProcess, assert_idle, serving, tiers, wait_until, within_capacity

CLIENTS = 20
VICTIMS = 2
HELD_LEASES, HELD_RESERVATIONS = 30, 10
TTL_MS = 60_000  # what the dead held must go long before


@pytest.mark.slow
def test_the_death_of_clients_among_twenty_harms_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "24MiB")) as sidecar, contextlib.ExitStack() as stack:
        watcher = stack.enter_context(Actor(sidecar.target))
        for talk in range(HELD_LEASES):
            watcher.store(talk, 8)
        workers = [stack.enter_context(WorkerProcess(sidecar.target)) for _ in range(CLIENTS)]
        for worker in workers:
            worker.send("connect")
        for worker in workers:
            worker.get()
        victims, others = workers[:VICTIMS], workers[VICTIMS:]
        for number, worker in enumerate(others):
            worker.send("work", turns=25, seed=number, first_talk=1000 + 4 * number)
        for number, victim in enumerate(victims):
            fresh = list(range(9000 + 100 * number, 9000 + 100 * number + HELD_RESERVATIONS))
            held = victim.ask(
                "hold", talks=list(range(HELD_LEASES)), pages=8, reserve_talks=fresh, ttl_ms=TTL_MS
            )
            assert held["granted"] == 8 * HELD_LEASES
            assert held["missing"] >= 5 * HELD_RESERVATIONS
        before = watcher.client.admin.stats()
        assert before.leases >= VICTIMS * HELD_LEASES
        assert before.reservations >= VICTIMS * HELD_RESERVATIONS
        for victim in victims:
            victim.kill()

        def released() -> bool:  # what the others hold for a moment is one thing each
            now = watcher.client.admin.stats()
            return now.leases <= len(others) and now.reservations <= len(others)

        took_s = wait_until("what the dead held is gone", released, 10)
        assert took_s < 2, "the death of a local process is seen at once, not when its leases expire"
        tallies = [worker.get() for worker in others]
        assert all(tally["wrong"] == tally["corrupt"] == tally["refused"] == 0 for tally in tallies), tallies
        assert sum(tally["granted"] for tally in tallies) > 0
        for worker in others:
            worker.close()
        within_capacity(assert_idle(watcher.client))
        wait_until("only the watcher is attached", lambda: watcher.client.admin.stats().sessions == 1)
        for talk in range(HELD_LEASES):
            assert watcher.read(talk, 8).wrong_bytes == 0
