"""A device to test: opened on the CPU, driven from the test's thread."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

import pytest

from hicache.device import DeviceOptions, DeviceStore, open_device
from hicache.types import Batch, Completion, Op, TierKind, TierSpec

SEGMENT_BYTES = 1 << 20


@dataclasses.dataclass
class Rig:
    """A store, and what a caller needs around it."""

    store: DeviceStore
    told: threading.Event
    next_id: int = 0

    def submit(self, op: Op, slots=(), buffers=(), page_bytes=0, **columns) -> int:
        self.next_id += 1
        views = [memoryview(b) for b in buffers]
        self.store.submit(
            Batch(self.next_id, op, page_bytes=page_bytes, slots=slots, buffers=views, **columns)
        )
        return self.next_id

    def wait(self, count: int = 1) -> list[Completion]:
        """The next completions, at least ``count``, in the order of ``poll``."""
        found: list[Completion] = []
        while len(found) < count:
            assert self.told.wait(20), "no completion"
            self.told.clear()
            found += self.store.poll()
        return found

    def put(self, slots, pages, **columns) -> Completion:
        self.submit(Op.PUT, slots, pages, len(pages[0]), **columns)
        return self.wait()[0]

    def get(self, slots, page_bytes) -> tuple[Completion, list[bytearray]]:
        buffers = [bytearray(b"\xee" * page_bytes) for _ in slots]
        self.submit(Op.GET, slots, buffers, page_bytes)
        return self.wait()[0], buffers

    def delete(self, slots) -> Completion:
        self.submit(Op.DELETE, slots)
        return self.wait()[0]

    def hold(self, stream: str) -> threading.Event:
        """Stop a copy stream until the event is set, so that a test sees what happens before."""
        gate = threading.Event()
        {"put": self.store._writes, "get": self.store._reads}[stream].launch(lambda: _pass(gate))
        return gate


@pytest.fixture
def open_rig() -> Iterator[Callable[..., Rig]]:
    pytest.importorskip("torch", reason="the device room needs torch")
    opened: list[Rig] = []

    def open_it(segments: int = 2, segment_bytes: int = SEGMENT_BYTES, staging_bytes: int = 4 << 20) -> Rig:
        told = threading.Event()
        spec = TierSpec("device", TierKind.DEVICE, segments * segment_bytes, segment_bytes)
        store = open_device("cpu", spec, told.set, DeviceOptions(staging_bytes=staging_bytes))
        opened.append(Rig(store, told))
        return opened[-1]

    yield open_it
    for rig in opened:
        rig.store.close()


@pytest.fixture
def rig(open_rig) -> Rig:
    """A store with segment 1 open: 16 slots of 1000 bytes."""
    made = open_rig()
    made.store.open_segment(1, "tenant", 1000, 16)
    return made


def _pass(gate: threading.Event) -> None:
    assert gate.wait(20), "nobody opened the gate"
