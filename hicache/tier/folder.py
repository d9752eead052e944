"""The disk tier's folder: whose it is, who holds it, and whether its contents can be trusted.

    FORMAT        {"format": "hicache-disk", "version": 1}; a folder without it is not ours, unless it is
    empty hicache.lock  flock of the process that has it open; holds that process's pid
    STATE         {"boot", "clean", "sync"}: what a later start needs to know about this one's end
    data.mdb, lock.mdb   LMDB's

Trust. Written without fsync, an LMDB file survives the death of the process but not of the machine: after a
power cut it is garbage that mostly looks like data. So: closed cleanly, or same boot, or every commit synced:
trusted. Otherwise the cache starts empty; a miss is legal, a wrong page never.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path

from hicache.errors import ConfigError

FORMAT_VERSION = 1
_FORMAT = "FORMAT"
_LOCK = "hicache.lock"
_STATE = "STATE"
DATA = "data.mdb"
_LMDB_FILES = (DATA, "lock.mdb")
#: What an empty folder may hold: a mount's own, or what a start left that died before FORMAT was written.
_EMPTY = {_LOCK, "lost+found", f"{_FORMAT}.new"}
_NETWORK = ("nfs", "cifs", "smb", "afs", "9p", "fuse.sshfs", "ceph", "lustre", "glusterfs", "fuse.glusterfs")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger(__name__)


class Folder:
    """An open, locked folder. ``wiped`` says why older contents were not kept; empty when they were."""

    def __init__(self, path: Path, *, map_bytes: int, sync: bool) -> None:
        """Raises ConfigError for a folder that is in use, not ours, newer, or not on a local disk."""
        self.path = path
        self.wiped = ""
        self._sync = sync
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_network(path)
            _refuse_foreign(path)
            self._lock_fd = _lock(path)
        except OSError as exc:
            raise ConfigError(f"disk folder {path} cannot be used: {exc}") from exc
        try:
            self._check_format()
            distrust = self._distrust(map_bytes)
            if distrust:
                self.wipe(distrust)
            self._write_state(clean=False)
        except OSError as exc:
            self.close()
            raise ConfigError(f"disk folder {path} cannot be used: {exc}") from exc
        except ConfigError:
            self.close()
            raise

    def wipe(self, reason: str) -> None:
        """Remove the data, remember why. The environment must not be open."""
        _log.warning("disk folder %s starts empty: %s", self.path, reason)
        self.wiped = reason
        for name in _LMDB_FILES:
            (self.path / name).unlink(missing_ok=True)

    def mark_clean(self) -> None:
        """Everything is on the medium: the next start may trust it whatever happens to the machine."""
        self._write_state(clean=True)

    def close(self) -> None:
        """Let the folder go. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def data_bytes(self) -> int:
        """Length of the data file, 0 when there is none."""
        data = self.path / DATA
        return data.stat().st_size if data.exists() else 0

    def _check_format(self) -> None:
        path = self.path / _FORMAT
        if not path.exists():
            _write(path, {"format": "hicache-disk", "version": FORMAT_VERSION})
            return
        found = _read(path)
        version = found.get("version")
        if found.get("format") != "hicache-disk" or not isinstance(version, int):
            raise ConfigError(f"{path} is unreadable", hint="remove the folder, or choose another")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"disk folder {self.path} has format version {version}, this hicache reads {FORMAT_VERSION}",
                hint="upgrade hicache, remove the folder, or choose another",
            )

    def _distrust(self, map_bytes: int) -> str:
        size = self.data_bytes()
        if not size:
            return ""
        if size > map_bytes:
            return f"its {size} bytes are more than the capacity now allows"
        state = _read(self.path / _STATE)
        trusted = state.get("clean") is True or state.get("sync") is True or state.get("boot") == _boot_id()
        return "" if trusted else "the machine went down while it was open without sync"

    def _write_state(self, *, clean: bool) -> None:
        _write(self.path / _STATE, {"boot": _boot_id(), "clean": clean, "sync": self._sync})


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _read(path: Path) -> dict[str, object]:
    """A small JSON object; an empty one for a file that is missing or unreadable."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, object]) -> None:
    """Replace a small JSON file, durably."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(path: Path) -> int:
    fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ConfigError(
            f"disk folder {path} is in use by process {holder}", hint="stop it, or choose another folder"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if _FORMAT not in names and names - _EMPTY:
        example = sorted(names - _EMPTY)[0]
        raise ConfigError(
            f"disk folder {path} is not empty and not hicache's (it holds {example!r})",
            hint="choose an empty or a new folder",
        )


def _refuse_network(path: Path) -> None:
    kind = filesystem(path)
    if kind.startswith(_NETWORK):
        raise ConfigError(
            f"disk folder {path} is on a network file system ({kind})",
            hint="LMDB needs a local disk: choose a folder on one",
        )


def filesystem(path: Path) -> str:
    """Type of the file system a path is on, from the mount table; empty when it does not say."""
    real = path.resolve()
    best, kind = -1, ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        mount = Path(fields[4].encode().decode("unicode_escape"))
        if real.is_relative_to(mount) and len(mount.parts) >= best:  # later mounts cover earlier ones
            best, kind = len(mount.parts), fields[fields.index("-") + 1]
    return kind
