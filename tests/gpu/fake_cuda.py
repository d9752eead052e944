"""The CUDA driver and runtime in ordinary memory (``fake_cudart/*.c``): built when first used, loaded, and driven.

The files have names of their own, so that a process with a real CUDA beside it takes neither for the other; links have
CUDA's names, so that a process that finds them by LD_LIBRARY_PATH takes them for CUDA.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from hicache.device import kernels
from hicache.device.cuda_api import CudaApi
from hicache.device.cuda_driver import CudaDriver
from hicache.device.cudart import Cudart

SOURCES = Path(__file__).parent / "fake_cudart"
ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = {version: f"libfakecudart-{version}.so" for version in (13000, 12080, 12040)}
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")
KINDS = ("streams", "device", "host", "registered", "opened", "mapped", "events")


@functools.cache
def build() -> Path:
    """The folder of the libraries; the test is skipped where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the CUDA runtime in ordinary memory cannot be built")
    sources = sorted(SOURCES.glob("*.[ch]"))
    mark = hashlib.sha256(b"".join(source.read_bytes() for source in (*sources, Path(__file__)))).hexdigest()[
        :16
    ]
    folder = _cache() / f"fake-cuda-{mark}"
    if folder.is_dir():
        return folder
    making = Path(tempfile.mkdtemp(dir=folder.parent))
    core = making / "libfakecuda.so"
    files = [str(SOURCES / name) for name in ("memory.c", "streams.c", "driver.c")]
    _compile([compiler, *FLAGS, "-Wl,-soname,libfakecuda.so", *files, "-o", str(core)])
    (making / "libcuda.so.1").symlink_to(core.name)
    for version, name in RUNTIMES.items():
        more = [f"-DVERSION={version}", f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN"]
        _compile([compiler, *FLAGS, *more, str(SOURCES / "runtime.c"), str(core), "-o", str(making / name)])
    (making / "libcudart.so.13").symlink_to(RUNTIMES[13000])
    try:
        making.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return folder


def _cache() -> Path:
    """Where ``make clean`` finds it; elsewhere in a checkout that may not be written."""
    folder = ROOT / "build"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


class FakeCuda:
    """The library in this process. One for all: ``fresh`` gives it as a new process would find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.core = ctypes.CDLL(str(folder / "libfakecuda.so"))
        self.core.fake_violations.restype = ctypes.c_char_p
        self.core.fake_configure.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self.core.fake_may_touch.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.core.fake_may_touch.restype = ctypes.c_bool

    def runtime(self, version: int = 13000) -> Cudart:
        return Cudart(str(self.folder / RUNTIMES[version]))

    def api(self) -> CudaApi:
        return CudaApi(str(self.folder / "libfakecuda.so"))

    def driver(self, index: int = 0, version: int = 13000, *, kernels: bool = True) -> CudaDriver:
        """The real driver on this library; kernels are run by the stream's own thread."""
        runtime = self.runtime(version)
        driver = CudaDriver(index, TwinLaunches(self, runtime), (runtime, self.api()))
        driver.has_kernels = kernels
        return driver

    def configure(self, **settings: int) -> None:
        for name, value in settings.items():
            assert not self.core.fake_configure(name.encode(), value), name

    def fail(self, call: str, code: int, after: int = 0) -> None:
        """The call fails once, after so many that go well; "async": the next thing that any stream does."""
        self.core.fake_fail(call.encode(), code, after)

    def calls(self, call: str) -> int:
        return int(self.core.fake_calls(call.encode()))

    def live(self) -> collections.Counter[str]:
        """What was made and not given back, by kind."""
        counts = (ctypes.c_int * len(KINDS))()
        self.core.fake_live(counts)
        found = collections.Counter(dict(zip(KINDS, counts, strict=True)))
        found["vmm"] = self.core.fake_vmm_live()
        return +found

    def violations(self) -> str:
        """The last thing that was done wrong; empty where nothing was."""
        count = ctypes.c_int()
        last = self.core.fake_violations(ctypes.byref(count)).decode()
        return last if count.value else ""

    def drain(self) -> None:
        self.core.fake_drain()

    def sweep(self) -> None:
        """Give back what a lost device has left, as the end of the process would."""
        self.core.fake_sweep()

    def reset(self) -> None:
        self.core.fake_reset()


@functools.cache
def library() -> FakeCuda:
    return FakeCuda(build())


def fresh() -> FakeCuda:
    found = library()
    found.reset()
    return found


class TwinLaunches:
    """The kernels as plain loops, queued on the stream as host functions. Checks addresses as a GPU would."""

    def __init__(self, fake: FakeCuda, runtime: Cudart) -> None:
        self.fake, self._runtime = fake, runtime
        self._launch = runtime._library.cudaLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._tasks: dict[int, object] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._run)

    def _queue(self, stream, task):
        number = next(self._numbers)
        self._tasks[number] = task
        code = self._launch(stream, ctypes.cast(self._entry, ctypes.c_void_p), number)
        if code:
            self._tasks.pop(number)
            raise self._runtime.error("cudaLaunchHostFunc", code)

    def _run(self, number):
        with self._lock:
            self._tasks.pop(number)()

    def touches(self, *pieces):
        """Whether memory may be touched; the device is lost where it may not."""
        if all(self.fake.core.fake_may_touch(int(address), size) for address, size in pieces):
            return True
        self.fake.core.fake_lose(700)
        return False

    def move_rows(self, stream, table, rows, row_bytes, aligned_to):
        def run():
            if not self.touches((table, 16 * rows)):
                return
            found = words(table, 2 * rows).tolist()
            for target, source in zip(found[:rows], found[rows:], strict=True):
                assert not target % aligned_to
                assert not source % aligned_to
                if not self.touches((target, row_bytes), (source, row_bytes)):
                    return
                ctypes.memmove(target, source, row_bytes)

        self._queue(stream, run)

    def hash_rows(self, stream, table, rows, row_bytes, scratch):
        def run():
            if not self.touches((table, 16 * rows), (scratch, kernels.hash_scratch_bytes(rows, row_bytes))):
                return
            found = words(table, 2 * rows)
            for row in range(rows):
                if not self.touches((found[row], row_bytes)):
                    return
                data = (ctypes.c_char * row_bytes).from_address(int(found[row]))
                found[rows + row] = np.uint64(xxh3_64_intdigest(data)).astype(np.int64)

        self._queue(stream, run)

    def move_units(self, stream, move, *, pack):
        def run():
            places = words(move.places, move.pages * move.units).reshape(move.pages, move.units)
            for page, unit, plane in itertools.product(
                range(move.pages), range(move.units), range(move.plane_count)
            ):
                place = int(places[page, unit])
                if place >= 0 and not self._move_unit(move, (page, unit, plane), place, pack=pack):
                    return

        self._queue(stream, run)

    def _move_unit(self, move, where, place, *, pack):
        page, unit, plane = where
        width, (block, token, head, number) = move.element_bytes, move.strides
        start = (place // move.block_tokens) * block + (place % move.block_tokens) * token
        engine = int(words(move.planes, move.plane_count)[plane]) + start * width
        size = move.unit_tokens * move.heads * move.head_size * width
        row = int(words(move.rows, move.pages)[page]) + (plane * move.units + unit) * size
        if not self.touches((row, size)):
            return False
        for at, (t, h, d) in enumerate(np.ndindex(move.unit_tokens, move.heads, move.head_size)):
            ends = row + at * width, engine + (t * token + h * head + d * number) * width
            if not self.touches((ends[1], width)):
                return False
            ctypes.memmove(*(ends if pack else ends[::-1]), width)
        return True


def words(address, count):
    return (
        np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(address))
        if count
        else np.empty(0, np.int64)
    )
