"""More than fits: nothing is refused while anything can move, everything is counted, leased pages stay right."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from pathlib import Path

import pytest
from e2e_actor import PAGE_BYTES, Actor, prompt
from e2e_kit import (
    WorkerProcess,
    assert_idle,
    assert_sound,
    free_port,
    metric,
    serving,
    tiers,
    within_capacity,
)

from hicache.errors import ExhaustedError
from hicache.rpc.client import Lease

HOST_BYTES = 8 << 20
TALK_PAGES = 16
SHARED = 3

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the device tier needs torch"
)


@pytest.mark.parametrize(
    ("disk", "more"),
    [
        pytest.param("128MiB", (), id="disk_holds_all"),
        pytest.param("16MiB", (), id="disk_holds_a_quarter"),
        pytest.param("", (), id="host_only"),
        pytest.param(
            "24MiB",
            ("--device", "cpu", "--device-bytes", "4MiB"),
            id="device_host_disk",
            marks=needs_torch,
        ),
    ],
)
def test_eight_times_the_host_tier_at_full_speed(tmp_path: Path, disk: str, more: tuple[str, ...]) -> None:
    talks = 8 * HOST_BYTES // (TALK_PAGES * PAGE_BYTES)
    port = free_port()
    flags = tiers(tmp_path, "8MiB", disk, "--metrics-port", str(port), *more)
    with serving(tmp_path, *flags) as sidecar, contextlib.ExitStack() as stack:
        writers = [stack.enter_context(WorkerProcess(sidecar.target)) for _ in range(2)]
        reader = stack.enter_context(Actor(sidecar.target))
        half = talks // 2
        for number, writer in enumerate(writers):
            writer.send("flood", first_talk=number * half, talks=half, pages=TALK_PAGES, wait_ms=30_000)
        results = [writer.get() for writer in writers]
        assert sum(result["refused"] for result in results) == 0
        stored = sum(result["stored"] for result in results)
        assert stored >= 2 * half * (TALK_PAGES - SHARED)
        stats = assert_idle(reader.client)
        within_capacity(stats)
        dropped = sum(tier.dropped_pages for tier in stats.tiers)
        assert stored == stats.tree_pages + dropped, "every page is there, or counted as dropped"
        assert metric(port, "hicache_refused_calls_total") == 0
        if disk == "128MiB":
            assert dropped == metric(port, "hicache_unsaved_dropped_pages_total")
        right = 0
        for talk in range(2 * half):
            seen = reader.read(talk, TALK_PAGES, wait_ms=30_000)
            assert seen.wrong_bytes == 0
            assert not seen.corrupt
            assert seen.granted == seen.matched, "what matches can be read"
            right += seen.granted
        took_s = max(result["took_s"] for result in results)
        print(f"{stored} pages in {took_s:.1f} s, {dropped} dropped, {right} read back")
        within_capacity(assert_idle(reader.client))


def lease_everything(actor: Actor) -> tuple[list[tuple[int, Lease]], ExhaustedError]:
    """Store and lease, at last page by page, until the host tier has no page that could move; what refuses then."""
    leases: list[tuple[int, Lease]] = []
    pages = TALK_PAGES
    for talk in range(200):
        try:
            actor.store(talk, pages, wait_ms=200)
        except ExhaustedError as error:
            if pages == SHARED + 1:
                return leases, error
            pages = SHARED + 1
            continue
        lease = actor.ns.fetch(prompt(talk, pages), ttl_ms=60_000, wait_ms=500)
        if lease.granted_pages == pages:
            leases.append((talk, lease))
        else:  # some of it had to leave for the rest of it
            lease.release()
            pages = SHARED + 1
    raise AssertionError("a tier of leased pages still takes more")


@pytest.mark.parametrize("disk", ["64MiB", ""], ids=["host_and_disk", "host_only"])
def test_with_everything_leased_stores_are_refused_and_leased_pages_stay_right(
    tmp_path: Path, disk: str
) -> None:
    with serving(tmp_path, *tiers(tmp_path, "8MiB", disk)) as sidecar, contextlib.ExitStack() as stack:
        holder = stack.enter_context(Actor(sidecar.target))
        writer = stack.enter_context(Actor(sidecar.target))
        leases, refused = lease_everything(holder)
        assert refused.retry_after_ms > 0
        held = sum(lease.granted_pages - SHARED for _, lease in leases)
        assert held * PAGE_BYTES > HOST_BYTES * 0.95, "not before the tier is full"
        began = time.monotonic()
        with pytest.raises(ExhaustedError) as again:
            writer.store(500, TALK_PAGES, wait_ms=1_000)
        assert 0.9 < time.monotonic() - began < 5, "it was waited for, as asked"
        assert again.value.retry_after_ms > 0
        with pytest.raises(ExhaustedError) as dropping:
            writer.ns.reserve(prompt(501, TALK_PAGES), wait_ms=500, drop_pressure=True)
        assert dropping.value.retry_after_ms > 0
        for talk, lease in leases:
            seen = holder.look(lease, talk)
            assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (len(lease), 0, False)
            assert lease.still_valid()
        assert_sound(writer.client)
        holder.client.release(lease for _, lease in leases)
        assert writer.store(500, TALK_PAGES).stored == TALK_PAGES - SHARED, "room again"
        assert writer.read(500, TALK_PAGES).granted == TALK_PAGES
        within_capacity(assert_idle(writer.client))


def test_with_everything_pinned_stores_are_refused_until_the_pins_end(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "8MiB", "")) as sidecar, Actor(sidecar.target) as actor:
        pins, talk = [], 0
        while talk < 200:
            try:
                actor.store(talk, TALK_PAGES, wait_ms=300)
            except ExhaustedError as error:
                assert error.retry_after_ms > 0
                break
            pins.append(actor.client.admin.pin(actor.ns, prompt(talk, TALK_PAGES), "host"))
            talk += 1
        assert sum(pin.pages - SHARED for pin in pins) * PAGE_BYTES > HOST_BYTES * 0.8
        for pinned, pin in enumerate(pins):
            with actor.ns.fetch(prompt(pinned, TALK_PAGES), wait_ms=0) as lease:
                assert lease.tier_pages["host"] >= pin.pages
                assert actor.look(lease, pinned).wrong_bytes == 0
        assert_sound(actor.client)
        for pin in pins:
            actor.client.admin.unpin(pin.pin)
        assert actor.store(500, TALK_PAGES).stored == TALK_PAGES - SHARED
        assert_idle(actor.client)


def test_a_waiting_store_gets_the_room_that_a_lease_gives_back(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "8MiB")) as sidecar, contextlib.ExitStack() as stack:
        holder = stack.enter_context(Actor(sidecar.target))
        worker = stack.enter_context(WorkerProcess(sidecar.target))
        worker.ask("connect")
        leases, _ = lease_everything(holder)
        worker.send("store", talk=700, pages=TALK_PAGES, wait_ms=20_000)
        time.sleep(0.5)
        assert holder.client.admin.stats().waiting == 1
        began = time.monotonic()
        for _, lease in leases[:3]:
            lease.release()
        assert worker.get()["stored"] == TALK_PAGES - SHARED
        assert time.monotonic() - began < 3
        for talk, lease in leases[3:]:
            assert holder.look(lease, talk).wrong_bytes == 0
        holder.client.release(lease for _, lease in leases)
        assert_idle(holder.client)
