"""The disk tier's folder: whose it is, who holds it, and whether its contents can be trusted.

    FORMAT        {"format": "hicache-disk", "version": 2}; a folder without it is not ours, unless it is empty
    hicache.lock  flock of the process that has it open; holds that process's pid
    STATE         {"boot", "clean", "sync"}: what a later start needs to know about this one's end
    shards/       the data (``shards``)
    quarantine/   damaged records kept for study (``quarantine``)

Version 1 had one ``data.mdb`` at the top: it becomes the first shard, its rows are read as they are. FORMAT says 2
only after that, and a start that died in between goes on where it stopped.

Trust. Written without fsync, an LMDB file survives the death of the process but not of the machine: after a
power cut it is garbage that mostly looks like data. So: closed cleanly, or same boot, or every commit synced:
trusted. Otherwise the cache starts empty; a miss is legal, a wrong page never.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

from hicache.errors import ConfigError
from hicache.tier.lmdb_env import DATA
from hicache.tier.lmdb_env import LOCK as LMDB_LOCK
from hicache.tier.shards import SHARDS, adopt_version_1, clear_leftovers
from hicache.tier.smallfile import du_bytes, fsync_folder, read_json, write_json

FORMAT_VERSION = 2
_OLD_VERSIONS = (1,)
_FORMAT = "FORMAT"
_LOCK = "hicache.lock"
_STATE = "STATE"
#: What an empty folder may hold: a mount's own, or what a start left that died before FORMAT was written.
_EMPTY = {_LOCK, "lost+found", f"{_FORMAT}.new"}
_NETWORK = ("nfs", "cifs", "smb", "afs", "9p", "fuse.sshfs", "ceph", "lustre", "glusterfs", "fuse.glusterfs")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger(__name__)


class Folder:
    """An open, locked folder. ``wiped`` says why older contents were not kept; empty when they were."""

    def __init__(self, path: Path, *, capacity_bytes: int, sync: bool) -> None:
        """Raises ConfigError for a folder that is in use, not ours, newer, or not on a local disk."""
        self.path = path
        self.wiped = ""
        self._sync = sync
        self._lock_fd = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_network(path)
            _refuse_foreign(path)
            self._lock_fd = _lock(path)
            version = self._version()
            distrust = self._distrust()
            if distrust:
                self._wipe(distrust)
            clear_leftovers(path)
            if version in _OLD_VERSIONS:
                adopt_version_1(path)
            if version != FORMAT_VERSION:
                write_json(path / _FORMAT, {"format": "hicache-disk", "version": FORMAT_VERSION})
            self._settle_past()
            self._write_state(clean=False)
            _warn_of_little_space(path, capacity_bytes)
        except OSError as exc:
            self.close()
            raise ConfigError(
                f"disk folder {path} cannot be used: {exc.strerror or exc}",
                hint="choose a folder that this user may write to, on a disk that takes writes",
            ) from exc
        except ConfigError:
            self.close()
            raise

    def mark_clean(self) -> None:
        """Everything is on the medium: the next start may trust it whatever happens to the machine."""
        self._write_state(clean=True)

    def close(self) -> None:
        """Let the folder go. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _wipe(self, reason: str) -> None:
        """Remove the data, remember why."""
        _log.warning("disk folder %s starts empty: %s", self.path, reason)
        self.wiped = reason
        for name in (DATA, LMDB_LOCK):
            (self.path / name).unlink(missing_ok=True)
        if (self.path / SHARDS).exists():
            shutil.rmtree(self.path / SHARDS)

    def _version(self) -> int:
        """The format's version; 0 for a folder that has none yet."""
        path = self.path / _FORMAT
        if not path.exists():
            return 0
        found = read_json(path)
        version = found.get("version")
        if found.get("format") != "hicache-disk" or not isinstance(version, int):
            raise ConfigError(f"{path} is unreadable", hint="remove the folder, or choose another")
        if version != FORMAT_VERSION and version not in _OLD_VERSIONS:
            raise ConfigError(
                f"disk folder {self.path} has format version {version}, this hicache reads up to {FORMAT_VERSION}",
                hint="upgrade hicache, remove the folder, or choose another",
            )
        return version

    def _distrust(self) -> str:
        """Why what is there cannot be trusted; empty when it can, or when there is nothing."""
        files = [self.path / DATA, *(self.path / SHARDS).glob(f"*/{DATA}")]
        if not any(file.exists() and file.stat().st_size for file in files):
            return ""
        state = read_json(self.path / _STATE)
        trusted = state.get("clean") is True or state.get("sync") is True or state.get("boot") == boot_id()
        return "" if trusted else "the machine went down while it was open without sync"

    def _settle_past(self) -> None:
        """What an unsynced process left goes to the medium before STATE says that everything is there."""
        state = read_json(self.path / _STATE)
        if not self._sync or state.get("clean") is True or state.get("sync") is True:
            return
        for data in (self.path / SHARDS).glob(f"*/{DATA}"):
            with data.open("rb") as file:
                os.fsync(file.fileno())
            fsync_folder(data.parent)

    def _write_state(self, *, clean: bool) -> None:
        write_json(self.path / _STATE, {"boot": boot_id(), "clean": clean, "sync": self._sync})


def boot_id() -> str:
    """Names this run of the machine. Raises OSError."""
    return _BOOT_ID.read_text().strip()


def holder_of(fd: int) -> str:
    """The process that holds a lock file, as it wrote itself down. Raises OSError."""
    return os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"


def _lock(path: Path) -> int:
    fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = holder_of(fd)
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

    # Not the folder's own owner: a mount made for us may belong to root.
    if _FORMAT in names:
        owner = (path / _FORMAT).stat().st_uid
        if owner != os.geteuid():
            raise ConfigError(
                f"disk folder {path} was made by user {owner}, this is user {os.geteuid()}",
                hint=f"run as user {owner}, chown -R the folder, or choose another",
            )


def _warn_of_little_space(path: Path, capacity_bytes: int) -> None:
    """Say at the start what would else show as a fault weeks later. Others may free space: no reason to refuse."""
    held = sum(du_bytes(file) for file in path.rglob("*") if file.is_file())
    space = os.statvfs(path)
    free = space.f_bavail * space.f_frsize
    if held + free < capacity_bytes:
        _log.warning(
            "disk folder %s: the file system has %d bytes left, the capacity needs %d more: the tier will fault "
            "before it is full; lower the capacity or free space",
            path,
            free,
            capacity_bytes - held,
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
