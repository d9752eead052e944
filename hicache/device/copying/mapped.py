"""Host memory of others that a device copies from and to: registered while it is mapped, and never longer.

What is registered is held: the mapping cannot go before ``cudaHostUnregister``. ``forget`` says that the memory is to
go (the sidecar retired a region, the session ended); it goes when the last copy there has ended and it was
unregistered, which a thread does.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hicache.device.pinned import Pins

Bytes = npt.NDArray[np.uint8]


class Memory(Protocol):
    """One mapping, for as long as something refers to it."""

    @property
    def bytes(self) -> Bytes:
        """All of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Consecutive pages of a job: rows of one mapping, or (``memory`` None) of memory that is not registered."""

    first: int
    rows: Bytes
    memory: Memory | None = None
    gone: Callable[[], bool] = lambda: False

    def part(self, first: int, count: int) -> Span | None:
        """What it has of pages [first, first + count), counted from the job's first."""
        begin, end = max(first, self.first), min(first + count, self.first + len(self.rows))
        if begin >= end:
            return None
        return Span(begin, self.rows[begin - self.first : end - self.first], self.memory, self.gone)


def parts(spans: Sequence[Span], first: int, count: int) -> list[Span]:
    """Spans cut to pages [first, first + count)."""
    return [found for span in spans if (found := span.part(first, count)) is not None]


def addresses(spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Where each page lies."""
    each = [
        span.rows.ctypes.data + np.arange(len(span.rows), dtype=np.int64) * span.rows.strides[0]
        for span in spans
    ]
    return np.concatenate(each) if each else np.empty(0, np.int64)


@dataclasses.dataclass(slots=True)
class _Held:
    memory: Memory
    pins: Pins
    gone: Callable[[], bool]
    users: int = 0
    leaving: bool = False
    queued: bool = False  # to be unregistered


@dataclasses.dataclass(frozen=True, slots=True)
class Using:
    """Mappings with copies under way. ``ready``: the device reaches all of these pages itself.

    ``pieces``: a number a page, the same for pages in one registered piece: no one copy reaches over two.
    """

    held: Sequence[_Held]
    ready: bool
    pieces: npt.NDArray[np.int64]


class Mapped:
    """The mappings that one device reaches. Any thread may call it.

    ``readable``, ``writable``: who registers memory that copies only read, or write as well.
    """

    def __init__(self, readable: Pins, writable: Pins) -> None:
        self._readable, self._writable = readable, writable
        self._lock = threading.RLock()
        self._held: dict[int, _Held] = {}
        self._abandoned: list[_Held] = []

    def __len__(self) -> int:
        return len(self._held)

    def use(self, spans: Sequence[Span], *, writes: bool) -> Using:
        """Copies begin there, until ``done``. Memory that is new is registered soon."""
        pins = self._writable if writes else self._readable
        found: list[_Held] = []
        with self._lock:
            for held in [held for held in self._held.values() if held.gone()]:
                self._leave(held)
            for span in spans:
                if span.memory is not None and not span.gone():
                    found.append(self._find(span.memory, span.gone, pins))
            ready = len(found) == len(spans) and all(
                not held.leaving
                and (held.pins is self._writable or not writes)
                and held.pins.cover(list(span.rows))
                for held, span in zip(found, spans, strict=True)
            )
        return Using(found, ready, _pieces(spans, pins.piece_bytes) if ready else np.empty(0, np.int64))

    def done(self, using: Using) -> None:
        """No copy is under way there any more."""
        with self._lock:
            for held in using.held:
                held.users -= 1
                self._go(held)

    def forget(self, memory: Memory) -> None:
        """The memory is to go; it does once no copy is under way there."""
        with self._lock:
            held = self._held.get(_key(memory))
            if held is not None:
                self._leave(held)

    def abandon(self) -> None:
        """The device was lost with copies under way: what it may still touch stays mapped until the process ends."""
        with self._lock:
            self._abandoned += [held for held in self._held.values() if held.users]

    def close(self) -> None:
        """Let go of everything. No copies are under way, or they were abandoned."""
        with self._lock:
            for held in list(self._held.values()):
                self._leave(held)
        for pins in (self._readable, self._writable):
            pins.close()
        with self._lock:
            _KEPT.extend(self._abandoned)
            self._held.clear()

    def _find(self, memory: Memory, gone: Callable[[], bool], pins: Pins) -> _Held:
        held = self._held.get(_key(memory))
        if held is None:
            held = self._held[_key(memory)] = _Held(memory, pins, gone)
            pins.add(memory.bytes.ctypes.data, memory.bytes.nbytes)
        held.users += 1
        return held

    def _leave(self, held: _Held) -> None:
        if not held.leaving:
            held.leaving = True
            self._go(held)

    def _go(self, held: _Held) -> None:
        if held.leaving and not held.users and not held.queued:
            held.queued = True
            data, key = held.memory.bytes, _key(held.memory)
            held.pins.remove(data.ctypes.data, data.nbytes, lambda: self._drop(key, held))

    def _drop(self, key: int, held: _Held) -> None:
        with self._lock:
            if self._held.get(key) is held:
                del self._held[key]


def _pieces(spans: Sequence[Span], piece_bytes: int) -> npt.NDArray[np.int64]:
    each = [
        (addresses([span]) - _key(span.memory)) // piece_bytes + (number << 32)
        for number, span in enumerate(spans)
        if span.memory is not None
    ]
    return np.concatenate(each) if each else np.empty(0, np.int64)


#: Memory that a lost device may still touch.
_KEPT: list[_Held] = []


def _key(memory: Memory) -> int:
    return int(memory.bytes.ctypes.data)
