"""The engine under random events, against a plain model: sets of pages, and dictionaries for tiers.

``engine.check()`` runs after every event (the shell sees to it). The shell catches pages that are written over, read
before they are there, or moved while they are copied; the model says what may match at all.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).parent))

from shell import PAGE_BYTES, ROT, Shell, recovery_events, tier

from hicache.engine import EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.engine.core import Core
from hicache.errors import ErrorCode, NotFoundError
from hicache.keys import chain_keys, fingerprint
from hicache.types import Ack, Namespace, Outcome, Pressure, TierKind, Use, WritePolicy

T = TypeVar("T")
DEVICE, HOST, DISK = TierKind.DEVICE, TierKind.HOST, TierKind.DISK
SETUPS = {
    "all": (tier(DEVICE, 6, 2), tier(HOST, 12, 3), tier(DISK, 20)),
    "host+disk": (tier(HOST, 12, 3), tier(DISK, 20)),
    "small disk": (tier(HOST, 16, 2), tier(DISK, 10)),
    "device+host": (tier(DEVICE, 6, 2), tier(HOST, 8, 2)),
    "host": (tier(HOST, 12, 4),),
    "disk": (tier(DISK, 12),),
    "roomy": (tier(HOST, 400, 2), tier(DISK, 800)),
}
WIDTH = 4
POLICY_NAMES = ("lru", "sieve", "remembering")
ADMISSION_NAMES = ("always", "always", "twice", "never")


def pack(tokens: list[int]) -> bytes:
    """A prompt of one-token pages."""
    return b"".join(token.to_bytes(WIDTH, "little") for token in tokens)


BASES = ([0, 1, 2, 0, 1, 2], [0, 1, 1, 1, 1], [2, 2, 2])
SHARING = st.builds(
    lambda base, length, tail: pack(base[:length] + tail),
    st.sampled_from(BASES),
    st.integers(1, 6),
    st.lists(st.integers(0, 3), max_size=5),
)
PROMPTS = st.one_of(SHARING, st.lists(st.integers(0, 2), min_size=1, max_size=9).map(pack))
NAMESPACES = st.sampled_from([1, 1, 2, 3])
SESSIONS = st.sampled_from([1, 2])
INDEX = st.integers(0, 5)
#: Kinds of events that a run may do without (swarm testing): what crowds out the others in one run is off in the next.
OPTIONAL = (
    "reserve", "commit", "abort", "release", "renew", "touch", "prefetch", "pin", "evict", "clear", "bad", "time",
    "sessions", "corrupt", "rot", "drain", "latch", "expire", "durable",
)  # fmt: skip


def when(name: str) -> Callable[[T], T]:
    """The rule is on only in runs that have drawn its name."""

    def gate(function: T) -> T:
        gated = precondition(lambda self: name in self.enabled)(function)
        gated.needs = name
        return gated

    return gate


@dataclasses.dataclass
class Held:
    """A lease as its owner knows it: where its first pages lie does not change while he has it."""

    session: int
    namespace: int
    prompt: bytes
    tier: int
    places: list[int] = dataclasses.field(default_factory=list)


class EngineMachine(RuleBasedStateMachine):
    """Two sessions, three namespaces (two tenants, two page sizes), tiers of a few pages."""

    enabled: frozenset[str] = frozenset()

    @initialize(
        setup=st.sampled_from(sorted(SETUPS)),
        policy=st.sampled_from(POLICY_NAMES),
        admission=st.sampled_from(ADMISSION_NAMES),
        write=st.sampled_from(list(WritePolicy)),
        bounds=st.sampled_from([(1, 4), (3, 4), (64, 1), (64, 32)]),
        low=st.sampled_from([0.0, 0.3]),
        found=st.lists(st.tuples(NAMESPACES, SHARING), max_size=4),
        torn=st.sampled_from([0, 0, 1, 2, 3]),
        enabled=st.sets(st.sampled_from(OPTIONAL), min_size=2),
    )
    def start(
        self,
        setup: str,
        policy: str,
        admission: str,
        write: WritePolicy,
        bounds: tuple[int, int],
        low: float,
        found: list[tuple[int, bytes]],
        torn: int,
        enabled: set[str],
    ) -> None:
        self.enabled = frozenset(enabled)
        options = EngineOptions(
            SETUPS[setup],
            policy=policy,
            admission=admission,
            write_policy=write,
            max_copy_pages=bounds[0],
            max_copies=bounds[1],
            default_ttl_ms=1000,
            expiry_grace_ms=200,
            free_low_fraction=low,
        )
        self.setup = setup
        self.shell = Shell(options)
        self.shell.on_reply = self.on_reply
        self.shell.open_namespace(1, Namespace("m", 1, PAGE_BYTES))
        self.shell.open_namespace(2, Namespace("m", 1, PAGE_BYTES, adapter="lora"))
        self.shell.open_namespace(3, Namespace("m", 1, PAGE_BYTES * 2, tenant="other"))
        for session in (1, 2):
            self.shell.handle(ev.SessionOpened(session, "default"))
        self.stored: dict[tuple[int, bytes], None] = {}
        self.lost = admission != "always"  # whether anything may have left the cache
        self.damaged = False  # whether a tier has lost anything
        self.reservations: dict[int, tuple[int, int, bytes, int, int]] = {}
        self.waiting: dict[int, tuple[int, int, bytes]] = {}
        self.durable: dict[
            int, tuple[int, bytes, int]
        ] = {}  # request -> namespace, prompt up to its end, pages
        self.leases: dict[int, Held] = {}
        self.pins: list[int] = []
        if options.tiers[-1].keyed:
            self.lost = self.lost or (bool(found) and setup != "roomy")
            self.fill_disk(found, torn)

    def fill_disk(self, found: list[tuple[int, bytes]], torn: int) -> None:
        """Pages that an earlier process left on disk; they are recovered while serving goes on.

        Some have rotted since (``torn`` of five, drawn by their key): what hung below them is stranded.
        """
        pages = {(n, prompt[:end]) for n, prompt in found for end in range(WIDTH, len(prompt) + 1, WIDTH)}
        rotten = {page for page in pages if zlib.crc32(page[1]) % 5 < torn}
        self.stored.update(dict.fromkeys(sorted(pages)))
        pages -= rotten
        self.lost = self.lost or bool(rotten)
        self.damaged = bool(rotten)
        index = len(self.shell.specs) - 1
        for number, prompt in pages:
            key = chain_keys(fingerprint(self.shell.namespaces[number]), prompt, WIDTH)[-1]
            self.shell.content[index][key] = (number, prompt)
        rng = random.Random(torn)
        heat = {page: (rng.randint(-5000, 1500), rng.randint(0, 5)) for page in sorted(pages)}
        self.shell.recovery = recovery_events(self.shell.namespaces, index, pages, part_pages=3, heat=heat)

    def on_reply(self, reply: act.Reply) -> None:
        """A durable commit's pages, and all above them, are on disk when it is answered."""
        expected = self.durable.pop(reply.request, None)
        if expected is None or not isinstance(reply.result, act.CommitResult):
            return
        namespace, prompt, pages = expected
        if reply.result.durable_pages != pages or self.damaged:
            return
        have = self.shell.disk_pages()
        for end in range(WIDTH, len(prompt) + 1, WIDTH):
            assert (namespace, prompt[:end]) in have, "said to be durable, and not on disk"

    # --- calls

    @rule(
        session=SESSIONS,
        namespace=NAMESPACES,
        prompt=PROMPTS,
        ack=st.sampled_from(list(Ack)),
        drop=st.booleans(),
    )
    def store(self, session: int, namespace: int, prompt: bytes, ack: Ack, drop: bool) -> None:
        """Reserve and commit, with all the copies that this takes."""
        self.lost = self.lost or self.setup != "roomy"
        self.stored.update(
            dict.fromkeys((namespace, prompt[:end]) for end in range(WIDTH, len(prompt) + 1, WIDTH))
        )
        pressure = Pressure.DROP if drop else Pressure.WAIT
        answer = self.shell.store(session, namespace, prompt, ack=ack, wait_ms=500, pressure=pressure)
        if isinstance(answer, act.Failure):
            assert answer.code in {ErrorCode.EXHAUSTED, ErrorCode.UNAVAILABLE, ErrorCode.CONFLICT}, answer
            self.lost = True

    @rule(
        session=SESSIONS,
        namespace=NAMESPACES,
        prompt=PROMPTS,
        most=st.sampled_from([0, 0, 2]),
        promote=st.sampled_from([True, True, False]),
        room=st.booleans(),
        into=st.sampled_from([-1, -1, 0, 1, 2, 3]),
    )
    def fetch(
        self, session: int, namespace: int, prompt: bytes, most: int, promote: bool, room: bool, into: int
    ) -> None:
        """Lease in the usual tier, or in any other with slots."""
        room = room and "reserve" in self.enabled
        answer = self.shell.ask(
            ev.Fetch, session=session, namespace=namespace, prompt=prompt, max_pages=most, promote=promote,
            reserve_missing=room, reserve_ttl_ms=1000, tier=into,
        )  # fmt: skip
        specs = self.shell.specs
        if into >= len(specs) or (into >= 0 and specs[into].keyed):
            assert isinstance(answer, act.Failure) and answer.code is ErrorCode.INVALID
            return
        assert isinstance(answer, act.FetchResult)
        if into < 0:
            into = next((index for index, spec in enumerate(specs) if spec.client_readable), 0)
        # To another tier than the usual one pages move although nobody lacks room.
        self.lost = self.lost or (promote and self.setup != "roomy")
        assert answer.matched_pages == sum(answer.tier_pages)
        self.shell.verify(namespace, prompt, answer)
        self.lost = self.lost or (room and self.setup != "roomy")
        assert room or answer.reserved is None
        if answer.reserved is not None:
            self._note_room(session, namespace, prompt, answer.reserved)
        if answer.lease:
            self.leases[answer.lease] = Held(session, namespace, prompt, into)
            self._see(answer)

    @when("reserve")
    @rule(
        session=SESSIONS,
        namespace=NAMESPACES,
        prompt=PROMPTS,
        wait=st.sampled_from([0, 0, 500]),
        drop=st.booleans(),
    )
    def reserve(self, session: int, namespace: int, prompt: bytes, wait: int, drop: bool) -> None:
        request = next(self.shell.requests)
        self.waiting[request] = (session, namespace, prompt)
        pressure = Pressure.DROP if drop else Pressure.WAIT
        self.shell.handle(ev.Reserve(request, session, namespace, prompt, 1000, wait, pressure))
        self.lost = self.lost or self.setup != "roomy"

    @when("reserve")
    @rule(index=INDEX, pages=st.integers(0, 9), durable=st.booleans(), last=st.booleans())
    def commit(self, index: int, pages: int, durable: bool, last: bool) -> None:
        if not self.reservations:
            return
        ident = sorted(self.reservations)[index % len(self.reservations)]
        session, namespace, prompt, cursor, end = self.reservations[ident]
        pages = min(pages, end - cursor)
        self.stored.update(
            dict.fromkeys((namespace, prompt[: (page + 1) * WIDTH]) for page in range(cursor, cursor + pages))
        )
        request = next(self.shell.requests)
        ack = Ack.DURABLE if durable else Ack.VISIBLE
        if durable and pages:
            self.durable[request] = (namespace, prompt[: (cursor + pages) * WIDTH], pages)
        pieces = [(cursor, pages)] if pages else []
        self.shell.handle(ev.Commit(request, session, ident, pieces, (namespace, prompt), ack, last))
        refused = isinstance(self.shell.replies.get(request), act.Failure)
        self.lost = self.lost or refused
        if refused or last:
            del self.reservations[ident]
        else:
            self.reservations[ident] = (session, namespace, prompt, cursor + pages, end)

    @when("release")
    @rule(index=st.integers(0, 3))
    def release(self, index: int) -> None:
        if self.leases:
            ident = sorted(self.leases)[index % len(self.leases)]
            self.shell.handle(ev.ReleaseLeases(self.leases.pop(ident).session, [ident, 999_999]))

    @rule(index=st.integers(0, 3))
    def look_at_lease(self, index: int) -> None:
        if self.leases:
            ident = sorted(self.leases)[index % len(self.leases)]
            held = self.leases[ident]
            try:
                view = self.shell.engine.lease_view(held.session, ident)
            except NotFoundError:
                del self.leases[ident]
                return
            self.shell.verify(held.namespace, held.prompt, view)
            self._see(view)

    def _see(self, view: act.FetchResult) -> None:
        """All that a lease grants is in its tier; what it has granted stays where it is, unless it was harmed."""
        held = self.leases[view.lease]
        assert view.tier == held.tier and {piece.tier for piece in view.pieces} <= {held.tier}
        places = [place for piece in view.pieces for place in piece.slots]
        if not self.damaged:
            assert places[: len(held.places)] == held.places, "a leased page has moved or gone"
        held.places = places

    @when("renew")
    @rule(index=st.integers(0, 3))
    def renew(self, index: int) -> None:
        if self.leases:
            ident = sorted(self.leases)[index % len(self.leases)]
            self.shell.ask(ev.RenewLeases, session=self.leases[ident].session, leases=[ident], ttl_ms=1500)

    @when("abort")
    @rule(index=st.integers(0, 3))
    def abort(self, index: int) -> None:
        if self.reservations:
            ident = sorted(self.reservations)[index % len(self.reservations)]
            session, *_ = self.reservations.pop(ident)
            self.shell.handle(ev.Abort(session, ident))

    @when("touch")
    @rule(namespace=NAMESPACES, prompt=PROMPTS, promote=st.booleans())
    def touch(self, namespace: int, prompt: bytes, promote: bool) -> None:
        self.lost = self.lost or (promote and self.setup != "roomy")
        self.shell.handle(ev.Touch(namespace, prompt, Use("chat", len(prompt)), promote))

    @when("prefetch")
    @rule(
        session=SESSIONS, namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2), cancel=st.booleans()
    )
    def prefetch(self, session: int, namespace: int, prompt: bytes, index: int, cancel: bool) -> None:
        target = index % len(self.shell.specs)
        answer = self.shell.ask(ev.Prefetch, session=session, namespace=namespace, prompt=prompt, tier=target)
        assert isinstance(answer, act.OperationResult)
        if cancel and answer.operation:
            self.shell.handle(ev.CancelOperation(session, answer.operation))

    @when("pin")
    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2), ttl=st.sampled_from([0, 500]))
    def pin(self, namespace: int, prompt: bytes, index: int, ttl: int) -> None:
        target = index % len(self.shell.specs)
        answer = self.shell.ask(ev.Pin, namespace=namespace, prompt=prompt, tier=target, ttl_ms=ttl)
        assert isinstance(answer, act.PinResult)
        if answer.pin:
            self.pins.append(answer.pin)

    @when("pin")
    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.shell.handle(ev.Unpin(self.pins.pop()))

    @when("evict")
    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(-1, 2))
    def evict(self, namespace: int, prompt: bytes, index: int) -> None:
        target = index if index < 0 else index % len(self.shell.specs)
        self.shell.ask(ev.Evict, namespace=namespace, prompt=prompt, tier=target)
        self.lost = True

    @when("clear")
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

    @when("bad")
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
        self.lost = self.damaged = True
        # A failed commit may be taken up again from where it stopped: our own cursor no longer knows.
        for ident in list(self.reservations):
            session, *_ = self.reservations.pop(ident)
            self.shell.handle(ev.Abort(session, ident))

    @when("time")
    @rule(ms=st.sampled_from([1, 100, 400, 1200]))
    def time_passes(self, ms: int) -> None:
        self.shell.advance(ms)

    @when("sessions")
    @rule(session=SESSIONS, dead=st.booleans())
    def session_ends(self, session: int, dead: bool) -> None:
        self.shell.handle(ev.SessionEnded(session, dead))
        self.shell.handle(ev.SessionOpened(session, "default"))
        self.leases = {k: v for k, v in self.leases.items() if v.session != session}
        self.reservations = {k: v for k, v in self.reservations.items() if v[0] != session}

    @when("sessions")
    @rule(session=SESSIONS, back=st.booleans())
    def session_suspended(self, session: int, back: bool) -> None:
        self.shell.handle(ev.SessionSuspended(session, 300))
        if back:
            self.shell.handle(ev.SessionResumed(session))
            return
        self.shell.advance(301)
        self.shell.handle(ev.SessionOpened(session, "default"))

    @when("corrupt")
    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2))
    def page_corrupt(self, namespace: int, prompt: bytes, index: int) -> None:
        target = index % len(self.shell.specs)
        self.shell.rot(namespace, prompt, target)
        self.shell.handle(ev.PageCorrupt(namespace, target, prompt))
        self.lost = self.damaged = True

    @when("scrub")
    @rule(picks=st.lists(st.integers(0, 63), min_size=1, max_size=3))
    def pages_lost(self, picks: list[int]) -> None:
        target = len(self.shell.specs) - 1
        held = self.shell.content[target]
        if not self.shell.specs[target].keyed or not held or target in self.shell.failed:
            return
        keys = sorted(held)
        self.shell.lose(target, [keys[pick % len(keys)] for pick in picks])
        self.lost = self.damaged = True

    @when("rot")
    @rule(namespace=NAMESPACES, prompt=PROMPTS, index=st.integers(0, 2))
    def rot_unseen(self, namespace: int, prompt: bytes, index: int) -> None:
        self.shell.rot(namespace, prompt, index % len(self.shell.specs))
        self.lost = self.damaged = True

    @when("latch")
    @rule(index=INDEX, readable=st.booleans(), luck=st.integers(0, 5))
    def tier_latched(self, index: int, readable: bool, luck: int) -> None:
        if luck:
            return
        self.shell.latch(index % len(self.shell.specs), readable=readable)
        self.lost = self.damaged = True

    @when("latch")
    @rule(index=INDEX)
    def tier_restored(self, index: int) -> None:
        self.shell.restore(index % len(self.shell.specs))

    @rule(limit=st.integers(1, 6))
    def tell_heat(self, limit: int) -> None:
        """What is told of is on disk, in the open, and not told twice without a use between."""
        heat = self.shell.engine.heat(limit)
        assert len({key for _, key, _, _ in heat}) == len(heat)
        for namespace, key, last_use_ms, hits in heat:
            assert last_use_ms <= self.shell.now and hits > 0
            if self.shell.failed.get(len(self.shell.specs) - 1, True):
                assert self.shell.content[-1][key] == ROT or self.shell.content[-1][key][0] == namespace

    @rule()
    def recover_some(self) -> None:
        self.shell.recover_some()

    @rule()
    def segments_close(self) -> None:
        self.shell.close_segments()

    @when("drain")
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
            if isinstance(answer, act.ReserveResult):
                self._note_room(session, namespace, prompt, answer)

    def _note_room(self, session: int, namespace: int, prompt: bytes, answer: act.ReserveResult) -> None:
        if answer.reservation:
            end = answer.present_pages + answer.missing_pages
            self.reservations[answer.reservation] = (session, namespace, prompt, answer.present_pages, end)

    @invariant()
    def matches_only_what_was_stored(self) -> None:
        if not hasattr(self, "shell"):
            return
        for namespace, prompt in list(self.stored)[-20:]:
            view = self.shell.engine.match(namespace, prompt)
            assert sum(view.run_pages) == view.pages
            for page in range(view.pages):
                assert (namespace, prompt[: (page + 1) * WIDTH]) in self.stored
            quiet = (
                not self.lost and not self.shell.pending and not self.shell.recovery and not self.reservations
            )
            if quiet and view.pages * WIDTH < len(prompt):
                raise AssertionError("a page that nothing pushed out is gone")

    @invariant()
    def disk_is_closed(self) -> None:
        """Whatever a crash would leave on disk now could be matched."""
        if not hasattr(self, "shell") or self.damaged or not self.shell.specs[-1].keyed:
            return
        if self.shell.recovery or any(copy.keys for copy in self.shell.pending):
            return
        pages = self.shell.disk_pages()
        for namespace, prompt in pages:
            assert len(prompt) == WIDTH or (namespace, prompt[:-WIDTH]) in pages, (
                "a page on disk lacks the one above it"
            )

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
        for _ in range(3):
            shell.advance(1_000_000)
            shell.finish_all()
        assert not shell.engine._core.operations or all(
            o.done for o in shell.engine._core.operations.values()
        )
        shell.ask(ev.Clear, namespace=0)
        shell.finish_all()
        stats = shell.engine.stats()
        assert (stats.leases, stats.reservations, stats.copies, stats.waiting) == (0, 0, 0, 0)
        assert stats.runs == 0, "something was left in the tree"
        assert all(view.used_bytes == 0 for view in stats.tiers), "the ledger kept something"
        assert not any(shell.content), "a tier kept something"
        self.nothing_left(shell.engine._core)

    def nothing_left(self, core: Core) -> None:
        """No set, queue or table still knows anything."""
        assert not (core.warming or core.warmed or core.verdicts)
        assert not (core.holes or core.gaps or core.condemned or core.backlog or core.savers or core.ingests)
        assert not (core.stranded.pages or core.stranded.units or core.returned or core.hot)
        assert not (core.recovering or core.chain_ends)
        assert not any(pool.waiters or pool.wanting or pool.draining for pool in core.pools.values())


EngineMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("HICACHE_TEST_EXAMPLES", "120")), stateful_step_count=50, deadline=None
)
TestEngineMachine = EngineMachine.TestCase
