"""malloc's thresholds: of those who ask, the one that wants to keep most decides, in either order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest

from hicache import heap


class Glibc:
    def __init__(self) -> None:
        self.set: dict[int, int] = {}

    def mallopt(self, which: int, value: int) -> int:
        self.set[which] = value
        return 1


@pytest.mark.parametrize("asked", [(64 << 20, 256 << 20), (256 << 20, 64 << 20)])
def test_the_largest_wish_decides(monkeypatch: pytest.MonkeyPatch, asked: Sequence[int]) -> None:
    libc = Glibc()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(heap, "_asked_bytes", [])
    assert all(heap.keep_freed(size) for size in asked)
    assert libc.set == {-1: 256 << 20, -3: 32 << 20}


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not heap.keep_freed(1 << 20)
    heap.give_back()
