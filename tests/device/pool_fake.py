"""The fake device with what the pool needs: memory that is filled and shared, a death, a silence."""

from __future__ import annotations

import ctypes

from cuda_fake import FakeDriver, Step, alone

from hicache.device.driver import DriverError


class PoolDriver(FakeDriver):
    """``host``: the driver with which host memory is registered, where that is another.

    ``die``: every call fails from then on. ``hush``: nothing that is queued runs any more, and no call fails.
    """

    def __init__(self, seed=0, fault_rate=0.0, *, host=None, **shape):
        self.dead = self.silent = False
        self._fault_rate = 0.0
        super().__init__(seed, fault_rate, **shape)
        self.host = host or self
        self.uuid = seed.to_bytes(16, "big")
        self.handles: list[int] = []

    @property
    def fault_rate(self):
        return 1.0 if self.dead else self._fault_rate

    @fault_rate.setter
    def fault_rate(self, rate):
        self._fault_rate = rate

    @alone
    def die(self):
        self.dead = True
        for steps in self.streams.values():
            steps.clear()

    @alone
    def hush(self):
        self.silent = True

    @alone
    def speak(self):
        """What was queued before the silence runs after all."""
        self.silent = False
        self.run_all()

    @alone
    def fill(self, stream, address, value, size_bytes):
        self.calls["fill"] += 1
        self._maybe_fail("fill")
        self._queue(stream, Fill(address, value, size_bytes))

    @alone
    def share(self, address):
        assert address in self.memory, "memory that was given back is shared"
        self.handles.append(address)
        return address.to_bytes(64, "little")

    def seen(self, handle):
        """What another process sees through a handle."""
        return self.memory[int.from_bytes(handle, "little")]

    @alone
    def record(self, event, stream):
        self._check()
        super().record(event, stream)

    @alone
    def ready(self, event):
        self._check()
        return super().ready(event)

    @alone
    def allocate(self, size_bytes):
        self._check()
        return super().allocate(size_bytes)

    def close(self):
        assert not self.silent, "a silent device was asked to end"
        super().close()

    def _check(self):
        if self.dead:
            raise DriverError("any", "the GPU has fallen off the bus", fatal=True)

    def _maybe_fail(self, call):
        self._check()
        super()._maybe_fail(call)

    def _advance(self):
        if not self.silent:
            super()._advance()

    def _may_touch(self, address, size_bytes):
        return super()._may_touch(address, size_bytes) or (
            self.host is not self and self.host._may_touch(address, size_bytes)
        )


class Fill(Step):
    name = "fill"

    def __init__(self, address, value, size_bytes):
        self.value = value
        self.touches = [(address, size_bytes)]

    def run(self, halves):
        [(address, size)] = self.touches
        start, end = size * halves.start // 2, size * halves.stop // 2
        ctypes.memset(address + start, self.value, end - start)
