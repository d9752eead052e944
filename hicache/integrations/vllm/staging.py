"""The scheduler's staging memory as a worker sees it: each memfd mapped once, found by its inode."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict

import numpy as np

from hicache.errors import StaleError
from hicache.integrations.vllm.layout import Bytes
from hicache.integrations.vllm.messages import StagedRun

#: Mapped at most; the scheduler's client has one region, and further ones while it grows.
MOST_MAPPINGS = 32


class StagingMaps:
    """Staging memory, mapped writable. One thread at a time."""

    def __init__(self) -> None:
        self._maps: OrderedDict[int, tuple[str, Bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._maps)

    def rows(self, run: StagedRun, page_bytes: int) -> Bytes:
        """The run's pages, one row each.

        Raises StaleError where the memory behind the path is not the one meant, or is gone.
        """
        end = run.offset + run.pages * page_bytes
        if run.offset < 0 or end > run.size_bytes:
            raise StaleError(f"staging run [{run.offset}, {end}) is not in {run.size_bytes} bytes")
        return self._memory(run)[run.offset : end].reshape(run.pages, page_bytes)

    def _memory(self, run: StagedRun) -> Bytes:
        found = self._maps.get(run.inode)
        if found is None:
            self._forget_gone()
            found = (run.path, _map(run))
            self._maps[run.inode] = found
            while len(self._maps) > MOST_MAPPINGS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(run.inode)
        if len(found[1]) != run.size_bytes:
            raise StaleError(f"staging memory {run.path} has {len(found[1])} bytes, not {run.size_bytes}")
        return found[1]

    def _forget_gone(self) -> None:
        """Let go of memory that its owner has closed: it would stay in use as long as it is mapped."""
        for inode, (path, _) in list(self._maps.items()):
            if not _is_inode(path, inode):
                del self._maps[inode]

    def close(self) -> None:
        """Let go of all mappings."""
        self._maps.clear()


def _is_inode(path: str, inode: int) -> bool:
    try:
        return os.stat(path).st_ino == inode  # noqa: PTH116 - a path in /proc, as another process told it
    except OSError:
        return False


def _map(run: StagedRun) -> Bytes:
    try:
        fd = os.open(run.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StaleError(f"staging memory {run.path} cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        if status.st_ino != run.inode or status.st_size != run.size_bytes:
            raise StaleError(f"staging memory {run.path} is no longer the one that was meant")
        memory = mmap.mmap(fd, run.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise StaleError(f"staging memory {run.path} cannot be mapped: {error}") from error
    finally:
        os.close(fd)
    return np.frombuffer(memory, dtype=np.uint8)
