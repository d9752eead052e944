"""Look at a disk folder that no sidecar has open: what it holds, what is wrong with it. Read only.

Each environment is read by a process of its own (``isolation``), since a garbage file may kill its reader. Pages are
then put together over all environments: a page whose parent is not stored is *stranded*: out of matches, not wrong.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from hicache.errors import ConfigError
from hicache.keys import KEY_BYTES
from hicache.tier.examine import Bad, NamespaceCount, Part, ShardHead, precheck, scan
from hicache.tier.folder import FORMAT_VERSION, boot_id, holder_of
from hicache.tier.isolation import Crashed, isolated
from hicache.tier.quarantine import QUARANTINE
from hicache.tier.shards import ShardInfo, list_shards
from hicache.tier.smallfile import du_bytes, read_json
from hicache.types import Namespace

_LINK_BYTES = 3 * KEY_BYTES
_HOUR_MS = 3_600_000
#: Classes of the age histogram, by upper bound.
AGES = (
    ("under 1 h", _HOUR_MS),
    ("1 h to 1 d", 24 * _HOUR_MS),
    ("1 d to 7 d", 7 * 24 * _HOUR_MS),
    ("longer", 1 << 62),
)

#: Told (rows read, rows in all) of one shard, and its name.
Progress = Callable[[str, int, int], None]


def _silent(_shard: str, _done: int, _of: int) -> None:
    """Nobody watches."""


@dataclasses.dataclass(slots=True)
class ShardReport:
    """One environment. ``problem`` says why it could not be read to the end."""

    name: str
    size_class_bytes: int
    map_bytes: int = 0
    file_bytes: int = 0
    used_bytes: int = 0
    entries: int = 0
    sound_pages: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    charge_bytes: int = 0
    undercharged: int = 0
    pages_in_pieces: int = 0
    bad: list[Bad] = dataclasses.field(default_factory=list)
    problem: str = ""

    @property
    def free_bytes(self) -> int:
        """Of the file, what holds no live data."""
        return max(0, self.file_bytes - self.used_bytes)

    def add(self, part: Part) -> None:
        """Take in a stretch of rows."""
        self.sound_pages += part.sound
        self.raw_bytes += part.raw_bytes
        self.stored_bytes += part.stored_bytes
        self.charge_bytes += part.charge_bytes
        self.undercharged += part.undercharged
        self.pages_in_pieces += part.in_pieces
        self.bad += part.bad


@dataclasses.dataclass(slots=True)
class FolderReport:
    """Everything ``inspect_folder`` found. ``distrust``: why the next start would not keep the contents."""

    path: str
    format_version: int = 0
    disk_bytes: int = 0
    quarantine_bytes: int = 0
    quarantine_files: int = 0
    distrust: str = ""
    shards: list[ShardReport] = dataclasses.field(default_factory=list)
    namespaces: dict[bytes, Namespace] = dataclasses.field(default_factory=dict)
    by_namespace: dict[bytes, NamespaceCount] = dataclasses.field(default_factory=dict)
    reachable_pages: int = 0
    stranded_pages: int = 0
    rootless_pages: int = 0  # stored without a record: they never come back after a restart
    twice_pages: int = 0  # in two shards, as a crash leaves them: the next start removes one
    uses: array[int] = dataclasses.field(
        default_factory=lambda: array("q")
    )  # last use in unix ms, stored bytes, ...

    @property
    def faults(self) -> Counter[str]:
        """Bad pages by kind."""
        return Counter(bad.fault.value for shard in self.shards for bad in shard.bad)

    @property
    def pages(self) -> int:
        """Sound ones."""
        return sum(shard.sound_pages for shard in self.shards)

    def ages(self, now_ms: int) -> list[tuple[str, int, int]]:
        """How long ago pages were used last: (how long, pages, stored bytes)."""
        found = [[0, 0] for _ in AGES] + [[0, 0]]
        for used_ms, stored in zip(self.uses[::2], self.uses[1::2], strict=True):
            age_ms = now_ms - used_ms
            at = next((n for n, (_, bound) in enumerate(AGES) if age_ms < bound), len(AGES) - 1)
            row = found[at] if used_ms else found[-1]
            row[0] += 1
            row[1] += stored
        names = [*(name for name, _ in AGES), "unknown"]
        return [(name, pages, stored) for name, (pages, stored) in zip(names, found, strict=True)]

    def problems(self, capacity_bytes: int = 0) -> list[str]:
        """What is wrong, in sentences; empty: nothing."""
        found = [f"{shard.name}: {shard.problem}" for shard in self.shards if shard.problem]
        found += [f"{count} pages: {kind}" for kind, count in sorted(self.faults.items())]
        wrong = sum(shard.undercharged for shard in self.shards)
        if wrong:
            found.append(f"{wrong} pages that take more than they are charged")
        if self.distrust:
            found.append(f"the next start will not keep the contents: {self.distrust}")
        if capacity_bytes and self.disk_bytes > capacity_bytes:
            found.append(f"the folder takes {self.disk_bytes} bytes, more than its {capacity_bytes}")
        return found


# -- the folder


@contextmanager
def hold_folder(path: Path) -> Generator[None, None, None]:
    """Keep sidecars out of a folder, without leaving a trace in it.

    Raises ConfigError for what is no folder of ours, is newer than this version, or is open in another process.
    """
    try:
        if not path.is_dir():
            raise ConfigError(f"DIR: {path} is not a folder")
        read_format(path)
        lock = path / "hicache.lock"
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW) if lock.exists() else -1
    except OSError as exc:
        raise ConfigError(f"DIR: {path} cannot be read: {exc.strerror}") from exc
    try:
        if fd >= 0:
            _take(fd, path)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _take(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = holder_of(fd)
        raise ConfigError(
            f"DIR: {path} is in use by process {holder}",
            hint="stop that sidecar first; `hicache stats` asks it",
        ) from None


def read_format(path: Path) -> int:
    """The folder's format version. Raises ConfigError, OSError."""
    file = path / "FORMAT"
    if not file.exists():
        raise ConfigError(f"DIR: {path} is not a disk folder of hicache's (it holds no FORMAT)")
    try:
        found = json.loads(file.read_bytes())
        version = int(found["version"]) if found["format"] == "hicache-disk" else 0
    except (ValueError, KeyError, TypeError):
        version = 0
    if version < 1:
        raise ConfigError(f"DIR: {file} is unreadable", hint="`hicache serve` would refuse this folder, too")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"DIR: {path} has format version {version}, this hicache reads up to {FORMAT_VERSION}",
            hint="upgrade hicache",
        )
    return version


def disk_use(path: Path) -> int:
    """What ``du`` shows for a folder and everything in it."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in (folder, *(os.path.join(folder, file) for file in files)):  # noqa: PTH118 - of os.walk's strings
            try:
                total += du_bytes(Path(name))
            except FileNotFoundError:
                continue
    return total


def inspect_folder(path: Path, *, bodies: bool, progress: Progress = _silent) -> FolderReport:
    """Read a whole folder. Hold it (``hold_folder``) while this runs; no other threads may run.

    Args:
        path: the folder.
        bodies: decode and verify every page; otherwise headers and rows only.
        progress: told now and then.

    Raises ConfigError, OSError.
    """
    report = FolderReport(str(path), read_format(path), disk_use(path), distrust=distrust(path))
    quarantined = [each for each in (path / QUARANTINE).rglob("*") if each.is_file()]
    report.quarantine_files = len(quarantined)
    report.quarantine_bytes = sum(each.stat().st_size for each in quarantined)
    forest = _Forest()
    for shard in list_shards(path):
        found = ShardReport(shard_name(path, shard), shard.size_class_bytes, shard.map_bytes)
        report.shards.append(found)
        found.problem = precheck(shard.path)
        if not found.problem:
            _read(shard, report, found, forest, progress=progress, bodies=bodies)
    forest.judge(report)
    return report


def shard_name(path: Path, shard: ShardInfo) -> str:
    """What reports call an environment."""
    return "data" if shard.path == path else str(shard.path.relative_to(path))


def _read(
    shard: ShardInfo,
    report: FolderReport,
    found: ShardReport,
    forest: _Forest,
    *,
    bodies: bool,
    progress: Progress,
) -> None:
    known = dict(report.namespaces)

    def work() -> Iterator[ShardHead | Part]:
        return scan(shard, known, bodies=bodies)

    rows, of = 0, 0
    try:
        for told in isolated(work):
            if isinstance(told, ShardHead):
                of = told.entries + told.meta_entries
                found.file_bytes, found.used_bytes = told.file_bytes, told.used_bytes
                found.entries = told.entries
                report.namespaces |= told.namespaces
                continue
            rows += told.rows
            found.add(told)
            forest.add(told)
            report.uses.extend(told.uses)
            for space, count in told.by_namespace.items():
                report.by_namespace.setdefault(space, NamespaceCount()).add(count)
            progress(found.name, rows, of)
    except Crashed as exc:
        found.problem = str(exc)


def distrust(path: Path) -> str:
    """Why a start would not keep the contents, as the folder's STATE has it; empty when it would."""
    if not list_shards(path):
        return ""
    state = read_json(path / "STATE")
    if state.get("clean") is True or state.get("sync") is True or state.get("boot") == boot_id():
        return ""
    return "the machine went down while it was open without sync"


class _Forest:
    """Who is whose parent, over all environments."""

    def __init__(self) -> None:
        self._parents: dict[bytes, tuple[bytes, bytes]] = {}
        self._twice = 0
        self._rootless = 0

    def add(self, part: Part) -> None:
        links = bytes(part.links)
        self._rootless += part.sound - len(links) // _LINK_BYTES
        for at in range(0, len(links), _LINK_BYTES):
            key = links[at : at + KEY_BYTES]
            self._twice += key in self._parents
            parent = links[at + KEY_BYTES : at + 2 * KEY_BYTES]
            self._parents[key] = (parent, links[at + 2 * KEY_BYTES : at + _LINK_BYTES])

    def judge(self, report: FolderReport) -> None:
        """Count who can be reached from a namespace's root."""
        reached: dict[bytes, bool] = {}
        for key in self._parents:
            path = []
            at, good = key, False
            while at in self._parents and at not in reached:
                path.append(at)
                parent, space = self._parents[at]
                good = parent == space
                at = parent
                if good:
                    break
            good = good or reached.get(at, False)
            for passed in path:
                reached[passed] = good
        report.reachable_pages = sum(reached.values())
        report.stranded_pages = len(reached) - report.reachable_pages
        report.twice_pages = self._twice
        report.rootless_pages = self._rootless
