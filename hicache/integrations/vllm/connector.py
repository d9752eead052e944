"""``HiCacheConnector``: vLLM's V1 KV connector. Thin: what vLLM calls is translated and passed on.

vLLM ships no types: to mypy its classes are Any.

One class plays both roles, as vLLM has it: in the scheduler's process (``scheduler``), and in each worker (``worker``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from vllm.distributed.kv_events import MEDIUM_CPU, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from hicache.integrations.vllm import settings as configuration
from hicache.integrations.vllm import stats as statistics
from hicache.integrations.vllm.agent import Agent
from hicache.integrations.vllm.engine import engine_facts
from hicache.integrations.vllm.identity import namespace_fields
from hicache.integrations.vllm.messages import StepOrders, StepReport
from hicache.integrations.vllm.requests import EXTRA_KEY_BYTES, Shape
from hicache.integrations.vllm.saving import StoredBlocks
from hicache.integrations.vllm.scheduler import Scheduler
from hicache.integrations.vllm.worker import Worker
from hicache.rpc.client.arguments import NamespaceFields
from hicache.runtime.clock import Clock

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

P = ParamSpec("P")
R = TypeVar("R")


class OrdersMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """StepOrders, as vLLM passes them on."""

    def __init__(self, orders: StepOrders) -> None:
        self.orders = orders


class ReportMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A StepReport, as vLLM gathers it from all ranks."""

    def __init__(self, report: StepReport) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        """Both as one."""
        assert isinstance(other, ReportMetadata)
        return ReportMetadata(self.report.merged(other.report))


class HiCacheStats(KVConnectorStats):  # type: ignore[misc]
    """Counters on their way to vLLM's log and metrics."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Start again."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> HiCacheStats:
        """Both as one."""
        return HiCacheStats(data=statistics.added(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """For the log."""
        return statistics.summary(self.data)

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class HiCachePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """``vllm:hicache_*``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[tuple[str, int], Any] = {}
        for names, kind in (
            (statistics.COUNTERS, self._counter_cls),
            (statistics.GAUGES, self._gauge_cls),
        ):
            for name, documentation in names.items():
                metric = kind(name=f"vllm:hicache_{name}", documentation=documentation, labelnames=labelnames)
                for engine, labels in per_engine_labelvalues.items():
                    self._metrics[name, engine] = metric.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted since the last time."""
        for name, amount in transfer_stats_data.items():
            metric = self._metrics[name, engine_idx]
            if name in statistics.GAUGES:
                metric.set(amount)
            else:
                metric.inc(amount)


def _timed(
    hook: Callable[Concatenate[_SchedulerHooks, P], R],
) -> Callable[Concatenate[_SchedulerHooks, P], R]:
    """Counts the time that a hook takes of the scheduler's."""

    def timed(self: _SchedulerHooks, /, *args: P.args, **kwargs: P.kwargs) -> R:
        begun_ns = self._now_ns()
        try:
            return hook(self, *args, **kwargs)
        finally:
            self.scheduler.tally.add("scheduler_ns", self._now_ns() - begun_ns)

    return functools.update_wrapper(timed, hook)


class _SchedulerHooks:
    """What vLLM's scheduler calls."""

    scheduler: Scheduler
    _now_ns: Callable[[], int]

    @_timed
    def on_new_request(self, request: Any) -> None:
        """Start its look-up."""
        self.scheduler.on_new_request(request)

    @_timed
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What can be loaded beyond vLLM's own; None: ask later."""
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    @_timed
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its blocks."""
        block_ids = blocks.get_block_ids()[0] if num_external_tokens else ()
        self.scheduler.allocated(request, block_ids, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Which tier the tokens to be loaded come from."""
        slow = self.scheduler.slow_tokens(request, num_external_tokens)
        split = {CacheHitSource.HOST: num_external_tokens - slow, CacheHitSource.DISK: slow}
        return {source: tokens for source, tokens in split.items() if tokens}

    @_timed
    def build_connector_meta(self, scheduler_output: Any) -> OrdersMetadata:
        """The step's orders."""
        return OrdersMetadata(self.scheduler.build_orders(scheduler_output))

    @_timed
    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers did."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, ReportMetadata):
            self.scheduler.take_report(meta.report, connector_output.invalid_block_ids)

    @_timed
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks can be freed: what is still to be copied out of them is copied before they are written to."""
        self.scheduler.finished(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether a step is needed for workers to report what they have done."""
        return self.scheduler.owed

    def reset_cache(self) -> bool:
        """This engine meets none of its model's pages any more; drop them in the sidecar, if it is there."""
        return self.scheduler.reset()

    def take_events(self) -> Iterable[BlockStored]:
        """Pages that the sidecar has acknowledged, as stored blocks."""
        block_size = self.scheduler.shape.block_size
        return [_event(stored, block_size) for stored in self.scheduler.take_stored()]


class _WorkerHooks:
    """What vLLM's model runner calls."""

    _worker: Worker
    _connector_metadata: KVConnectorMetadata | None
    _step_open = False

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The tensors that hold KV. Raises UnsupportedError where they are not as vLLM's configuration said."""
        self._worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """A step begins; no block of it has been written to yet."""
        assert isinstance(kv_connector_metadata, OrdersMetadata)
        self._worker.preempted(kv_connector_metadata.orders)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The step's orders. Loads that it does not wait for begin at once, beside the computation."""
        self._connector_metadata = connector_metadata
        self._step_open = True
        orders = self._orders()
        if all(load.asynchronous for load in orders.loads):
            self._worker.begin(orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads that the step waits for."""
        self._worker.begin(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A layer is about to be computed."""
        self._worker.layer_ready(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """A layer has been computed."""
        self._worker.save_layer(layer_name)

    def wait_for_save(self) -> None:
        """The step has been computed."""
        self._end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose asynchronous loads have ended, well or not.

        With speculative decoding this comes before ``wait_for_save``, and so does the question for failed blocks.
        """
        self._end_step()
        return None, self._worker.finished_loads() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that are not what was to be loaded."""
        return self._worker.failed_blocks()

    def build_connector_worker_meta(self) -> ReportMetadata | None:
        """What was done since the last step."""
        report = self._worker.take_report()
        return ReportMetadata(report) if report else None

    def _end_step(self) -> None:
        if self._step_open:
            self._step_open = False
            self._worker.end_step()

    def _orders(self) -> StepOrders:
        metadata = self._connector_metadata
        assert isinstance(metadata, OrdersMetadata)
        return metadata.orders


class HiCacheConnector(_SchedulerHooks, _WorkerHooks, KVConnectorBase_V1):  # type: ignore[misc]
    """See ``hicache.integrations.vllm`` for how it is configured."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _share_log()
        self._now_ns = Clock().now_ns
        settings = configuration.parse(self._kv_transfer_config.kv_connector_extra_config)
        facts = engine_facts(vllm_config, kv_cache_config, allow_other_versions=settings.allow_other_versions)
        if role is KVConnectorRole.WORKER:
            self._worker = Worker(facts, settings, facts.rank)
            return
        page_tokens = configuration.page_tokens(settings, facts.block_size)
        multimodal = bool(vllm_config.model_config.is_multimodal_model)
        shape = Shape(
            block_size=facts.block_size,
            page_tokens=page_tokens,
            page_bytes=facts.page_bytes(page_tokens),
            world=facts.world,
            extra_key_bytes=EXTRA_KEY_BYTES if multimodal else 0,
        )
        own = functools.cache(lambda: namespace_fields(facts, settings))  # reads the weights' files

        def fields_of(adapter: str, salt: str) -> NamespaceFields:
            return {**own(), "adapter": adapter, "salt": salt, "extra_key_bytes": shape.extra_key_bytes}

        agent = Agent(settings, fields_of, shape.page_bytes)
        self.scheduler = Scheduler(settings, shape, agent, self._now_ns)
        events = vllm_config.kv_events_config
        self.scheduler.saves.events = bool(events is not None and events.enable_kv_cache_events)
        agent.start()

    # --- what vLLM asks of the class

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are waited for and saved one by one, which no captured graph can do."""
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HiCacheStats:
        """Counters that came from another process."""
        return HiCacheStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> HiCachePromMetrics:
        """``vllm:hicache_*``."""
        return HiCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is a miss later."""
        return False

    def shutdown(self) -> None:
        """Store what is queued, for a bounded time; end the session."""
        if self._role is KVConnectorRole.WORKER:
            self._worker.close()
        else:
            self.scheduler.close()

    def get_kv_connector_stats(self) -> HiCacheStats | None:
        """What was counted; workers' counts come with their reports."""
        if self._role is KVConnectorRole.WORKER:
            return None
        numbers = self.scheduler.take_numbers()
        return HiCacheStats(data=numbers) if numbers else None


def _share_log() -> None:
    """Write to vLLM's log: it sets up its own logger only, and what others say below a warning would go nowhere."""
    ours, theirs = logging.getLogger("hicache"), logging.getLogger("vllm")
    if not ours.hasHandlers():  # else somebody has decided otherwise
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)


def _event(stored: StoredBlocks, block_size: int) -> BlockStored:
    return BlockStored(
        block_hashes=[maybe_convert_block_hash(each) for each in stored.hashes],
        parent_block_hash=maybe_convert_block_hash(stored.parent) if stored.parent is not None else None,
        token_ids=list(stored.token_ids),
        block_size=block_size,
        lora_id=stored.lora_id,
        medium=MEDIUM_CPU,
        lora_name=stored.lora_name,
    )
