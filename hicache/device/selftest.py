"""Do the kernels do on this device what they should? Asked when it is opened, before a page is trusted to them.

It also compiles, or takes from Triton's cache, what nearly all pages need, so that no lane waits for that later.
"""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import xxhash

from hicache.device import kernels
from hicache.device.driver import Driver, DriverError

#: Long enough for the kernels that large pages take.
ROW_BYTES = 64 << 10
_POLL_S, _POLLS = 1e-3, 20_000


def problem(driver: Driver) -> str:
    """Why the kernels must not be used; empty where they moved and hashed a row as they should.

    Raises DriverError where the device is lost over it.
    """
    stream, event = driver.stream(0), driver.event()
    host = driver.allocate_host(2 * ROW_BYTES + 64)
    device = driver.allocate(ROW_BYTES + 64)
    scratch = driver.allocate(kernels.hash_scratch_bytes(1, ROW_BYTES))
    source, target, tail = host[:ROW_BYTES], host[ROW_BYTES : 2 * ROW_BYTES], host[2 * ROW_BYTES :]
    source[:], target[:] = np.random.default_rng(0).integers(0, 256, ROW_BYTES, np.uint8), 0
    words = tail.view(np.int64)
    words[:3] = device, source.ctypes.data, device  # to, from; what is hashed, and behind it the hash
    table = device + ROW_BYTES
    try:
        driver.copy(stream, [table], [tail.ctypes.data], [64])
        driver.move_rows(stream, table, 1, ROW_BYTES, 16)
        driver.hash_rows(stream, table + 16, 1, ROW_BYTES, scratch)
        driver.copy(stream, [target.ctypes.data, tail.ctypes.data], [device, table], [ROW_BYTES, 64])
        _wait(driver, event, stream)
        if not np.array_equal(source, target):
            return "a row arrived changed"
        wanted = xxhash.xxh3_64_intdigest(source.data)
        return "" if int(words[3]) % (1 << 64) == wanted else "the hash of a row is wrong"
    except DriverError as error:
        if error.fatal:
            raise
        _wait(driver, event, stream)
        return str(error)
    finally:
        with contextlib.suppress(DriverError):  # a device that was lost has taken them with it
            driver.release_host(host)
            driver.release(device)
            driver.release(scratch)


def _wait(driver: Driver, event: int, stream: int) -> None:
    driver.record(event, stream)
    pause = threading.Event()
    for _ in range(_POLLS):
        if driver.ready(event):
            return
        pause.wait(_POLL_S)
    raise DriverError("selftest", "the device did not answer in 20 s", fatal=True)
