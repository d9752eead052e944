"""A shell for tests: tiers are dictionaries, copies finish when the test says so, every byte moved is accounted for.

A page's content is its identity: the namespace and the whole prompt up to it. A copy reads its source when it starts
and again when it ends (a source that was reused meanwhile is caught), and its target is garbage in between. After every
event the engine checks itself, and what it believes is compared with what the tiers hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from hicache.engine import Engine, EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.keys import chain_keys, fingerprint
from hicache.types import Namespace, Outcome, Residency, TierKind, TierSpec

PAGE_BYTES = 64
DISK_PAGE_BYTES = 8192  # what the engine takes a small page to cost on disk
CHARGE_BYTES = 4096  # what it turns out to cost
GARBAGE = ("garbage",)
ROT = ("rot",)


def tier(kind: TierKind, pages: int, segments: int = 1) -> TierSpec:
    """A tier of ``pages`` pages of PAGE_BYTES."""
    if kind is TierKind.DISK:
        return TierSpec("disk", kind, pages * DISK_PAGE_BYTES, keyed=True, durable=True)
    return TierSpec(
        kind.value,
        kind,
        pages * PAGE_BYTES,
        segment_bytes=pages // segments * PAGE_BYTES,
        client_readable=kind is TierKind.HOST,
    )


class Shell:
    """Carries out actions over dictionaries and keeps the answers."""

    def __init__(self, options: EngineOptions, *, check: bool = True) -> None:
        self.engine = Engine(options)
        self.now = 1000
        self.specs = options.tiers
        self.content: list[dict[object, object]] = [{} for _ in options.tiers]
        self.open_segments: list[dict[int, tuple[str, int]]] = [{} for _ in options.tiers]
        self.closing: list[tuple[int, int]] = []
        self.pending: list[act.Copy | act.CopyIn] = []
        self.started: dict[int, list[object]] = {}
        self.deleted: dict[int, set[object]] = {}  # copy -> keys deleted after its PUT was submitted
        self.replies: dict[int, act.Result] = {}
        self.on_reply: Callable[[act.Reply], None] = lambda _: None
        self.done_operations: dict[int, act.OperationDone] = {}
        self.requests = itertools.count(1)
        self.namespaces: dict[int, Namespace] = {}
        self.recovery: list[ev.Recovered] = []
        self.failed: dict[int, bool] = {}  # tier -> whether it can still be read
        self.check = check
        self.moved: list[act.Action] = []  # all copies, for tests that count

    # --- driving

    def handle(self, event: ev.Event) -> None:
        """Hand in an event; start what it asks for; look at everything."""
        for action in self.engine.handle(event, self.now):
            self._perform(action)
        if self.check:
            self.engine.check()
            self.compare()

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

    def recover_some(self) -> None:
        """The next part of what was found on disk at start."""
        if self.recovery:
            self.handle(self.recovery.pop(0))

    def latch(self, index: int, *, readable: bool) -> None:
        """A tier takes no more pages, or is gone."""
        self.failed[index] = readable
        self.handle(ev.TierLatched(index, readable))

    def lose(self, index: int, keys: Sequence[bytes]) -> None:
        """A keyed tier has found damaged pages, and reports them."""
        for key in keys:
            self.content[index][key] = ROT
        self.handle(ev.PagesLost(index, keys))

    def restore(self, index: int) -> None:
        """A latched tier is well again."""
        if self.failed.pop(index, None) is not None:
            self.handle(ev.TierRestored(index))

    def finish(
        self, index: int = 0, outcomes: Sequence[Outcome] | None = None, *, source_fault: bool = False
    ) -> None:
        """Finish one pending copy."""
        copy = self.pending[index]
        target, slots = (
            (copy.dst_tier, copy.dst_slots) if isinstance(copy, act.Copy) else (copy.tier, copy.slots)
        )
        while self.recovery and self.specs[target].keyed:
            self.recover_some()  # writes are held until then
        self.pending.remove(copy)
        contents = self.started.pop(copy.copy)
        places = self._places(target, slots, copy.keys)
        outcomes, source_fault = self._outcomes(copy, contents, outcomes, source_fault)
        deleted = self.deleted.pop(copy.copy, set())
        charges = []
        for number, (place, content) in enumerate(zip(places, contents, strict=True)):
            good = outcomes is None or outcomes[number] is Outcome.OK
            if good and place not in deleted:
                self.content[target][place] = content
            charges.append(CHARGE_BYTES if good else 0)
        self.handle(
            ev.CopyDone(copy.copy, outcomes, charges if self.specs[target].keyed else (), source_fault)
        )

    def _outcomes(
        self,
        copy: act.Copy | act.CopyIn,
        contents: list[object],
        outcomes: Sequence[Outcome] | None,
        fault: bool,
    ) -> tuple[Sequence[Outcome] | None, bool]:
        """What the copy comes to: what the test wants, unless the tiers have something to say."""
        target = copy.dst_tier if isinstance(copy, act.Copy) else copy.tier
        if target in self.failed:
            return [Outcome.FAULT] * len(contents), False
        if not isinstance(copy, act.Copy):
            return outcomes, fault
        if not self.failed.get(copy.src_tier, True):
            return [Outcome.FAULT] * len(contents), True
        verdicts = []
        for place, content in zip(
            self._places(copy.src_tier, copy.src_slots, copy.keys), contents, strict=True
        ):
            now = self.content[copy.src_tier].get(place)
            if ROT in {now, content}:
                verdicts.append(Outcome.CORRUPT)
            else:
                assert now == content, "a copy's source was reused under it"
                verdicts.append(Outcome.OK)
        if set(verdicts) == {Outcome.OK}:
            return outcomes, fault
        return verdicts, True

    def finish_all(self) -> None:
        for _ in range(3_000):
            if not (self.pending or self.closing or self.recovery):
                return
            self.recover_some()
            if self.pending:
                self.finish()
            self.close_segments()
        raise AssertionError("copies without end")

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
                self.moved.append(action)
                places = self._places(action.src_tier, action.src_slots, action.keys)
                self.started[action.copy] = [self.content[action.src_tier][place] for place in places]
                assert GARBAGE not in self.started[action.copy], "copied a page that is not there"
                self._garble(action.dst_tier, action.dst_slots)
                self.pending.append(action)
            case act.CopyIn():
                self.moved.append(action)
                namespace, prompt = action.source  # type: ignore[misc]
                width = self.namespaces[namespace].symbol_bytes
                self.started[action.copy] = [
                    (namespace, prompt[: (page + 1) * width]) for page in action.pages
                ]
                for slot in (
                    action.slots
                ):  # a failed commit's pages may be written again; ``compare`` knows live ones
                    self.content[action.tier][slot] = GARBAGE
                self.pending.append(action)
            case act.Free():
                self._free(action)
            case act.OpenSegment():
                assert action.segment not in self.open_segments[action.tier]
                assert (action.tier, action.segment) not in self.closing, "a segment in use twice"
                self.open_segments[action.tier][action.segment] = (action.domain, action.page_bytes)
            case act.CloseSegment():
                del self.open_segments[action.tier][action.segment]
                self.closing.append((action.tier, action.segment))
            case act.OperationDone():
                assert action.operation not in self.done_operations, "an operation was done twice"
                self.done_operations[action.operation] = action
            case act.Reply():
                assert action.request not in self.replies, "answered twice"
                self.replies[action.request] = action.result
                self.on_reply(action)

    def _free(self, action: act.Free) -> None:
        places = self._places(action.tier, action.slots, action.keys)
        for place in places:
            self.content[action.tier].pop(place, None)
        if self.specs[action.tier].keyed:
            for copy in self.pending:
                if (copy.dst_tier if isinstance(copy, act.Copy) else copy.tier) == action.tier:
                    self.deleted.setdefault(copy.copy, set()).update(set(copy.keys) & set(places))

    def _garble(self, tier_index: int, slots: Sequence[int]) -> None:
        for slot in slots:
            assert slot not in self.content[tier_index], "wrote over a page that is still there"
            self.content[tier_index][slot] = GARBAGE

    def compare(self) -> None:
        """Every page that the engine believes to be readable is there, unless it has rotted."""
        core = self.engine._core
        for namespace in core.namespaces.values():
            width = namespace.tree.symbol_bytes
            for node in namespace.tree.walk():
                for run in node.runs:
                    self._compare(core, namespace.id, run, namespace.tree.prompt_to(run), width)

    def _compare(self, core: object, namespace: int, run: object, prompt: bytes, width: int) -> None:
        for index, state in enumerate(run.state):  # type: ignore[attr-defined]
            if state not in {Residency.RESIDENT, Residency.DRAINING} or not self.failed.get(index, True):
                continue
            places = core.keys(run) if self.specs[index].keyed else run.slots[index]  # type: ignore[attr-defined]
            first = len(prompt) // width - len(places)
            for page, place in enumerate(places, first + 1):
                found = self.content[index][place]
                assert found in {ROT, (namespace, prompt[: page * width])}, (
                    f"{run}: tier {index} holds {found}"
                )

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

    def reserve(self, session: int, namespace: int, prompt: bytes, **fields: object) -> act.Result:
        """Reserve, waiting for the answer."""
        request = next(self.requests)
        self.handle(ev.Reserve(request, session, namespace, prompt, **fields))  # type: ignore[arg-type]
        return self.settle(request)

    def store(
        self, session: int, namespace: int, prompt: bytes, *, ack: object = None, **fields: object
    ) -> act.Result:
        """Reserve and commit, waiting for both."""
        answer = self.reserve(session, namespace, prompt, **fields)
        if not isinstance(answer, act.ReserveResult) or not answer.reservation:
            return answer
        request = next(self.requests)
        pieces = [(answer.present_pages, answer.missing_pages)]
        options = {} if ack is None else {"ack": ack}
        self.handle(
            ev.Commit(request, session, answer.reservation, pieces, (namespace, prompt), last=True, **options)  # type: ignore[arg-type]
        )
        return self.settle(request)

    def verify(self, namespace: int, prompt: bytes, result: act.FetchResult) -> None:
        """Every granted page is the page stored."""
        spec = self.namespaces[namespace]
        width = spec.symbol_bytes
        keys = chain_keys(fingerprint(spec), prompt, width)
        page = 0
        for piece in result.pieces:
            for slot in piece.slots:
                place = keys[page] if self.specs[piece.tier].keyed else slot
                page += 1
                found = self.content[piece.tier][place]
                assert found in {ROT, (namespace, prompt[: page * width])}, (
                    f"page {page - 1} is wrong: {found}"
                )
        assert page == result.granted_pages

    def place_of(self, namespace: int, prompt: bytes, index: int) -> object:
        """Where the last page of a prompt lies in a tier; None if it is not readable there."""
        tree = self.engine._core.namespaces[namespace].tree
        runs, pages = tree.runs(tree.trace(prompt))
        known = sum(run.pages for run in runs[:-1]) + pages
        if not runs or known * tree.symbol_bytes != len(prompt):
            return None
        if runs[-1].state[index] not in {Residency.RESIDENT, Residency.DRAINING}:
            return None
        if self.specs[index].keyed:
            return chain_keys(fingerprint(self.namespaces[namespace]), prompt, tree.symbol_bytes)[-1]
        return runs[-1].slots[index][pages - 1]

    def rot(self, namespace: int, prompt: bytes, index: int) -> bool:
        """Let the last page of a prompt rot in a tier, unseen; whether there was one."""
        place = self.place_of(namespace, prompt, index)
        if place is None or place not in self.content[index]:
            return False
        self.content[index][place] = ROT
        return True

    # --- a disk that outlives its process

    def disk_pages(self, index: int = -1) -> set[tuple[int, bytes]]:
        """What a keyed tier holds: (namespace, prompt up to the page)."""
        return {content for content in self.content[index].values() if content not in {ROT, GARBAGE}}  # type: ignore[misc]

    def restart(
        self,
        options: EngineOptions,
        *,
        part_pages: int = 4,
        heat: Mapping[tuple[int, bytes], tuple[int, int]] = MappingProxyType({}),
    ) -> Shell:
        """A new engine beside what this one's disk holds, as after kill -9; what is found is in ``recovery``."""
        fresh = Shell(options, check=self.check)
        index = len(self.specs) - 1
        fresh.content[-1] = dict(self.content[-1])
        for number, spec in self.namespaces.items():
            fresh.open_namespace(number, spec)
        fresh.recovery = recovery_events(fresh.namespaces, index, self.disk_pages(index), part_pages, heat)
        known = {key for event in fresh.recovery for column in event.keys for key in column}
        fresh.content[-1] = {key: page for key, page in fresh.content[-1].items() if key in known}  # rot goes
        return fresh


def recovery_events(
    namespaces: dict[int, Namespace],
    index: int,
    pages: set[tuple[int, bytes]],
    part_pages: int,
    heat: Mapping[tuple[int, bytes], tuple[int, int]] = MappingProxyType({}),
) -> list[ev.Recovered]:
    """The events that bring these pages back, each page a chain of its own. ``heat``: (last use in ms, hits)."""
    events = []
    for number, spec in namespaces.items():
        width = spec.symbol_bytes
        mine = {prompt for namespace, prompt in pages if namespace == number}
        if not mine:
            continue
        rooted = {p for p in mine if all(p[:end] in mine for end in range(width, len(p), width))}
        chain_of: dict[bytes, int] = {b"": -1}
        parts: list[tuple[int, bytes, list[bytes], list[int], int, int, bytes]] = []
        for prompt in sorted(mine, key=lambda p: (p not in rooted, len(p), p)):  # the stranded ones come last
            keys = [fingerprint(spec), *chain_keys(fingerprint(spec), prompt, width)]
            parent = chain_of.get(prompt[:-width], -2)
            chain_of[prompt] = len(parts)
            last_ms, hits = heat.get((number, prompt), (0, 0))
            waits_for = keys[-2] if parent == -2 else b""
            parts.append((parent, prompt[-width:], keys[-1:], [CHARGE_BYTES], last_ms, hits, waits_for))
        for start in range(0, len(parts), part_pages):
            rows = zip(*parts[start : start + part_pages], strict=True)
            parents, symbols, page_keys, charges, last_use_ms, hit_counts, parent_keys = map(list, rows)
            done = start + part_pages >= len(parts)
            events.append(
                ev.Recovered(
                    number,
                    index,
                    parents,
                    symbols,
                    page_keys,
                    charges,
                    done,
                    last_use_ms,
                    hit_counts,
                    parent_keys,
                )
            )
    return events
