"""An engine in a process of its own on a real GPU. Run by tests; obeys lines of its input, as fake_engine.py does."""

from __future__ import annotations

import json
import sys

import numpy as np

from hicache.device.cuda_driver import CudaDriver
from hicache.device.cuda_export import CudaExporter


class Engine:
    def __init__(self) -> None:
        self.driver, self.exporter = CudaDriver(0), CudaExporter(0)
        self.driver.bind()
        self.stream, self.event = self.driver.stream(0), self.driver.event()

    def cache(self, size: int) -> dict:
        """Memory of cudaMalloc full of a pattern, and its handle; asked for by an address in its middle."""
        self.at, self.pinned = self.driver.allocate(size), self.driver.allocate_host(size)
        self.pinned[:] = np.arange(size) % 251
        self._copy(self.at, self.pinned.ctypes.data, size)
        base, whole = self.exporter.allocation(self.at + size // 2)
        return {"offset": self.at - base, "size": whole, "handle": self.exporter.handle(base).hex()}

    def ask(self, offset: int) -> dict:
        """A byte of the cache, as this process sees it."""
        self._copy(self.pinned.ctypes.data, self.at + offset, 1)
        return {"byte": int(self.pinned[0])}

    def _copy(self, target: int, source: int, size: int) -> None:
        self.driver.copy(self.stream, [target], [source], [size])
        self.driver.record(self.event, self.stream)
        while not self.driver.ready(self.event):
            pass


def main() -> None:
    engine = Engine()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(engine, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
