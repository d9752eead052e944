"""An engine in a process of its own, on the CUDA runtime in ordinary memory. Run by tests; obeys lines of its input.

python tests/gpu/fake_engine.py      answers each line with one line of JSON
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fake_cuda
import numpy as np

from hicache.device.cuda_abi import AllocationProp, MemLocation
from hicache.device.cuda_export import CudaExporter
from hicache.device.driver import DriverError


class Engine:
    def __init__(self) -> None:
        self.fake = fake_cuda.fresh()
        self.driver = self.fake.driver()
        self.exporter = CudaExporter(0, (self.fake.runtime(), self.fake.api()))

    def cache(self, size: int) -> dict:
        """Memory of cudaMalloc full of a pattern, and its handle; asked for by an address in its middle."""
        self.at = self.driver.allocate(size)
        self.size = size
        pattern(self.at, size)
        base, whole = self.exporter.allocation(self.at + size // 2)
        return {"offset": self.at - base, "size": whole, "handle": self.exporter.handle(base).hex()}

    def vmm(self, size: int, exportable: int, path: str) -> dict:
        """Memory of cuMemCreate; its descriptor goes over the socket at ``path``."""
        core = self.fake.core
        prop = AllocationProp(type=1, requestedHandleTypes=exportable, location=MemLocation(1, 0))
        handle = ctypes.c_uint64()
        assert not core.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(prop), 0)
        api = self.fake.api()
        at = api._map(handle.value, size, MemLocation(1, 0))
        api.call("cuMemRelease", handle.value)
        self.at, self.size = at, size
        pattern(at, size)
        try:
            fd = self.exporter.descriptor(self.exporter.allocation(at + 5)[0])
        except DriverError as error:
            return {"error": str(error)}
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(path)
            socket.send_fds(line, [b"x"], [fd])
        os.close(fd)
        return {"size": self.exporter.allocation(at)[1]}

    def ask(self, offset: int) -> dict:
        """A byte of the cache, as this process sees it."""
        return {"byte": ctypes.c_uint8.from_address(self.at + offset).value}


def pattern(address: int, size: int) -> None:
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    memory[:] = np.arange(size) % 251


def main() -> None:
    engine = Engine()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(engine, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
