"""The scheduler side: what vLLM's scheduler asks and tells, turned into orders for the workers and work for the agent.

Nothing here waits, but for an engine step in which there is nothing to compute. The objects of vLLM (requests,
scheduler outputs) are only read. Look-ups are in ``asking``, saves in ``saving``; here is what binds them, and loads:

    a lease     asked for -> offered (RequestState.answer) -> load under way (Load) -> given back, or reported as bad
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hicache.integrations.vllm.asking import Lookups
from hicache.integrations.vllm.messages import LoadOrder, StepOrders, StepReport
from hicache.integrations.vllm.requests import RequestState, Shape, new_state
from hicache.integrations.vllm.saving import Saves, StoredBlocks
from hicache.integrations.vllm.settings import VllmSettings
from hicache.integrations.vllm.stats import Numbers, Tally

if TYPE_CHECKING:
    from hicache.integrations.vllm.agent import Agent
    from hicache.rpc.client.aio_held import Lease

log = logging.getLogger(__name__)

#: How long a step in which nothing is computed may wait for news, so that it does not spin.
IDLE_WAIT_S = 0.001


@dataclasses.dataclass(slots=True)
class Load:
    """A load that workers are at; it owns its lease. ``ranks``: those that are not done."""

    lease: Lease
    ranks: int
    slow_pages: int
    corrupt: set[int] = dataclasses.field(default_factory=set)


class Scheduler:
    """What vLLM's scheduler calls; nothing raises for what the sidecar does or fails to do."""

    def __init__(self, settings: VllmSettings, shape: Shape, agent: Agent, now_ns: Callable[[], int]) -> None:
        self.tally = Tally()
        self.saves = Saves(settings, shape, agent, self.tally, now_ns)
        self._lookups = Lookups(settings, shape, agent, self.tally, now_ns)
        self._settings = settings
        self.shape = shape
        self._agent = agent
        self._now_ns = now_ns
        self._states: dict[str, RequestState] = {}
        self._loads: dict[str, Load] = {}
        self._load_orders: list[LoadOrder] = []
        self._cancelled: list[str] = []
        self._flush: list[int] = []

    @property
    def owed(self) -> bool:
        """Whether workers have still to report something."""
        return bool(self._loads) or self.saves.owed

    # --- a request's life

    def on_new_request(self, request: Any) -> None:
        """A request has arrived: its look-up starts before the scheduler asks for it."""
        self._lookups.begin(self._state(request))

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond vLLM's own can be loaded; None: ask later. May be called any number of times."""
        state = self._state(request)
        state.offered_tokens = 0
        if not state.reads or state.request_id in self._loads:
            return 0, False
        answer = self._lookups.answer(state)
        if answer is None:
            return None, False
        more = state.offerable_tokens(request.num_tokens) - computed_tokens
        if more <= 0 or not self._lookups.ticket(state):
            return 0, False
        state.offered_from, state.offered_tokens = computed_tokens, computed_tokens + more
        return more, self._settings.load_async

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """The request has got its blocks; ``external_tokens`` of them are to be loaded."""
        state = self._states.get(request.request_id)
        if state is None:
            return
        if external_tokens:
            self._order_load(state, block_ids, external_tokens)
        self._lookups.let_go(state)

    def finished(self, request: Any) -> None:
        """The request is over, however it ended. What workers still do for it goes on."""
        state = self._states.pop(request.request_id, None)
        if state is None:
            return
        self.tally.add("dropped_pages", state.lost_pages)
        self._lookups.let_go(state)
        if state.request_id in self._loads:
            self._cancelled.append(state.request_id)
        self._flush += self.saves.jobs_of(state)

    def _state(self, request: Any) -> RequestState:
        state = self._states.get(request.request_id)
        if state is None:
            state = new_state(request, self.shape.page_tokens, self.shape.extra_key_bytes)
            self._states[request.request_id] = state
        elif state.preemptions != request.num_preemptions:
            self._start_again(state)
        return state

    def _start_again(self, state: RequestState) -> None:
        """Preempted: its blocks are gone, and what the sidecar holds of it by now is asked anew."""
        self._lookups.let_go(state)
        state.preemptions = state.request.num_preemptions
        state.asks, state.outdated = 0, False

    # --- a step

    def build_orders(self, output: Any) -> StepOrders:
        """The orders of the step that was just scheduled."""
        self.tally.add("scheduler_steps")
        self.saves.take_settled()
        for request_id in output.preempted_req_ids or ():
            self._preempted(request_id)
        self._lookups.ask_parked()
        orders = StepOrders(
            page_blocks=self.shape.page_blocks,
            loads=tuple(self._load_orders),
            saves=tuple(self.saves.order(output, self._states)),
            cancelled=tuple(self._cancelled),
            flush=tuple(self._flush),
        )
        self._load_orders, self._cancelled, self._flush = [], [], []
        if not output.total_num_scheduled_tokens and (self._lookups.awaited or self.owed):
            self._rest()
        return orders

    def _rest(self) -> None:
        """Nothing is computed in this step: wait a moment, and leave the processor to who is waited for."""
        begun_ns = self._now_ns()
        self._agent.news.wait(IDLE_WAIT_S)
        self._agent.news.clear()
        self.tally.add("idle_ns", self._now_ns() - begun_ns)

    def take_report(self, report: StepReport, invalid_blocks: set[int]) -> None:
        """What the workers did. Failures come first: what they spoilt must not be committed."""
        for request_id in report.failed:
            self._load_failed(request_id)
        for request_id, page in report.corrupt:
            if request_id in self._loads:
                self._loads[request_id].corrupt.add(page)
        for request_id, ranks in report.loaded.items():
            self._loaded(request_id, ranks)
        self.saves.report(report, invalid_blocks)
        self.tally.add_workers(report.stats)

    def _preempted(self, request_id: str) -> None:
        """Its blocks go to others in this step; it may have been scheduled again in it already."""
        state = self._states.get(request_id)
        if state is None:
            return
        self._flush += self.saves.jobs_of(state)
        if state.preemptions != state.request.num_preemptions:
            self._start_again(state)
            self._lookups.begin(state)

    # --- loads

    def _order_load(self, state: RequestState, block_ids: Sequence[int], external_tokens: int) -> None:
        shape, begin, end = self.shape, state.offered_from, state.offered_tokens
        assert external_tokens == end - begin, "vLLM takes what was offered, or nothing"
        first_page, skipped_tokens = divmod(begin, shape.page_tokens)
        slow_pages = state.answer.slow_pages if state.answer is not None else 0
        ticket, lease = state.ticket, self._lookups.take_lease(state)
        assert ticket is not None, "an offer has a ticket"
        order = LoadOrder(
            request_id=state.request_id,
            ticket=ticket,
            first_page=first_page,
            pages=end // shape.page_tokens - first_page,
            skip_blocks=skipped_tokens // shape.block_size,
            block_ids=tuple(block_ids[begin // shape.block_size : end // shape.block_size]),
            asynchronous=self._settings.load_async,
        )
        self._load_orders.append(order)
        self._loads[state.request_id] = Load(lease, shape.world, slow_pages)
        self.tally.add("hit_tokens", external_tokens)

    def slow_tokens(self, request: Any, external_tokens: int) -> int:
        """How many of the tokens that are being loaded came from a slower tier: the last ones."""
        load = self._loads.get(request.request_id)
        if load is None:
            return 0
        return min(external_tokens, load.slow_pages * self.shape.page_tokens)

    def _loaded(self, request_id: str, ranks: int) -> None:
        """So many more ranks have let go of a lease."""
        load = self._loads.get(request_id)
        if load is None:
            return
        load.ranks -= ranks
        if load.ranks > 0:
            return
        del self._loads[request_id]
        if load.corrupt:
            self._agent.report(load.lease, load.corrupt)
        else:
            self._agent.release(load.lease)

    def _load_failed(self, request_id: str) -> None:
        """The request is computed, stored anew, and never offered external tokens again."""
        self.tally.add("failed_requests")
        state = self._states.get(request_id)
        if state is not None:
            self._lookups.let_go(state)
            state.reads = False
            state.set_back(0)

    # --- all of it

    def reset(self) -> bool:
        """Forget and drop all pages of this model.

        True also where the sidecar is absent or does not let us, and still holds them: this engine meets none of them
        any more, which is what was asked for. Anything else would make vLLM's pause and sleep fail, which call this.
        """
        for state in self._states.values():
            self._lookups.let_go(state)
            state.asks = 0
            state.set_back(0)
            state.outdated = state.request.num_computed_tokens > 0
        self.saves.void_all()
        problem = self._agent.clear()
        if problem:
            log.warning("hicache: reset_cache could not drop the pages in the sidecar: %s", problem)
        log.warning(
            "hicache: after reset_cache this engine keeps its pages apart from those of others, "
            "since the model's weights may have been changed"
        )
        return True

    def take_numbers(self) -> Numbers:
        """What was counted since this was last asked; nothing where that would not tell anything."""
        if not self.tally.eventful:
            return {}
        return self.tally.take() | self._agent.gauges()

    def take_stored(self) -> list[StoredBlocks]:
        """What was stored since this was last asked, for KV events."""
        return self.saves.take_stored()

    def close(self) -> None:
        """Store what is queued, for a bounded time."""
        self._agent.close()
