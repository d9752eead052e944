"""The real CUDA driver on a CUDA runtime in ordinary memory: calls, errors, units, and what CUDA refuses."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")

import fake_cuda  # noqa: E402

from hicache.device import DeviceOptions, cudart, kernels  # noqa: E402
from hicache.device.cuda import CudaDevice  # noqa: E402
from hicache.device.cuda_driver import CudaDriver  # noqa: E402
from hicache.device.driver import DriverError, Strips, UnitMove  # noqa: E402
from hicache.device.kv import FAILED  # noqa: E402
from hicache.errors import UnsupportedError  # noqa: E402
from hicache.types import Batch, Op, Outcome, TierKind, TierSpec  # noqa: E402


@pytest.fixture
def fake():
    """The library; a test leaves nothing behind in it."""
    library = fake_cuda.fresh()
    before = library.live()
    yield library
    library.drain()
    left, wrong = library.live() - before, library.violations()
    if left:  # the next test is to find none of it
        library.reset()
        library.sweep()
    assert not left
    assert not wrong


@pytest.fixture
def driver(fake):
    fake.configure(delay_us=200)
    made = fake.driver()
    made.bind()
    yield made
    made.close()


class Desk:
    """A stream with an event, and memory that is given back."""

    def __init__(self, driver):
        self.driver, self.stream, self.event = driver, driver.stream(0), driver.event()
        self.device, self.host = [], []

    def on_device(self, array):
        address = self.driver.allocate(array.nbytes)
        self.device.append(address)
        source = self.pinned(array.nbytes)
        source[:] = array.reshape(-1).view(np.uint8)
        self.driver.copy(self.stream, [address], [source.ctypes.data], [array.nbytes])
        self.wait()
        return address

    def pinned(self, size):
        self.host.append(self.driver.allocate_host(size))
        return self.host[-1]

    def read(self, address, size):
        target = self.pinned(size)
        self.driver.copy(self.stream, [target.ctypes.data], [address], [size])
        self.wait()
        return target.copy()

    def wait(self):
        self.driver.record(self.event, self.stream)
        end = time.monotonic() + 20
        while not self.driver.ready(self.event):
            assert time.monotonic() < end, "the stream does not come to its end"

    def close(self):
        for address in self.device:
            self.driver.release(address)
        for memory in self.host:
            self.driver.release_host(memory)


@pytest.fixture
def desk(driver):
    made = Desk(driver)
    yield made
    made.close()


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


# --- copies


def test_copies_run_in_their_streams_order_and_the_event_says_when(desk):
    page = noise(100_000)
    first = desk.on_device(page)
    second = desk.on_device(np.zeros_like(page))
    target = desk.pinned(page.nbytes)
    desk.driver.copy(desk.stream, [second, target.ctypes.data], [first, second], [page.nbytes] * 2)
    desk.wait()
    assert np.array_equal(target, page)


@pytest.mark.parametrize(("version", "arguments"), [(13000, 8), (12080, 9)])
def test_batches_as_either_version_wants_them(fake, version, arguments):
    driver = fake.driver(version=version)
    assert driver.has_batch
    desk = Desk(driver)
    page = noise(60_000)
    source, target = desk.on_device(page), desk.pinned(page.nbytes)
    pieces = np.arange(0, page.nbytes, 1000)
    driver.copy_batch(
        desk.stream, (target.ctypes.data + pieces).tolist(), (source + pieces).tolist(), [1000] * len(pieces)
    )
    driver.copy_batch(desk.stream, [], [], [])
    desk.wait()
    assert np.array_equal(target, page)
    assert fake.calls("cudaMemcpyBatchAsync") == 1
    assert len(driver._cudart._functions["cudaMemcpyBatchAsync"].argtypes) == arguments
    desk.close()
    driver.close()


@pytest.mark.parametrize(("runtime", "installed"), [(12040, 13000), (13000, 12040)])
def test_there_are_batches_where_runtime_and_installed_driver_both_know_them(fake, runtime, installed):
    fake.configure(driver_version=installed)
    driver = fake.driver(version=runtime)
    assert not driver.has_batch
    desk = Desk(driver)
    where = desk.on_device(noise(8))
    with pytest.raises(DriverError, match=r"no such function|not supported in the installed") as caught:
        driver.copy_batch(desk.stream, [where], [where], [8])
    assert not caught.value.fatal
    desk.close()
    driver.close()


def test_strips_and_fills(desk):
    page = noise(4096).reshape(16, 256)
    source, target = desk.on_device(page), desk.pinned(16 * 100)
    desk.driver.copy_strips(desk.stream, Strips(target.ctypes.data, 100, source + 8, 256, 100, 16))
    desk.wait()
    assert np.array_equal(target.reshape(16, 100), page[:, 8:108])
    with pytest.raises(DriverError, match="pitch") as caught:
        desk.driver.copy_strips(desk.stream, Strips(target.ctypes.data, 99, source, 256, 100, 16))
    assert not caught.value.fatal
    desk.driver.fill(desk.stream, source + 1, 7, 4094)
    assert desk.read(source, 4096).tolist() == [page[0, 0], *[7] * 4094, page[-1, -1]]


def test_a_stream_waits_for_a_counter_and_writes_one(desk):
    counters = desk.pinned(64).view(np.int64)
    counters[:] = 0
    at = desk.driver.mapped(counters.ctypes.data)
    target, page = desk.pinned(8), desk.on_device(noise(8, 3))
    desk.driver.wait_value(desk.stream, at, 3)
    desk.driver.copy(desk.stream, [target.ctypes.data], [page], [8])
    desk.driver.write_value(desk.stream, at + 8, 41)
    desk.driver.record(desk.event, desk.stream)
    target[:] = 0
    time.sleep(0.02)
    assert not desk.driver.ready(desk.event)
    assert (counters[1], target.any()) == (0, False)
    counters[0] = 3
    desk.wait()
    assert counters[1] == 41
    assert np.array_equal(target, noise(8, 3))


@pytest.mark.parametrize("value", [1, 40, 2**40])
def test_nobody_waits_for_a_transfer_that_has_failed(desk, value):
    """CUDA compares the difference as a signed number; FAILED is at least every number of layers from 1 on."""
    counter = desk.pinned(8).view(np.uint64)
    counter[0] = FAILED
    desk.driver.wait_value(desk.stream, counter.ctypes.data, value)
    desk.wait()


def test_waiting_for_nothing_is_not_queued_since_a_failed_counter_would_not_end_it(desk, fake):
    counter = desk.pinned(8).view(np.uint64)
    counter[0] = FAILED
    desk.driver.wait_value(desk.stream, counter.ctypes.data, 0)
    desk.wait()
    assert fake.calls("cuStreamWaitValue64_v2") == 0


def test_time_between_events(desk):
    other = desk.driver.event()
    desk.driver.record(other, desk.stream)
    desk.wait()
    assert 0 <= desk.driver.elapsed_ns(other, desk.event) < 20e9


# --- errors


@pytest.mark.parametrize(
    ("code", "fatal"),
    [(1, False), (2, False), (400, False), (801, False), (700, True), (719, True), (999, True)],
)
def test_codes_are_errors_and_some_are_the_end(fake, driver, code, fatal):
    fake.fail("cudaMalloc", code)
    with pytest.raises(DriverError, match=rf"^cudaMalloc: .* \({code}\)$") as caught:
        driver.allocate(100)
    assert caught.value.fatal is fatal
    assert fake.runtime()._library.cudaPeekAtLastError() == 0, "torch would have met the error again"
    driver.release(driver.allocate(100))


def test_a_polled_event_leaves_no_error_behind_for_others(fake, desk):
    gate = desk.pinned(8).view(np.uint64)
    gate[0] = 0
    desk.driver.wait_value(desk.stream, gate.ctypes.data, 1)
    desk.driver.record(desk.event, desk.stream)
    assert not desk.driver.ready(desk.event)
    assert fake.runtime()._library.cudaPeekAtLastError() == 0
    gate[0] = 1
    desk.wait()


def test_an_access_outside_known_memory_is_the_end_of_the_device(fake):
    told = threading.Event()
    spec = TierSpec("device", TierKind.DEVICE, 1 << 21, 1 << 20)
    store = CudaDevice(spec, told.set, DeviceOptions(cuda_staging_bytes=1 << 16), fake.driver())
    store.open_segment(0, "tenant", 1000, 16)
    store._segments[0].address += 1 << 40
    for _ in range(2):
        store.submit(Batch(1, Op.PUT, 1000, slots=[0], buffers=[memoryview(bytes(1000))]))
        assert told.wait(20)
        told.clear()
        [done] = store.poll()
        assert done.outcomes == (Outcome.FAULT,)
        assert "illegal memory access" in done.error
    assert "given up" in store.stats.problem
    store.close()
    fake.reset()  # the device is lost with all that was on it; clean up as the process's end would
    fake.sweep()


def test_no_device_of_that_number(fake):
    with pytest.raises(UnsupportedError, match="CUDA sees 1 devices"):
        fake.driver(1)
    fake.fail("cudaGetDeviceCount", 35)
    with pytest.raises(UnsupportedError, match="CUDA sees 0 devices"):
        fake.driver(0)


def test_two_devices_of_one_thread(fake):
    fake.configure(devices=2)
    drivers = [fake.driver(0), fake.driver(1)]
    assert drivers[0].uuid != drivers[1].uuid
    assert all(len(driver.uuid) == 16 for driver in drivers)
    memory = [driver.allocate(64) for driver in drivers]
    assert [fake.runtime().device_of(address) for address in memory] == [0, 1]
    for driver, address in zip(drivers, memory, strict=True):
        driver.release(address)
        driver.close()


# --- kernels that do not work are not used


class Broken(fake_cuda.TwinLaunches):
    """Kernels that do something else than they should."""

    def __init__(self, fake, runtime, how):
        super().__init__(fake, runtime)
        self.how = how

    def move_rows(self, stream, table, rows, row_bytes, aligned_to):
        if self.how == "raises":
            raise DriverError("move_rows", "PTXASError: no ptxas")
        if self.how == "is lost":
            table += 1 << 40
        super().move_rows(stream, table, rows, row_bytes - 8 * (self.how == "forgets"), aligned_to)

    def hash_rows(self, stream, table, rows, row_bytes, scratch):
        super().hash_rows(stream, table, rows, row_bytes - 8 * (self.how == "miscounts"), scratch)


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "no ptxas"), ("forgets", "arrived changed"), ("miscounts", "hash of a row")]
)
def test_a_device_whose_kernels_do_not_work_copies_without_them(fake, caplog, how, said):
    runtime = fake.runtime()
    driver = CudaDriver(0, Broken(fake, runtime, how), (runtime, fake.api()))
    assert not driver.has_kernels
    assert said in caplog.text
    with pytest.raises(DriverError, match="no kernels"):
        driver.hash_rows(0, 0, 1, 1024, 0)
    driver.close()


def test_a_device_that_is_lost_over_its_kernels_is_not_opened(fake):
    runtime = fake.runtime()
    with pytest.raises(UnsupportedError, match="illegal memory access"):
        CudaDriver(0, Broken(fake, runtime, "is lost"), (runtime, fake.api()))
    fake.reset()
    fake.sweep()


# --- memory


def test_allocations_that_may_be_shared_are_whole_blocks(driver):
    for asked, wanted in ((100, 100), (1 << 20, 2 << 20), ((2 << 20) + 1, 4 << 20)):
        address = driver.allocate(asked)
        assert driver.extent(address + asked - 1) == (address, wanted)
        driver.release(address)


def test_more_than_the_device_has(fake, driver):
    fake.configure(device_bytes=4 << 20)
    held = driver.allocate(2 << 20)
    with pytest.raises(DriverError, match="out of memory") as caught:
        driver.allocate(3 << 20)
    assert not caught.value.fatal
    driver.release(held)


def test_registration_keeps_cudas_rules(fake, driver):
    memory = mmap.mmap(-1, 1 << 16)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    driver.register(start, 1 << 15)
    for address, size in ((start, 1 << 15), (start + 4096, 4096), (start + (1 << 14), 1 << 15)):
        with pytest.raises(DriverError, match="already mapped"):
            driver.register(address, size)
    with pytest.raises(DriverError, match="does not correspond"):
        driver.unregister(start + 4096)
    assert driver.mapped(start + 100) == start + 100
    driver.unregister(start)
    with pytest.raises(DriverError, match="does not correspond"):
        driver.unregister(start)
    fake.configure(register_bytes=4096)
    with pytest.raises(DriverError, match="out of memory"):
        driver.register(start, 1 << 15)


def test_memory_that_may_only_be_read_is_registered_so_where_the_device_can(fake, driver, tmp_path):
    file = tmp_path / "pages"
    file.write_bytes(bytes(8192))
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 8192, prot=mmap.PROT_READ)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    with pytest.raises(DriverError) as caught:
        driver.register(start, 8192)
    assert not caught.value.fatal
    driver.register_read_only(start, 8192)
    driver.unregister(start)
    fake.configure(read_only_supported=0)
    with pytest.raises(DriverError, match="registers no read-only memory"):
        driver.register_read_only(start, 8192)


def test_a_cuda_in_ordinary_memory_is_not_taken_for_cuda(fake):
    """It is loaded here; where a GPU is, the tests of both run in one process."""
    fake.runtime()
    try:
        assert "fake" not in cudart._path()
    except OSError as error:
        assert "no CUDA runtime here" in str(error)


# --- units


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("layout", ["kv-nhd", "block-kv-hnd"])
def test_units_move_as_the_torch_twin_moves_them(desk, layout, pack):
    """Through the driver's call, with the engine's planes and tables on the device and rows in pinned memory."""
    shapes = {"kv-nhd": (2, 6, 4, 2, 8), "block-kv-hnd": (6, 2, 2, 4, 8)}
    layer = torch.from_numpy(noise(np.prod(shapes[layout]) * 2, 5)).view(torch.int16).view(shapes[layout])
    planes = kernels.planes(layer, layout)
    places = torch.tensor([[8, 2], [-1, 20], [14, 0]])
    rows = torch.from_numpy(noise(3 * 4 * 2 * 16 * 2, 6)).view(3, -1)
    at = desk.on_device(layer.numpy())
    host = desk.pinned(rows.numel())
    host[:] = rows.numpy().reshape(-1)
    first = layer.data_ptr()
    table = lambda values: desk.on_device(np.array(values, np.int64))  # noqa: E731
    move = UnitMove(
        planes=table([plane.data_ptr() - first + at for plane in planes]),
        plane_count=2,
        places=table(places.flatten().tolist()),
        rows=table([host.ctypes.data + row * rows.shape[1] for row in range(3)]),
        pages=3,
        units=2,
        unit_tokens=2,
        block_tokens=4,
        heads=2,
        head_size=8,
        element_bytes=2,
        strides=tuple(planes[0].stride()),
        aligned_to=16,
    )
    desk.driver.move_units(desk.stream, move, pack=pack)
    desk.wait()
    (kernels.pack_units if pack else kernels.unpack_units)(planes, places, rows, 4)
    assert np.array_equal(host.reshape(3, -1), rows.numpy())
    assert np.array_equal(desk.read(at, layer.nbytes), layer.numpy().reshape(-1).view(np.uint8))
