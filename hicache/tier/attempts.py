"""Where errors of the medium end: a transaction that fails is an outcome, never an exception."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import lmdb

from hicache.tier.ops import WriterStats

_log = logging.getLogger(__name__)

#: What ``Attempts.run`` says when a map is full.
FULL = "the disk tier is full"
_NO_SPACE = "no space left on device"
_NO_SPACE_BYTES = 1 << 20


class Attempts:
    """Runs what may fail, counts it, and says what failed. For the writer's thread only."""

    def __init__(self, home: Path, stats: WriterStats, on_error: Callable[[str], None]) -> None:
        self._home = home
        self._stats = stats
        self._on_error = on_error
        self._last = ""  # a disk that stays broken is logged once

    def run(self, work: Callable[[], None], *, commits: int = 1) -> str:
        """Do something with the medium: empty when it worked, ``FULL`` when a map is full, or what failed.

        ``commits``: what it counts as when it worked.
        """
        try:
            work()
        except lmdb.MapFullError:
            self._stats.map_full += 1
            return FULL
        except Exception as exc:  # noqa: BLE001 - the loop's edge: EIO, ENOSPC, or a bug; the FAULT of these operations
            text = explain(exc, self._home)
            if text != self._last:
                _log.error("disk: a commit failed: %s", text)
            self._last = text
            self._stats.faults += 1
            self._on_error(text)
            return text
        self._stats.commits += commits
        self._last = ""
        return ""


def explain(exc: Exception, home: Path) -> str:
    """What failed. A full disk shows as EIO or a short write in LMDB: say what it is."""
    text = f"{type(exc).__name__}: {exc}"
    if _NO_SPACE in text.lower():
        return text
    full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and isinstance(exc, (OSError, lmdb.Error)):
        try:
            space = os.statvfs(home)
            full = space.f_bavail * space.f_frsize < _NO_SPACE_BYTES
        except OSError:
            full = False
    return f"{text} ({_NO_SPACE})" if full else text
