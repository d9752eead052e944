"""Events that name what is not there, and what the engine tells of itself when it breaks."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from worlds import (
    DISK,
    HOST,
    LORA,
    ME,
    NS,
    TENANT,
    act,
    ev,
    fetch,
    line,
    matched,
    pages,
    put,
    tier,
    where,
    world,
)

from hicache.engine import EngineOptions
from hicache.errors import ConfigError, ErrorCode, NotFoundError, ViolationError
from hicache.types import Ack, Outcome


@pytest.mark.parametrize(
    ("make", "fields", "code"),
    [
        (ev.Fetch, {"session": ME, "namespace": 77, "prompt": b""}, ErrorCode.NOT_FOUND),
        (ev.Fetch, {"session": 77, "namespace": NS, "prompt": b""}, ErrorCode.NOT_FOUND),
        (ev.Reserve, {"session": ME, "namespace": 77, "prompt": b""}, ErrorCode.NOT_FOUND),
        (ev.Reserve, {"session": 77, "namespace": NS, "prompt": b""}, ErrorCode.NOT_FOUND),
        (ev.Prefetch, {"session": 77, "namespace": NS, "prompt": b"", "tier": 0}, ErrorCode.NOT_FOUND),
        (ev.Prefetch, {"session": ME, "namespace": NS, "prompt": b"", "tier": 2}, ErrorCode.INVALID),
        (ev.Prefetch, {"session": ME, "namespace": NS, "prompt": b"", "tier": -1}, ErrorCode.INVALID),
        (ev.Pin, {"namespace": 77, "prompt": b"", "tier": 0}, ErrorCode.NOT_FOUND),
        (ev.Pin, {"namespace": NS, "prompt": b"", "tier": 9}, ErrorCode.INVALID),
        (ev.Evict, {"namespace": 77, "prompt": b"", "tier": 0}, ErrorCode.NOT_FOUND),
        (ev.Evict, {"namespace": NS, "prompt": b"", "tier": -2}, ErrorCode.INVALID),
        (ev.Clear, {"namespace": 77}, ErrorCode.NOT_FOUND),
        (ev.Commit, {"session": 77, "reservation": 5, "pieces": [], "source": None}, ErrorCode.NOT_FOUND),
    ],
)
def test_calls_that_name_what_is_not_there_are_refused(make: type, fields: dict, code: ErrorCode):
    """NOT_FOUND or INVALID, nothing changed, and the engine goes on."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4))
    answer = shell.ask(make, **fields)
    assert isinstance(answer, act.Failure)
    assert answer.code is code
    assert matched(shell, line(0, 4)) == 4


@pytest.mark.parametrize(
    "event",
    [
        ev.Touch(77, b""),
        ev.PageCorrupt(77, 0, line(0, 1)),
        ev.PageCorrupt(NS, 9, line(0, 1)),
        ev.TierLatched(9, readable=False),
        ev.Abort(77, 1),
        ev.CancelOperation(77, 1),
        ev.ReleaseLeases(77, [1]),
        ev.Unpin(77),
        ev.SessionEnded(77, dead=True),
        ev.SessionSuspended(77, 100),
        ev.SessionResumed(77),
        ev.Recovered(NS, 9, [], [], [], [], done=True),
        ev.Tick(),
    ],
)
def test_reports_about_what_is_not_there_are_dropped(event: ev.Event):
    """What they name may have gone while they were on their way."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4))
    shell.handle(event)
    assert matched(shell, line(0, 4)) == 4


def test_reads_of_what_is_not_there_say_so():
    """NotFoundError, never a KeyError."""
    engine = world(tier(HOST, 8)).engine
    for read in (
        lambda: engine.match(77, b""),
        lambda: engine.tree_view(77),
        lambda: engine.lease_view(ME, 1),
        lambda: engine.lease_prompt(ME, 1),
        lambda: engine.operation_view(ME, 1),
    ):
        with pytest.raises(NotFoundError):
            read()


def test_empty_prompts_are_fine():
    """Nothing to fetch, nothing missing; an Evict without a prompt is everything."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    assert fetch(shell, b"").matched_pages == 0
    assert shell.ask(ev.Reserve, session=ME, namespace=NS, prompt=b"") == act.ReserveResult(0, 0, 0, 0)
    assert shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=b"", tier=0) == act.OperationResult(
        0, 0, 0
    )
    assert shell.ask(ev.Evict, namespace=NS, prompt=b"", tier=-1) == act.EvictResult(4, 0)


def test_opening_a_namespace_twice_changes_nothing():
    """First use in this process; idempotent."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    shell.open_namespace(NS, shell.namespaces[NS])
    assert matched(shell, line(0, 4)) == 4


def test_an_internal_error_tells_the_story_without_content():
    """The last events, by their small fields; nothing that an event carries is kept alive."""
    shell = world(tier(HOST, 8), story_events=4)
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 4))
    shell.engine._core.leases[lease.lease].runs[0].pins[0] = 0
    with pytest.raises(ViolationError) as caught:
        shell.engine.check()
    assert caught.value.story == shell.engine.story()
    with pytest.raises(ViolationError) as caught:
        shell.engine.handle(ev.ReleaseLeases(ME, [lease.lease]), shell.now)
    story = caught.value.story
    assert len(story) == 4
    assert story[-1] == f"ReleaseLeases(session={ME}, leases=({lease.lease},))"
    assert "prompt=<16 bytes>" in story[-2]
    assert "the last events before it" in str(caught.value)


def test_the_story_keeps_no_clients_memory():
    """A commit's source can be freed as soon as its copy is done."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    kept = [value for _, values in shell.engine._story for value in values]
    assert not any(isinstance(value, bytes | memoryview) for value in kept)
    assert any("source=" in entry for entry in shell.engine.story())


def test_a_step_that_the_residency_table_lacks_is_a_violation():
    """A completion that nobody waits for is our own bug, not a client's."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    with pytest.raises(ViolationError):
        shell.engine.handle(ev.CopyDone(999), shell.now)
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    run = next(iter(shell.engine._core.runs.values()))
    with pytest.raises(ViolationError):
        shell.engine._core.set_state(run, 0, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"tiers": ()},
        {"selective_hits": 0},
        {"max_copies": 0},
        {"free_low_fraction": 1.0},
        {"default_ttl_ms": 0},
        {"default_ttl_ms": 10, "max_ttl_ms": 5},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict):
    """ConfigError, at once."""
    with pytest.raises(ConfigError):
        EngineOptions(**({"tiers": (tier(HOST, 8),)} | settings))


def test_stats_and_tree_view_show_what_there_is():
    """Occupancy by tier in bytes, nodes with their namespaces, and how many were left out."""
    shell = world(tier(HOST, 32, 2), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    put(shell, line(0, 2) + pages(77))
    put(shell, line(0, 3), namespace=TENANT)
    fetch(shell, line(0, 2))
    stats = shell.engine.stats()
    assert [view.used_bytes for view in stats.tiers] == [8 * 64, 4 * 4096]
    assert (stats.pages, stats.leases, stats.namespaces) == (8, 1, 3)
    nodes, omitted = shell.engine.tree_view()
    assert (sum(node.pages for node in nodes), omitted) == (8, 0)
    assert len([node for node in nodes if node.namespace]) == 2
    assert sum(node.pinned_pages for node in nodes) == 2
    assert shell.engine.tree_view(NS, max_nodes=1)[1] == 2
    assert shell.engine.tree_view(LORA) == ([], 0)


def test_match_reports_stretches_by_their_best_tier():
    """Host where it is in host, disk for the rest; nothing changes."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 6), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 6), tier=0)
    fetch(shell, line(0, 2))
    shell.finish_all()
    view = shell.engine.match(NS, line(0, 5))
    assert (view.pages, view.run_pages, view.run_tier) == (5, [2, 3], [0, 1])


def test_evicting_from_one_tier_demotes_and_counts_only_what_left():
    """Dirty pages drain, those above them are copied; a second call finishes the work."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 4))
    put(shell, line(0, 2) + pages(77))
    first = shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=0)
    assert first == act.EvictResult(2, 2)
    shell.finish_all()
    assert shell.ask(ev.Evict, namespace=NS, prompt=b"", tier=0).pages == 1
    shell.finish_all()
    assert shell.ask(ev.Evict, namespace=NS, prompt=b"", tier=0) == act.EvictResult(2, 0)
    assert where(shell, line(0, 4)) == ["-", "R"]
    assert shell.ask(ev.Evict, namespace=NS, prompt=b"", tier=1) == act.EvictResult(5, 0)


def test_a_copy_in_that_comes_back_after_its_tier_is_gone_is_a_failure():
    """No page appears in a tier that cannot be read."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    granted = shell.reserve(ME, NS, line(0, 4))
    request = next(shell.requests)
    shell.handle(ev.Commit(request, ME, granted.reservation, [(0, 4)], (NS, line(0, 4)), last=True))
    shell.engine.handle(ev.TierLatched(0, readable=False), shell.now)
    shell.finish(0, [Outcome.OK] * 4)
    assert shell.replies[request] == act.CommitResult(0, 0, 0, 4)


def test_every_event_has_a_handler_and_a_place_in_the_story():
    """A new event cannot be forgotten."""
    from hicache.engine import story
    from hicache.engine.engine import _HANDLERS

    kinds = {kind for kind in vars(ev).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    events = kinds - {ev.Namespace, ev.Use}
    assert set(_HANDLERS) == events == set(story._NAMES)
