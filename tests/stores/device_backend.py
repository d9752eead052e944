"""The device store in the conformance suite."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from backends import PAGES, Backend

from hicache.device import DeviceOptions, open_device
from hicache.device.cuda import CudaDevice, open_cuda
from hicache.device.segment import DeviceSegment
from hicache.types import PageStore, TierKind, TierSpec, slot_stride

for folder in ("device", "gpu"):  # the fakes
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))


class DeviceBackend(Backend):
    """A device's memory; pages are spread over two segments, and batches move in several chunks."""

    device = "cpu"

    def open(self) -> PageStore:
        spec = TierSpec("device", TierKind.DEVICE, 2 << 20, 1 << 20)
        options = DeviceOptions(3 * self.page_bytes, cuda_staging_bytes=3 * self.page_bytes)
        self.opened = open_device(self.device, spec, self.notify, options)
        for segment in (0, 1):
            self.opened.open_segment(segment, "default", self.page_bytes, PAGES // 2)
        return self.opened

    def address(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"slots": [(number % 2 << 24) + number // 2 for number in numbers]}

    def corrupt(self, number: int, rng: random.Random) -> None:
        pool = self.opened._segments[number % 2].pool
        pool[number // 2, rng.randrange(self.page_bytes)] ^= 1 << rng.randrange(8)


class FakeCudaBackend(DeviceBackend):
    """The CUDA store on a fake device that delays and reorders; ``number`` seeds it."""

    def open(self) -> PageStore:
        from cuda_fake import FakeDriver

        spec = TierSpec("device", TierKind.DEVICE, 2 << 20, 1 << 20)
        options = DeviceOptions(cuda_staging_bytes=3 * self.page_bytes)
        self.driver = FakeDriver(seed=self.page_bytes, kernels=self.kernels)
        self.opened = CudaDevice(spec, self.notify, options, self.driver)
        for segment in (0, 1):
            self.opened.open_segment(segment, "default", self.page_bytes, PAGES // 2)
        return self.opened

    kernels = True

    def corrupt(self, number: int, rng: random.Random) -> None:
        _flip(self.opened._segments[number % 2], number // 2, self.page_bytes, rng)

    def close(self) -> None:
        super().close()
        assert not self.driver.violations, self.driver.violations


class FakeCudaBackendPlain(FakeCudaBackend):
    """The same on a device that runs no kernels: pages are hashed on the host."""

    kernels = False


class ManyBackend(DeviceBackend):
    """Two fake devices, of which each gets one of the two segments."""

    def open(self) -> PageStore:
        from pool_fake import PoolDriver

        spec = TierSpec("device", TierKind.DEVICE, 2 << 20, 1 << 20)
        options = DeviceOptions(cuda_staging_bytes=3 * self.page_bytes)
        first = PoolDriver(seed=self.page_bytes)
        self.drivers = [first, PoolDriver(seed=1 + self.page_bytes, host=first)]
        self.opened = open_cuda(spec, self.notify, options, self.drivers)
        for segment in (0, 1):
            self.opened.open_segment(segment, "default", self.page_bytes, PAGES // 2)
        return self.opened

    def corrupt(self, number: int, rng: random.Random) -> None:
        segment = self.opened.device_of(number % 2)._segments[number % 2]
        _flip(segment, number // 2, self.page_bytes, rng)

    def close(self) -> None:
        super().close()
        assert not [driver.violations for driver in self.drivers if driver.violations]


class CudartBackend(FakeCudaBackend):
    """The CUDA store and the real driver on a CUDA runtime in ordinary memory, whose streams run late."""

    def open(self) -> PageStore:
        import fake_cuda

        self.fake = fake_cuda.fresh()
        self.before = self.fake.live()
        self.fake.configure(delay_us=60, seed=self.page_bytes)
        spec = TierSpec("device", TierKind.DEVICE, 2 << 20, 1 << 20)
        options = DeviceOptions(cuda_staging_bytes=3 * self.page_bytes)
        self.opened = CudaDevice(spec, self.notify, options, self.fake.driver(kernels=self.kernels))
        for segment in (0, 1):
            self.opened.open_segment(segment, "default", self.page_bytes, PAGES // 2)
        return self.opened

    def close(self) -> None:
        self.store.close()
        assert not self.fake.violations(), self.fake.violations()
        assert self.fake.live() == self.before


class CudartBackendPlain(CudartBackend):
    """The same without kernels."""

    kernels = False


class CudaBackend(DeviceBackend):
    """A real GPU."""

    device = "cuda"

    def corrupt(self, number: int, rng: random.Random) -> None:
        segment = self.opened._segments[number % 2]
        start = segment.address + number // 2 * slot_stride(self.page_bytes) + rng.randrange(self.page_bytes)
        driver = self.opened._driver
        stream, event, byte = driver.stream(0), driver.event(), driver.allocate_host(1)
        for flip in (0, 1 << rng.randrange(8)):
            byte[0] ^= flip
            ends = (start, byte.ctypes.data)
            driver.copy(stream, [ends[bool(flip) - 1]], [ends[-bool(flip)]], [1])
            driver.record(event, stream)
            while not driver.ready(event):
                pass
        driver.release_host(byte)


def _flip(segment: DeviceSegment, index: int, page_bytes: int, rng: random.Random) -> None:
    start = segment.address + index * slot_stride(page_bytes) + rng.randrange(page_bytes)
    byte = ctypes.c_uint8.from_address(start)
    byte.value ^= 1 << rng.randrange(8)


KINDS = {
    "cpu": DeviceBackend,
    "fake": FakeCudaBackend,
    "fake-plain": FakeCudaBackendPlain,
    "many": ManyBackend,
    "cudart": CudartBackend,
    "cudart-plain": CudartBackendPlain,
    "cuda": CudaBackend,
}


def make(page_bytes: int, kind: str = "cpu") -> Backend:
    """The factory that ``BACKENDS`` names."""
    torch = pytest.importorskip("torch", reason="the device room needs torch")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return KINDS[kind](page_bytes)
