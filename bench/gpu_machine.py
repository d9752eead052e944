"""The machine under the GPU bench: streams, events and pinned memory, or their stand-ins in ordinary memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import harness
import torch

Work = Callable[[], None]


class Machine:
    """``device``: ``cuda:<n>`` or ``cpu``. Speeds are bytes a nanosecond, that is GB/s."""

    def __init__(self, device: str, repetitions: int) -> None:
        self.is_cuda = device.startswith("cuda")
        if self.is_cuda and not torch.cuda.is_available():
            raise harness.BenchError("no GPU here; --device cpu --tiny checks the bench without one")
        self.device = torch.device(device)
        self.repetitions = repetitions
        self._plain: dict[str, float] = {}
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        self.streams = [torch.cuda.Stream(priority=p) for p in (-1, 0, 0)] if self.is_cuda else [None] * 3

    def describe(self) -> dict:
        if not self.is_cuda:
            return {"name": "cpu"}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "memory_gib": properties.total_memory >> 30,
            "cuda": torch.version.cuda,
        }

    def pinned(self, *shape: int) -> torch.Tensor:
        """uint8 host memory that copies reach without a stop."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.is_cuda)

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """What is queued inside goes to this stream: 0 copies, 1 copies the other way, 2 helps."""
        if self.is_cuda:
            with torch.cuda.stream(self.streams[number]):
                yield
        else:
            yield

    def after(self, number: int, other: int) -> None:
        """What stream ``number`` is given from now on waits for what ``other`` was given until now."""
        if self.is_cuda:
            self.streams[number].wait_stream(self.streams[other])

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time(self, work: Work) -> float:
        """Median ns of the work, queued from stream 0; it must have come back to stream 0 at its end."""
        return statistics.median(self._once(work) for _ in range(self._warm(work)))

    def time_both(self, first: Work, second: Work) -> float:
        """Median ns of two works at once, on streams 0 and 1."""

        def both() -> None:
            self.after(1, 0)
            first()
            with self.on(1):
                second()
            self.after(0, 1)

        return self.time(both)

    def _warm(self, work: Work) -> int:
        for _ in range(2):
            self._once(work)
        return self.repetitions

    def _once(self, work: Work) -> float:
        self.wait()
        if not self.is_cuda:
            start = time.perf_counter_ns()
            work()
            return max(time.perf_counter_ns() - start, 1)
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with self.on(0):
            ends[0].record()
            work()
            ends[1].record()
        self.wait()
        return ends[0].elapsed_time(ends[1]) * 1e6

    def ceiling(self, way: str, size_bytes: int) -> float:
        """GB/s of one large plain copy of pinned memory; measured once."""
        if way not in self._plain:
            host, device = (
                self.pinned(size_bytes),
                torch.empty(size_bytes, dtype=torch.uint8, device=self.device),
            )
            target, source = (host, device) if way == "to host" else (device, host)
            self._plain[way] = size_bytes / self.time(lambda: target.copy_(source, non_blocking=True))
        return self._plain[way]

    def duplex_ceiling(self, size_bytes: int) -> float:
        """GB/s of two large plain copies at once, one each way, both counted."""
        hosts = [self.pinned(size_bytes) for _ in range(2)]
        devices = [torch.empty(size_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        taken = self.time_both(
            lambda: hosts[0].copy_(devices[0], non_blocking=True),
            lambda: devices[1].copy_(hosts[1], non_blocking=True),
        )
        return 2 * size_bytes / taken
