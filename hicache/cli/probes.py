"""What ``hicache doctor`` looks at: facts about this machine, gathered without judging them.

Everything that can hang or crash (torch, CUDA, LMDB on an odd file system) is tried in a child process with a
time limit. Files of the kernel are read below a root that tests replace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from hicache.sealed import SealedMemory

PROBE_TIMEOUT_S = 60

LMDB_PROBE = """
import json, lmdb, sys
with lmdb.open(sys.argv[1], map_size=1 << 20, writemap=False) as env:
    with env.begin(write=True) as write:
        write.put(b"key", b"value")
    env.sync(True)
    with env.begin() as read:
        assert read.get(b"key") == b"value"
print(json.dumps({"version": lmdb.__version__, "library": ".".join(map(str, lmdb.version()))}))
"""

TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"version": torch.__version__, "gpus": names, "built_for": torch.version.cuda or ""}))
"""

PROTOBUF_PROBE = """
import json
import hicache.rpc.pb
from hicache.rpc.pb import admin_pb2_grpc, cache_pb2_grpc, region_pb2_grpc, session_pb2_grpc
print(json.dumps({"loads": True}))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """What a child process found: its answer, or why there is none."""

    found: dict[str, object]
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """A directory's file system. ``free_bytes`` -1: cannot be known."""

    path: str
    kind: str
    free_bytes: int
    writable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What there is. Zero or empty: not known."""

    python: str
    system: str
    kernel: tuple[int, int]
    cpus: int
    optimised: bool  # python -O
    memory_total_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int  # of the control group; 0: none
    memlock_bytes: int  # -1: no limit
    open_files: int
    shm_bytes: int  # size of /dev/shm
    sealing_problem: str
    shmem_huge_pages: str
    disk: Disk | None
    lmdb: Probe
    torch: Probe
    protobuf: Probe
    versions: dict[str, str]


def gather(disk_path: str, root: Path = Path("/")) -> Facts:
    """Look at everything. Takes a few seconds, mostly torch's import."""
    memory = read_meminfo(root / "proc/meminfo")
    return Facts(
        python=platform.python_version(),
        system=platform.system(),
        kernel=kernel_version(platform.release()),
        cpus=len(os.sched_getaffinity(0)),
        optimised=not __debug__,
        memory_total_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0),
        memory_limit_bytes=read_number(root / "sys/fs/cgroup/memory.max"),
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_bytes=size_of(root / "dev/shm"),
        sealing_problem=try_sealing(),
        shmem_huge_pages=read_choice(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        disk=look_at_disk(disk_path, root / "proc/self/mountinfo") if disk_path else None,
        lmdb=probe_lmdb(disk_path),
        torch=run_probe(TORCH_PROBE) if has_module("torch") else Probe({}, "not installed"),
        protobuf=run_probe(PROTOBUF_PROBE),
        versions=package_versions(),
    )


def kernel_version(release: str) -> tuple[int, int]:
    """``6.1.0-23-amd64`` as (6, 1); (0, 0) when it cannot be read."""
    parts = release.split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].split("-")[0].isdecimal()):
        return (0, 0)
    return (int(parts[0]), int(parts[1].split("-")[0]))


def read_meminfo(path: Path) -> dict[str, int]:
    """Bytes by name."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdecimal():
                found[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return found


def read_number(path: Path) -> int:
    """The number in a file; 0 where there is none (no such file, ``max``)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0


def read_choice(path: Path) -> str:
    """The chosen word of a kernel file such as ``always [advise] never``; empty where there is none."""
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def size_of(path: Path) -> int:
    """Size of the file system at ``path`` in bytes; 0 where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def try_sealing() -> str:
    """Make a sealed memfd as the host tier does. Returns the problem; empty: it works."""
    try:
        memory = SealedMemory("hicache-doctor", mmap.PAGESIZE)
    except (OSError, AttributeError) as error:
        return f"memfd_create, F_ADD_SEALS: {error}"
    memory.mapped[0] = 1
    memory.close()
    return ""


def look_at_disk(disk_path: str, mountinfo: Path) -> Disk:
    """The file system that holds ``disk_path`` (or its nearest parent that exists)."""
    place = Path(disk_path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
        free = found.f_bavail * found.f_frsize
    except OSError:
        free = -1
    return Disk(str(place), file_system(place, mountinfo), free, os.access(place, os.W_OK | os.X_OK))


def file_system(place: Path, mountinfo: Path) -> str:
    """Kind of the file system mounted closest above ``place``; empty when it cannot be known."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        resolved = place.resolve()
        for line in mountinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            left, _, right = line.partition(" - ")
            fields, target = left.split(), right.split()
            if len(fields) < 5 or not target:
                continue
            mount = fields[4].replace("\\040", " ")
            if resolved.is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, target[0]
    return kind


def probe_lmdb(disk_path: str) -> Probe:
    """Open, write, sync and read an LMDB environment where the disk tier would stand."""
    place = Path(disk_path).absolute() if disk_path else Path(tempfile.gettempdir())
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix="hicache-doctor-", dir=place) as folder:
            return run_probe(LMDB_PROBE, folder)
    except OSError as error:
        return Probe({}, f"{place}: {error.strerror}")


def run_probe(program: str, *arguments: str) -> Probe:
    """Run a small program in a child; it prints one JSON object."""
    command = [sys.executable, "-c", program, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - our own programs
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe({}, f"no answer within {PROBE_TIMEOUT_S} s")
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    if done.returncode:
        return Probe({}, lines[-1] or f"ended with {done.returncode}")
    found: dict[str, object] = json.loads(lines[-1])
    return Probe(found)


def has_module(name: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def package_versions() -> dict[str, str]:
    """Versions of the packages that hicache stands on; absent packages are left out."""
    names = ("hicache", "grpcio", "protobuf", "numpy", "lmdb", "zstandard", "xxhash", "prometheus-client")
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
