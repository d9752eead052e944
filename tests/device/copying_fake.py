"""The fake device with what a copier asks of it: an engine's streams, quantising kernels, read-only registration.

An engine's stream is another stream of the fake. What waits for a mark does not run before the mark is reached.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from cuda_fake import FakeDriver, Step, _words, alone

from hicache.device import kernels
from hicache.device.driver import DriverError


class CopyFake(FakeDriver):
    def __init__(self, *arguments, read_only=True, **shape):
        super().__init__(*arguments, **shape)
        self.takes_read_only = read_only
        self.engine = self.stream(0)
        self.engines_memory = 0

    @alone
    def register_read_only(self, address, size_bytes):
        if not self.takes_read_only:
            raise DriverError("register", "the device registers no read-only memory")
        self.register(address, size_bytes)

    @alone
    def mark(self, stream):
        made = Mark()
        self._queue(self.engine if stream is None else stream, made)
        return made

    @alone
    def follow(self, stream, mark):
        self._maybe_fail("follow")
        self._queue(stream, Wait(mark))

    fence = mark

    @alone
    def hold(self, stream, fence):
        self._queue(self.engine if stream is None else stream, Wait(fence))

    def _run(self, handle, step):
        if isinstance(step, Mark):
            step.reached = True  # also behind what failed, which later events tell of
        elif isinstance(step, Wait) and not step.mark.reached:
            self.streams[handle].appendleft(step)
        else:
            super()._run(handle, step)

    @alone
    def compute(self, work, stream=None):
        """The engine does something on its stream."""
        self._queue(self.engine if stream is None else stream, Compute(work))

    @alone
    def encode_units(self, stream, move, coding, refused):
        self._maybe_fail("encode_units")
        self._queue(stream, Code(self, move, coding, refused))

    @alone
    def decode_units(self, stream, move, coding):
        self._maybe_fail("decode_units")
        self._queue(stream, Code(self, move, coding, None))

    @alone
    def close(self):
        """All but the engine's own memory must have been given back."""
        theirs = self.memory.pop(self.engines_memory)
        self.run_all()
        super().close()
        self.memory[self.engines_memory] = theirs

    def settle(self, mark):
        """Until a mark of an engine's stream is reached."""
        for _ in range(100_000):
            if mark.reached:
                return
            with self.lock:
                self._advance()
        raise AssertionError("the engine's stream stands still")


class Mark(Step):
    name = "mark"
    reached = False


class Wait(Step):
    name = "wait"

    def __init__(self, mark):
        self.mark = mark

    def run(self, halves):
        pass


class Compute(Step):
    name = "compute"

    def __init__(self, work):
        self.work = work

    def run(self, halves):
        if halves.stop == 2:
            self.work()


class Code(Step):
    name = "code"

    def __init__(self, driver, move, coding, refused):
        self.driver, self.what, self.coding, self.refused = driver, move, coding, refused
        units = move.pages * move.units
        self.touches = [
            (move.planes, 8 * move.plane_count),
            (move.places, 8 * units),
            (move.rows, 8 * move.pages),
        ]
        if refused is not None:
            self.touches.append((refused, 4 * move.pages))

    def run(self, halves):
        move, coding = self.what, self.coding
        assert move.element_bytes == 2
        unit_numbers = move.unit_tokens * move.heads * move.head_size
        numbers = move.units * unit_numbers  # of a plane
        heads, codes = kernels._load("quant").CODECS[coding.codec]
        groups, whole = numbers // 64, coding.page_planes * numbers // 64
        places = _words(move.places, move.pages * move.units).reshape(move.pages, move.units)
        rows, planes = _words(move.rows, move.pages), _words(move.planes, move.plane_count)
        for page in range(move.pages * halves.start // 2, move.pages * halves.stop // 2):
            for plane in range(move.plane_count):
                first = (coding.first_plane + plane) * groups
                parts = self._parts(int(rows[page]), whole, first, groups, heads, codes)
                one = torch.empty((1, groups * (heads + codes)), dtype=torch.uint8)
                found = np.empty((move.units, unit_numbers), np.int16)
                if self.refused is None:
                    one[0] = torch.from_numpy(np.concatenate([part.copy() for part in parts]))
                    back = torch.from_numpy(found).view(1, -1).view(getattr(torch, coding.dtype))
                    kernels.decode_rows(one, coding.codec, back)
                for unit, place in enumerate(places[page].tolist()):
                    if place < 0:
                        assert self.refused is None
                        continue
                    view = self._unit(int(planes[plane]), place)
                    if self.refused is None:
                        view[:] = found[unit].reshape(view.shape)
                    else:
                        found[unit] = view.reshape(-1)
                if self.refused is not None:
                    numbers_of = torch.from_numpy(found).view(1, -1).view(getattr(torch, coding.dtype))
                    said = torch.zeros(1, dtype=torch.int32)
                    kernels.encode_rows(numbers_of, coding.codec, one, said)
                    if said[0]:
                        ctypes.c_int32.from_address(self.refused + 4 * page).value = 1
                    at = 0
                    for part in parts:
                        part[:] = one[0, at : at + part.size].numpy()
                        at += part.size

    def _parts(self, row, whole, first, groups, heads, codes):
        """A plane's parameters and codes in a page's row."""
        if self.coding.codec == "int4-g64":
            spans = [(2 * first, 2 * groups), (2 * whole + 2 * first, 2 * groups)]
        else:
            spans = [(heads * first, heads * groups)]
        spans.append((heads * whole + codes * first, codes * groups))
        if not self.driver._may_touch(row, whole * (heads + codes)):
            self.driver.violations.append("a quantising kernel was given a wrong address")
        return [_bytes(row + start, size) for start, size in spans]

    def _unit(self, plane, place):
        move = self.what
        block, token = divmod(place, move.block_tokens)
        steps = [step * 2 for step in move.strides]
        start = plane + block * steps[0] + token * steps[1]
        shape = (move.unit_tokens, move.heads, move.head_size)
        last = sum((size - 1) * step for size, step in zip(shape, steps[1:], strict=True)) + 2
        if not self.driver._may_touch(start, last):
            self.driver.violations.append("a quantising kernel was given a wrong plane")
        raw = _bytes(start, last).view(np.uint8)
        return np.ndarray(shape, np.int16, raw.data, 0, steps[1:])


def _bytes(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
