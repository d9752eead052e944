"""The agent's calls about look-ups and leases: what has gathered goes into one FetchMany at a time.

Belongs to the agent's event loop, but for ``ask`` and ``release``, which any thread may call.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from hicache.errors import ErrorCode, HicacheError, UnavailableError
from hicache.integrations.vllm.namespaces import Namespaces
from hicache.integrations.vllm.requests import Answer, Question
from hicache.integrations.vllm.settings import VllmSettings
from hicache.rpc.client import FetchQuery, aio
from hicache.rpc.client.aio_held import Lease

log = logging.getLogger(__name__)

#: Pages of this tier cannot be read by engines: they are brought up first.
SLOW_TIER = "disk"

Spawn = Callable[[Coroutine[Any, Any, object]], object]


@dataclasses.dataclass(slots=True)
class Failures:
    """Says each kind of failure once, and tells the circuit of those that mean that the sidecar is not well."""

    suspect: Callable[[], None]
    calls: int = 0
    warned: set[ErrorCode] = dataclasses.field(default_factory=set)

    def failed(self, error: HicacheError) -> None:
        """A call went wrong."""
        self.calls += 1
        if error.code in {ErrorCode.UNAVAILABLE, ErrorCode.STALE, ErrorCode.INTERNAL}:
            self.suspect()
        else:
            self.complain(error, "the sidecar refused")

    def complain(self, error: HicacheError, what: str) -> None:
        """Say it, once for each kind of error."""
        if error.code not in self.warned:
            self.warned.add(error.code)
            log.warning("hicache: %s: %s", what, error)


class Rounds:
    """All questions, and all leases from their grant to their release. ``told``: an answer has come."""

    def __init__(
        self,
        client: aio.Client,
        namespaces: Namespaces,
        settings: VllmSettings,
        failures: Failures,
        *,
        spawn: Spawn,
        told: Callable[[], None],
    ) -> None:
        self.held: set[Lease] = set()
        self._client = client
        self._namespaces = namespaces
        self._settings = settings
        self._failures = failures
        self._spawn = spawn
        self._told = told
        self._questions: collections.deque[Question] = collections.deque()
        self._releases: collections.deque[Lease] = collections.deque()

    def ask(self, question: Question) -> None:
        """Put a question into the next round."""
        self._questions.append(question)

    def release(self, lease: Lease) -> None:
        """Give a lease back with the next round."""
        self._releases.append(lease)

    @property
    def gathered(self) -> bool:
        """Whether there is anything for a round."""
        return bool(self._questions or self._releases)

    async def round(self) -> None:
        """One FetchMany with all that has gathered; raises nothing."""
        asked, queries = self._gather()
        released = [self._releases.popleft() for _ in range(len(self._releases))]
        self.held.difference_update(released)
        renewed = self._due()
        if not (queries or released or renewed):
            return
        try:
            if not self._client.attached:
                raise UnavailableError("the sidecar is absent")
            outcomes = await self._client.fetch_many(
                queries, ttl_ms=self._settings.lease_ttl_ms, release=released, renew=renewed
            )
        except HicacheError as error:
            self._failures.failed(error)
            self._settle_all(asked)
            return
        for question, outcome in zip(asked, outcomes, strict=True):
            self._take(question, outcome)

    def abandon(self) -> None:
        """Nobody will ask any more: who still waits is told so. Leases end with the session."""
        while self._questions:
            self._questions.popleft().settle(Answer())
        self.held.clear()
        self._told()

    # --- asking

    def _gather(self) -> tuple[list[Question], list[FetchQuery]]:
        """The questions that can be asked now; others wait for their namespace."""
        asked, queries = [], []
        while self._questions:
            question = self._questions.popleft()
            if question.abandoned:
                continue
            try:
                handle = self._namespaces.ready(question.identity)
            except HicacheError as error:
                self._refuse(question, error)
                continue
            if handle is None:
                self._spawn(self._make(question))
                continue
            asked.append(question)
            queries.append(FetchQuery(handle, question.tokens, extra_keys=question.extra_keys))
        return asked, queries

    async def _make(self, question: Question) -> None:
        """Make a question's namespace, then ask it."""
        try:
            await self._namespaces.get(question.identity)
        except HicacheError as error:
            self._refuse(question, error)
            return
        self.ask(question)
        await self.round()

    def _refuse(self, question: Question, error: HicacheError) -> None:
        self._failures.complain(error, "a prompt was not looked up")
        self._answer(question, None)

    def _settle_all(self, questions: Iterable[Question]) -> None:
        for question in questions:
            self._answer(question, None)

    # --- answers

    def _take(self, question: Question, outcome: Lease | HicacheError) -> None:
        if isinstance(outcome, HicacheError):
            self._refuse(question, outcome)
            return
        self.held.add(outcome)
        if outcome.operation and outcome.granted_pages < outcome.matched_pages:
            self._spawn(self._await_pages(question, outcome))
        else:
            self._answer(question, outcome)

    async def _await_pages(self, question: Question, lease: Lease) -> None:
        """Pages are on their way from a slower tier: the answer waits for them, for a while."""
        try:
            await lease.wait(self._settings.load_wait_ms)
        except HicacheError as error:
            log.debug("pages on their way did not come: %s", error)
        self._answer(question, lease)

    def _answer(self, question: Question, lease: Lease | None) -> None:
        answer = Answer()
        if lease is not None and lease.granted_pages:
            slow_pages = min(lease.granted_pages, lease.tier_pages.get(SLOW_TIER, 0))
            answer = Answer(lease, lease.granted_pages, _held_pages(lease), slow_pages)
        elif lease is not None:
            answer = Answer(matched_pages=_held_pages(lease))
        taken = question.settle(answer)
        if lease is not None and not (taken and answer.lease is lease):
            self._give_back(lease)
        self._told()

    def _give_back(self, lease: Lease) -> None:
        if lease.lease_id:
            self.release(lease)
        else:
            self.held.discard(lease)  # nothing was granted

    def _due(self) -> list[Lease]:
        """Leases at half their time; those that are over are let go of."""
        due = []
        for lease in list(self.held):
            if lease.remaining_ms * 2 >= self._settings.lease_ttl_ms:
                continue
            if lease.still_valid():
                due.append(lease)
            else:
                self.held.discard(lease)
        return due


async def waited(event: asyncio.Event, most_s: float) -> None:
    """Until the event is set, or so long; then it is clear."""
    try:
        async with asyncio.timeout(most_s):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()


def _held_pages(lease: Lease) -> int:
    """How many pages the sidecar still holds, as far as it has told.

    Those that were matched and did not come, although nothing is on its way any more, turned out to be unreadable:
    the request that computes them is to store them again.
    """
    return lease.matched_pages if lease.operation else lease.granted_pages
