"""Memory of another process through the real driver: handles, descriptors, and processes that are gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device room needs torch")

import fake_cuda
from test_cudart import Desk, driver, fake  # noqa: F401

from hicache.device.cuda_export import CudaExporter
from hicache.device.driver import DriverError
from hicache.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[2]
GRANULE = 2 << 20


class Engine:
    """``fake_engine.py``, or ``gpu_engine.py``, told what to do."""

    def __init__(self, script: str = "fake_engine.py") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def __call__(self, *words) -> dict:
        print(json.dumps(words), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def shared_engine():
    fake_cuda.build()  # skips here where it cannot
    made = Engine()
    yield made
    made.kill()


@pytest.fixture
def desk(driver):  # noqa: F811
    made = Desk(driver)
    yield made
    made.close()


def test_another_processs_memory_is_read_and_written_by_its_handle(shared_engine, desk):
    told = shared_engine("cache", 3 << 20)
    assert (told["size"], told["offset"]) == (4 << 20, 0)
    handle = bytes.fromhex(told["handle"])
    at = desk.driver.open_shared(handle)
    assert desk.driver.open_shared(handle) == at, "an allocation is mapped once"
    assert desk.driver.extent(at + 100) == (at, 4 << 20)
    assert np.array_equal(desk.read(at + 1000, 5000), np.arange(1000, 6000) % 251)
    desk.driver.fill(desk.stream, at + 7, 200, 1)
    desk.wait()
    assert shared_engine("ask", 7) == {"byte": 200}
    desk.driver.close_shared(at)
    assert desk.read(at, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 200], "it was opened twice"
    desk.driver.close_shared(at)
    with pytest.raises(DriverError, match="invalid argument"):
        desk.driver.close_shared(at)


def test_a_process_that_died_leaves_its_mapping_whole_until_it_is_closed(desk):
    engine = Engine()
    handle = bytes.fromhex(engine("cache", 4096)["handle"])
    at = desk.driver.open_shared(handle)
    engine.kill()
    assert np.array_equal(desk.read(at, 4096), np.arange(4096) % 251)
    desk.driver.close_shared(at)
    with pytest.raises(DriverError, match="invalid resource handle") as caught:
        desk.driver.open_shared(handle)
    assert not caught.value.fatal


@pytest.mark.parametrize("handle", [b"", bytes(63), bytes(64), b"\xff" * 64])
def test_what_is_no_handle_is_refused_and_costs_nothing_else(desk, handle):
    with pytest.raises(DriverError) as caught:
        desk.driver.open_shared(handle)
    assert not caught.value.fatal


def test_a_handle_of_this_process_is_refused_and_costs_nothing_else(desk):
    at = desk.on_device(np.zeros(10, np.uint8))
    with pytest.raises(DriverError, match="invalid device context") as caught:
        desk.driver.open_shared(desk.driver.share(at))
    assert not caught.value.fatal


def test_host_memory_has_no_handle(desk):
    with pytest.raises(DriverError, match="cudaIpcGetMemHandle"):
        desk.driver.share(desk.pinned(100).ctypes.data)


# --- by descriptor


def receive(path, found) -> threading.Thread:
    """A thread that takes one descriptor at a socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def take() -> None:
        line, _ = listener.accept()
        with line, listener:
            found.extend(socket.recv_fds(line, 1, 1)[1])

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return thread


def test_memory_is_mapped_by_its_descriptor(shared_engine, desk, tmp_path):
    found: list[int] = []
    thread = receive(tmp_path / "fds", found)
    assert shared_engine("vmm", 2 * GRANULE, 1, str(tmp_path / "fds")) == {"size": 2 * GRANULE}
    thread.join(20)
    [fd] = found
    for size in (0, GRANULE - 4096, 3 * GRANULE):
        with pytest.raises(DriverError) as caught:
            desk.driver.open_exported(fd, size)
        assert not caught.value.fatal
    at = desk.driver.open_exported(fd, 2 * GRANULE)
    os.close(fd)
    assert desk.driver.extent(at) == (at, 2 * GRANULE)
    assert np.array_equal(desk.read(at + GRANULE, 5000), np.arange(GRANULE, GRANULE + 5000) % 251)
    desk.driver.fill(desk.stream, at + 9, 201, 1)
    desk.wait()
    assert shared_engine("ask", 9) == {"byte": 201}
    desk.driver.close_exported(at)
    with pytest.raises(DriverError, match="no memory was imported"):
        desk.driver.close_exported(at)


@pytest.mark.parametrize("step", ["cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"])
def test_an_import_that_fails_half_way_leaves_nothing(desk, fake, step):  # noqa: F811
    before, fd = fake.live(), os.memfd_create("test")
    os.ftruncate(fd, GRANULE)
    fake.fail(step, 2)
    with pytest.raises(DriverError, match=step):
        desk.driver.open_exported(fd, GRANULE)
    os.close(fd)
    assert fake.live() == before


def test_memory_made_without_a_wish_to_export_has_no_descriptor(shared_engine, tmp_path):
    told = shared_engine("vmm", GRANULE, 0, str(tmp_path / "fds"))
    assert "cuMemExportToShareableHandle: operation not permitted" in told["error"]


def test_memory_of_cudamalloc_has_no_descriptor(fake, desk):  # noqa: F811
    at = desk.on_device(np.zeros(10, np.uint8))
    with pytest.raises(DriverError, match="cuMemRetainAllocationHandle"):
        CudaExporter(0, (fake.runtime(), fake.api())).descriptor(at)


def test_the_exporter_leaves_the_threads_device_as_it_was(fake):  # noqa: F811
    fake.configure(devices=2)
    runtime = fake.runtime()
    driver = fake.driver(1)  # noqa: F811
    at = driver.allocate(64)
    runtime.use(0)
    exporter = CudaExporter(1, (runtime, fake.api()))
    assert exporter.allocation(at) == (at, 64)
    assert len(exporter.handle(at)) == 64
    assert runtime.device == 0
    assert exporter.device_uuid() == driver.uuid
    driver.release(at)
    driver.close()


def test_where_there_is_no_cuda_the_exporter_says_so(monkeypatch):
    from hicache.device import cuda_export

    def none(*_):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_export, "CudaApi", none)
    with pytest.raises(UnsupportedError, match="cannot be reached"):
        CudaExporter(0)
