r"""Saves: what is complete after a step is copied by the workers, then handed to the agent to be committed.

    ordered -> copied by all ranks -> handed to the agent -> settled
          \-> void: never committed; the request's pages count as not stored

A step may be scheduled before the one before it has been computed (asynchronous scheduling), so what a failed load has
spoilt may be ordered to be saved already when its report arrives. All jobs of the request that were not reported by
then are void, and so are those of requests that share one of the bad blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hicache.integrations.vllm.commits import (
    CommitTask,
    Outcome,
    Place,
    Settled,
    free_places,
    staged_runs,
)
from hicache.integrations.vllm.messages import SaveOrder, StepReport
from hicache.integrations.vllm.requests import SETBACKS_MOST, RequestState, Shape, complete_pages
from hicache.integrations.vllm.settings import Save, VllmSettings
from hicache.integrations.vllm.stats import Tally

if TYPE_CHECKING:
    from hicache.integrations.vllm.agent import Agent

NS_PER_MS = 1_000_000
#: A request whose pages the sidecar had no room for does not try again for so long.
QUIET_MS = 1_000


@dataclasses.dataclass(frozen=True, slots=True)
class StoredBlocks:
    """What a KV event says of stored pages: vLLM's own hashes of their blocks."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]
    lora_id: int | None
    lora_name: str | None


@dataclasses.dataclass(slots=True)
class Job:
    """A save that workers are at; it owns its places. ``ranks``: those that are not done."""

    number: int
    state: RequestState
    first_page: int
    places: tuple[Place, ...]
    block_ids: Sequence[int]  # the request's whole table: what its pages depend on
    tokens: bytes
    ranks: int
    event: StoredBlocks | None = None
    void: bool = False


class Saves:
    """All jobs of the engine."""

    def __init__(
        self,
        settings: VllmSettings,
        shape: Shape,
        agent: Agent,
        tally: Tally,
        now_ns: Callable[[], int],
    ) -> None:
        self.events = False  # whether what was stored is remembered for ``take_stored``
        self._settings = settings
        self._shape = shape
        self._agent = agent
        self._tally = tally
        self._now_ns = now_ns
        self._jobs: dict[int, Job] = {}  # that workers are at
        self._committing: dict[int, Job] = {}  # that the agent is at
        self._stored: list[StoredBlocks] = []
        self._numbers = 0

    @property
    def owed(self) -> bool:
        """Whether workers have still to report a job."""
        return bool(self._jobs)

    def jobs_of(self, state: RequestState) -> list[int]:
        """The jobs of a request that workers are at."""
        return [number for number, job in self._jobs.items() if job.state is state]

    def void_all(self) -> None:
        """Nothing that is on its way is to be committed."""
        for job in self._jobs.values():
            job.void = True

    def take_stored(self) -> list[StoredBlocks]:
        """What was stored since this was last asked."""
        stored, self._stored = self._stored, []
        return stored

    def report(self, report: StepReport, invalid_blocks: set[int]) -> None:
        """What the workers did. Failures first: what they spoilt must not be committed."""
        self._void_spoilt(report.failed, invalid_blocks)
        for number in report.void:
            if number in self._jobs:
                self._jobs[number].void = True
        for number, ranks in report.saved.items():
            self._saved(number, ranks)

    def order(self, output: Any, states: Mapping[str, RequestState]) -> list[SaveOrder]:
        """Save what is complete after this step."""
        if self._settings.save is Save.OFF or not self._agent.online:
            return []
        orders: list[SaveOrder] = []
        now_ns = self._now_ns()
        drafts = output.scheduled_spec_decode_tokens or {}
        for request_id, before_tokens in _computed_before(output):
            state = states.get(request_id)
            if state is None or not state.writes or state.outdated or now_ns < state.quiet_until_ns:
                continue
            new_tokens = output.num_scheduled_tokens[request_id] - len(drafts.get(request_id, ()))
            first, after_tokens = state.ordered_pages, before_tokens + new_tokens
            if after_tokens < (first + 1) * self._shape.page_tokens:
                continue  # the usual step of a request that decodes
            end = self._complete(state, after_tokens)
            if first < end:
                self._save(state, first, end, output.kv_connector_block_state, orders)
        return orders

    def _complete(self, state: RequestState, computed_tokens: int) -> int:
        request = state.request
        known = request.num_tokens if self._settings.save is Save.ALL else request.num_prompt_tokens
        return complete_pages(computed_tokens, min(known, request.num_tokens), self._shape.page_tokens)

    def _save(self, state: RequestState, first: int, end: int, tables: Any, orders: list[SaveOrder]) -> None:
        """Order pages [first, end) to be saved, or as many as there is staging memory for."""
        places = tuple(self._agent.stage(end - first))
        state.lost_pages = end - first - len(places)
        if not places:
            return
        end = state.ordered_pages = first + len(places)
        (block_ids,) = tables.get_block_ids(state.request_id)
        wanted = block_ids[first * self._shape.page_blocks : end * self._shape.page_blocks]
        self._numbers += 1
        state.jobs += 1
        self._tally.add("save_jobs")
        self._jobs[self._numbers] = Job(
            number=self._numbers,
            state=state,
            first_page=first,
            places=places,
            block_ids=block_ids,
            tokens=state.packed(state.request.all_token_ids, end),
            ranks=self._shape.world,
            event=self._stored_blocks(state, first, end) if self.events else None,
        )
        orders.append(SaveOrder(self._numbers, state.request_id, staged_runs(places), tuple(wanted)))

    def _saved(self, number: int, ranks: int) -> None:
        """So many more ranks are done with a job."""
        job = self._jobs.get(number)
        if job is None:
            return
        job.ranks -= ranks
        if job.ranks > 0:
            return
        del self._jobs[number]
        if job.void:
            self._tally.add("void_jobs")
            job.state.jobs -= 1
            job.state.set_back(job.first_page)
            free_places(job.places)
            return
        self._committing[number] = job
        state, end = job.state, job.first_page + len(job.places)
        self._agent.commit(
            CommitTask(
                number, id(state), state.identity, job.tokens, state.keys(end), job.first_page, job.places
            )
        )

    def _void_spoilt(self, failed: frozenset[str], invalid_blocks: set[int]) -> None:
        """Jobs that may hold what was computed from pages that did not load."""
        for job in self._jobs.values() if failed or invalid_blocks else ():
            if job.state.request_id in failed or not invalid_blocks.isdisjoint(job.block_ids):
                job.void = True
                job.state.set_back(job.first_page)

    def take_settled(self) -> None:
        """Take up what became of commits."""
        for settled in self._agent.take_settled():
            job = self._committing.pop(settled.job, None)
            if job is not None:
                self._settle(job, settled)

    def _settle(self, job: Job, settled: Settled) -> None:
        state = job.state
        state.jobs -= 1
        if settled.outcome is Outcome.STORED:
            self._tally.add("stored_pages", settled.stored_pages)
            self._tally.add("present_pages", len(job.places) - min(settled.stored_pages, len(job.places)))
            if job.event is not None:
                self._stored.append(job.event)
            return
        self._tally.add(f"{settled.outcome.value}_jobs")
        if settled.outcome is Outcome.BEHIND:
            state.set_back(settled.present_pages)
            state.setbacks += 1
            state.writes = state.writes and state.setbacks <= SETBACKS_MOST
            return
        state.set_back(job.first_page)
        state.quiet_until_ns = self._now_ns() + QUIET_MS * NS_PER_MS

    def _stored_blocks(self, state: RequestState, first: int, end: int) -> StoredBlocks | None:
        """What to announce of pages [first, end): vLLM's own hashes of their blocks."""
        request, shape = state.request, self._shape
        hashes = request.block_hashes
        begin_block, end_block = first * shape.page_blocks, end * shape.page_blocks
        if len(hashes) < end_block:
            return None
        lora = getattr(request, "lora_request", None)
        return StoredBlocks(
            hashes=tuple(hashes[begin_block:end_block]),
            parent=hashes[begin_block - 1] if begin_block else None,
            token_ids=tuple(request.all_token_ids[first * shape.page_tokens : end * shape.page_tokens]),
            lora_id=lora.lora_int_id if lora is not None else None,
            lora_name=lora.lora_name if lora is not None else None,
        )


def _computed_before(output: Any) -> Iterator[tuple[str, int]]:
    """The requests of a step, and how many tokens of each were computed before it."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
