"""What is let into lower tiers, policies by tier, ghosts, and what is said of a use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from remembering import RememberingPolicy
from worlds import DEVICE, DISK, HOST, ME, NS, act, ev, fetch, line, matched, pages, put, tier, where, world

from hicache.engine import EngineOptions, gate
from hicache.errors import ConfigError
from hicache.keys import chain_keys, fingerprint
from hicache.policy.lru import LruPolicy
from hicache.policy.sieve import SievePolicy
from hicache.types import Ack, Namespace, SymbolKind, Use, WritePolicy


def pool(shell, index):
    """The pool of NS in a tier."""
    return shell.engine._core.namespaces[NS].pools[index]


def counters(shell):
    """The live counters."""
    return shell.engine._core.counters


# --- admission


def test_a_refused_victim_is_dropped_without_a_copy():
    """It gives room at once, and is counted as refused, not as unsaved."""
    shell = world(tier(HOST, 8), tier(DISK, 100), admission="never")
    put(shell, line(0, 4))
    put(shell, line(50, 8))
    assert not [each for each in shell.moved if isinstance(each, act.Copy)]
    assert matched(shell, line(0, 4)) == 0
    assert counters(shell).refused_pages == [0, 4]
    assert counters(shell).dropped_pages == [4, 0]
    assert counters(shell).unsaved_dropped_pages == 0


def test_admission_is_asked_once_between_two_uses():
    """Plans that are abandoned, or leave a part, do not ask again; a use does."""
    shell = world(tier(HOST, 8), tier(DISK, 100), admission="twice")
    put(shell, line(0, 4))
    put(shell, line(50, 4))
    admission = pool(shell, 1).admission
    put(shell, line(60, 1))
    put(shell, line(70, 1))
    assert [(info.pages, hits) for info, hits in admission.asked] == [(4, 0)]
    assert matched(shell, line(0, 4)) == 2
    fetch(shell, line(0, 4), ttl_ms=1)
    shell.advance(10_000)
    shell.advance(10_000)
    put(shell, line(80, 7))  # takes the second line, too
    assert [(info.pages, hits) for info, hits in admission.asked] == [(4, 0), (4, 0), (1, 0), (1, 0), (2, 1)]
    shell.finish_all()
    assert where(shell, line(0, 2)) == ["-", "R"]  # it was refused before
    assert counters(shell).admitted_pages == [0, 2]


def test_early_copies_are_not_made_of_what_is_refused():
    """Neither at the n-th use nor ahead of need nor at insert."""
    for write in (WritePolicy.SELECTIVE, WritePolicy.THROUGH):
        shell = world(
            tier(HOST, 8), tier(DISK, 100), admission="never", write_policy=write, free_low_fraction=0.9
        )
        put(shell, line(0, 8))
        for _ in range(3):
            fetch(shell, line(0, 8), ttl_ms=1)
            shell.advance(10_000)
        shell.advance(10_000)
        assert where(shell, line(0, 8)) == ["R", "-"]


@pytest.mark.parametrize("size", [2, 8])
def test_durable_commits_and_drains_are_never_refused(size):
    """What somebody waits for is written."""
    shell = world(tier(HOST, 8), tier(DISK, 100), admission="never")
    answer = put(shell, line(0, size), ack=Ack.DURABLE)
    assert answer.durable_pages == size
    put(shell, line(50, 8 - size) if size < 8 else line(50, 4))
    request = next(shell.requests)
    shell.handle(ev.Drain(request, 5000))
    assert shell.settle(request) == act.DrainResult(0)
    assert counters(shell).refused_pages == [0, 0]


def test_a_page_that_others_build_on_is_copied_whatever_admission_says():
    """It is no leaf: its copy goes where it must."""
    shell = world(tier(DEVICE, 8), tier(HOST, 8), tier(DISK, 100), tier_admissions={"disk": "never"})
    put(shell, line(0, 4))
    put(shell, line(50, 8), wait_ms=1000)
    put(shell, line(0, 4) + pages(90), wait_ms=1000)
    assert where(shell, line(0, 4)) == ["-", "R", "-"]
    core = shell.engine._core
    parent = next(run for run in core.runs.values() if run.pages == 4 and run.below[0])
    assert not gate.refuses(core, parent, 2)
    child = next(run for run in core.runs.values() if run.pages == 1)
    assert gate.refuses(core, parent, 2, leaving=1)
    assert gate.refuses(core, child, 2)


# --- by tier


def test_each_tier_has_its_own_policy_and_admission():
    """The one that is named for it, else the common one."""
    shell = world(
        tier(DEVICE, 8),
        tier(HOST, 8),
        tier(DISK, 100),
        policy="sieve",
        tier_policies={"disk": "lru"},
        admission="never",
        tier_admissions={"disk": "always"},
    )
    assert [type(pool(shell, index).policy) for index in range(3)] == [SievePolicy, SievePolicy, LruPolicy]
    assert [pool(shell, index).admission is None for index in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tier_policies": {"tape": "lru"}}, "tier_policies names tape"),
        ({"tier_admissions": {"host": "always"}}, "tier_admissions names host"),
        ({"policy": "luck"}, "unknown eviction policy 'luck'"),
        ({"tier_policies": {"disk": "luck"}}, "unknown eviction policy 'luck'"),
        ({"admission": "luck"}, "unknown admission 'luck'"),
    ],
)
def test_names_are_checked_when_options_are_made(fields, message):
    """Not when the first page comes."""
    with pytest.raises(ConfigError, match=message):
        EngineOptions((tier(HOST, 8), tier(DISK, 8)), **fields)


# --- ghosts


def test_what_returns_is_cut_where_the_policy_ceases_to_know_it():
    """One run is wholly remembered or wholly new, and the remembered one has a use more."""
    shell = world(tier(HOST, 8), policy="remembering")
    put(shell, line(0, 4))
    put(shell, line(50, 8))
    policy = pool(shell, 0).policy
    assert isinstance(policy, RememberingPolicy)
    assert len(policy.remembered) == 4
    put(shell, line(0, 7))
    tree = shell.engine._core.namespaces[NS].tree
    runs, _ = tree.runs(tree.match(line(0, 7)))
    assert [(run.pages, run.hits) for run in runs] == [(4, 1), (3, 0)]
    assert policy.returned == 4
    assert policy.units == 8


def test_pages_that_are_simply_gone_leave_no_ghosts():
    """An operator's clearing is no eviction."""
    shell = world(tier(HOST, 8), policy="remembering")
    put(shell, line(0, 4))
    shell.ask(ev.Clear, namespace=0)
    assert not pool(shell, 0).policy.remembered


def test_ghosts_of_a_demotion_and_of_what_comes_back():
    """A drained page is a ghost above, and known when it is promoted."""
    shell = world(tier(HOST, 8), tier(DISK, 100), policy="remembering")
    put(shell, line(0, 4))
    put(shell, line(50, 8), wait_ms=1000)
    assert len(pool(shell, 0).policy.remembered) == 4
    shell.advance(10_000)
    fetch(shell, line(0, 4))
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["R", "R"]
    assert pool(shell, 0).policy.returned == 4


def test_ids_are_those_of_pages_at_their_place():
    """Tokens: of the page key. Hashes: of the hash itself; other namespaces have others."""
    shell = world(tier(HOST, 8), policy="remembering")
    put(shell, line(0, 3))
    core = shell.engine._core
    keys = chain_keys(fingerprint(shell.namespaces[NS]), line(0, 3), 4)
    (run,) = core.runs.values()
    assert core.page_ids(run) == [int.from_bytes(key[:8], "little") for key in keys]
    found = []
    for number, adapter in ((7, ""), (8, "lora")):
        spec = Namespace("m", 1, 64, adapter=adapter, symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=20)
        shell.open_namespace(number, spec)
        prompt = b"".join(bytes([page]) * 20 for page in range(2))
        assert isinstance(shell.store(ME, number, prompt), act.CommitResult)
        found.append(core.page_ids(max(core.runs.values(), key=lambda each: each.id)))
    assert found[0][0] ^ found[0][1] == found[1][0] ^ found[1][1] == int.from_bytes(b"\x01" * 8, "little")
    assert not set(found[0]) & set(found[1])


# --- use


def test_policies_are_told_what_was_said_of_the_use():
    """By the call that stored a run, or the last look-up that said anything; equal uses are one object."""
    shell = world(tier(HOST, 16), tier(DISK, 100), admission="twice")
    put(shell, line(0, 4), use=Use("chat", 3, 1.5))
    put(shell, line(0, 2) + pages(90), use=Use("chat", 3, 1.5))
    runs = list(shell.engine._core.runs.values())
    assert len({id(run.use) for run in runs}) == 1
    info = shell.engine._core.info(runs[0])
    assert (info.cls, info.turn, info.cost) == ("chat", 3, 1.5)
    fetch(shell, line(0, 2), use=Use("batch"))
    fetch(shell, line(0, 2))
    shell.handle(ev.Touch(NS, line(0, 2) + pages(90), Use("agent", 9)))
    uses = {shell.engine._core.info(run).cls for run in shell.engine._core.runs.values()}
    assert uses == {"agent", "chat"}


def test_callers_cannot_make_the_table_of_uses_grow_without_end():
    """It is bounded; runs keep what they have."""
    shell = world(tier(HOST, 16), check=False)
    put(shell, line(0, 1))
    for turn in range(10_000):
        shell.handle(ev.Touch(NS, line(0, 1), Use("x", turn)))
    assert len(shell.engine._core.uses) <= 4096
