"""The engine under random events, against a plain model: sets of pages, and dictionaries for tiers.

``engine.check()`` runs after every event (the shell sees to it). The shell catches pages that are written over, read
before they are there, or moved while they are copied; the model says what may match at all.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

sys.path.insert(0, str(Path(__file__).parent))

from shell import PAGE_BYTES, Shell, tier

from hicache.engine import EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.errors import NotFoundError
from hicache.types import Ack, Namespace, Outcome, Pressure, TierKind, WritePolicy

DEVICE, HOST, DISK = TierKind.DEVICE, TierKind.HOST, TierKind.DISK
SETUPS = {
    "all": (tier(DEVICE, 6, 2), tier(HOST, 12, 3), tier(DISK, 20)),
    "host+disk": (tier(HOST, 12, 3), tier(DISK, 20)),
    "device+host": (tier(DEVICE, 6, 2), tier(HOST, 8, 2)),
    "host": (tier(HOST, 12, 4),),
    "disk": (tier(DISK, 12),),
    "roomy": (tier(HOST, 400, 2), tier(DISK, 800)),
}
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(
    lambda tokens: b"".join(token.to_bytes(4, "little") for token in tokens)
)
NAMESPACES = st.sampled_from([1, 2, 3])
SESSIONS = st.sampled_from([1, 2])


class EngineMachine(RuleBasedStateMachine):
    """Two sessions, three namespaces (two tenants, two page sizes), tiers of a few pages."""

    @initialize(
        setup=st.sampled_from(sorted(SETUPS)),
        policy=st.sampled_from(["lru", "sieve"]),
        write=st.sampled_from(list(WritePolicy)),
        bound=st.sampled_from([1, 3, 64]),
        low=st.sampled_from([0.0, 0.3]),
    )
    def start(self, setup: str, policy: str, write: WritePolicy, bound: int, low: float) -> None:
        options = EngineOptions(
            SETUPS[setup],
            policy=policy,
            write_policy=write,
            max_copy_pages=bound,
            max_copies=4,
            default_ttl_ms=1000,
            expiry_grace_ms=200,
            free_low_fraction=low,
        )
        self.setup = setup
        self.shell = Shell(options)
        self.shell.open_namespace(1, Namespace("m", 1, PAGE_BYTES))
        self.shell.open_namespace(2, Namespace("m", 1, PAGE_BYTES, adapter="lora"))
        self.shell.open_namespace(3, Namespace("m", 1, PAGE_BYTES * 2, tenant="other"))
        for session in (1, 2):
            self.shell.handle(ev.SessionOpened(session, "default"))
        self.stored: set[tuple[int, bytes]] = set()
        self.lost = False  # whether anything may have left the cache
        self.reservations: dict[int, tuple[int, int, bytes, int, int]] = {}
        self.waiting: dict[int, tuple[int, int, bytes]] = {}
        self.leases: dict[int, tuple[int, int, bytes]] = {}
        self.pins: list[int] = []

    # --- calls

    @rule(session=SESSIONS, namespace=NAMESPACES, prompt=PROMPTS, most=st.sampled_from([0, 0, 2]), promote=st.booleans())
    def fetch(self, session: int, namespace: int, prompt: bytes, most: int, promote: bool) -> None:
        answer = self.shell.ask(
            ev.Fetch, session=session, namespace=namespace, prompt=prompt, max_pages=most, promote=promote
        )
        assert isinstance(answer, act.FetchResult)
        assert answer.matched_pages == sum(answer.tier_pages)
        self.shell.verify(namespace, prompt, answer)
        if answer.lease:
            self.leases[answer.lease] = (session, namespace, prompt)

    @rule(session=SESSIONS, namespace=NAMESPACES, prompt=PROMPTS, wait=st.sampled_from([0, 0, 500]), drop=st.booleans())
    def reserve(self, session: int, namespace: int, prompt: bytes, wait: int, drop: bool) -> None:
        request = next(self.shell.requests)
        self.waiting[request] = (session, namespace, prompt)
        pressure = Pressure.DROP if drop else Pressure.WAIT
        self.shell.handle(ev.Reserve(request, session, namespace, prompt, 1000, wait, pressure))
        self.lost = self.lost or self.setup != "roomy"

    @rule(index=st.integers(0, 3), pages=st.integers(0, 9), durable=st.booleans(), last=st.booleans())
    def commit(self, index: int, pages: int, durable: bool, last: bool) -> None:
        if not self.reservations:
            return
        ident = sorted(self.reservations)[index % len(self.reservations)]
        session, namespace, prompt, cursor, end = self.reservations[ident]
        pages = min(pages, end - cursor)
        answer = self.shell.ask(
            ev.Commit,
            session=session,
            reservation=ident,
            pieces=[(cursor, pages)] if pages else [],
            source=(namespace, prompt),
            ack=Ack.DURABLE if durable else Ack.VISIBLE,
            last=last,
        )
        if isinstance(answer, act.Failure) or last:
            del self.reservations[ident]
        else:
            self.reservations[ident] = (session, namespace, prompt, cursor + pages, end)
        if not isinstance(answer, act.Failure):
            width = 4
            self.stored.update((namespace, prompt[: (page + 1) * width]) for page in range(cursor, cursor + pages))

    @rule(index=st.integers(0, 3))
    def release(self, index: int) -> None:
        if self.leases:
            ident = sorted(self.leases)[index % len(self.leases)]
            session, _, _ = self.leases.pop(ident)
            self.shell.handle(ev.ReleaseLeases(session, [ident, 999_999]))

    @rule(index=st.integers(0, 3))
    def look_at_lease(self, index: int) -> None:
        if self.leases:
            ident = sorted(self.leases)[index % len(self.leases)]
            session, namespace, prompt = self.leases[ident]
            try:
                self.shell.verify(namespace, prompt, self.shell.engine.lease_view(session, ident))
            except NotFoundError:
                del self.leases[ident]

    @rule(index=st.integers(0, 3))
    def renew(self, index: int) -> None:
        if self.leases:
            ident = sorted(self.leases)[index % len(self.leases)]
            self.shell.ask(ev.RenewLeases, session=self.leases[ident][0], leases=[ident], ttl_ms=1500)

    @rule(index=st.integers(0, 3))
    def abort(self, index: int) -> None:
        if self.reservations:
            ident = sorted(self.reservations)[index % len(self.reservations)]
            session, *_ = self.reservations.pop(ident)
            self.shell.handle(ev.Abort(session, ident))

    @rule(namespace=NAMESPACES, prompt=PROMPTS)
    def touch(self, namespace: int, prompt: bytes) -> None:
        self.shell.handle(ev.Touch(namespace, prompt))

    @rule(session=SESSIONS, namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2), cancel=st.booleans())
    def prefetch(self, session: int, namespace: int, prompt: bytes, index: int, cancel: bool) -> None:
        target = index % len(self.shell.specs)
        answer = self.shell.ask(ev.Prefetch, session=session, namespace=namespace, prompt=prompt, tier=target)
        assert isinstance(answer, act.OperationResult)
        if cancel and answer.operation:
            self.shell.handle(ev.CancelOperation(session, answer.operation))

    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2), ttl=st.sampled_from([0, 500]))
    def pin(self, namespace: int, prompt: bytes, index: int, ttl: int) -> None:
        target = index % len(self.shell.specs)
        answer = self.shell.ask(ev.Pin, namespace=namespace, prompt=prompt, tier=target, ttl_ms=ttl)
        assert isinstance(answer, act.PinResult)
        if answer.pin:
            self.pins.append(answer.pin)

    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.shell.handle(ev.Unpin(self.pins.pop()))

    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(-1, 2))
    def evict(self, namespace: int, prompt: bytes, index: int) -> None:
        target = index if index < 0 else index % len(self.shell.specs)
        self.shell.ask(ev.Evict, namespace=namespace, prompt=prompt, tier=target)
        self.lost = True

    @rule(namespace=st.sampled_from([0, 1]))
    def clear(self, namespace: int) -> None:
        self.shell.ask(ev.Clear, namespace=namespace)
        self.lost = True

    # --- the world

    @rule(index=st.integers(0, 5))
    def finish_copy(self, index: int) -> None:
        if self.shell.pending:
            self.shell.finish(index % len(self.shell.pending))

    @rule()
    def finish_everything(self) -> None:
        self.shell.finish_all()

    @rule(seed=st.integers(0, 2**16), source=st.booleans())
    def finish_badly(self, seed: int, source: bool) -> None:
        if not self.shell.pending:
            return
        rng = random.Random(seed)
        copy = self.shell.pending[0]
        pages = len(copy.pages) if isinstance(copy, act.CopyIn) else max(len(copy.dst_slots), len(copy.keys))
        source = source and isinstance(copy, act.Copy)
        faults = [Outcome.CORRUPT, Outcome.MISS] if source else [Outcome.FULL, Outcome.FAULT, Outcome.CORRUPT]
        outcomes = [Outcome.OK if rng.random() < 0.6 else rng.choice(faults) for _ in range(pages)]
        self.shell.finish(0, outcomes, source_fault=source)
        self.lost = True
        # A failed commit may be taken up again from where it stopped: our own cursor no longer knows.
        for ident in list(self.reservations):
            session, *_ = self.reservations.pop(ident)
            self.shell.handle(ev.Abort(session, ident))

    @rule(ms=st.sampled_from([1, 100, 400, 1200]))
    def time_passes(self, ms: int) -> None:
        self.shell.advance(ms)

    @rule(session=SESSIONS, dead=st.booleans())
    def session_ends(self, session: int, dead: bool) -> None:
        self.shell.handle(ev.SessionEnded(session, dead))
        self.shell.handle(ev.SessionOpened(session, "default"))
        self.leases = {k: v for k, v in self.leases.items() if v[0] != session}
        self.reservations = {k: v for k, v in self.reservations.items() if v[0] != session}

    @rule(session=SESSIONS, back=st.booleans())
    def session_suspended(self, session: int, back: bool) -> None:
        self.shell.handle(ev.SessionSuspended(session, 300))
        if back:
            self.shell.handle(ev.SessionResumed(session))
            return
        self.shell.advance(301)
        self.shell.handle(ev.SessionOpened(session, "default"))

    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2))
    def page_corrupt(self, namespace: int, prompt: bytes, index: int) -> None:
        target = index % len(self.shell.specs)
        self.shell.handle(ev.PageCorrupt(namespace, target, prompt))
        self.lost = True

    @rule()
    def segments_close(self) -> None:
        self.shell.close_segments()

    @rule(grace=st.sampled_from([0, 5000]))
    def drain(self, grace: int) -> None:
        request = next(self.shell.requests)
        self.shell.handle(ev.Drain(request, grace))
        assert isinstance(self.shell.settle(request), act.DrainResult)
        self.lost = self.lost or self.setup != "roomy"

    # --- what must hold

    @invariant()
    def collect_reservations(self) -> None:
        if not hasattr(self, "shell"):
            return
        for request in list(self.waiting):
            answer = self.shell.replies.get(request)
            if answer is None:
                continue
            session, namespace, prompt = self.waiting.pop(request)
            if isinstance(answer, act.ReserveResult) and answer.reservation:
                end = answer.present_pages + answer.missing_pages
                self.reservations[answer.reservation] = (session, namespace, prompt, answer.present_pages, end)

    @invariant()
    def matches_only_what_was_stored(self) -> None:
        if not hasattr(self, "shell"):
            return
        for namespace, prompt in list(self.stored)[:20]:
            view = self.shell.engine.match(namespace, prompt)
            assert sum(view.run_pages) == view.pages
            for page in range(view.pages):
                assert (namespace, prompt[: (page + 1) * 4]) in self.stored
            if not self.lost and not self.shell.pending and view.pages * 4 < len(prompt):
                raise AssertionError("a page that nothing pushed out is gone")

    def teardown(self) -> None:
        """Whatever happened, once everybody is gone everything can be dropped and nothing is left behind."""
        if not hasattr(self, "shell"):
            return
        shell = self.shell
        shell.finish_all()
        for pin in self.pins:
            shell.handle(ev.Unpin(pin))
        for session in (1, 2):
            shell.handle(ev.SessionEnded(session, dead=True))
        shell.advance(1_000_000)
        shell.finish_all()
        shell.advance(1_000_000)
        shell.ask(ev.Clear, namespace=0)
        shell.finish_all()
        stats = shell.engine.stats()
        assert (stats.leases, stats.reservations, stats.copies, stats.waiting) == (0, 0, 0, 0)
        assert stats.runs == 0, "something was left in the tree"
        assert all(view.used_bytes == 0 for view in stats.tiers), "the ledger kept something"
        assert not any(shell.content), "a tier kept something"


EngineMachine.TestCase.settings = settings(max_examples=int(os.environ.get("HICACHE_TEST_EXAMPLES", "120")), stateful_step_count=60, deadline=None)
TestEngineMachine = EngineMachine.TestCase
