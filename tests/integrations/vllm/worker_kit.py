"""What the worker's tests share: engines made of tensors, leased pages in memory, staging memory of one's own."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import xxhash

from hicache.errors import HicacheError, NotFoundError
from hicache.integrations.vllm.engine import EngineFacts, LayerFacts, ModelFacts
from hicache.integrations.vllm.messages import LoadOrder, SaveOrder, StagedRun, StepOrders, StepReport
from hicache.integrations.vllm.settings import VllmSettings
from hicache.integrations.vllm.worker import Worker

torch = pytest.importorskip("torch", reason="needs torch")

MODEL = ModelFacts("m", "", "", "auto", "", {"model_type": "llama"}, "bfloat16", 4096)


def make_facts(layers: int = 3, block_bytes: int = 4096, blocks: int = 64, **changes: Any) -> EngineFacts:
    facts = EngineFacts(
        version="0.32.0",
        model=MODEL,
        kv_dtype="bfloat16/auto",
        attention="FullAttentionSpec window None chunk None",
        backend="cpu:CPU_ATTN",
        layout="LBHNC",
        isa="vec",
        block_size=32,
        num_blocks=blocks,
        kv_heads=2,
        head_size=32,
        layers=tuple(LayerFacts(f"layers.{n}.attn", block_bytes) for n in range(layers)),
        world=1,
        rank=0,
        steps_ahead=0,
    )
    return dataclasses.replace(facts, **changes)


#: The engine that most tests have.
FACTS = make_facts()
NAMES = [layer.name for layer in FACTS.layers]
PART = FACTS.part_block_bytes  # of a page of one block


def make_settings(endpoint: str = "unix:///nowhere.sock", **fields: Any) -> VllmSettings:
    return VllmSettings(endpoint=endpoint, **fields)


def make_caches(facts: EngineFacts, seed: int) -> dict[str, Any]:
    """A tensor a layer, as vLLM's CPU backend lays them: [blocks, heads, tokens, content], all in one storage."""
    rng = np.random.default_rng(seed)
    each = facts.layers[0].block_bytes
    content = each // (facts.kv_heads * facts.block_size * 2)
    shape = (len(facts.layers), facts.num_blocks, facts.kv_heads, facts.block_size, content)
    raw = rng.integers(0, 256, (*shape[:-1], content * 2), dtype=np.uint8)
    whole = torch.from_numpy(raw).view(torch.bfloat16)
    return {layer.name: whole[number] for number, layer in enumerate(facts.layers)}


def block_of(tensor: Any, block: int) -> bytes:
    """A block's bytes, by torch."""
    return bytes(tensor[block].contiguous().view(torch.uint8).numpy().tobytes())


def part_of(caches: dict[str, Any], blocks: Sequence[int]) -> bytes:
    """What a page's part must hold: layer by layer, block by block."""
    return b"".join(block_of(tensor, block) for tensor in caches.values() for block in blocks)


class Pages:
    """Leased pages in memory. Every way in which they can fail can be set."""

    def __init__(self, pages: int, page_bytes: int, seed: int, spans: Sequence[int] = ()) -> None:
        rng = np.random.default_rng(seed)
        self.data = rng.integers(0, 256, (pages, page_bytes), dtype=np.uint8)
        self.checksums = [xxhash.xxh3_64_intdigest(row.data) for row in self.data]
        self.lengths = list(spans) or [pages]
        self.valid = True
        self.failure: HicacheError | None = None
        self.gate: threading.Event | None = None  # readers come only once it is set
        self.on_check: Callable[[], None] = lambda: None
        self.verified: set[int] = set()

    def reader(self, ticket: Any) -> Pages:
        assert ticket is self
        if self.gate is not None:
            self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        return self

    def spans(self, first: int, count: int) -> Iterator[tuple[int, Any]]:
        begin = 0
        for length in self.lengths:
            low, high = max(first, begin), min(first + count, begin + length)
            if low < high:
                view = self.data[low:high]
                view.flags.writeable = False
                yield low, view
            begin += length

    def unsound(self, first: int, count: int) -> list[int]:
        pages = range(first, first + count)
        self.verified.update(pages)
        return [
            page for page in pages if xxhash.xxh3_64_intdigest(self.data[page].data) != self.checksums[page]
        ]

    def still_valid(self) -> bool:
        self.on_check()
        return self.valid

    def rot(self, page: int) -> None:
        self.data[page, len(self.data[page]) // 2] ^= 1

    def expire(self) -> None:
        self.failure = NotFoundError("the lease has expired")


class AnySource:
    """Turns tickets into pages: they are their own readers."""

    def reader(self, ticket: Any) -> Any:
        return ticket.reader(ticket)


def load_order(leased: Pages, block_ids: Sequence[int], **changes: Any) -> LoadOrder:
    order = LoadOrder("r", leased, 0, len(leased.data), 0, tuple(block_ids), asynchronous=False)  # type: ignore[arg-type]
    return dataclasses.replace(order, **changes)


class Staging:
    """A memfd of one's own, as the scheduler's client has one."""

    def __init__(self, size_bytes: int) -> None:
        self.fd = os.memfd_create("staging")
        os.truncate(self.fd, size_bytes)
        self.size_bytes = size_bytes

    def run(self, offset: int, pages: int, **changes: Any) -> StagedRun:
        run = StagedRun(
            f"/proc/{os.getpid()}/fd/{self.fd}", self.size_bytes, os.fstat(self.fd).st_ino, offset, pages
        )
        return dataclasses.replace(run, **changes)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def close(self) -> None:
        os.close(self.fd)


def save_order(job: int, runs: Sequence[StagedRun], block_ids: Sequence[int]) -> SaveOrder:
    return SaveOrder(job, f"r{job}", tuple(runs), tuple(block_ids))


def make_worker(
    facts: EngineFacts, caches: dict[str, Any], *, source: Any = None, rank: int = 0, **settings: Any
) -> Worker:
    worker = Worker(facts, make_settings(**settings), rank, source=source or AnySource())
    worker.register(caches)
    return worker


@dataclasses.dataclass(frozen=True)
class Outcome:
    finished: set[str]
    failed_blocks: set[int]
    report: StepReport


def step(
    worker: Worker, orders: StepOrders, names: Sequence[str], compute: Callable[[str], None] | None = None
) -> Outcome:
    """One step as vLLM drives it: loads that it needs come first, others after the computation."""
    needs = any(not order.asynchronous for order in orders.loads)
    worker.preempted(orders)
    if needs:
        worker.begin(orders)
    for name in names:
        worker.layer_ready(name)
        if compute is not None:
            compute(name)
        worker.save_layer(name)
    if not needs:
        worker.begin(orders)
    worker.end_step()
    finished = worker.finished_loads()
    return Outcome(finished, worker.failed_blocks(), worker.take_report())
