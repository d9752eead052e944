"""Loads and stores: what is copied, how far it is, how it ended.

A job ends exactly once, with or without an error, and touches the engine's planes and the pages' memory no more once it
has. Layers pass in order; what a layer's passing says is that its bytes were copied (on a GPU: on the streams that were
made to wait for it). Only the end of a load says that they are the pages': until then whatever was computed from
them may be wrong and must not be given out.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hicache.device.copying.mapped import Span
from hicache.device.kv import Places
from hicache.errors import CorruptError, HicacheError, InvalidArgumentError, UnavailableError

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]


class Handle:
    """What load and store have in common. Any thread may ask."""

    def __init__(self, layers: range, pages: int) -> None:
        self.layers = layers
        self.pages = pages
        self._change = threading.Condition()
        self._left = 1  # shares
        self._failure: HicacheError | None = None
        self._cancelled = False
        self._done = False
        self._error: HicacheError | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._done

    @property
    def cancelled(self) -> bool:
        """Whether it was told to end."""
        return self._cancelled

    def cancel(self) -> None:
        """End it soon, with an error, unless it has ended; ``wait`` says when it has."""
        with self._change:
            self._cancelled = True
            self._change.notify_all()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it has ended. Raises what it failed with, UnavailableError if it has not in time (and goes on)."""
        with self._change:
            if not self._change.wait_for(lambda: self._done, timeout_s):
                raise UnavailableError(f"the copy has not ended within {timeout_s} s")
            if self._error is not None:
                raise self._error

    def wait_end(self) -> None:
        """Until it has ended, however."""
        with self._change:
            self._change.wait_for(lambda: self._done)

    # --- for who copies

    def go_on(self) -> None:
        """Raise UnavailableError where it was cancelled."""
        if self._cancelled:
            raise UnavailableError("the copy was cancelled")

    def divide(self, shares: int) -> None:
        """So many shares copy; before any of them begins."""
        self._left = shares

    def run(self, work: Callable[[], None], settle: Callable[[], None]) -> None:
        """A share of the job, on this thread. Where one fails the others stop; the last settles and ends the job."""
        error = _caught(work)
        with self._change:
            if error is not None:
                self._failure, self._cancelled = self._failure or error, True
                self._change.notify_all()
            self._left -= 1
            last = not self._left
        if last:
            self.end(self._failure or _caught(settle))

    def end(self, error: HicacheError | None = None) -> None:
        """It has ended; the first end stays."""
        with self._change:
            if not self._done:
                self._done, self._error = True, error
            self._change.notify_all()


class LoadHandle(Handle):
    """A load under way."""

    def __init__(self, layers: range, pages: int, hold: Callable[[Any, Any], None] | None = None) -> None:
        super().__init__(layers, pages)
        self._hold = hold
        self._passed: list[list[Any]] = [[] for _ in layers]  # fences, one a share
        self._shares = 1
        self._bad: set[int] = set()

    @property
    def corrupt_pages(self) -> tuple[int, ...]:
        """Pages of the lease that are not what was stored, once it has ended."""
        return tuple(sorted(self._bad)) if self._done else ()

    @property
    def layers_done(self) -> int:
        """How many layers, from the first, may be waited for without waiting for the host."""
        with self._change:
            return next(
                (n for n, found in enumerate(self._passed) if len(found) < self._shares), len(self.layers)
            )

    def wait_layer(self, layer: int, stream: Any = None, timeout_s: float | None = None) -> None:
        """Until a layer's bytes are there; on a GPU ``stream`` (None: the current one) waits, and not the caller.

        Raises as ``wait`` does, and InvalidArgumentError for a layer that is not loaded.
        """
        if layer not in self.layers:
            raise InvalidArgumentError(f"layer {layer} is not among those loaded: {self.layers}")
        found = self._passed[self.layers.index(layer)]
        with self._change:
            if not self._change.wait_for(lambda: self._done or len(found) >= self._shares, timeout_s):
                raise UnavailableError(f"layer {layer} was not there within {timeout_s} s")
            if self._error is not None:
                raise self._error
        for fence in found if self._hold is not None else ():
            assert self._hold is not None
            self._hold(stream, fence)

    # --- for who copies

    def divide(self, shares: int) -> None:
        """See Handle."""
        super().divide(shares)
        self._shares = shares

    def pass_layer(self, layer: int, fence: Any = None) -> None:
        """A share has copied a layer, or (``fence``) has given it to its stream."""
        with self._change:
            self._passed[self.layers.index(layer)].append(fence)
            self._change.notify_all()

    def note(self, bad: Iterable[int]) -> None:
        """Pages that are not what was stored."""
        with self._change:
            self._bad.update(bad)

    def settle(self, check: Callable[[], None]) -> None:
        """All is copied and compared: was it what was leased all the while?"""
        self.go_on()
        check()
        if self._bad:
            raise CorruptError(
                f"checksum of page {min(self._bad)} differs ({len(self._bad)} of {self.pages} pages)",
                hint="compute these pages; Lease.report_corrupt has the sidecar look at them",
            )


class StoreHandle(Handle):
    """A store under way: the copying part. ``layered``: a layer is copied once it was announced."""

    def __init__(self, layers: range, pages: int, *, layered: bool) -> None:
        super().__init__(layers, pages)
        self._marks: dict[int, Any] = {}
        self.layered = layered
        self.checksums: U64 = np.zeros(pages, np.uint64)
        self.refused = np.zeros(pages, np.bool_)

    def announce(self, layer: int, mark: Any = None) -> None:
        """The engine has computed a layer (on a GPU: has launched all that computes it, which ``mark`` stands for)."""
        if not self.layered or layer not in self.layers:
            raise InvalidArgumentError(f"layer {layer}: store with layered=True, and announce its layers")
        with self._change:
            self._marks.setdefault(layer, mark)
            self._change.notify_all()

    # --- for who copies

    def await_layer(self, layer: int) -> Any:
        """Until a layer may be read; what to come behind. Raises UnavailableError where it was cancelled."""
        if not self.layered:
            return None
        with self._change:
            self._change.wait_for(lambda: self._cancelled or layer in self._marks)
            self.go_on()
            return self._marks[layer]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadJob:
    """Pages to planes. ``spans`` and ``places`` are counted from the job's first page, which is ``number``.

    ``check`` raises unless the pages are, this moment, what was leased. ``after``: as ``Copies.mark`` answers.
    """

    spans: Sequence[Span]
    places: Places
    layers: range
    checksums: U64
    verify: bool
    number: int
    check: Callable[[], None]
    handle: LoadHandle
    after: Any = None

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.places)


@dataclasses.dataclass(frozen=True, slots=True)
class StoreJob:
    """Planes to pages, all layers. ``verify``: fix the pages' checksums."""

    spans: Sequence[Span]
    places: Places
    verify: bool
    handle: StoreHandle
    after: Any = None

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.places)


def hash_spans(spans: Sequence[Span]) -> U64:
    """xxh3-64 of every page as it lies there."""
    sums = [xxhash.xxh3_64_intdigest(row.data) for span in spans for row in span.rows]
    return np.array(sums, np.uint64)


def _caught(work: Callable[[], None]) -> HicacheError | None:
    """What some of a job raises, whatever it is: the job must end."""
    try:
        work()
    except HicacheError as error:
        return error
    except Exception as error:
        log.exception("copying pages")
        return UnavailableError(f"copying pages failed: {type(error).__name__}: {error}")
    return None
