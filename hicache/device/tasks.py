"""A transfer on its way: what it asks for in bytes and addresses, and what has become of it so far.

Movers (``host_mover.py``, ``cuda_mover.py``) share this: a task is made on the owner's thread, run by a mover's, and
ends once. Whatever fails shows in the counter at once, so that nobody who waits for a layer waits for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from hicache.device.driver import Addresses
from hicache.device.imports import OpenKv
from hicache.device.kv import FAILED
from hicache.device.loans import Loan
from hicache.device.transfers import DevicePages, HostPages, HostSlots, Transfer, TransferDone
from hicache.errors import InvalidArgumentError
from hicache.types import Outcome

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A transfer's units in bytes. ``first`` and ``layers``: which layers of the planes are moved."""

    pages: int
    units: int  # of a page
    unit_tokens: int
    unit_bytes: int
    first: int
    layers: int

    @classmethod
    def of(cls, transfer: Transfer) -> Shape:
        """Raises InvalidArgumentError for what does not lie in the planes or the page."""
        kv, (pages, units) = transfer.kv.kv, transfer.places.shape
        unit_tokens = transfer.page_tokens // units if units else 0
        layers = transfer.layers or kv.layers - transfer.first_layer
        checks = (
            (unit_tokens > 0, f"pages of {transfer.page_tokens} tokens in {units} units"),
            (
                transfer.first_layer >= 0 and 0 < layers <= kv.layers - transfer.first_layer,
                f"layers {transfer.first_layer} to {transfer.first_layer + layers} of {kv.layers}",
            ),
            (
                kv.page_offset + kv.part_bytes(transfer.page_tokens) <= transfer.page_bytes,
                f"planes of {kv.part_bytes(transfer.page_tokens)} bytes a page from byte {kv.page_offset} of"
                f" {transfer.page_bytes}",
            ),
        )
        for ok, problem in checks:
            if not ok:
                raise InvalidArgumentError(f"transfer {transfer.id}: {problem}")
        return cls(pages, units, unit_tokens, unit_tokens * kv.token_bytes, transfer.first_layer, layers)


class Task:
    """One transfer. ``pack``: from the engine. ``ended`` is called once, by ``finish``.

    ``host``: the buffers of host pages as arrays, kept until the end (none for slots); ``loan``: of device pages, what
    their slots held.
    """

    def __init__(
        self, transfer: Transfer, kv: OpenKv, ended: Callable[[Task], None], *, pack: bool, loan: Loan | None
    ) -> None:
        self.transfer = transfer
        self.kv = kv
        self.pack = pack
        self.loan = loan
        self.shape = Shape.of(transfer)
        self.host = _buffers(transfer, pack=pack)
        count = _count(transfer.pages)
        if count != self.shape.pages:
            raise InvalidArgumentError(f"transfer {transfer.id}: {count} pages, places of {self.shape.pages}")
        self.checksums = np.zeros(count, np.uint64) if loan is None else loan.checksums.copy()
        self._outcomes = [Outcome.OK] * count
        self._error = ""
        self._ended = ended
        self._over = False
        self._failed = False
        self._lock = threading.Lock()  # two threads may work for one task

    @property
    def expected(self) -> npt.NDArray[np.uint64] | None:
        """What the pages of a load must hash to; None where nobody asked."""
        pages = self.transfer.pages
        if isinstance(pages, HostPages):
            return np.array(pages.checksums, np.uint64) if len(pages.checksums) and not self.pack else None
        return self.loan.checksums if self.loan and pages.verify else None

    @property
    def rows(self) -> Addresses:
        """Where the pages' slots begin."""
        if self.loan:
            return self.loan.addresses
        pages = self.transfer.pages
        if isinstance(pages, HostPages) and isinstance(pages.buffers, HostSlots):
            return pages.buffers.addresses
        return addresses(self.host)

    @property
    def failed(self) -> bool:
        """Whether a page or more has failed."""
        return self._failed

    @property
    def over(self) -> bool:
        """``finish`` was called."""
        return self._over

    def live(self) -> Indices:
        """The pages that have not failed."""
        with self._lock:
            return np.array([p for p, o in enumerate(self._outcomes) if o is Outcome.OK], np.int64)

    def fail(self, pages: Iterable[int], outcome: Outcome, reason: str = "") -> None:
        """These pages have failed; the first outcome of a page and the first reason stand."""
        with self._lock:
            for page in pages:
                if self._outcomes[page] is Outcome.OK:
                    self._outcomes[page] = outcome
                    self._failed = True
            if outcome is Outcome.FAULT:
                self._error = self._error or reason
            if self._failed:
                with contextlib.suppress(ValueError, OSError):  # a timeline that is closed has nobody to tell
                    self._tell(FAILED)

    def rotten(self, pages: Indices) -> None:
        """The bytes of these pages are not what they must be. A slot that was overwritten meanwhile is only gone."""
        if self.loan is not None:
            self.fail(np.flatnonzero(~self.loan.still()).tolist(), Outcome.MISS)
        self.fail(pages.tolist(), Outcome.CORRUPT)
        if self.loan is not None:
            self.loan.empty(pages)

    def fault(self, reason: str) -> None:
        """All pages have failed."""
        self.fail(range(self.shape.pages), Outcome.FAULT, reason)

    def arrived(self, layers: int) -> None:
        """So many layers of all pages have come."""
        with self._lock:
            if not self._failed:
                self._tell(layers)

    def ready_layer(self, layer: int) -> bool:
        """Whether the engine has said that a layer (of all, from 0) may be taken."""
        counter = self.transfer.counter
        return counter is None or counter.get() > layer

    def late(self, now_ns: int) -> str:
        """Why a layer that has not come is waited for no more; empty: it is."""
        if self.kv.closing:
            return "the KV region was closed while a layer was waited for"
        if self.transfer.deadline_ns and now_ns >= self.transfer.deadline_ns:
            return "a layer did not come before the deadline"
        return ""

    def finish(self) -> None:
        """End the transfer: nothing of it touches anybody's memory any more."""
        assert not self._over, "a transfer ends once"
        if self.loan is not None:
            self.fail(np.flatnonzero(~self.loan.still()).tolist(), Outcome.MISS)
            self.loan.end()
        self._over = True
        self.host = []  # whose they are may release them now
        self._ended(self)

    def done(self) -> TransferDone:
        """What the owner gets."""
        ok = [outcome is Outcome.OK for outcome in self._outcomes]
        sums = tuple(int(s) if fine else 0 for s, fine in zip(self.checksums.tolist(), ok, strict=True))
        return TransferDone(self.transfer.id, tuple(self._outcomes), sums, self._error)

    def _tell(self, value: int) -> None:
        if self.transfer.counter is not None and not self.pack:
            self.transfer.counter.set(value)


def _count(pages: HostPages | DevicePages) -> int:
    if isinstance(pages, DevicePages):
        return len(pages.slots)
    return len(pages.buffers.addresses if isinstance(pages.buffers, HostSlots) else pages.buffers)


def _buffers(transfer: Transfer, *, pack: bool) -> list[Bytes]:
    """Host pages as arrays. Raises InvalidArgumentError for one of another size, or that cannot be written."""
    if not isinstance(transfer.pages, HostPages):
        return []
    found: list[Bytes] = []
    buffers = transfer.pages.buffers
    if isinstance(buffers, HostSlots) and buffers.page_bytes != transfer.page_bytes:
        raise InvalidArgumentError(
            f"transfer {transfer.id}: slots of {buffers.page_bytes} bytes, not {transfer.page_bytes}"
        )
    for buffer in () if isinstance(buffers, HostSlots) else buffers:
        if buffer.nbytes != transfer.page_bytes or not buffer.c_contiguous or (pack and buffer.readonly):
            raise InvalidArgumentError(
                f"transfer {transfer.id}: a buffer is not {transfer.page_bytes} contiguous"
                f"{' writable' if pack else ''} bytes"
            )
        found.append(np.frombuffer(buffer, np.uint8))
    sums = transfer.pages.checksums
    count = _count(transfer.pages)
    if len(sums) not in {0, count}:
        raise InvalidArgumentError(f"transfer {transfer.id}: {count} pages, {len(sums)} checksums")
    return found


def memory_at(address: int, size_bytes: int) -> Bytes:
    """Memory that somebody else keeps."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


def addresses(arrays: Iterable[Bytes]) -> Addresses:
    """Where arrays begin."""
    return np.array([array.ctypes.data for array in arrays], np.int64)
