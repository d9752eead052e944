"""The steps of a copy, as the streams run them: between host buffers, staging and slots.

    PUT  host buffers -> staging, checksums of the copy, scatter to slots
    GET  gather slots -> staging, checksums against the record, host buffers

A batch moves in chunks of the staging buffer, so that a chunk is still in the processor's cache at its next
step. The heavy parts (numpy and torch copies, xxh3) release the GIL. Slot columns change under the store's
lock, which is never held during a copy.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hicache.device import kernels
from hicache.device.plan import Extent
from hicache.device.result import Result
from hicache.device.segment import Segment, Sums
from hicache.types import Outcome, slot_stride

#: What a copy may raise: torch's errors are RuntimeErrors, a buffer released too early is a ValueError.
COPY_FAULTS = (RuntimeError, ValueError, BufferError, MemoryError)

Rows = npt.NDArray[np.uint8]
Chosen = npt.NDArray[np.bool_]


class Staging:
    """The staging buffer of one stream; used by its thread only. Grows to one slot where a slot is larger."""

    def __init__(self, staging_bytes: int) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._least_bytes = staging_bytes

    def rows(self, page_bytes: int) -> torch.Tensor:
        """uint8 [as many slots as fit, stride]."""
        stride = slot_stride(page_bytes)
        wanted = max(stride, self._least_bytes)
        if self._memory.numel() < wanted:
            self._memory = torch.empty(wanted, dtype=torch.uint8)
        count = self._memory.numel() // stride
        return self._memory[: count * stride].view(count, stride)


def put(extent: Extent[Segment], result: Result, staging: Staging, lock: threading.Lock) -> None:
    """Write the extent's pages. Every slot is empty from the first byte on until its page is accepted."""
    with lock:
        extent.segment.empty(extent.indices)
    rows = staging.rows(extent.segment.page_bytes)
    for chunk in extent.chunks(len(rows)):
        _put_chunk(chunk, result, rows[: len(chunk.indices)], lock)


def _put_chunk(chunk: Extent[Segment], result: Result, rows: torch.Tensor, lock: threading.Lock) -> None:
    segment = chunk.segment
    host: Rows = rows.numpy()
    pages = host[:, : segment.page_bytes]
    host[:, segment.page_bytes :] = 0  # no byte of an earlier page travels in the padding
    for row, position in zip(pages, chunk.positions.tolist(), strict=True):
        np.copyto(row, np.frombuffer(result.batch.buffers[position], np.uint8))
    sums = _checksums(pages)
    sound = np.ones(len(sums), np.bool_)
    if result.batch.checksums:
        given = [result.batch.checksums[position] for position in chunk.positions.tolist()]
        sound = sums == np.array(given, np.uint64)
        result.settle(chunk.positions[~sound], Outcome.CORRUPT)
    accepted = rows if sound.all() else rows[torch.from_numpy(sound)]
    kernels.scatter_pages(accepted, segment.pool, torch.from_numpy(chunk.indices[sound]))
    with lock:
        kept = sound & (segment.frees[chunk.indices] == chunk.frees)
        segment.accept(chunk.indices[kept], sums[kept])
    if (sound & ~kept).any():
        result.fault("a slot was freed before its page arrived")
    result.moved(chunk.positions[kept], sums[kept])


def get(extent: Extent[Segment], result: Result, staging: Staging, lock: threading.Lock) -> None:
    """Read the extent's pages. A buffer whose outcome is not OK is left as it was."""
    rows = staging.rows(extent.segment.page_bytes)
    for chunk in extent.chunks(len(rows)):
        _get_chunk(chunk, result, rows, lock)


def _get_chunk(chunk: Extent[Segment], result: Result, staging: torch.Tensor, lock: threading.Lock) -> None:
    segment = chunk.segment
    with lock:
        held: Chosen = segment.held[chunk.indices]
        indices, positions = chunk.indices[held], chunk.positions[held]
        recorded, writes = segment.checksums[indices], segment.writes[indices]
    result.settle(chunk.positions[~held], Outcome.MISS)
    rows = staging[: len(indices)]
    kernels.gather_pages(segment.pool, torch.from_numpy(indices), rows)
    pages: Rows = rows.numpy()[:, : segment.page_bytes]
    sums = _checksums(pages)
    sound: Chosen = sums == recorded
    if not sound.all():
        with lock:  # a page that was overwritten meanwhile is not corrupt, only gone
            rotten = ~sound & (segment.writes[indices] == writes)
            segment.empty(indices[rotten])
        result.settle(positions[~sound], Outcome.MISS)
        result.settle(positions[rotten], Outcome.CORRUPT)
    for row, position in zip(np.flatnonzero(sound).tolist(), positions[sound].tolist(), strict=True):
        np.copyto(np.frombuffer(result.batch.buffers[position], np.uint8), pages[row])
    result.moved(positions[sound], sums[sound])


def delete(extent: Extent[Segment], result: Result, staging: Staging, lock: threading.Lock) -> None:
    """Empty the extent's slots; MISS where one is empty already."""
    segment = extent.segment
    with lock:
        held: Chosen = segment.held[extent.indices]
        segment.empty(extent.indices)
    result.settle(extent.positions[held], Outcome.OK)
    result.settle(extent.positions[~held], Outcome.MISS)


def _checksums(pages: Rows) -> Sums:
    return np.array([xxhash.xxh3_64_intdigest(page.data) for page in pages], np.uint64)
