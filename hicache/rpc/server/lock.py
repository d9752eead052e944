"""One server a socket path: an flock beside the socket, taken before anything is bound.

gRPC unlinks an existing socket when it binds, so that a second server would silently steal the path of the
first. The lock file stays when the server stops: to unlink it would let two later servers lock two different
files.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from hicache.errors import ConfigError

LOCK_SUFFIX = ".lock"


class SocketLock:
    """Holds the right to bind a path and the paths derived from it. ``release`` gives it back."""

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path + LOCK_SUFFIX
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock. Raises ConfigError naming the process that holds it, or why there can be no lock."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"socket_path: cannot open the lock file {self._path}: {error.strerror}",
                hint="the directory must exist and be writable",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise ConfigError(
                f"socket_path: {self._path} is locked by the hicache server with pid {holder}",
                hint="stop it first, or choose another socket_path",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def remove_stale_socket(path: str) -> None:
    """Remove the socket that a dead server left; call it under the lock only.

    Raises ConfigError where the path is something else than a socket.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket_path: {path} exists and is not a socket", hint="move it away")
    Path(path).unlink(missing_ok=True)
