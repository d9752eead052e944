"""Builds the shim, drives it through its control file, and makes of its log the disk that a power cut leaves.

What is kept after a cut: everything synced, and of the rest whatever chance keeps, in pieces of 4 KiB; of files made,
renamed and removed some first part of what was not synced. Two models of a directory: "posix", where only an fsync of
the folder makes names durable, and "journal", where any fsync does, as on ext4 and xfs.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "shim.c"
PIECE_BYTES = 4096
WRITE, TRUNCATE, SYNC, CREATE, MKDIR, RENAME, UNLINK, RMDIR = range(1, 9)
FINE, NO_SPACE, IO_WRITE, IO_SYNC, READ_ONLY, SLOW, CUT = range(7)
_HEAD = struct.Struct("<IIQQ")
_ALONE = 1 << 63


def build_shim(folder: Path) -> Path:
    """Compile it. Skips the test where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: the shim that simulates bad disks cannot be built")
    target = folder / "shim.so"
    done = subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-ldl", "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the shim does not compile here: {done.stderr.splitlines()[:3]}")
    return target


class Control:
    """What the shim does from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(4096))

    def set(self, fault: int, argument: int = 0, *, after: int = 0) -> None:
        """A fault for every operation that comes after so many others; CUT kills at that one."""
        with self.path.open("r+b") as file:
            os.pwrite(file.fileno(), struct.pack("<3i", fault, argument, after), 0)


def shim_env(
    shim: Path, root: Path, *, log: Path | None = None, control: Path | None = None
) -> dict[str, str]:
    env = {"LD_PRELOAD": str(shim), "SHIM_ROOT": str(root)}
    if log is not None:
        env["SHIM_LOG"] = str(log)
    if control is not None:
        env["SHIM_CONTROL"] = str(control)
    return env


class File:
    """What of a file is on the medium, and what is on its way."""

    def __init__(self, data: bytes = b"") -> None:
        self.durable = bytearray(data)
        self.pending: list[tuple[int, bytes | None]] = []  # (offset, data), or (size, None) for a truncate

    def sync(self) -> None:
        for at, data in self.pending:
            _apply(self.durable, at, data)
        self.pending.clear()

    def after_cut(self, rng: random.Random, kept: float) -> bytes:
        left = bytearray(self.durable)
        for at, data in self.pending:
            if data is None:
                if rng.random() < kept:
                    _apply(left, at, None)
                continue
            start = 0
            while start < len(data):
                end = min(len(data), (at + start) // PIECE_BYTES * PIECE_BYTES + PIECE_BYTES - at)
                if rng.random() < kept:
                    _apply(left, at + start, data[start:end])
                start = end
        return bytes(left)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        content.extend(bytes(at - len(content)))
        return
    if len(content) < at + len(data):
        content.extend(bytes(at + len(data) - len(content)))
    content[at : at + len(data)] = data


Names = dict[str, File | None]  # None: a folder


class Disk:
    """The medium below one folder, from a log. ``model``: "posix" or "journal"."""

    def __init__(self, root: Path, model: str) -> None:
        self.root = str(root.resolve())
        self.model = model
        self.live: Names = {}
        self.durable: Names = {}
        self._inodes: dict[int, File] = {}
        self._changes: list[tuple[str, str, File | None, str]] = []  # (what, name, file, other name)
        for path in sorted(root.rglob("*")):
            made = None if path.is_dir() else File(path.read_bytes())
            self.live[str(path.resolve())] = self.durable[str(path.resolve())] = made
            if made is not None:
                self._inodes[path.stat().st_ino] = made

    def play(self, log: bytes) -> int:
        """Take in a log; returns how many records it had."""
        at = count = 0
        while at + _HEAD.size <= len(log):
            kind, length, inode, offset = _HEAD.unpack_from(log, at)
            at += _HEAD.size
            self._record(kind, inode, offset, log[at : at + length])
            at += length
            count += 1
        return count

    def _record(self, kind: int, inode: int, offset: int, rest: bytes) -> None:
        if kind == SYNC and not offset & _ALONE:
            self._sync(inode, rest.rstrip(b"\0").decode())
        elif kind in (WRITE, TRUNCATE, SYNC):
            if inode not in self._inodes:
                return  # a file of which no name was ever seen
            file = self._inodes[inode]
            if kind == SYNC:
                file.pending.pop()  # the write just recorded
                _apply(file.durable, offset ^ _ALONE, rest)
            else:
                file.pending.append((offset, rest if kind == WRITE else None))
        else:
            self._name(kind, inode, [part.decode() for part in rest.split(b"\0") if part])

    def _sync(self, inode: int, path: str) -> None:
        if inode in self._inodes and self.live.get(path, self) is not None:
            self._inodes[inode].sync()
            if self.model == "journal":
                self._names_durable(lambda _: True)
        else:
            self._names_durable(lambda name: self.model == "journal" or str(Path(name).parent) == path)

    def _names_durable(self, wanted: object) -> None:
        left = []
        for change in self._changes:
            if wanted(change[1]):  # type: ignore[operator]
                _change(self.durable, change)
            else:
                left.append(change)
        self._changes = left

    def _name(self, kind: int, inode: int, names: list[str]) -> None:
        name = names[0]
        if kind == CREATE:
            if name in self.live:
                return
            self._inodes[inode] = File()
            change = ("add", name, self._inodes[inode], "")
        elif kind == MKDIR:
            change = ("add", name, None, "")
        elif kind == RENAME:
            change = ("move", names[1], None, name)
        else:
            change = ("remove", name, None, "")
        _change(self.live, change)
        self._changes.append(change)

    def build(self, target: Path, rng: random.Random) -> str:
        """Write what a cut now would leave below ``target``; says in words what chance did."""
        names = dict(self.durable)
        first = rng.randint(0, len(self._changes))
        for change in self._changes[:first]:
            _change(names, change)
        kept = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        target.mkdir(parents=True)
        for name, file in sorted(names.items()):
            path = target / Path(name).relative_to(self.root)
            if file is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.after_cut(rng, kept))
        return f"{first} of {len(self._changes)} names, {kept:.0%} of what was not synced"


def _change(names: Names, change: tuple[str, str, File | None, str]) -> None:
    what, name, file, other = change
    if what == "add":
        names[name] = file
    elif what == "remove":
        names.pop(name, None)
    else:
        for old in [each for each in names if each == other or each.startswith(f"{other}/")]:
            names[name + old[len(other) :]] = names.pop(old)
