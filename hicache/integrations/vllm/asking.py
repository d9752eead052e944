"""Look-ups and the leases that wait with their requests: who asks, who stands in line, who has waited long enough.

Every lease that is taken up here is handed on to a load (``take_lease``) or given back (``let_go``).
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING

from hicache.errors import HicacheError
from hicache.integrations.vllm.requests import ASKS_MOST, Answer, Question, RequestState, Shape
from hicache.integrations.vllm.settings import VllmSettings
from hicache.integrations.vllm.stats import Tally

if TYPE_CHECKING:
    from hicache.integrations.vllm.agent import Agent
    from hicache.rpc.client.aio_held import Lease

NS_PER_MS = 1_000_000
#: A lease with less time left than this is not offered.
OFFER_MARGIN_MS = 500


class Lookups:
    """The look-ups of all requests that have no blocks yet."""

    def __init__(
        self,
        settings: VllmSettings,
        shape: Shape,
        agent: Agent,
        tally: Tally,
        now_ns: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._shape = shape
        self._agent = agent
        self._tally = tally
        self._now_ns = now_ns
        self._waiting: set[str] = set()  # requests that ask, or have a lease that no load has taken
        self._parked: collections.OrderedDict[str, RequestState] = collections.OrderedDict()

    @property
    def awaited(self) -> bool:
        """Whether any answer may still come."""
        return bool(self._waiting or self._parked)

    def begin(self, state: RequestState) -> None:
        """Ask before the scheduler does."""
        if not state.reads or state.pending:
            return
        if self._agent.online:
            self._ask(state, urgent=False)
        else:
            self._tally.add("lookups_offline")

    def answer(self, state: RequestState) -> Answer | None:
        """The sidecar's answer, an empty one where none is to be had, None while it is worth waiting."""
        now_ns = self._now_ns()
        if state.question is not None and state.question.answer is not None:
            self._take_answer(state, state.question, state.question.answer, now_ns)
        if state.answer is not None:
            lease = state.answer.lease
            if lease is None or (lease.remaining_ms > OFFER_MARGIN_MS and lease.still_valid()):
                return state.answer
            self.let_go(state)  # lost while the request waited: look again
        if not self._agent.online:
            self.let_go(state)
            return Answer()
        if not state.pending and not self._ask(state, urgent=True):
            return Answer()
        return self._wait(state, now_ns)

    def _wait(self, state: RequestState, now_ns: int) -> Answer | None:
        """None: ask later; an empty answer once that has taken too long."""
        state.wait_since_ns = state.wait_since_ns or now_ns
        if now_ns - state.wait_since_ns < self._settings.lookup_timeout_ms * NS_PER_MS:
            return None
        self._tally.add("lookup_timeouts")
        if state.question is not None:
            self._agent.suspect()
        self.let_go(state)
        state.asks = ASKS_MOST
        return Answer()

    def _ask(self, state: RequestState, *, urgent: bool) -> bool:
        """Look the request up, or put it in line where too many wait. False: it has no page, or asked often enough."""
        request = state.request
        pages = request.num_tokens // self._shape.page_tokens
        if state.asks >= ASKS_MOST or request.num_tokens <= self._shape.page_tokens:
            return False
        if len(self._waiting) >= self._settings.max_waiting_leases:
            state.parked = True
            self._parked[state.request_id] = state
            if urgent:
                self._parked.move_to_end(state.request_id, last=False)
            return True
        state.asks += 1
        tokens = state.packed(request.all_token_ids, pages)
        state.question = Question(state.identity, tokens, state.keys(pages), self._now_ns())
        self._waiting.add(state.request_id)
        self._tally.add("lookups")
        self._agent.ask(state.question)
        return True

    def ask_parked(self) -> None:
        """Those next in line may ask."""
        while self._parked and len(self._waiting) < self._settings.max_waiting_leases:
            _, state = self._parked.popitem(last=False)
            state.parked = False
            self._ask(state, urgent=False)

    def _take_answer(self, state: RequestState, question: Question, answer: Answer, now_ns: int) -> None:
        state.question, state.answer = None, answer
        if answer.lease is None:
            self._waiting.discard(state.request_id)
        self._tally.add("lookup_ns", now_ns - question.asked_ns)
        state.known(answer.matched_pages)

    def ticket(self, state: RequestState) -> bool:
        """Make the ticket for an offer, before vLLM hears of it: an offer that was taken cannot be withdrawn.

        False: the lease was lost since it was last looked at; the next call looks the prompt up again.
        """
        assert state.answer is not None and state.answer.lease is not None, "an offer has a lease"
        try:
            state.ticket = state.answer.lease.ticket()
        except HicacheError:
            self.let_go(state)
            return False
        return True

    def take_lease(self, state: RequestState) -> Lease:
        """The lease of an offer that was taken; from now on the caller's."""
        assert state.answer is not None and state.answer.lease is not None, "an offer has a lease"
        lease, state.answer = state.answer.lease, None
        self._waiting.discard(state.request_id)
        return lease

    def let_go(self, state: RequestState) -> None:
        """No look-up, no answer, no lease."""
        answer = state.answer
        if state.question is not None:
            answer = state.question.abandon()
        if answer is not None and answer.lease is not None:
            self._agent.release(answer.lease)
        state.question, state.answer = None, None
        state.parked, state.offered_tokens, state.wait_since_ns = False, 0, 0
        state.ticket = None
        self._parked.pop(state.request_id, None)
        self._waiting.discard(state.request_id)
