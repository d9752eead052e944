"""Records that did not decode, kept aside for study: ``quarantine/<key hex>.<kind>``, the oldest out first.

Inside the capacity: what the files take on disk stays within a bound. Nothing here is ever read back, and a
failure to keep a record is no failure of the store.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from pathlib import Path

from hicache.errors import ConfigError
from hicache.tier.codec import Kind
from hicache.tier.rows import DISK_PAGE_BYTES

_log = logging.getLogger(__name__)

QUARANTINE = "quarantine"
#: The folder itself grows with the number of names in it.
_FILES_MAX = 256


def word_of(kind: Kind) -> str:
    """A kind of damage as one word, for names of files and counters."""
    return kind.value.replace(" ", "-")


def open_quarantine(home: Path, bound_bytes: int) -> Quarantine:
    """The folder's quarantine. Raises ConfigError."""
    try:
        return Quarantine(home, bound_bytes)
    except OSError as exc:
        raise ConfigError(f"disk folder {home / QUARANTINE} cannot be used: {exc}") from exc


class Quarantine:
    """The folder of records set aside. For one thread."""

    def __init__(self, home: Path, bound_bytes: int) -> None:
        """Takes over what an earlier process left. A bound of 0 keeps nothing. Raises OSError."""
        self._folder = home / QUARANTINE
        # The folder takes room, too; what is left of the bound is for its files.
        self._bound_bytes = max(0, bound_bytes - _FILES_MAX * 128)
        self._files: OrderedDict[Path, int] = OrderedDict()
        if self._folder.is_dir():
            found = sorted((file.stat().st_mtime_ns, file) for file in self._folder.iterdir())
            for _, file in found:
                self._files[file] = _rounded(file.stat().st_size)
        self._make_room(0)

    @property
    def held_bytes(self) -> int:
        """What its files take."""
        return sum(self._files.values())

    def keep(self, key: bytes, kind: str, record: memoryview) -> bool:
        """Set a record aside; says whether it was kept."""
        size = _rounded(record.nbytes)
        if size > self._bound_bytes:
            return False
        file = self._folder / f"{key.hex()}.{kind}"
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._drop(file)
            self._make_room(size)
            file.write_bytes(record)
        except OSError as exc:
            _log.warning("disk: a damaged record could not be kept: %s", exc)
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            return False
        self._files[file] = size
        return True

    def _make_room(self, size: int) -> None:
        while self._files and (self.held_bytes + size > self._bound_bytes or len(self._files) >= _FILES_MAX):
            self._drop(next(iter(self._files)))

    def _drop(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        self._files.pop(file, None)


def _rounded(size: int) -> int:
    return -(-size // DISK_PAGE_BYTES) * DISK_PAGE_BYTES
