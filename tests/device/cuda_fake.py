"""A device of CUDA's shape in ordinary memory that takes its liberties, all of them from one seed.

What is queued runs late: only while somebody asks whether an event is ready, a few steps of any stream at a time; a
ready event may be announced later still. The copies of a batch run in any order. With ``fault_rate`` a queued step, a
call or a registration fails: the step is then done in part or not at all, and the next event of its stream says so.

It checks how it is used, too, and ``violations`` tells: memory given back with copies under way, copies from or to
memory that is not pinned or not the device's. Fresh and returned memory is filled with 0xDB. The device's memory is of
memfds, so that other processes, or other fakes in this one, map it by its handle; mapping what is mapped fails.
``claimed``, where it is given: whether a transfer has a unit at this address of another's memory.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import functools
import mmap
import os
import random
import struct
import threading

import numpy as np
from xxhash import xxh3_64_intdigest

from hicache.device.driver import DriverError


def alone(method):
    """One thread at a time, so that a stream's order is one."""

    @functools.wraps(method)
    def locked(self, *arguments, **named):
        with self.lock:
            return method(self, *arguments, **named)

    return locked


class FakeDriver:
    def __init__(self, seed=0, fault_rate=0.0, *, delays=True, kernels=True, batch=True, piece=1 << 63):
        self.name = f"fake (seed {seed})"
        self.has_kernels, self.has_batch = kernels, batch
        self.lock = threading.RLock()
        self.rng = random.Random(seed)
        self.fault_rate, self.delays, self.registrable = fault_rate, delays, piece
        self.memory: dict[int, np.ndarray] = {}  # the device's and the pinned, by address
        self.registered: dict[int, int] = {}
        self._starts: list[tuple[int, int]] = []  # (start, end) of all that copies may touch
        self.streams: dict[int, collections.deque] = {}
        self.failed: dict[int, bool] = {}
        self.events: dict[int, list] = {}  # handle -> [queries to go or None, time in ns, failed]
        self.now_ns = 0
        self.violations: list[str] = []
        self.calls: collections.Counter[str] = collections.Counter()
        self._next = 1
        self.uuid = (seed % (1 << 32)).to_bytes(16, "big")
        self.fds: dict[int, int] = {}  # of the device's memory, by address
        self.mapped: dict[int, tuple] = {}  # others' memory: address -> (array, what it was mapped by)
        self.claimed = None

    # --- memory

    def bind(self):
        pass

    @alone
    def allocate(self, size_bytes):
        fd = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        memory = np.frombuffer(mmap.mmap(fd, size_bytes), np.uint8)
        memory[:] = 0xDB
        address = memory.ctypes.data
        self.memory[address], self.fds[address] = memory, fd
        self._open(address, size_bytes)
        return address

    @alone
    def allocate_host(self, size_bytes):
        return self._take(size_bytes)

    @alone
    def release(self, address):
        self._give(address)

    @alone
    def release_host(self, memory):
        self._give(memory.ctypes.data)

    @alone
    def register(self, address, size_bytes):
        self._maybe_fail("register")
        if size_bytes > self.registrable:
            raise DriverError("register", "operation not permitted")
        self.registered[address] = size_bytes
        self._open(address, size_bytes)

    @alone
    def unregister(self, address):
        self._close(address, self.registered.pop(address))

    def _take(self, size_bytes):
        raw = np.full(size_bytes + 256, 0xDB, np.uint8)
        memory = raw[-raw.ctypes.data % 256 :][:size_bytes]
        self.memory[memory.ctypes.data] = memory
        self._open(memory.ctypes.data, size_bytes)
        return memory

    def _give(self, address):
        memory = self.memory.pop(address)
        self._close(address, memory.nbytes)
        memory[:] = 0xDB
        if address in self.fds:
            os.close(self.fds.pop(address))

    def _open(self, start, size_bytes):
        bisect.insort(self._starts, (start, start + size_bytes))

    def _close(self, start, size_bytes):
        self._starts.remove((start, start + size_bytes))
        for stream in self.streams.values():
            for step in stream:
                for at, size in step.touches if isinstance(step, Step) else ():
                    if at < start + size_bytes and start < at + size:
                        self.violations.append("memory was given back with copies under way")

    def _may_touch(self, address, size_bytes):
        at = bisect.bisect_right(self._starts, (address, 1 << 63)) - 1
        return at >= 0 and address + size_bytes <= self._starts[at][1]

    # --- memory of other processes

    @alone
    def share(self, address):
        fd = self.fds[address]
        handle = struct.pack("<4q", os.getpid(), fd, os.fstat(fd).st_ino, self.memory[address].nbytes)
        return handle.ljust(64, b"\0")

    @alone
    def open_shared(self, handle):
        self._maybe_fail("open_shared")
        pid, fd, inode, size = struct.unpack_from("<4q", handle)
        if any(os.fstat(own).st_ino == inode for own in self.fds.values()):
            raise DriverError("open_shared", "a handle of this process")
        if any(how == handle for _, how in self.mapped.values()):
            raise DriverError("open_shared", "already mapped")
        try:
            theirs = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError as error:
            raise DriverError("open_shared", f"invalid resource handle: {error}") from error
        try:
            if os.fstat(theirs).st_ino != inode:
                raise DriverError("open_shared", "invalid resource handle")
            return self._map(theirs, size, handle)
        finally:
            os.close(theirs)

    @alone
    def extent(self, address):
        start, end = self._starts[bisect.bisect_right(self._starts, (address, 1 << 63)) - 1]
        return start, end - start

    @alone
    def close_shared(self, address):
        self._unmap(address, by_handle=True)

    @alone
    def open_exported(self, fd, size_bytes):
        self._maybe_fail("open_exported")
        if os.fstat(fd).st_size < size_bytes:
            raise DriverError("open_exported", "invalid argument")
        return self._map(fd, size_bytes, None)

    @alone
    def close_exported(self, address):
        self._unmap(address, by_handle=False)

    def _map(self, fd, size_bytes, how):
        memory = np.frombuffer(mmap.mmap(fd, size_bytes), np.uint8)
        self.mapped[memory.ctypes.data] = (memory, how)
        self._open(memory.ctypes.data, size_bytes)
        return memory.ctypes.data

    def _unmap(self, address, by_handle):
        memory, how = self.mapped.pop(address)
        if (how is not None) != by_handle:
            self.violations.append("memory was unmapped in the wrong way")
        self._close(address, memory.nbytes)

    # --- streams and events

    @alone
    def stream(self, priority):
        handle = self._handle()
        self.streams[handle], self.failed[handle] = collections.deque(), False
        return handle

    @alone
    def event(self):
        handle = self._handle()
        self.events[handle] = [0, 0, False]
        return handle

    @alone
    def record(self, event, stream):
        self.events[event] = [None, 0, False]
        self.streams[stream].append(event)

    @alone
    def ready(self, event):
        self.calls["ready"] += 1
        self._advance()
        state = self.events[event]
        if state[0] is None:
            return False
        if state[0] > 0:
            state[0] -= 1
            return False
        if state[2]:
            raise DriverError("ready", "an illegal memory access was encountered")
        return True

    def elapsed_ns(self, first, second):
        return self.events[second][1] - self.events[first][1]

    def run_all(self):
        """Everything that is queued, now."""
        while any(self.streams.values()):
            self._advance()

    def _advance(self):
        busy = [handle for handle, steps in self.streams.items() if steps]
        if not busy:
            return
        for _ in range(self.rng.randrange(4) if self.delays else 1000):
            handle = self.rng.choice(busy)
            if self.streams[handle]:
                self._run(handle, self.streams[handle].popleft())

    def _run(self, handle, step):
        if not isinstance(step, Step):
            delay = self.rng.randrange(3) if self.delays else 0
            self.events[step] = [delay, self.now_ns, self.failed[handle]]
            self.failed[handle] = False
            return
        if self.failed[handle]:
            return  # after an error nothing runs until somebody has seen it
        for at, size in step.touches:
            if not self._may_touch(at, size):
                self.violations.append(f"a {step.name} of memory that is neither pinned nor the device's")
                return
        self.now_ns += step.cost_ns
        fault = self.fault_rate and self.rng.random() < self.fault_rate
        if fault:
            self.failed[handle] = True
        if not fault or self.rng.random() < 0.5:
            first = not step.begun
            step.begun = True
            half = first and (fault or (self.delays and self.rng.random() < 0.4))
            step.run(slice(0, 1) if half else slice(0, 2) if first else slice(1, 2))
            if half and not fault:
                self.streams[handle].appendleft(
                    step
                )  # the other half comes when the stream's turn comes again

    # --- copies and kernels

    @alone
    def copy(self, stream, targets, sources, sizes):
        self.calls["copy"] += 1
        self._maybe_fail("copy")
        for target, source, size in zip(targets, sources, sizes, strict=True):
            self._queue(stream, Copy("copy", [(target, source, size)]))

    @alone
    def copy_batch(self, stream, targets, sources, sizes):
        assert self.has_batch
        self.calls["batch"] += 1
        self._maybe_fail("copy_batch")
        moves = list(zip(targets, sources, sizes, strict=True))
        self.rng.shuffle(moves)
        self._queue(stream, Copy("batch", moves))

    @alone
    def move_rows(self, stream, table, rows, row_bytes, aligned_to):
        assert self.has_kernels
        self.calls["move_rows"] += 1
        self._maybe_fail("move_rows")
        self._queue(stream, MoveRows(self, table, rows, row_bytes, aligned_to))

    @alone
    def hash_rows(self, stream, table, rows, row_bytes, scratch):
        assert self.has_kernels
        self.calls["hash_rows"] += 1
        self._maybe_fail("hash_rows")
        self._queue(stream, HashRows(self, table, rows, row_bytes, scratch))

    @alone
    def move_units(self, stream, move, *, pack):
        assert self.has_kernels
        self.calls["move_units"] += 1
        self._maybe_fail("move_units")
        self._queue(stream, MoveUnits(self, move, pack))

    @alone
    def copy_strips(self, stream, strips):
        self.calls["strips"] += 1
        self._maybe_fail("copy_strips")
        pitches = (strips.target_pitch, strips.source_pitch)
        if min(pitches) < strips.width_bytes or max(pitches) >= 1 << 31:
            raise DriverError("copy_strips", "invalid argument")
        for start, pitch in zip((strips.target, strips.source), pitches, strict=True):
            if not self._may_touch(start, (strips.count - 1) * pitch + strips.width_bytes):
                self.violations.append("strips that reach from one piece of memory into another")
                return
        at = [
            (strips.target + i * strips.target_pitch, strips.source + i * strips.source_pitch)
            for i in range(strips.count)
        ]
        moves = [(target, source, strips.width_bytes) for target, source in at]
        self.rng.shuffle(moves)
        self._queue(stream, Copy("copy", moves))

    @alone
    def fill(self, stream, address, value, size_bytes):
        self.calls["fill"] += 1
        self._maybe_fail("fill")
        self._queue(stream, Fill(address, value, size_bytes))

    def close(self):
        assert not any(self.streams.values()), "streams were destroyed with work in them"
        if self.memory or self.registered or self.mapped:
            self.violations.append(
                f"{len(self.memory) + len(self.mapped)} pieces of memory were never given back"
            )

    def _queue(self, stream, step):
        self.streams[stream].append(step)

    def _maybe_fail(self, call):
        if self.fault_rate and self.rng.random() < self.fault_rate:
            raise DriverError(call, "unspecified launch failure")

    def _handle(self):
        self._next += 1
        return self._next


class Step:
    """Something queued; ``run`` does its first half, its second, or both."""

    name = ""
    cost_ns = 1000
    touches: tuple = ()
    begun = False

    def run(self, halves):
        raise AssertionError


def move(target, source, size, halves):
    start, end = size * halves.start // 2, size * halves.stop // 2
    ctypes.memmove(target + start, source + start, end - start)


class Copy(Step):
    def __init__(self, name, moves):
        self.name, self.moves = name, moves
        self.touches = [(at, size) for target, source, size in moves for at in (target, source)]
        self.cost_ns = 1000 + sum(size for _, _, size in moves) // (50 if name == "copy" else 55)

    def run(self, halves):
        for target, source, size in self.moves:
            move(target, source, size, halves)


class MoveRows(Step):
    name = "move_rows"

    def __init__(self, driver, table, rows, row_bytes, aligned_to):
        self.driver, self.rows, self.row_bytes, self.aligned_to = driver, rows, row_bytes, aligned_to
        self.table = table
        self.touches = [(table, 16 * rows)]
        self.cost_ns = 3000 + rows * row_bytes // 52

    def run(self, halves):
        addresses = _words(self.table, 2 * self.rows).tolist()
        for target, source in zip(addresses[: self.rows], addresses[self.rows :], strict=True):
            for at in (target, source):
                if not self.driver._may_touch(at, self.row_bytes) or at % self.aligned_to:
                    self.driver.violations.append("a kernel was given a wrong address")
                    return
            move(target, source, self.row_bytes, halves)


class Fill(Step):
    name = "fill"

    def __init__(self, address, value, size_bytes):
        self.value = value
        self.touches = [(address, size_bytes)]

    def run(self, halves):
        [(address, size)] = self.touches
        start, end = size * halves.start // 2, size * halves.stop // 2
        ctypes.memset(address + start, self.value, end - start)


class MoveUnits(Step):
    name = "move_units"

    def __init__(self, driver, move, pack):
        self.driver, self.what, self.pack = driver, move, pack
        units = move.pages * move.units
        self.touches = [
            (move.planes, 8 * move.plane_count),
            (move.places, 8 * units),
            (move.rows, 8 * move.pages),
        ]
        self.unit_bytes = move.unit_tokens * move.heads * move.head_size * move.element_bytes
        self.cost_ns = 3000 + units * move.plane_count * self.unit_bytes // 45

    def run(self, halves):
        what = self.what
        planes, rows = _words(what.planes, what.plane_count).tolist(), _words(what.rows, what.pages).tolist()
        places = _words(what.places, what.pages * what.units).tolist()
        if any(at % what.aligned_to for at in (*planes, *rows)) or what.aligned_to % what.element_bytes:
            self.driver.violations.append("a kernel was given addresses that are not aligned")
            return
        every = [(p, u) for p in range(what.plane_count) for u in range(len(places)) if places[u] >= 0]
        for plane, unit in every[len(every) * halves.start // 2 : len(every) * halves.stop // 2]:
            block, token = divmod(places[unit], what.block_tokens)
            engine = planes[plane] + (block * what.strides[0] + token * what.strides[1]) * what.element_bytes
            row = rows[unit // what.units] + (plane * what.units + unit % what.units) * self.unit_bytes
            self._move(engine, row)

    def _move(self, engine, row):
        what, driver = self.what, self.driver
        sizes = (what.unit_tokens, what.heads, what.head_size)
        strides = tuple(stride * what.element_bytes for stride in what.strides[1:])
        span = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + what.element_bytes
        if not driver._may_touch(engine, span) or not driver._may_touch(row, self.unit_bytes):
            driver.violations.append("units that are neither pinned nor the device's")
            return
        if driver.claimed is not None and not driver.claimed(engine):
            driver.violations.append("an engine's memory was touched for no transfer")
        raw = (ctypes.c_char * span).from_address(engine)
        unit = np.ndarray(sizes, f"V{what.element_bytes}", raw, strides=strides)
        page = np.ndarray(
            sizes, f"V{what.element_bytes}", (ctypes.c_char * self.unit_bytes).from_address(row)
        )
        if self.pack:
            page[...] = unit
        else:
            unit[...] = page


class HashRows(Step):
    name = "hash_rows"

    def __init__(self, driver, table, rows, row_bytes, scratch):
        self.driver, self.table, self.rows, self.row_bytes = driver, table, rows, row_bytes
        self.touches = [(table, 16 * rows), (scratch, rows * ((row_bytes - 1) // 1024 + 1) * 64)]

    def run(self, halves):
        table = _words(self.table, 2 * self.rows)
        for row in range(self.rows * halves.start // 2, self.rows * halves.stop // 2):
            data = (ctypes.c_char * self.row_bytes).from_address(int(table[row]))
            table[self.rows + row] = np.uint64(xxh3_64_intdigest(data)).astype(np.int64)


def _words(address, count):
    return (
        np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(address))
        if count
        else np.empty(0, np.int64)
    )
