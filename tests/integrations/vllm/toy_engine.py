"""A toy of vLLM's engine around our scheduler side: blocks of bytes, chunked prefill, preemption, two kinds of loads.

What it "computes" for a token is a digest of what stands in the cache for the token before it, so wrong bytes spread
as they would in a real model, and every page that is stored can be compared with the truth.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from hicache.integrations.vllm.messages import LoadOrder, SaveOrder, StepOrders, StepReport
from hicache.integrations.vllm.scheduler import Scheduler

SLOT_BYTES = 16
WAITING, LOADING, RUNNING, FINISHED = "waiting", "loading", "running", "finished"


def slot(before: bytes, token: int) -> bytes:
    return hashlib.blake2b(before + token.to_bytes(4, "little"), digest_size=SLOT_BYTES).digest()


def truth(tokens: Sequence[int]) -> bytes:
    """What the cache must hold for these tokens."""
    found, last = [], bytes(SLOT_BYTES)
    for token in tokens:
        last = slot(last, token)
        found.append(last)
    return b"".join(found)


class ToyRequest:
    """The part of vLLM's Request that we read."""

    def __init__(self, request_id: str, prompt: Sequence[int], **extra: Any) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt)
        self.all_token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.mm_features: list[Any] = []
        self.kv_transfer_params: dict[str, Any] | None = None
        self.skip_reading_prefix_cache = False
        self.lora_request = None
        self.cache_salt: str | None = None
        self.prompt_embeds = None
        self.resumable = False
        self.block_hashes: list[bytes] = []
        self.status = WAITING
        self.blocks: list[int] = []
        for name, value in extra.items():
            setattr(self, name, value)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


@dataclasses.dataclass
class Access:
    """How the toy's worker gets at bytes: a page of a ticket, and the places of a staged run."""

    read: Callable[[Any, int], bytes]
    rows: Callable[[Any], np.ndarray]
    valid: Callable[[Any], bool] = lambda _: True


@dataclasses.dataclass
class Step:
    orders: StepOrders
    computed: dict[str, tuple[int, int]]  # request -> tokens [begin, end)
    tables: dict[str, list[int]]
    tokens: dict[str, list[int]]


class ToyEngine:
    """``ahead`` steps are scheduled before the outcome of the oldest is known, as with asynchronous scheduling."""

    def __init__(
        self,
        scheduler: Scheduler,
        access: Access,
        *,
        blocks: int = 64,
        budget: int = 64,
        ahead: int = 0,
        load_steps: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.access = access
        self.block_size = scheduler.shape.block_size
        self.memory = np.zeros((blocks, self.block_size * SLOT_BYTES), np.uint8)
        self.free = list(range(blocks))
        self.cached: dict[bytes, int] = {}  # whole blocks that nobody holds, by the tokens up to their end
        self.requests: dict[str, ToyRequest] = {}
        self.budget = budget
        self.ahead = ahead
        self.load_steps = load_steps
        self.pipeline: list[Step] = []
        self.loading: dict[str, tuple[LoadOrder, int]] = {}
        self.finished_loads: set[str] = set()
        self.failed_async: set[str] = set()
        self.fail_next_load = False
        self.offers: list[tuple[str, int, int]] = []
        self.preempted: set[str] = set()
        self.hit_tokens = 0
        self.void_steps = 0
        self.scheduled = 0  # steps
        self.processed = 0
        self.deferred: list[tuple[int, list[int]]] = []

    # --- what users do

    def add(self, request: ToyRequest) -> ToyRequest:
        self.requests[request.request_id] = request
        self.scheduler.on_new_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self._end(self.requests[request_id])

    def preempt(self, request_id: str) -> None:
        request = self.requests[request_id]
        assert request.status == RUNNING
        self._give_blocks_back(request, request.num_computed_tokens)
        request.status, request.num_computed_tokens = WAITING, 0
        request.num_preemptions += 1
        self.preempted.add(request_id)

    def run(self, *requests: ToyRequest, outputs: int = 0, steps: int = 200, between: Any = None) -> None:
        """Until these are computed, with so many tokens of output, and ended."""
        for _ in range(steps):
            if between is not None:
                between()
            self.step()
            for request in requests:
                made = request.num_tokens - request.num_prompt_tokens
                if request.status == RUNNING and self.computed(request) and made > outputs:
                    self._end(request)
            if all(request.status == FINISHED for request in requests):
                return
        raise AssertionError(f"not done after {steps} steps: {[request.status for request in requests]}")

    def computed(self, request: ToyRequest) -> bool:
        in_flight = any(request.request_id in step.computed for step in self.pipeline)
        return not in_flight and request.num_computed_tokens >= request.num_tokens - 1

    # --- a step

    def step(self) -> None:
        self.scheduled += 1
        self.pipeline.append(self._schedule())
        if len(self.pipeline) > self.ahead:
            self._finish_step(self.pipeline.pop(0))

    def drain(self) -> None:
        while self.pipeline:
            self._finish_step(self.pipeline.pop(0))

    def _schedule(self) -> Step:
        budget = self.budget
        new: list[Any] = []
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
        scheduled: dict[str, int] = {}
        for request in [each for each in self.requests.values() if each.status == RUNNING]:
            count = min(budget, request.num_tokens - request.num_computed_tokens)
            if count > 0 and self._extend(request, request.num_computed_tokens + count):
                cached.req_ids.append(request.request_id)
                cached.num_computed_tokens.append(request.num_computed_tokens)
                scheduled[request.request_id] = count
                budget -= count
        for request in [each for each in self.requests.values() if each.status in {WAITING, LOADING}]:
            count = self._admit(request, budget)
            if count:
                new.append(
                    SimpleNamespace(
                        req_id=request.request_id, num_computed_tokens=request.num_computed_tokens
                    )
                )
                scheduled[request.request_id] = count
                budget -= count
        tables = {name: list(self.requests[name].blocks) for name in scheduled}
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens={},
            preempted_req_ids=self.preempted,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (tables[name],)),
        )
        self.preempted = set()
        orders = self.scheduler.build_orders(output)
        computed = {}
        for name, count in scheduled.items():
            request = self.requests[name]
            computed[name] = (request.num_computed_tokens, request.num_computed_tokens + count)
            request.num_computed_tokens += count
        tokens = {name: list(self.requests[name].all_token_ids) for name in scheduled}
        return Step(orders, computed, tables, tokens)

    def _admit(self, request: ToyRequest, budget: int) -> int:
        """How many tokens of a waiting request are computed in this step."""
        if request.status == LOADING:
            if request.request_id not in self.finished_loads:
                return 0
            self.finished_loads.discard(request.request_id)
            request.status = WAITING
            if request.request_id in self.failed_async:
                self.failed_async.discard(request.request_id)
                if not request.num_computed_tokens:
                    self._give_blocks_back(request)
        external, later = 0, False
        if not request.num_computed_tokens:
            local = self._take_cached(request)
            found, later = self.scheduler.matched_tokens(request, local)
            if found is None or not budget:
                self._give_blocks_back(request, local)
                return 0
            external = found
            self.offers.append((request.request_id, local, external))
            request.num_computed_tokens = local + external
        count = 0 if later else min(budget, request.num_tokens - request.num_computed_tokens)
        if not (later or count) or not self._extend(request, request.num_computed_tokens + count):
            request.num_computed_tokens = 0
            self._give_blocks_back(request)
            return 0
        self.scheduler.allocated(request, list(request.blocks), external)
        self.hit_tokens += external
        if later:
            request.status = LOADING
            return 0
        request.status = RUNNING
        return count

    # --- the worker

    def _finish_step(self, step: Step) -> None:
        """Compute it, and take its outcome up."""
        self.processed += 1
        while self.deferred and self.deferred[0][0] <= self.processed:
            self.free[:0] = self.deferred.pop(0)[1]
        failed: set[str] = set()
        invalid: set[int] = set()
        corrupt: list[tuple[str, int]] = []
        loaded: dict[str, int] = {}
        for order in step.orders.loads:
            if order.asynchronous:
                self.loading[order.request_id] = (order, self.load_steps)
            else:
                self._load(order, failed, invalid, corrupt)
                loaded[order.request_id] = 1
        sync_failed = bool(failed)
        for name, (begin, end) in step.computed.items():
            self._compute(step.tokens[name], step.tables[name], begin, end)
        if sync_failed:
            self.void_steps = 1 + self.ahead
        void = frozenset(save.job for save in step.orders.saves) if self.void_steps else frozenset()
        self.void_steps = max(0, self.void_steps - 1)
        for save in step.orders.saves:
            if save.job not in void:
                self._copy_out(save)
        ended = self._advance_loads(step.orders, failed, invalid, corrupt, loaded)
        self._update(step, invalid)
        report = StepReport(
            saved={save.job: 1 for save in step.orders.saves},
            void=void,
            loaded=loaded,
            corrupt=tuple(corrupt),
            failed=frozenset(failed),
        )
        self.scheduler.take_report(report, invalid)
        for name in ended:
            request = self.requests[name]
            if request.status == FINISHED:
                self._give_blocks_back(request)
                del self.requests[name]
            else:
                self.finished_loads.add(name)

    def _advance_loads(
        self, orders: StepOrders, failed: Any, invalid: Any, corrupt: Any, loaded: Any
    ) -> list[str]:
        ended = []
        for name in list(self.loading):
            order, left = self.loading[name]
            if left > 0 and name not in orders.cancelled:
                self.loading[name] = (order, left - 1)
                continue
            del self.loading[name]
            self._load(order, failed, invalid, corrupt)
            loaded[name] = 1
            ended.append(name)
        return ended

    def _load(self, order: LoadOrder, failed: Any, invalid: Any, corrupt: Any) -> None:
        page_blocks = self.scheduler.shape.page_blocks
        bad: set[int] = set()
        blocks = iter(order.block_ids)
        broken, self.fail_next_load = self.fail_next_load or not self.access.valid(order.ticket), False
        for page in range(order.first_page, order.first_page + order.pages):
            data = np.frombuffer(self.access.read(order.ticket, page), np.uint8).reshape(page_blocks, -1)
            skip = order.skip_blocks if page == order.first_page else 0
            targets = [next(blocks) for _ in range(page_blocks - skip)]
            if hasattr(order.ticket, "unsound") and page in order.ticket.unsound():
                corrupt.append((order.request_id, page))
                bad.update(targets)
            for target, row in zip(targets, data[skip:], strict=True):
                self.memory[target] = 0xEE if broken else row
        assert next(blocks, None) is None, "as many blocks as the pages take"
        if broken:
            bad = set(order.block_ids)
        if bad:
            failed.add(order.request_id)
            invalid.update(bad)

    def _compute(self, tokens: list[int], table: list[int], begin: int, end: int) -> None:
        for position in range(begin, end):
            before = bytes(SLOT_BYTES) if not position else self._slot(table, position - 1).tobytes()
            self._slot(table, position)[:] = np.frombuffer(slot(before, tokens[position]), np.uint8)

    def _slot(self, table: list[int], position: int) -> np.ndarray:
        block, at = divmod(position, self.block_size)
        return self.memory[table[block]][at * SLOT_BYTES : (at + 1) * SLOT_BYTES]

    def _copy_out(self, save: SaveOrder) -> None:
        rows = [row for run in save.runs for row in self.access.rows(run)]
        page_blocks = self.scheduler.shape.page_blocks
        assert len(rows) * page_blocks == len(save.block_ids)
        for page, row in enumerate(rows):
            for at, block in enumerate(save.block_ids[page * page_blocks : (page + 1) * page_blocks]):
                row.reshape(page_blocks, -1)[at] = self.memory[block]

    def _update(self, step: Step, invalid: set[int]) -> None:
        """What vLLM's scheduler makes of a step's output."""
        spoilt = set()
        for request in list(self.requests.values()):
            if request.status not in {RUNNING, LOADING}:
                continue
            bad = [at for at, block in enumerate(request.blocks) if block in invalid]
            if bad and bad[0] * self.block_size < request.num_computed_tokens:
                request.num_computed_tokens = bad[0] * self.block_size
                spoilt.add(request.request_id)
                if request.status == LOADING:
                    self.failed_async.add(request.request_id)
        for name, (_, end) in step.computed.items():
            request = self.requests.get(name)
            if request is None or name in spoilt or request.status != RUNNING:
                continue
            if end == request.num_tokens and request.num_computed_tokens >= end:
                request.all_token_ids.append(len(request.all_token_ids) % 7 + 1)

    # --- blocks

    def _extend(self, request: ToyRequest, tokens: int) -> bool:
        need = -(-tokens // self.block_size) - len(request.blocks)
        while len(self.free) < need and self.cached:
            self.free.append(self.cached.pop(next(iter(self.cached))))
        if len(self.free) < need:
            return False
        request.blocks += [self.free.pop() for _ in range(need)]
        return True

    def _key(self, tokens: Sequence[int]) -> bytes:
        return repr(list(tokens)).encode()

    def _take_cached(self, request: ToyRequest) -> int:
        size = self.block_size
        while (end := (len(request.blocks) + 1) * size) < request.num_tokens:
            block = self.cached.pop(self._key(request.all_token_ids[:end]), None)
            if block is None:
                break
            request.blocks.append(block)
        return len(request.blocks) * size

    def _give_blocks_back(self, request: ToyRequest, good_tokens: int = 0) -> None:
        """Those that steps under way still write to are kept apart until these have ended."""
        in_flight = any(request.request_id in step.computed for step in self.pipeline)
        if in_flight:
            self.deferred.append((self.scheduled, request.blocks))
        for at, block in enumerate(() if in_flight else request.blocks):
            key = self._key(request.all_token_ids[: (at + 1) * self.block_size])
            if (at + 1) * self.block_size <= good_tokens and key not in self.cached:
                self.cached[key] = block
            else:
                self.free.insert(0, block)
        request.blocks = []

    def _end(self, request: ToyRequest) -> None:
        loading = request.status == LOADING and request.request_id not in self.finished_loads
        self.finished_loads.discard(request.request_id)
        self.scheduler.finished(request)
        request.status = FINISHED
        if not loading:
            self._give_blocks_back(request)
            del self.requests[request.request_id]
