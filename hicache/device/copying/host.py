"""Copies between pages and planes in host memory: threads, and one call a share and a plane, without the GIL.

Plain pages are moved by numpy, piece by piece as they lie, where units begin at whole units of a block; else, and for
quantised pages, by the kernels' torch twins.

Bytes: a plain byte is read and written once, and read once more where it is verified.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hicache.device import kernels
from hicache.device.copying.jobs import Handle, LoadJob, StoreJob, hash_spans
from hicache.device.copying.kv import EngineKv
from hicache.device.copying.mapped import Memory, Span, parts
from hicache.device.copying.workers import Workers
from hicache.device.kv import Places

if TYPE_CHECKING:
    from torch import Tensor

#: A thread's share of a job is at least this large.
SHARE_BYTES = 4 << 20
#: Quantised pages are moved in parts of so many bytes of numbers: they pass through temporaries.
CHUNK_BYTES = 8 << 20

Words = npt.NDArray[Any]


class HostCopies:
    """The Copies of planes in host memory."""

    def __init__(self, kv: EngineKv, *, threads: int) -> None:
        self.kv = kv
        self._planes = HostPlanes(kv)
        self._threads = threads
        self._loads, self._stores = Workers("load", threads), Workers("store", threads)
        self._open: weakref.WeakSet[Handle] = weakref.WeakSet()

    def mark(self, stream: object) -> None:
        """Nothing: what the engine has computed is there."""

    def load(self, job: LoadJob) -> None:
        """See Copies."""
        works = [functools.partial(self._load, job, first, count) for first, count in self._divide(job)]
        self._begin(self._loads, job.handle, works, functools.partial(job.handle.settle, job.check))

    def store(self, job: StoreJob) -> None:
        """See Copies."""
        works = [functools.partial(self._store, job, first, count) for first, count in self._divide(job)]
        self._begin(self._stores, job.handle, works, job.handle.go_on)

    def forget(self, memory: Memory) -> None:
        """Nothing is held here: a mapping goes with the last copy from it."""

    def close(self) -> None:
        """See Copies."""
        for handle in list(self._open):
            handle.cancel()
        self._loads.close()
        self._stores.close()

    def _divide(self, job: LoadJob | StoreJob) -> list[tuple[int, int]]:
        """(first page, pages) of each share."""
        shares = max(1, min(self._threads, job.pages, job.pages * self.kv.raw_bytes // SHARE_BYTES))
        ends = [job.pages * number // shares for number in range(shares + 1)]
        return [(begin, end - begin) for begin, end in itertools.pairwise(ends)]

    def _begin(
        self,
        workers: Workers,
        handle: Handle,
        works: Sequence[Callable[[], None]],
        settle: Callable[[], None],
    ) -> None:
        handle.divide(len(works))
        self._open.add(handle)
        for work in works:
            workers.put(functools.partial(handle.run, work, settle))

    # --- in threads

    def _load(self, job: LoadJob, first: int, count: int) -> None:
        job.check()
        if self.kv.codec:
            self._load_quantised(job, first, count)
        else:
            for layer in job.layers:
                for span, places in _along(job, first, count):
                    job.handle.go_on()
                    self._planes.move(layer, places, span.rows, pack=False)
                job.handle.pass_layer(layer)
        if job.verify:
            sums = hash_spans(parts(job.spans, first, count))
            bad = np.flatnonzero(sums != job.checksums[first : first + count])
            job.handle.note((bad + first + job.number).tolist())

    def _load_quantised(self, job: LoadJob, first: int, count: int) -> None:
        for begin, pages in self._chunks(first, count):
            for span, places in _along(job, begin, pages):
                job.handle.go_on()
                raw = self._planes.decode(span.rows)
                for layer in job.layers:
                    self._planes.move(layer, places, raw, pack=False)
        for layer in job.layers:
            job.handle.pass_layer(layer)

    def _store(self, job: StoreJob, first: int, count: int) -> None:
        handle = job.handle
        if self.kv.codec:
            self._store_quantised(job, first, count)
        else:
            for layer in handle.layers:
                handle.await_layer(layer)
                for span, places in _along(job, first, count):
                    handle.go_on()
                    self._planes.move(layer, places, span.rows, pack=True)
        if job.verify:
            handle.checksums[first : first + count] = hash_spans(parts(job.spans, first, count))

    def _store_quantised(self, job: StoreJob, first: int, count: int) -> None:
        handle = job.handle
        for begin, pages in self._chunks(first, count):
            for span, places in _along(job, begin, pages):
                raw = np.empty((len(span.rows), self.kv.raw_bytes), np.uint8)
                for layer in handle.layers:
                    handle.await_layer(layer)
                    self._planes.move(layer, places, raw, pack=True)
                end = span.first + len(span.rows)
                handle.refused[span.first : end] = self._planes.encode(raw, span.rows)

    def _chunks(self, first: int, count: int) -> list[tuple[int, int]]:
        most = max(1, CHUNK_BYTES // self.kv.raw_bytes)
        return [(at, min(most, first + count - at)) for at in range(first, first + count, most)]


class HostPlanes:
    """The planes as arrays of units."""

    def __init__(self, kv: EngineKv) -> None:
        self._kv = kv
        self._units: dict[int, list[Words]] = {}

    def move(self, layer: int, places: Places, rows: Words, *, pack: bool) -> None:
        """One layer of some pages. ``rows``: uint8 ``[pages, page]``."""
        import torch

        kv = self._kv
        unit, first = kv.page_tokens // places.shape[1], layer * kv.planes_per_layer
        if kv.block_tokens % unit or ((places >= 0) & (places % unit != 0)).any():
            planes = kv.planes[first : first + kv.planes_per_layer]
            twin = kernels.pack_units if pack else kernels.unpack_units
            twin(planes, torch.from_numpy(places), _tensor(rows), kv.page_tokens, first)
            return
        for plane in range(first, first + kv.planes_per_layer):
            units = self._views(unit)[plane]
            column = rows[:, plane * kv.plane_bytes : (plane + 1) * kv.plane_bytes].view(units.dtype)
            _move(units, places // unit, column.reshape(*places.shape, *units.shape[2:]), pack=pack)

    def encode(self, raw: Words, rows: Words) -> npt.NDArray[np.bool_]:
        """Quantise pages; answers which were refused, whose rows hold nothing."""
        import torch

        refused = torch.zeros(len(raw), dtype=torch.int32)
        numbers = torch.from_numpy(raw).view(self._kv.planes[0].dtype)
        kernels.encode_rows(numbers, self._kv.codec, _tensor(rows), refused)
        found: npt.NDArray[np.bool_] = refused.numpy() != 0
        return found

    def decode(self, rows: Words) -> Words:
        """The numbers of quantised pages, as bytes."""
        import torch

        raw = torch.empty((len(rows), self._kv.raw_bytes), dtype=torch.uint8)
        kernels.decode_rows(_tensor(rows), self._kv.codec, raw.view(self._kv.planes[0].dtype))
        found: Words = raw.numpy()
        return found

    def _views(self, unit: int) -> list[Words]:
        """Each plane as ``[blocks, units of a block, ...]``; made once for a size of units."""
        if unit not in self._units:
            self._units[unit] = [_units(plane, unit) for plane in self._kv.planes]
        return self._units[unit]


def _move(units: Words, numbers: Places, pages: Words, *, pack: bool) -> None:
    """Between units ``[blocks, units of a block, ...]`` and pages ``[pages, units of a page, ...]``: one call each.

    ``numbers``: which unit of all, negative for one that is not moved.
    """
    each = units.shape[1]
    keep = numbers >= 0
    if (
        keep.all()
        and units.strides[0] == each * units.strides[1]
        and (np.diff(numbers.reshape(-1)) == 1).all()
    ):
        first, count = int(numbers[0, 0]), numbers.size
        run = np.lib.stride_tricks.as_strided(
            units[first // each, first % each :], (count, *units.shape[2:]), units.strides[1:]
        )
        if pack:
            np.copyto(pages, run.reshape(pages.shape))
        else:
            np.copyto(run.reshape(pages.shape), pages)
        return
    where: tuple[Any, ...] = (numbers // each, numbers % each)
    chosen: Any = ...
    if not keep.all():
        chosen = np.nonzero(keep)
        where = (where[0][chosen], where[1][chosen])
    if not pack:
        units[where] = pages[chosen]
    elif chosen is ... and units.flags.c_contiguous:
        found = _scratch(pages)
        np.take(units.reshape(-1, *units.shape[2:]), numbers, axis=0, out=found, mode="clip")
        np.copyto(pages, found)
    else:
        pages[chosen] = units[where]


_OWN = threading.local()


def _scratch(like: Words) -> Words:
    """This thread's memory of that shape: fresh memory for each call would cost more than the copy."""
    held = getattr(_OWN, "bytes", None)
    if held is None or held.nbytes < like.nbytes:
        held = _OWN.bytes = np.empty(like.nbytes, np.uint8)
    found: Words = held[: like.nbytes].view(like.dtype).reshape(like.shape)
    return found


def _units(plane: Tensor, unit: int) -> Words:
    """A plane as ``[blocks, units of a block, ...]`` of integers; what is contiguous in a unit is one axis."""
    blocks, block, heads, dim = plane.shape
    width = plane.element_size()
    words = plane.view(kernels.word_dtype(width))
    whole = plane.stride()[1:] == (heads * dim, dim, 1)
    inner = (unit * heads * dim,) if whole else (unit, heads, dim)
    step = (1,) if whole else words.stride()[1:]
    shape = (blocks, block // unit, *inner)
    found: Words = words.as_strided(
        shape, (words.stride(0), unit * words.stride(1), *step), words.storage_offset()
    ).numpy()
    return found


def _tensor(rows: Words) -> Tensor:
    """The same bytes. What is mapped read-only is only read through it, though torch has no word for that."""
    import torch

    if not rows.flags.writeable:
        end = (len(rows) - 1) * rows.strides[0] + rows.shape[1]
        raw = np.frombuffer((ctypes.c_uint8 * end).from_address(rows.ctypes.data), np.uint8)
        rows = np.lib.stride_tricks.as_strided(raw, rows.shape, rows.strides)
    return torch.from_numpy(rows)


def _along(job: LoadJob | StoreJob, first: int, count: int) -> list[tuple[Span, Places]]:
    """The spans of some pages, each with its places."""
    return [
        (span, job.places[span.first : span.first + len(span.rows)])
        for span in parts(job.spans, first, count)
    ]
