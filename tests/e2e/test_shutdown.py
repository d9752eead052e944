"""SIGTERM: copies finished, everything saved, nothing left behind; a second one ends it now."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from e2e_actor import Actor, LoadThread, prompt
from e2e_kit import assert_idle, serving, tiers, wait_recovered, wait_until
from sidecars import Sidecar

from hicache.errors import UnavailableError

TALKS, PAGES = 40, 14


def end(sidecar: Sidecar, timeout_s: float) -> int:
    """Wait for a sidecar that was told to end; its exit code."""
    child = sidecar._child
    assert child is not None
    code = child.wait(timeout_s)
    sidecar.kill()
    return code


def send(sidecar: Sidecar, number: signal.Signals) -> None:
    assert sidecar._child is not None
    sidecar._child.send_signal(number)


def test_sigterm_saves_everything_and_a_restart_is_warm(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "16MiB", "128MiB", "--grace", "20s")) as sidecar:
        with Actor(sidecar.target) as actor:
            for talk in range(TALKS):
                actor.store(talk, PAGES)  # acknowledged as visible only
            assert sum(tier.pages for tier in actor.client.admin.stats().tiers if tier.name == "disk") < 200
            began = time.monotonic()
            assert sidecar.stop() == 0
            print(f"drained in {time.monotonic() - began:.2f} s")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"log", "disk", "hicache.sock.lock"}
        log = sidecar.log_path.read_text()
        assert "unsaved_pages=0" in log
        assert " level=error " not in log
        sidecar.start()
        with Actor(sidecar.target) as actor:
            wait_recovered(actor.client)
            for talk in range(TALKS):
                seen = actor.read(talk, PAGES)
                assert (seen.granted, seen.wrong_bytes) == (PAGES, 0)
            assert_idle(actor.client)


def test_sigterm_under_load_ends_in_order(tmp_path: Path, seed: int) -> None:
    with serving(tmp_path, *tiers(tmp_path, "4MiB", "128MiB", "--grace", "10s")) as sidecar:
        with (
            Actor(sidecar.target, timeout_s=1.0) as one,
            Actor(sidecar.target, timeout_s=1.0) as other,
            LoadThread(one, seed, 0, durable=False) as load,
            LoadThread(other, seed + 1, 5000, durable=True) as durable,
        ):
            lease = one.ns.fetch(prompt(0, 8), ttl_ms=60_000)
            wait_until("both get on", lambda: min(load.turns, durable.turns) > 10)
            began = time.monotonic()
            assert sidecar.stop() == 0
            took_s = time.monotonic() - began
            wait_until("both are told", lambda: load.errors and durable.errors, 30)
            lease.release()
        assert took_s < 15, "within the grace and a little"
        assert load.crash is None
        assert durable.crash is None
        assert set(load.errors) | set(durable.errors) <= {"UnavailableError", "StaleError"}
        assert load.wrong_bytes == durable.wrong_bytes == 0
        log = sidecar.log_path.read_text()
        assert "Traceback" not in log
        assert " level=error " not in log
        sidecar.start()
        with Actor(sidecar.target) as actor:
            wait_recovered(actor.client)
            for talk, pages in durable.durable.items():
                seen = actor.read(talk, pages)
                assert (seen.granted, seen.wrong_bytes) == (pages, 0)
            for talk, pages in load.tried.items():
                assert actor.read(talk, pages).wrong_bytes == 0
            assert_idle(actor.client)
        print(f"drained under load in {took_s:.2f} s, {load.errors} {durable.errors}")


def test_a_draining_sidecar_takes_nothing_new_and_says_so(tmp_path: Path) -> None:
    with (
        serving(tmp_path, *tiers(tmp_path, "8MiB", "64MiB", "--grace", "6s")) as sidecar,
        Actor(sidecar.target, timeout_s=1.0) as actor,
    ):
        actor.store(0, 8)
        lease = actor.ns.fetch(prompt(0, 8), ttl_ms=60_000)
        room = actor.ns.reserve(prompt(5, 8), ttl_ms=60_000)
        send(sidecar, signal.SIGTERM)
        wait_until("it was told, or it is over", lambda: actor.client.draining or not sidecar.pid, 5)
        if actor.client.draining:
            for call in (
                lambda: actor.ns.fetch(prompt(0, 8)),
                lambda: actor.ns.reserve(prompt(7, 8)),
            ):
                with pytest.raises(UnavailableError):
                    call()
        assert end(sidecar, 15) == 0
        lease.release()
        room.abort()


def test_a_second_sigterm_ends_it_now(tmp_path: Path) -> None:
    with (
        serving(tmp_path, *tiers(tmp_path, "64MiB", "512MiB", "--grace", "60s")) as sidecar,
        Actor(sidecar.target, timeout_s=1.0) as actor,
    ):
        for talk in range(200):
            actor.store(talk, 16)
        lease = actor.ns.fetch(prompt(0, 8), ttl_ms=60_000)
        room = actor.ns.reserve(prompt(5000, 8), ttl_ms=60_000)
        send(sidecar, signal.SIGTERM)
        time.sleep(0.05)
        send(sidecar, signal.SIGTERM)
        began = time.monotonic()
        assert end(sidecar, 20) == 0
        took_s = time.monotonic() - began
        assert took_s < 5, "at once"
        assert not sidecar.socket_path.exists()
        assert not Path(f"{sidecar.socket_path}.fd").exists()
        lease.release()
        room.abort()
        sidecar.start()
        with Actor(sidecar.target) as again:
            wait_recovered(again.client)
            for talk in range(0, 200, 5):
                seen = again.read(talk, 16)
                assert (seen.wrong_bytes, seen.corrupt) == (0, False)
            assert_idle(again.client)
