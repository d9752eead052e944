"""Announcements under random events: whoever applies them knows at every step exactly what a look-up would find.

The machine is the engine's own (every kind of event, faults in all tiers); beside it stand one watcher that is there
from the start and others that come at any moment, whose survey goes on while everything changes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).parent))

from test_machine import EngineMachine

from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.engine import survey
from hicache.engine.engine import Engine
from hicache.keys import KEY_BYTES, chain_keys, fingerprint
from hicache.types import Residency

LIVE = {Residency.RESIDENT, Residency.DRAINING}
Held = dict[tuple[int, int, bytes], bytes]  # (namespace, tier, key) -> symbol


def truth(engine: Engine, tenant: str = "") -> Held:
    """What a walk of the trees finds readable."""
    core = engine._core
    found: Held = {}
    for namespace in core.namespaces.values():
        if tenant and namespace.spec.tenant != tenant:
            continue
        todo = [(node, namespace.fingerprint) for node in namespace.tree.root.children.values()]
        while todo:
            node, key = todo.pop()
            for run in node.runs:
                readable = [
                    t for t in core.tier_range if run.state[t] in LIVE and (run.id, t) not in core.condemned
                ]
                if not readable:
                    break
                width = namespace.tree.symbol_bytes
                symbols = namespace.tree.symbols(run)
                for page, key in enumerate(chain_keys(key, symbols, width)):  # noqa: B020
                    for tier in readable:
                        found[namespace.id, tier, key] = symbols[page * width : (page + 1) * width]
            else:
                todo += [(child, key) for child in node.children.values()]
    return found


class Consumer:
    """Applies announcements, and nothing else."""

    def __init__(self, engine: Engine, number: int = 0, tenant: str = "") -> None:
        self.engine, self.number, self.tenant = engine, number, tenant
        self.held: Held = {}
        self.caught_up = not number

    def hear(self, action: act.Announce | act.SurveyDone) -> None:
        if isinstance(action, act.SurveyDone):
            self.caught_up = self.caught_up or action.survey == self.number
            return
        core = self.engine._core
        namespace = core.namespaces[action.namespace]
        if self.tenant and namespace.spec.tenant != self.tenant:
            return
        if not (self.number in action.surveys or (self.caught_up and action.news)):
            return
        width = namespace.tree.symbol_bytes
        keys = [action.keys[at : at + KEY_BYTES] for at in range(0, len(action.keys), KEY_BYTES)]
        assert keys
        if not action.stored:
            for key in keys:
                del self.held[action.namespace, action.tier, key]  # it was told of
            return
        before = action.parent or fingerprint(namespace.spec)
        assert keys == chain_keys(before, action.symbols, width)
        if action.parent:
            above = [(action.namespace, tier, action.parent) in self.held for tier in core.tier_range]
            assert any(above), "told of a page before the one above it"
        for page, key in enumerate(keys):
            place = (action.namespace, action.tier, key)
            assert place not in self.held, "told twice"
            self.held[place] = action.symbols[page * width : (page + 1) * width]


class NewsMachine(EngineMachine):
    """The engine's machine, watched."""

    @initialize(at_once=st.booleans())
    def watch(self, at_once: bool) -> None:
        self.at_once = at_once
        self.consumers: list[Consumer] = []
        self.surveys = 0

    @precondition(lambda self: hasattr(self, "shell"))
    @rule(tenant=st.sampled_from(["", "", "default", "other"]))
    def come(self, tenant: str) -> None:
        """A watcher arrives; the first one of all is from now on told of everything, beginning with nothing."""
        if not self.consumers:
            self._listen()
        if len(self.consumers) > 4:
            gone = self.consumers.pop(1)
            self.shell.handle(ev.SurveyClosed(gone.number))
        self.surveys += 1
        self.consumers.append(Consumer(self.shell.engine, self.surveys, tenant))
        self.shell.handle(ev.SurveyOpened(self.surveys, tenant))

    @rule(most=st.integers(1, 4))
    def lose_a_page(self, most: int) -> None:
        """A page in the middle of the tree goes: a hole, if it was nowhere else."""
        core = self.shell.engine._core
        for namespace in core.namespaces.values():
            for node in namespace.tree.walk():
                for run in node.runs:
                    live = [tier for tier in core.tier_range if run.state[tier] in LIVE]
                    if live and run.tree.child_runs(run) and most:
                        most -= 1
                        prompt = namespace.tree.prompt_to(run)
                        for tier in live:
                            self.shell.rot(namespace.id, prompt, tier)
                            self.shell.handle(ev.PageCorrupt(namespace.id, tier, prompt))
                        self.lost = self.damaged = True
                        return

    def _listen(self) -> None:
        start, shell = self.shell._perform, self.shell

        def perform(action: act.Action) -> None:
            if isinstance(action, act.Announce | act.SurveyDone):
                for consumer in self.consumers:
                    consumer.hear(action)
            else:
                start(action)

        shell._perform = perform  # type: ignore[method-assign]
        shell.handle(ev.Watching(on=True))
        first = Consumer(shell.engine)
        first.held = truth(shell.engine)
        self.consumers.append(first)

    @precondition(lambda self: getattr(self, "surveys", 0))
    @rule(index=st.integers(0, 4), cost=st.sampled_from([1, 5, 30, 60]), times=st.integers(1, 3))
    def survey_on(self, index: int, cost: int, times: int) -> None:
        """One piece, of any size down to parts of runs."""
        for _ in range(times):
            late = [each for each in self.consumers if not each.caught_up]
            if not late:
                return
            old, survey.PIECE_COST = survey.PIECE_COST, cost
            try:
                self.shell.handle(ev.SurveyNext(late[index % len(late)].number))
            finally:
                survey.PIECE_COST = old

    @invariant()
    def consumers_know_what_there_is(self) -> None:
        if getattr(self, "at_once", False) and hasattr(self, "shell") and not self.consumers:
            self._listen()
        for consumer in getattr(self, "consumers", ()):
            there = truth(self.shell.engine, consumer.tenant)
            if consumer.caught_up:
                assert consumer.held == there
            else:
                assert consumer.held.items() <= there.items(), "told of what cannot be found"

    def teardown(self) -> None:
        if hasattr(self, "shell"):
            for consumer in getattr(self, "consumers", ()):
                while not consumer.caught_up:
                    self.shell.handle(ev.SurveyNext(consumer.number))
            self.consumers_know_what_there_is()
        super().teardown()
        self.consumers_know_what_there_is()


NewsMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("HICACHE_TEST_EXAMPLES", "60")), stateful_step_count=40, deadline=None
)
TestNewsMachine = NewsMachine.TestCase
