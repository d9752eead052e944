"""A disk that fills up, breaks, crawls or turns read-only under a real sidecar, and comes back.

The tier latches, demotions become drops, the host tier goes on answering, nothing is ever wrong; when the disk is well
again the tier comes back by itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_shim import FINE, IO_SYNC, IO_WRITE, NO_SPACE, READ_ONLY, SLOW, Control, shim_env
from e2e_actor import Actor
from e2e_kit import assert_sound, free_port, metric, serving, tiers, wait_until

from hicache.cli.sidecar import Sidecar
from hicache.errors import HicacheError
from hicache.rpc.client.results import TierStats

pytestmark = pytest.mark.slow

PAGES = 10
PROBES = importlib.util.find_spec("hicache.runtime.watch") is not None
RECOVERS_S = 30.0 if PROBES else 6.0
FAULTS = {"no-space": NO_SPACE, "io-write": IO_WRITE, "io-sync": IO_SYNC, "read-only": READ_ONLY}


class Patient:
    """A sidecar on a disk of which the test decides how it is, and a client that knows every byte."""

    def __init__(self, sidecar: Sidecar, actor: Actor, control: Control, port: int) -> None:
        self.sidecar, self.actor, self.control, self.port = sidecar, actor, control, port
        self._talk = 0

    def disk(self) -> TierStats:
        return next(tier for tier in self.actor.client.admin.stats().tiers if tier.kind == "disk")

    def store(self, talks: int, *, durable: bool = False) -> list[int]:
        """Store new talks; returns their numbers."""
        first, self._talk = self._talk, self._talk + talks
        for talk in range(first, self._talk):
            self.actor.store(talk, PAGES, durable=durable)
        return list(range(first, self._talk))

    def read(self, talks: list[int]) -> int:
        """Pages that can be read; every byte of them is right."""
        granted = 0
        for talk in talks:
            seen = self.actor.read(talk, PAGES)
            assert (seen.wrong_bytes, seen.corrupt) == (0, False), f"talk {talk}"
            granted += seen.granted
        return granted

    def health(self, service: str) -> str:
        """What gRPC's health service says."""
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        with grpc.insecure_channel(self.sidecar.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))

    def latch(self, fault: int) -> None:
        """Make the disk bad, and store until the tier has noticed."""
        self.control.set(fault)
        deadline = time.monotonic() + 20
        while self.disk().state == "ok":
            assert time.monotonic() < deadline, "the tier never noticed"
            with contextlib.suppress(HicacheError):
                self.store(2, durable=True)


@pytest.fixture
def patient(tmp_path: Path, shim: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    (tmp_path / "disk").mkdir()
    control, port = Control(tmp_path / "control"), free_port()
    for name, value in shim_env(shim, tmp_path / "disk", control=control.path).items():
        monkeypatch.setenv(name, value)
    flags = ("--disk-sync", "--metrics-port", str(port))
    with (
        serving(tmp_path, *tiers(tmp_path, "8MiB", "256MiB", *flags)) as sidecar,
        Actor(sidecar.target, timeout_s=20.0) as actor,
    ):
        yield Patient(sidecar, actor, control, port)
        control.set(FINE)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_disk_costs_the_disk_tier_and_nothing_else(patient: Patient, fault: str) -> None:
    kept = patient.store(30, durable=True)
    assert patient.disk().state == "ok"
    patient.latch(FAULTS[fault])
    before = patient.disk()
    assert before.state == "read-only"
    assert metric(patient.port, "hicache_tier_state", state="read-only", tier="disk") == 1
    assert metric(patient.port, "hicache_tier_degraded", tier="disk") == 1
    assert before.reason, "why is told as well"
    fresh = patient.store(120)  # three times what the host tier holds
    assert patient.read(fresh[-20:]) == 20 * PAGES, "the host tier goes on"
    assert patient.disk().pages == before.pages, "nothing is written any more"
    stats = patient.actor.client.admin.stats()
    assert stats.counters["unsaved_dropped_pages"] > 0 or sum(t.dropped_pages for t in stats.tiers) > 0
    assert patient.read(kept) > 0, "what is on the disk can still be read"
    assert_sound(patient.actor.client)


@pytest.mark.parametrize("fault", ["no-space", "io-sync"])
def test_no_page_is_called_durable_that_is_not(patient: Patient, fault: str) -> None:
    kept = patient.store(5, durable=True)
    patient.control.set(FAULTS[fault])
    for talk in range(1000, 1010):
        with contextlib.suppress(HicacheError):
            assert patient.actor.store(talk, PAGES, durable=True).durable == 0
    patient.control.set(FINE)
    patient.sidecar.kill()
    patient.sidecar.start()
    wait_until("the client is attached again", lambda: patient.actor.client.attached, 10)
    wait_until("recovered", lambda: not patient.actor.client.admin.stats().counters["recovering"])
    assert patient.read(kept) == 5 * PAGES


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.xfail(not PROBES, strict=True, reason="this runtime does not probe a latched tier")
def test_the_tier_comes_back_by_itself(patient: Patient, fault: str) -> None:
    patient.store(5, durable=True)
    patient.latch(FAULTS[fault])
    patient.store(20)
    assert patient.health("") == "SERVING", "the sidecar serves without its disk"
    assert patient.health("hicache.tier.disk") == "NOT_SERVING"
    patient.control.set(FINE)
    wait_until("the tier is back", lambda: patient.disk().state == "ok", RECOVERS_S)
    wait_until("its health, too", lambda: patient.health("hicache.tier.disk") == "SERVING")
    kept = patient.store(10, durable=True)
    assert_sound(patient.actor.client)
    patient.sidecar.kill()
    patient.sidecar.start()
    wait_until("the client is attached again", lambda: patient.actor.client.attached, 10)
    wait_until("recovered", lambda: not patient.actor.client.admin.stats().counters["recovering"])
    assert patient.read(kept) == 10 * PAGES


def test_a_disk_that_takes_seconds_a_write_holds_nobody_up(patient: Patient) -> None:
    kept = patient.store(10, durable=True)
    patient.control.set(SLOW, 1000)
    slowest = 0.0
    for _ in range(15):
        began = time.monotonic()
        fresh = patient.store(1)
        assert patient.read(fresh) == PAGES
        slowest = max(slowest, time.monotonic() - began)
    print(f"slowest store and read of {PAGES} pages beside writes of a second: {slowest * 1000:.0f} ms")
    assert patient.read(kept) == 10 * PAGES
    assert patient.disk().state == "ok", "slow is not broken"
    patient.control.set(FINE)
    patient.store(1, durable=True)
    assert_sound(patient.actor.client)
