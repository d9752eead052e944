"""The worker side, in each process that holds KV tensors; the connector calls it as vLLM's hooks come.

A step goes: ``preempted(orders)`` first of all, then ``begin(orders)`` before or after the computation (before it
where a load must be there for it), ``layer_ready`` and ``save_layer`` around each layer, ``end_step``, and what it
came to: ``finished_loads``, then ``failed_blocks``, then ``take_report``.

No call waits for the sidecar. A load that a step needs is waited for up to ``load_timeout_ms``; then its blocks are
reported as failed, and the engine computes them. Saves out of host memory are done when the step ends; those out of a
device's go on, and are reported by a later step. In a step in which a load failed,
what was computed may stand on wrong blocks, also for other requests that share them: none of its saves are good, and
neither are those of steps that were scheduled before the failure was known.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hicache.errors import HicacheError, InvalidArgumentError, UnavailableError
from hicache.integrations.vllm.copying import HostBlocks
from hicache.integrations.vllm.device import DeviceBlocks
from hicache.integrations.vllm.engine import EngineFacts
from hicache.integrations.vllm.layout import LayerTensor, PartLayout
from hicache.integrations.vllm.loads import MOST_SHARES, Load, LoadResult, PageReader, PageSource, Seat, Tools
from hicache.integrations.vllm.messages import LoadOrder, StepOrders, StepReport, WorkerCounts
from hicache.integrations.vllm.saves import SaveResult, SaveTools, StepSaves
from hicache.integrations.vllm.settings import VllmSettings, page_tokens
from hicache.integrations.vllm.staging import StagingMaps
from hicache.rpc.client import Client, LeaseTicket
from hicache.runtime.clock import Clock

log = logging.getLogger(__name__)


class Worker:
    """One rank's loads and saves. All calls from the engine's own thread."""

    def __init__(
        self,
        facts: EngineFacts,
        settings: VllmSettings,
        rank: int,
        *,
        source: PageSource | None = None,
        now_ns: Callable[[], int] | None = None,
    ) -> None:
        if not 0 <= rank < facts.world:
            raise InvalidArgumentError(f"rank {rank} of {facts.world}")
        self._facts = facts
        self._settings = settings
        self._rank = rank
        self._now_ns = now_ns or Clock().now_ns
        self._sidecar = None if source else Sidecar(settings)
        self._source = source or self._sidecar
        self._maps = StagingMaps()
        self._loaders = ThreadPoolExecutor(MOST_SHARES, "hicache-load")
        self._saver = ThreadPoolExecutor(1, "hicache-save")
        self._desk: _Desk | None = None
        self._orders: StepOrders | None = None  # of the step that is under way
        self._begun = False
        self._needed: list[Load] = []  # by this step
        self._between: dict[str, Load] = {}  # asynchronous loads, by request
        self._saves: StepSaves | None = None  # of the step that is under way
        self._sealed: list[StepSaves] = []  # of steps before, that are not done
        self._void_steps = 0  # whose saves are still not to be trusted
        self._out = _Outbox()

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """The engine's KV tensors, from now on. Raises UnsupportedError where they are not what the facts say."""
        self._let_go("the engine has other KV tensors now")
        page_blocks = page_tokens(self._settings, self._facts.block_size) // self._facts.block_size
        tensors = {name: LayerTensor.of(name, tensor) for name, tensor in kv_caches.items()}
        self._facts.check_tensors(tensors)
        layers = [(layer.name, layer.block_bytes) for layer in self._facts.layers]
        layout = PartLayout(tensors, layers, (self._facts.num_blocks, page_blocks))
        seat = Seat(self._rank, self._facts.world, layout.part_bytes)
        blocks = HostBlocks(layout) if layout.device == "cpu" else DeviceBlocks(layout, kv_caches)
        assert self._source is not None
        self._desk = _Desk(
            layout,
            tuple(kv_caches.values()),
            Tools(self._source, blocks, seat, self._loaders, self._now_ns, self._settings.load_timeout_ms),
            SaveTools(blocks, seat, self._maps, self._saver, self._now_ns),
        )
        if self._sidecar is not None:
            self._sidecar.connect()

    # --- a step

    def preempted(self, orders: StepOrders) -> None:
        """A step begins: nothing of it has been computed, no block has been overwritten yet."""
        self._open(orders)

    def begin(self, orders: StepOrders) -> None:
        """Start the step's loads."""
        self._open(orders)
        if self._begun or self._desk is None:
            return
        self._begun = True
        for order in orders.loads:
            self._start(order, self._desk)

    def _open(self, orders: StepOrders) -> None:
        if orders is self._orders:
            return
        self._orders, self._begun = orders, False
        for request_id in orders.cancelled:
            if request_id in self._between:
                self._between[request_id].stop("nobody waits for it any more")
        assert self._saves is None and not self._needed, "the step before has ended"
        self._settle([saves for saves in self._sealed if saves.has(orders.flush)])
        if orders.saves and self._desk is not None:
            self._saves = StepSaves(orders.saves, self._desk.saving)

    def _start(self, order: LoadOrder, desk: _Desk) -> None:
        load = Load(order, desk.loading)
        if order.request_id in self._between:  # its blocks are still written to: let it end first
            self._between[order.request_id].stop("the request is loaded again")
            self._collect(self._between.pop(order.request_id))
        if order.asynchronous:
            self._between[order.request_id] = load
        else:
            self._needed.append(load)
        load.start()

    def layer_ready(self, name: str) -> None:
        """Wait until a layer of all that this step loads is there, or its time is over."""
        number = self._desk.layout.number(name) if self._desk and self._needed else None
        if number is not None:
            for load in self._needed:
                load.wait_layer(number)

    def save_layer(self, name: str) -> None:
        """A layer's KV of this step has been computed."""
        if self._saves is None or self._desk is None or not self._desk.layout.owns(name):
            return
        number = self._desk.layout.number(name)
        assert number is not None
        self._saves.layer(number)

    def end_step(self) -> None:
        """The step has been computed: its loads and saves are done when this returns."""
        self._end_loads()
        if self._saves is not None and self._desk is not None:
            self._saves.seal(void=self._void_steps > 0)
            self._sealed.append(self._saves)
            self._saves = None
        self._void_steps = max(0, self._void_steps - 1)
        deferred = self._desk is not None and self._desk.saving.blocks.deferred
        self._settle([saves for saves in self._sealed if saves.done or not deferred])
        self._orders = None

    def _settle(self, ended: list[StepSaves]) -> None:
        """Wait for some saves, and put down what became of them."""
        for saves in ended:
            self._sealed.remove(saves)
            self._out.save(saves.result())

    def _end_loads(self) -> None:
        """Wait for the loads that the step needed: what it came to depends on them."""
        failed = [self._collect(load) for load in self._needed]
        self._needed = []
        if any(failed):
            self._void_steps = 1 + self._facts.steps_ahead

    def _collect(self, load: Load) -> bool:
        """Put down how a load ended, once it has; answers whether it failed."""
        result = load.finish()
        self._out.load(load.order.request_id, result)
        return result.failed

    # --- what it came to

    def finished_loads(self) -> set[str]:
        """Requests whose asynchronous loads have ended since the last call, well or not. Does not wait."""
        ended = [name for name, load in self._between.items() if load.done or load.overdue]
        for name in ended:
            self._collect(self._between.pop(name))
        return set(ended)

    def failed_blocks(self) -> set[int]:
        """Blocks that loads left without their content, since the last call: all of those that this step needed.

        vLLM asks before ``end_step`` where it speculates.
        """
        self._end_loads()
        return self._out.take_blocks()

    def take_report(self) -> StepReport:
        """What there is to tell since the last call."""
        return self._out.take_report()

    def close(self) -> None:
        """End all loads, let go of all memory, leave the sidecar. Idempotent."""
        self._let_go("the engine stops")
        if self._saves is not None:
            self._saves.seal(void=True)
        self._saves, self._sealed = None, []
        self._saver.shutdown(wait=True)
        if self._sidecar is not None:
            self._sidecar.close()
        self._loaders.shutdown(wait=True, cancel_futures=True)
        self._maps.close()
        self._desk = None

    def _let_go(self, why: str) -> None:
        """Stop all loads; they are reported as any that failed."""
        for load in [*self._needed, *self._between.values()]:
            load.stop(why)


class _Desk:
    """What there is once the tensors are known."""

    def __init__(
        self, layout: PartLayout, tensors: tuple[Any, ...], loading: Tools, saving: SaveTools
    ) -> None:
        self.layout = layout
        self.tensors = tensors  # threads write to their memory: it must stay
        self.loading = loading
        self.saving = saving


class _Outbox:
    """What the worker has to tell."""

    def __init__(self) -> None:
        self._blocks: set[int] = set()
        self._report = StepReport()

    def load(self, request_id: str, result: LoadResult) -> None:
        """How a load ended."""
        self._blocks.update(result.failed_blocks)
        self._add(
            StepReport(
                loaded={request_id: 1},
                corrupt=tuple((request_id, page) for page in result.corrupt),
                failed=frozenset({request_id} if result.failed else ()),
                stats=WorkerCounts(
                    loaded_pages=result.pages,
                    loaded_bytes=result.bytes,
                    load_ns=result.duration_ns,
                    failed_loads=int(result.failed),
                    corrupt_pages=len(result.corrupt),
                ),
            )
        )

    def save(self, result: SaveResult) -> None:
        """What became of a step's saves."""
        self._add(
            StepReport(
                saved=dict(Counter([*result.copied, *result.void])),
                void=frozenset(result.void),
                stats=WorkerCounts(
                    saved_pages=result.pages,
                    saved_bytes=result.bytes,
                    save_ns=result.duration_ns,
                    void_saves=len(result.void),
                ),
            )
        )

    def _add(self, report: StepReport) -> None:
        self._report = self._report.merged(report)

    def take_blocks(self) -> set[int]:
        taken, self._blocks = self._blocks, set()
        return taken

    def take_report(self) -> StepReport:
        taken, self._report = self._report, StepReport()
        return taken


class Sidecar:
    """This process's own session, with which leased pages are mapped. Comes, and comes back, in the background."""

    def __init__(self, settings: VllmSettings) -> None:
        timeout_s = settings.rpc_timeout_ms / 1000
        self._client = Client(
            settings.endpoint,
            name="vllm-worker",
            data_plane="shm",
            timeout_s=timeout_s,
            connect_timeout_s=timeout_s,
        )
        self._pause_s = settings.reconnect_ms / 1000
        self._over = threading.Event()
        self._epoch = b""  # the run of the sidecar that pages were last read from
        self._thread = threading.Thread(target=self._attach, name="hicache-attach", daemon=True)

    def connect(self) -> None:
        """Attach in the background, as soon as there is a sidecar."""
        if not self._thread.is_alive() and not self._over.is_set():
            self._thread.start()

    def _attach(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(HicacheError):
                self._client.connect()
                return
            self._over.wait(self._pause_s)

    def reader(self, ticket: LeaseTicket) -> PageReader:
        """The ticket's pages; mapped where they are not yet.

        Waits for the session only where the scheduler's was faster to be had again. The lease that a lost sidecar gave
        is lost with it: that is known at once. Raises HicacheError.
        """
        if ticket.epoch == self._epoch and not self._client.attached:
            raise UnavailableError("the sidecar that leased these pages is gone")
        found = self._client.reader(ticket)
        self._epoch = ticket.epoch
        return found

    def close(self) -> None:
        """End the session."""
        self._over.set()
        self._client.close()
