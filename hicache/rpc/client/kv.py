"""An engine's KV as the client holds it, without I/O: what is registered, and counters that tell how far copies are.

A counter's life: free -> held by one transfer -> free, once the transfer was answered and no stream of the engine has
a wait or a write on it any more. A transfer that was never answered may still be written for by the server: its
counter is never used again; the session's end gives it back.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hicache.device.kv import FAILED, PagedKv
from hicache.errors import InvalidArgumentError
from hicache.rpc.client.kv_tensors import close_memories
from hicache.rpc.client.region import Registration

#: Of one timeline: more than a session has transfers under way; another one is made where they are all taken.
COUNTERS = 512
COUNTER_BYTES = 8


class KvState:
    """An engine's KV, and its region in the session of that incarnation. Its descriptors go with it."""

    def __init__(self, kv: PagedKv, tensors: object = None) -> None:
        self.kv = kv
        self.tensors = tensors  # kept while the sidecar may copy to and from their memory
        self.registration: Registration | None = None
        self.gate = threading.Lock()  # held, never waited for, by who registers it
        self.closed = False
        self._let_go = weakref.finalize(self, close_memories, kv.memories)

    def close(self) -> None:
        """It is used no more: its descriptors are closed. Idempotent."""
        self.closed = True
        self.tensors = None
        self._let_go()


class Counter:
    """One counter, held by one transfer. Any thread may call it; when it was given back it changes no more."""

    def __init__(self, timeline: Timeline, index: int) -> None:
        self.timeline = timeline
        self.index = index
        self._lock = threading.Lock()
        self._ours = True
        self._until: list[Callable[[], bool]] = []
        self.set(0)

    @property
    def address(self) -> int:
        """Of the counter, in this process."""
        return self.timeline.address + COUNTER_BYTES * self.index

    def get(self) -> int:
        """As it stands. Taking the lock again: what is read afterwards is read after it, on any processor."""
        with self._lock:
            value = int(self.timeline.values[self.index])
        with self._lock:
            return value

    def set(self, value: int) -> None:
        """Show a value, unless it was given back; and what was written before, to whoever sees it."""
        with self._lock:
            pass
        with self._lock:
            if self._ours:
                self.timeline.values[self.index] = value

    def raise_to(self, value: int) -> None:
        """As ``set``, if it is more than what is shown."""
        with self._lock:
            pass
        with self._lock:
            if self._ours and int(self.timeline.values[self.index]) < value:
                self.timeline.values[self.index] = value

    def hold(self, queue: Callable[[], Callable[[], bool]]) -> bool:
        """Queue something on a stream that uses the counter; ``queue`` answers what says that it has run.

        False, and nothing is queued, where the counter was given back.
        """
        with self._lock:
            if not self._ours:
                return False
            self._until.append(queue())
            return True

    def give_back(self, *, settled: bool) -> None:
        """No more of this transfer. ``settled``: the server was heard to be done with it. Idempotent."""
        with self._lock:
            if not self._ours:
                return
            self._ours = False
            until, self._until = self._until, []
        self.timeline.take_back(self.index, until if settled else None)


class Timeline:
    """Counters in memory that this process shares with the server, of one session."""

    def __init__(self, region_id: int, values: npt.NDArray[np.uint64]) -> None:
        self.region_id = region_id
        self.values = values
        self.address = values.ctypes.data
        self._lock = threading.Lock()
        self._free = list(range(len(values)))
        self._waiting: list[tuple[int, list[Callable[[], bool]]]] = []  # for streams of the engine

    @property
    def free(self) -> int:
        """Counters that are not held, and wait for no stream."""
        with self._lock:
            self._reap()
            return len(self._free)

    def take(self) -> Counter | None:
        """A counter that shows 0; None where none is free."""
        with self._lock:
            if not self._free:
                self._reap()
            if not self._free:
                return None
            index = self._free.pop()
        return Counter(self, index)

    def take_back(self, index: int, until: list[Callable[[], bool]] | None) -> None:
        """A counter is free again when all of ``until`` say so; None: never."""
        with self._lock:
            if until is not None:
                self._waiting.append((index, until))
                self._reap()

    def _reap(self) -> None:
        still = []
        for index, until in self._waiting:
            left = [ready for ready in until if not ready()]
            if left:
                still.append((index, left))
            else:
                self._free.append(index)
        self._waiting = still


class Timelines:
    """The timelines of a client's session. Any thread may call it."""

    def __init__(self) -> None:
        self.gate = threading.Lock()  # held, never waited for, by who has one made
        self._lock = threading.Lock()
        self._incarnation = 0
        self._made: list[Timeline] = []

    def take(self, incarnation: int) -> Counter | None:
        """A free counter of that session; None: a timeline is to be made for it, and added."""
        with self._lock:
            made = list(self._made) if incarnation == self._incarnation else []
        for timeline in made:
            counter = timeline.take()
            if counter is not None:
                return counter
        return None

    def add(self, incarnation: int, timeline: Timeline) -> None:
        """A timeline that was made for that session. Those of sessions before are forgotten."""
        with self._lock:
            if incarnation > self._incarnation:
                self._incarnation, self._made = incarnation, []
            if incarnation == self._incarnation:
                self._made.append(timeline)


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """What a load brought: pages of the lease by their numbers.

    ``missing``: no longer there, or not read, for ``reason`` (of the first); ``corrupt``: not what their checksums
    say; the sidecar gives them up. What was computed with either is void; the blocks of the others are right.
    """

    pages: int
    missing: Sequence[int] = ()
    corrupt: Sequence[int] = ()
    reason: str = ""
    moved_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether every page arrived."""
        return not self.missing and not self.corrupt


class Progress:
    """How far a transfer of layers is, and how it ended. Any thread may ask.

    ``first_layer``, ``layers``: what it moves, by the numbers of the KV's layers. ``awaited``: the counter is the
    server's to raise, and ours to wait for.
    """

    def __init__(
        self, first_layer: int, layers: int, counter: Counter | None, *, awaited: bool = False
    ) -> None:
        self.first_layer = first_layer
        self.layers = layers
        self.counter = counter
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._good = False
        self._awaited = awaited

    def end(self, *, good: bool, settled: bool) -> None:
        """It has ended; the first time counts. ``settled``: the server was heard to be done with it.

        Whoever waits for its counter, a stream too, is let go where it failed.
        """
        with self._lock:
            if self.ended.is_set():
                return
            self._good = good
            self.ended.set()  # before the counter can be another's
        if self.counter is not None:
            if self._awaited and not good:
                self.counter.set(FAILED)
            self.counter.give_back(settled=settled)

    @property
    def done_layers(self) -> int:
        """Layers that have arrived, from the first; 0 where it failed."""
        shown = self.counter.get() if self.counter is not None else 0
        if self.ended.is_set():
            return self.layers if self._good else 0
        return shown if shown <= self.layers else 0

    @property
    def failed(self) -> bool:
        """Whether it has failed, as far as is known."""
        shown = self.counter.get() if self.counter is not None else 0
        if self.ended.is_set():
            return not self._good
        return shown >= FAILED

    def place(self, layer: int) -> int:
        """What the counter shows when that layer is done. Raises InvalidArgumentError for one that is not moved."""
        if not self.first_layer <= layer < self.first_layer + self.layers:
            raise InvalidArgumentError(
                f"layer {layer} is not one of [{self.first_layer}, {self.first_layer + self.layers})"
            )
        return layer - self.first_layer + 1
