"""Read pages out of a client's registered memory.

Always with ``preadv``, never by mapping: a client may truncate its file under us, and a mapping would kill us
with SIGBUS where a read comes back short. Pages that lie next to each other are read by one call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hicache.types import Outcome

#: IOV_MAX on Linux.
_MAX_BUFFERS = 1024


def read_region(fd: int, offsets: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
    """Fill ``buffers[i]`` from ``fd`` at byte ``offsets[i]``.

    Returns one outcome a page, OK or FAULT (a short read, a bad descriptor or offset); never raises for what
    the client did. Blocks as long as the file does: give it regular files and memfds only. Releases the GIL.
    """
    assert len(offsets) == len(buffers), "one offset a buffer"
    outcomes = [Outcome.FAULT] * len(offsets)
    start = 0
    while start < len(offsets):
        end, next_offset = start + 1, offsets[start] + buffers[start].nbytes
        while end < len(offsets) and end - start < _MAX_BUFFERS and offsets[end] == next_offset:
            next_offset += buffers[end].nbytes
            end += 1
        done = _read_contiguous(fd, offsets[start], buffers[start:end])
        outcomes[start : start + done] = [Outcome.OK] * done
        # A page that came back short is a fault; the ones after it are tried on their own.
        start = max(start + done, start + 1)
    return outcomes


def _read_contiguous(fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
    """How many of the buffers were filled whole, from the first on."""
    left = [buffer.cast("B") for buffer in buffers]
    filled = 0
    while left:
        try:
            got = os.preadv(fd, left, offset)
        except (OSError, OverflowError):
            return filled
        if not got:
            return filled
        offset += got
        while left and got >= left[0].nbytes:
            got -= left[0].nbytes
            filled += 1
            left.pop(0)
        if got:
            left[0] = left[0][got:]
    return filled
