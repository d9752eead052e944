"""The device store in the conformance suite."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from backends import PAGES, Backend

from hicache.device import DeviceOptions, open_device
from hicache.types import PageStore, TierKind, TierSpec


class DeviceBackend(Backend):
    """A device's memory; pages are spread over two segments, and batches move in several chunks."""

    device = "cpu"

    def open(self) -> PageStore:
        spec = TierSpec("device", TierKind.DEVICE, 2 << 20, 1 << 20)
        options = DeviceOptions(staging_bytes=3 * self.page_bytes)
        self.opened = open_device(self.device, spec, self.notify, options)
        for segment in (0, 1):
            self.opened.open_segment(segment, "default", self.page_bytes, PAGES // 2)
        return self.opened

    def address(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"slots": [(number % 2 << 24) + number // 2 for number in numbers]}

    def corrupt(self, number: int, rng: random.Random) -> None:
        pool = self.opened._segments[number % 2].pool
        pool[number // 2, rng.randrange(self.page_bytes)] ^= 1 << rng.randrange(8)


def make(page_bytes: int) -> Backend:
    """The factory that ``BACKENDS`` names."""
    pytest.importorskip("torch", reason="the device room needs torch")
    return DeviceBackend(page_bytes)
