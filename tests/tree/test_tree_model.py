"""The tree against a plain model: a dict from the prompt up to a page to what is known of that page."""

from __future__ import annotations

import dataclasses
import itertools
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hicache.errors import ViolationError
from hicache.keys import chain_keys
from hicache.tree import Run, Tree, edit
from hicache.types import Residency

WIDTH = 2
TIERS = 2
SEED = b"seed"
LIVE = {Residency.RESIDENT, Residency.DRAINING}

prompts = st.text("abc", max_size=9).map(lambda text: "".join(2 * c for c in text).encode())
tiers = st.integers(0, TIERS - 1)


@dataclasses.dataclass
class Page:
    """What the model knows of one page."""

    state: list[int] = dataclasses.field(default_factory=lambda: [0] * TIERS)
    slots: list[int | None] = dataclasses.field(default_factory=lambda: [None] * TIERS)
    pins: list[int] = dataclasses.field(default_factory=lambda: [0] * TIERS)
    tick: int = 0
    hits: int = 0
    anchors: int = 0  # on the page's end


class Holding:
    """A holder, and in ``pages`` what it must hold."""

    def __init__(self, runs: list[Run], pages: list[bytes]) -> None:
        self.runs = runs
        self.pages = pages


class TreeMachine(RuleBasedStateMachine):
    """Every call of the tree, compared with the model after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(WIDTH, TIERS, itertools.count(1))
        self.model: dict[bytes, Page] = {}
        self.holders: list[Holding] = []
        self.slot = itertools.count(100)

    # --- what the model says

    def prefixes(self, run: Run) -> list[bytes]:
        """The model's keys of a run's pages."""
        prompt = self.tree.prompt_to(run)
        return [prompt[: len(prompt) - WIDTH * after] for after in range(run.pages - 1, -1, -1)]

    def known(self, prompt: bytes, *, live: bool) -> int:
        """Pages of the prompt that have a place, or that can be read."""
        for page in range(len(prompt) // WIDTH):
            found = self.model.get(prompt[: (page + 1) * WIDTH])
            if found is None or (live and not LIVE & set(found.state)):
                return page
        return len(prompt) // WIDTH

    def runs(self) -> list[Run]:
        """All runs, by id."""
        return sorted((run for node in self.tree.walk() for run in node.runs), key=lambda run: run.id)

    def pick(self, data: st.DataObject) -> Run:
        return data.draw(st.sampled_from(self.runs()))

    def pick_path(self, data: st.DataObject) -> bytes:
        """A prompt that mostly follows the tree."""
        stem = data.draw(st.sampled_from([b"", *sorted(self.model)]))
        return stem[: WIDTH * data.draw(st.integers(0, 20))] + data.draw(prompts)

    def held(self, run: Run) -> bool:
        page = self.model[self.tree.prompt_to(run)]
        pages = set(self.prefixes(run))
        return bool(page.anchors or any(page.pins) or any(pages & set(each.pages) for each in self.holders))

    # --- structure

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        prompt = self.pick_path(data)
        place = self.tree.trace(prompt)
        assert place.pages == self.known(prompt, live=False)
        missing = len(prompt) // WIDTH - place.pages
        if not missing:
            return
        path = self.tree.cut(place)
        pages = data.draw(st.integers(1, missing))
        run = self.tree.insert(prompt, path[-1] if path else None, place.pages, pages)
        assert run.pages == pages
        assert self.tree.parent_run(run) is (path[-1] if path else None)
        for page in range(place.pages, place.pages + pages):
            self.model[prompt[: (page + 1) * WIDTH]] = Page()

    @rule(data=st.data())
    def insert_again(self, data: st.DataObject) -> None:
        prompt = self.pick_path(data)
        pages = self.known(prompt, live=False)
        if not pages:
            return
        at = data.draw(st.integers(0, pages - 1))
        path = self.tree.cut(self.tree.trace(prompt[: at * WIDTH]))
        with pytest.raises(ViolationError):
            self.tree.insert(prompt, path[-1] if path else None, at, 1)

    @rule(data=st.data())
    def match(self, data: st.DataObject) -> None:
        prompt = self.pick_path(data)
        before = [(run.id, run.pages, run.tick, run.hits) for run in self.runs()]
        match = self.tree.match(prompt)
        runs, last = self.tree.runs(match)
        assert before == [(run.id, run.pages, run.tick, run.hits) for run in self.runs()]
        assert match.pages == self.known(prompt, live=True)
        assert match.last_pages == (match.pages * WIDTH - sum(len(n.edge) for n in match.nodes[:-1])) // WIDTH
        assert match.pages == sum(run.pages for run in runs[:-1]) + last
        assert b"".join(map(self.tree.symbols, runs)).startswith(prompt[: match.pages * WIDTH])

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        prompt = self.pick_path(data)
        match = self.tree.match(prompt)
        runs = self.tree.cut(match)
        assert b"".join(map(self.tree.symbols, runs)) == prompt[: match.pages * WIDTH]
        for above, run in itertools.pairwise([None, *runs]):
            assert self.tree.parent_run(run) is above  # type: ignore[arg-type]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        run = self.pick(data)
        if run.pages > 1:
            pages = data.draw(st.integers(1, run.pages - 1))
            symbols = self.tree.symbols(run)
            tail = self.tree.split_run(run, pages)
            assert self.tree.symbols(run) + self.tree.symbols(tail) == symbols
            assert self.tree.child_runs(run) == [tail]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        run = self.pick(data)
        after = [each for each in self.tree.child_runs(run) if each.node is run.node]
        pages = run.pages
        absorbed = self.tree.try_merge(run)
        if absorbed is not None:
            assert [absorbed] == after
            assert run.pages == pages + absorbed.pages
        elif after:
            one = self.model[self.tree.prompt_to(run)]
            two = self.model[self.tree.prompt_to(after[0])]
            same = (one.state, one.tick, one.hits) == (two.state, two.tick, two.hits)
            assert not same or self.held(run) or self.held(after[0])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        run: Run | None = self.pick(data)
        first = run
        expected = []
        while run is not None and not any(self.model[self.tree.prompt_to(run)].state) and not self.held(run):
            gone = {each.id for each in expected}
            if any(each.id not in gone for each in self.tree.child_runs(run)):
                break
            expected.append(run)
            run = self.tree.parent_run(run)
        doomed = [prefix for each in expected for prefix in self.prefixes(each)]
        assert first is not None
        assert self.tree.prune(first) == expected
        assert not self.tree.prune(first) or not expected
        for prefix in doomed:
            del self.model[prefix]

    # --- what is known of runs

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tier=tiers, state=st.sampled_from([int(each) for each in Residency]))
    def set_state(self, data: st.DataObject, tier: int, state: int) -> None:
        run = self.pick(data)
        path: list[Run] = []
        above = self.tree.parent_run(run)
        while above is not None:
            path.append(above)
            above = self.tree.parent_run(above)
        before = [each.below[tier] for each in path]
        told = self.tree.set_state(run, tier, state)
        pairs = zip(path, before, strict=True)
        changed = [each for each, old in pairs if each.state[tier] and bool(each.below[tier]) != bool(old)]
        assert changed == ([] if told is None else [told])
        slots = [next(self.slot) for _ in range(run.pages)] if state else None
        self.tree.set_slots(run, tier, array("q", slots) if slots else None)
        for index, prefix in enumerate(self.prefixes(run)):
            self.model[prefix].state[tier] = state
            self.model[prefix].slots[tier] = slots[index] if slots else None

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tick=st.integers(0, 1))
    def touch(self, data: st.DataObject, tick: int) -> None:
        run = self.pick(data)
        run.tick, run.hits = tick, run.hits + 1
        for prefix in self.prefixes(run):
            self.model[prefix].tick, self.model[prefix].hits = run.tick, run.hits

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tier=tiers)
    def pin(self, data: st.DataObject, tier: int) -> None:
        run = self.pick(data)
        step = -1 if run.pins[tier] else 1
        run.pins[tier] += step
        for prefix in self.prefixes(run):
            self.model[prefix].pins[tier] += step

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def anchor(self, data: st.DataObject) -> None:
        run = self.pick(data)
        step = -1 if run.anchors else 1
        run.anchors += step
        self.model[self.tree.prompt_to(run)].anchors += step

    @precondition(lambda self: self.model and len(self.holders) < 4)
    @rule(data=st.data(), whole_path=st.booleans())
    def hold(self, data: st.DataObject, whole_path: bool) -> None:
        runs = [self.pick(data)]
        while whole_path and (above := self.tree.parent_run(runs[0])) is not None:
            runs.insert(0, above)
        holder = Holding(runs, [prefix for run in runs for prefix in self.prefixes(run)])
        for run in runs:
            run.holders.append(holder)
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        for run in holder.runs:
            run.holders.remove(holder)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def page_keys(self, data: st.DataObject) -> None:
        run = self.pick(data)
        keys = self.tree.page_keys(run, SEED)
        assert keys == chain_keys(SEED, self.tree.prompt_to(run), WIDTH)[-run.pages :]
        keys.clear()  # it is ours: the tree keeps its own

    # --- after every step

    @invariant()
    def tree_equals_model(self) -> None:
        self.tree.check()
        found = 0
        for run in self.runs():
            prefixes = self.prefixes(run)
            found += run.pages
            assert self.tree.depth_pages(run) == len(prefixes[0]) // WIDTH - 1
            assert run.anchors == sum(self.model[prefix].anchors for prefix in prefixes)
            assert run.anchors == self.model[prefixes[-1]].anchors
            for index, prefix in enumerate(prefixes):
                page = self.model[prefix]
                assert (run.state, run.pins) == (page.state, page.pins)
                assert (run.tick, run.hits) == (page.tick, page.hits)
                assert [slots[index] if slots else None for slots in run.slots] == page.slots
            if run.keys is not None:
                assert run.keys == chain_keys(SEED, prefixes[-1], WIDTH)[-run.pages :]
        assert found == len(self.model)

    @invariant()
    def holders_follow_their_pages(self) -> None:
        for holder in self.holders:
            assert [prefix for run in holder.runs for prefix in self.prefixes(run)] == holder.pages
            assert all(run.holders.count(holder) == 1 for run in holder.runs)


@pytest.mark.parametrize("long_edge_bytes", [edit.LONG_EDGE_BYTES, 8], ids=["short edges", "long edges"])
def test_tree_and_model_agree(long_edge_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over any history the tree finds what the model finds, and every page keeps what is known of it."""
    monkeypatch.setattr(edit, "LONG_EDGE_BYTES", long_edge_bytes)
    case = TreeMachine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
    case().runTest()
