"""A client that is stopped past its lease and resumed never takes a recycled slot's bytes for its own."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from e2e_actor import PAGE_BYTES, Actor, prompt
from e2e_kit import WorkerProcess, assert_idle, serving, tiers, wait_until

PAGES = 12
TTL_MS, REST_MS = 700, 300
LOST = {"NotFoundError", "StaleError"}


@pytest.mark.parametrize("verify", ["off", "on-copy"])
def test_a_stopped_client_never_takes_recycled_slots_for_its_own(
    tmp_path: Path, rng: random.Random, verify: str
) -> None:
    """With ``verify`` off, nothing but deadline and generations stands between it and the others' bytes."""
    flags = tiers(tmp_path, "4MiB", "", "--expiry-grace", f"{REST_MS}ms")
    with serving(tmp_path, *flags) as sidecar, contextlib.ExitStack() as stack:
        writer = stack.enter_context(Actor(sidecar.target))
        reader = stack.enter_context(WorkerProcess(sidecar.target))
        reader.ask("connect")
        foreign = 0
        for turn in range(4):
            talk, fresh = 10 * turn, 100 + 50 * turn
            writer.store(talk, PAGES)
            reader.send("copy_until_lost", talk=talk, pages=PAGES, ttl_ms=TTL_MS, verify=verify)
            begun = reader.get()
            assert begun == {"granted": PAGES, "wrong": 0, "valid": True}
            time.sleep(rng.uniform(0, 0.2))  # anywhere in its copying
            reader.signal(signal.SIGSTOP)
            try:
                wait_until("the lease is gone", lambda: not writer.client.admin.stats().leases, 10)
                for other in range(fresh, fresh + 40):  # twice the tier
                    writer.store(other, PAGES)
                assert writer.matched(talk, PAGES) <= 3, "its pages are gone, its slots are others' now"
            finally:
                reader.signal(signal.SIGCONT)
            end = reader.get()
            assert end["wrong"] == 0
            assert end["raised"] in LOST
            assert end["valid"] is False
            foreign += end["foreign_bytes"]
        assert foreign > 0, "the raw views did show other bytes: the slots were recycled under the client"
        assert reader.ask("read", talk=fresh + 39, pages=PAGES) == {
            "matched": PAGES,
            "granted": PAGES,
            "wrong_bytes": 0,
            "corrupt": False,
        }
        assert_idle(writer.client)


def test_the_slots_of_an_expired_lease_rest_for_the_grace(tmp_path: Path) -> None:
    flags = tiers(tmp_path, "2MiB", "", "--expiry-grace", "1500ms")
    with serving(tmp_path, *flags) as sidecar, contextlib.ExitStack() as stack:
        reader = stack.enter_context(Actor(sidecar.target))
        writer = stack.enter_context(WorkerProcess(sidecar.target))
        writer.ask("connect")
        reader.store(0, PAGES)
        lease = reader.ns.fetch(prompt(0, PAGES), ttl_ms=400)
        views = lease.numpy()
        writer.send("flood", first_talk=100, talks=60, pages=PAGES, wait_ms=10_000)
        began = time.monotonic()
        while lease.still_valid():
            time.sleep(0.01)
        expired_s = time.monotonic() - began
        assert expired_s < 0.4, "the client's own deadline comes before the server's"
        while time.monotonic() - began < 1.5:  # within TTL + grace of the server's clock
            assert reader.wrong(0, np.stack(views)) == 0, "the slots were used again before they had rested"
        assert writer.get()["refused"] == 0
        found = np.empty((PAGES, PAGE_BYTES), np.uint8)
        with pytest.raises(Exception, match="expired"):
            lease.copy_into(found)
        lease.release()
        assert_idle(reader.client)


def test_a_renewed_lease_outlives_its_first_term(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "2MiB", "")) as sidecar, contextlib.ExitStack() as stack:
        reader = stack.enter_context(Actor(sidecar.target))
        writer = stack.enter_context(WorkerProcess(sidecar.target))
        writer.ask("connect")
        reader.store(0, PAGES)
        with reader.ns.fetch(prompt(0, PAGES), ttl_ms=500) as lease:
            writer.send("flood", first_talk=100, talks=60, pages=PAGES, wait_ms=10_000)
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                lease.renew(500)
                assert reader.look(lease, 0).wrong_bytes == 0
                time.sleep(0.1)
            assert lease.still_valid()
        assert writer.get()["refused"] == 0
        assert_idle(reader.client)
