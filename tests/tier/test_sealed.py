"""Memory that others may read: also where a kernel has no seal against writing."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from hicache import sealed

SIZE = 1 << 16
real = fcntl.fcntl


@pytest.fixture(params=["seal", "no seal"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    def without(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_ADD_SEALS and value & sealed.F_SEAL_FUTURE_WRITE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, value)

    if request.param == "no seal":
        monkeypatch.setattr(sealed.fcntl, "fcntl", without)
    made = sealed.SealedMemory("hicache-test", SIZE)
    yield made
    made.close()


def test_we_write_and_others_read(memory: sealed.SealedMemory) -> None:
    with mmap.mmap(memory.fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as theirs:
        memory.mapped[5:8] = b"abc"
        assert theirs[5:8] == b"abc"


def test_others_can_neither_write_nor_cut(memory: sealed.SealedMemory) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(memory.fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for attempt in (
        lambda: os.pwrite(memory.fd, b"x", 0),
        lambda: os.ftruncate(memory.fd, 0),
        lambda: os.ftruncate(memory.fd, 2 * SIZE),
    ):
        with pytest.raises(OSError):
            attempt()
    assert real(memory.fd, fcntl.F_GET_SEALS) & sealed.SIZE_SEALS == sealed.SIZE_SEALS
    assert os.fstat(memory.fd).st_size == SIZE


def test_nothing_leaks(memory: sealed.SealedMemory) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    other = sealed.SealedMemory("hicache-test", SIZE)
    other.close()
    other.close()
    other.mapped.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_another_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, command: int, value: int = 0) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(sealed.fcntl, "fcntl", refused)
    with pytest.raises(PermissionError):
        sealed.SealedMemory("hicache-test", SIZE)
