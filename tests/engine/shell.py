"""A shell for tests: tiers are dictionaries, copies finish when the test says so, every byte moved is accounted for.

A page's content is its identity: the namespace and the whole prompt up to it. A copy reads its source when it starts and
again when it ends (a source that was reused meanwhile is caught), and its target is garbage in between.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from hicache.engine import Engine, EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.keys import fingerprint
from hicache.types import Namespace, Outcome, TierKind, TierSpec

PAGE_BYTES = 64
GARBAGE = ("garbage",)


def tier(kind: TierKind, pages: int, segments: int = 1) -> TierSpec:
    """A tier of ``pages`` pages of PAGE_BYTES."""
    if kind is TierKind.DISK:
        return TierSpec("disk", kind, pages * 8192, keyed=True, durable=True)
    return TierSpec(
        kind.value,
        kind,
        pages * PAGE_BYTES,
        segment_bytes=pages // segments * PAGE_BYTES,
        client_readable=kind is TierKind.HOST,
    )


class Shell:
    """Carries out actions over dictionaries and keeps the answers."""

    def __init__(self, options: EngineOptions, seed: int = 0) -> None:
        self.engine = Engine(options)
        self.random = random.Random(seed)
        self.now = 1000
        self.specs = options.tiers
        self.content: list[dict[object, object]] = [{} for _ in options.tiers]
        self.open_segments: list[dict[int, str]] = [{} for _ in options.tiers]
        self.closing: list[tuple[int, int]] = []
        self.pending: list[act.Copy | act.CopyIn] = []
        self.started: dict[int, list[object]] = {}
        self.replies: dict[int, act.Result] = {}
        self.done_operations: dict[int, act.OperationDone] = {}
        self.requests = itertools.count(1)
        self.namespaces: dict[int, Namespace] = {}
        self.prompts: dict[int, tuple[int, bytes]] = {}  # reservation -> namespace and prompt
        self.check = True

    # --- driving

    def handle(self, event: ev.Event) -> None:
        for action in self.engine.handle(event, self.now):
            self._perform(action)
        if self.check:
            self.engine.check()

    def ask(self, make: type, **fields: object) -> act.Result | None:
        """Hand in an event that wants an answer; the answer if it came at once."""
        request = next(self.requests)
        self.handle(make(request=request, **fields))
        return self.replies.get(request)

    def open_namespace(self, number: int, spec: Namespace) -> None:
        self.namespaces[number] = spec
        self.handle(ev.NamespaceOpened(number, spec, fingerprint(spec)))

    def advance(self, ms: int) -> None:
        self.now += ms
        self.handle(ev.Tick())

    def finish(self, index: int = 0, outcomes: Sequence[Outcome] | None = None, *, source_fault: bool = False) -> None:
        """Finish one pending copy."""
        copy = self.pending.pop(index)
        contents = self.started.pop(copy.copy)
        if isinstance(copy, act.Copy):
            for place, content in zip(self._places(copy.src_tier, copy.src_slots, copy.keys), contents, strict=True):
                assert self.content[copy.src_tier].get(place) == content, "a copy's source was reused under it"
            target, slots = copy.dst_tier, copy.dst_slots
        else:
            target, slots = copy.tier, copy.slots
        places = self._places(target, slots, copy.keys)
        charges = []
        for number, (place, content) in enumerate(zip(places, contents, strict=True)):
            good = outcomes is None or outcomes[number] is Outcome.OK
            if good:
                self.content[target][place] = content
            elif self.specs[target].keyed:
                self.content[target].pop(place, None)
            charges.append(4096 if good else 0)
        if not self.specs[target].keyed:
            charges = []
        self.handle(ev.CopyDone(copy.copy, outcomes, charges, source_fault))

    def finish_all(self) -> None:
        while self.pending or self.closing:
            if self.pending:
                self.finish()
            self.close_segments()

    def close_segments(self) -> None:
        while self.closing:
            tier_index, segment = self.closing.pop()
            self.handle(ev.SegmentClosed(tier_index, segment))

    # --- the tiers

    def _places(self, tier_index: int, slots: Sequence[int], keys: Sequence[bytes]) -> list[object]:
        return list(keys if self.specs[tier_index].keyed else slots)

    def _perform(self, action: act.Action) -> None:
        match action:
            case act.Copy():
                assert len(action.src_slots) == (0 if self.specs[action.src_tier].keyed else len(action.dst_slots) or len(action.keys))
                places = self._places(action.src_tier, action.src_slots, action.keys)
                self.started[action.copy] = [self.content[action.src_tier][place] for place in places]
                assert GARBAGE not in self.started[action.copy], "copied a page that is not there"
                if not self.specs[action.dst_tier].keyed:
                    self._garble(action.dst_tier, action.dst_slots)
                self.pending.append(action)
            case act.CopyIn():
                namespace, prompt = action.source  # type: ignore[misc]
                width = self.namespaces[namespace].symbol_bytes
                self.started[action.copy] = [(namespace, prompt[: (page + 1) * width]) for page in action.pages]
                if not self.specs[action.tier].keyed:
                    self._garble(action.tier, action.slots)
                self.pending.append(action)
            case act.Free():
                for place in action.keys or action.slots:
                    self.content[action.tier].pop(place, None)
            case act.OpenSegment():
                assert action.segment not in self.open_segments[action.tier]
                self.open_segments[action.tier][action.segment] = action.domain
            case act.CloseSegment():
                del self.open_segments[action.tier][action.segment]
                self.closing.append((action.tier, action.segment))
            case act.OperationDone():
                self.done_operations[action.operation] = action
            case act.Reply():
                assert action.request not in self.replies, "answered twice"
                self.replies[action.request] = action.result

    def _garble(self, tier_index: int, slots: Sequence[int]) -> None:
        for slot in slots:
            assert slot not in self.content[tier_index], "wrote over a page that is still there"
            self.content[tier_index][slot] = GARBAGE

    # --- clients

    def settle(self, request: int) -> act.Result:
        """The answer to a request, letting copies finish and time pass as needed."""
        for _ in range(10_000):
            if request in self.replies:
                return self.replies[request]
            if self.pending:
                self.finish()
            elif self.closing:
                self.close_segments()
            else:
                self.advance(100)
        raise AssertionError("never answered")

    def store(self, session: int, namespace: int, prompt: bytes, **fields: object) -> act.Result:
        """Reserve and commit, waiting for both."""
        request = next(self.requests)
        self.handle(ev.Reserve(request, session, namespace, prompt, **fields))  # type: ignore[arg-type]
        answer = self.settle(request)
        if not isinstance(answer, act.ReserveResult) or not answer.reservation:
            return answer
        request = next(self.requests)
        pieces = [(answer.present_pages, answer.missing_pages)]
        self.handle(
            ev.Commit(request, session, answer.reservation, pieces, (namespace, prompt), last=True)
        )
        return self.settle(request)

    def verify(self, namespace: int, prompt: bytes, result: act.FetchResult) -> None:
        """Every granted page is the page stored."""
        width = self.namespaces[namespace].symbol_bytes
        page = 0
        for piece in result.pieces:
            for slot in piece.slots:
                page += 1
                assert self.content[piece.tier][slot] == (namespace, prompt[: page * width]), f"page {page - 1} is wrong"
        assert page == result.granted_pages
