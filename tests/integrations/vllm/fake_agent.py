"""The agent's part in the scheduler's tests: a store in memory that answers when the test says so."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from hicache.errors import StaleError
from hicache.integrations.vllm.commits import CommitTask, Outcome, Place, Settled
from hicache.integrations.vllm.requests import Answer, Identity, Question

Key = tuple[Identity, bytes]


@dataclasses.dataclass(frozen=True)
class FakeRun:
    path: str
    size_bytes: int
    inode: int
    offset: int
    pages: int


class FakeStaging:
    def __init__(self, agent: FakeAgent, number: int, pages: int) -> None:
        self.agent, self.pages, self.freed = agent, pages, False
        self.bytes = np.zeros((pages, agent.page_bytes), np.uint8)
        self.runs = [FakeRun("fake", 0, number, 0, pages)]

    def free(self) -> None:
        assert not self.freed, "given back once"
        self.freed = True
        self.agent.staged_pages -= self.pages
        self.bytes[:] = 0xDD


class FakeLease:
    def __init__(
        self, agent: FakeAgent, identity: Identity, prompt: bytes, granted: int, matched: int
    ) -> None:
        self.agent, self.identity, self.prompt = agent, identity, prompt
        self.granted_pages, self.matched_pages = granted, matched
        self.remaining_ms = 20_000
        self.lost = False
        self.tier_pages = {"host": granted}
        self.data = [bytearray(agent.pages[identity, prompt[: agent.cut(n + 1)]]) for n in range(granted)]
        self.bad = {n for n in range(granted) if (identity, prompt[: agent.cut(n + 1)]) in agent.rotten}

    def still_valid(self) -> bool:
        return not self.lost

    def ticket(self) -> FakeLease:
        if self.lost:
            raise StaleError("the lease was lost with its session")
        return self

    def unsound(self) -> set[int]:
        return self.bad


class FakeAgent:
    """Nothing happens until ``work``; ``dead`` is a sidecar that is gone with all that it held."""

    def __init__(self, page_tokens: int, page_bytes: int, staging_pages: int = 1000) -> None:
        self.page_tokens, self.page_bytes, self.staging_pages = page_tokens, page_bytes, staging_pages
        self.news = threading.Event()
        self.pages: dict[Key, bytes] = {}
        self.rotten: set[Key] = set()
        self.dead = self.suspected = self.refuses = self.full = False
        self.held: set[FakeLease] = set()
        self.staged_pages = 0
        self.questions: list[Question] = []
        self.tasks: list[CommitTask] = []
        self.settled: list[Settled] = []
        self.stagings: dict[int, FakeStaging] = {}
        self.reported: list[tuple[FakeLease, list[int]]] = []
        self.cleared = 0
        self._numbers = itertools.count(1)

    def cut(self, pages: int) -> int:
        return pages * self.page_tokens * 4

    @property
    def online(self) -> bool:
        return not (self.dead or self.suspected)

    def gauges(self) -> dict[str, int]:
        return {"online": int(self.online), "leases": len(self.held), "staged_bytes": self.staged_pages}

    def ask(self, question: Question) -> None:
        self.questions.append(question)

    def release(self, lease: Any) -> None:
        assert lease in self.held or self.dead or lease.lost, "a lease is given back once"
        self.held.discard(lease)

    def report(self, lease: FakeLease, pages: Iterable[int]) -> None:
        self.reported.append((lease, sorted(pages)))
        for page in pages:
            key = (lease.identity, lease.prompt[: self.cut(page + 1)])
            if key in self.rotten:
                self.rotten.discard(key)
                self.pages.pop(key, None)
        self.release(lease)

    def stage(self, pages: int) -> list[Place]:
        places: list[Place] = []
        room = min(pages, self.staging_pages - self.staged_pages)
        while room > 0:
            size = min(room, 3)  # in pieces, as fragmented memory would be
            number = next(self._numbers)
            staging = self.stagings[number] = FakeStaging(self, number, size)
            self.staged_pages += size
            places += (Place(staging, index) for index in range(size))  # type: ignore[arg-type]
            room -= size
        return places

    def commit(self, task: CommitTask) -> None:
        self.tasks.append(task)

    def take_settled(self) -> list[Settled]:
        settled, self.settled = self.settled, []
        return settled

    def suspect(self) -> None:
        self.suspected = True

    def clear(self) -> str:
        self.cleared += 1
        while self.tasks:
            self._end(self.tasks.pop(0), Outcome.LOST, 0, 0)
        self.pages.clear()
        self.rotten.clear()
        return "no" if self.dead else ""

    def close(self) -> None:
        pass

    # --- what the test does

    def work(self, questions: int = 1000, tasks: int = 1000) -> None:
        for _ in range(min(questions, len(self.questions))):
            self._answer(self.questions.pop(0))
        for _ in range(min(tasks, len(self.tasks))):
            self._commit(self.tasks.pop(0))

    def die(self) -> None:
        self.dead = True
        self.pages.clear()
        self.rotten.clear()
        for lease in self.held:
            lease.lost = True
        self.held.clear()

    def come_back(self) -> None:
        self.dead = self.suspected = False

    def _matched(self, identity: Identity, prompt: bytes) -> int:
        pages = 0
        while (identity, prompt[: self.cut(pages + 1)]) in self.pages and self.cut(pages + 1) <= len(prompt):
            pages += 1
        return pages

    def _answer(self, question: Question) -> None:
        if question.abandoned:
            return
        matched = 0 if self.dead else self._matched(question.identity, question.tokens)
        answer = Answer(matched_pages=matched)
        if matched:
            lease = FakeLease(self, question.identity, question.tokens, matched, matched)
            self.held.add(lease)
            answer = Answer(lease, matched, matched)  # type: ignore[arg-type]
        if not question.settle(answer) and answer.lease is not None:
            self.release(answer.lease)

    def _commit(self, task: CommitTask) -> None:
        outcome, present, stored = Outcome.LOST, 0, 0
        if not self.dead:
            present = self._matched(task.identity, task.tokens)
            outcome = Outcome.REFUSED if self.full else Outcome.STORED
            if present < task.first_page:
                outcome = Outcome.BEHIND
            elif not self.full:
                for at, place in enumerate(task.places):
                    key = (task.identity, task.tokens[: self.cut(task.first_page + at + 1)])
                    if key not in self.pages:
                        self.pages[key] = place.staging.bytes[place.index].tobytes()  # type: ignore[attr-defined]
                        stored += 1
        self._end(task, outcome, present, stored)

    def _end(self, task: CommitTask, outcome: Outcome, present: int, stored: int) -> None:
        for staging in {id(place.staging): place.staging for place in task.places}.values():
            staging.free()
        self.settled.append(Settled(task.job, outcome, present, stored))
