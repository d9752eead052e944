"""Engines' KV for tests of transfers: planes in memfds, counters, and the twin that says what must come out."""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os

import numpy as np
import torch
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from hicache.device import kernels
from hicache.device.kv import MemoryKind, PagedKv, SharedMemory

PAD = 64  # bytes between planes, which nobody may touch
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Count:
    """A counter that remembers what it was set to."""

    def __init__(self, value=0):
        self.value, self.seen = value, []

    def get(self):
        return self.value

    def set(self, value):
        assert not self.seen or value >= self.seen[-1], f"{self.seen} then {value}"
        self.seen.append(value)
        self.value = value


def sealed(size_bytes, seals=fcntl.F_SEAL_SHRINK):
    fd = os.memfd_create("engine", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@dataclasses.dataclass(frozen=True)
class Form:
    """What an engine's KV is like."""

    layers: int = 2
    per_layer: int = 2
    blocks: int = 6
    block_tokens: int = 4
    heads: int = 2
    dim: int = 8
    width: int = 2
    order: tuple[int, ...] = (
        0,
        1,
        2,
        3,
    )  # the axes from the outermost to the innermost, as they lie in memory
    gap: int = 0  # elements left free behind every innermost run
    memories: int = 1
    page_offset: int = 0

    @property
    def sizes(self):
        return (self.blocks, self.block_tokens, self.heads, self.dim)

    @property
    def strides(self):
        found, step = [0] * 4, 1
        for number, axis in enumerate(reversed(self.order)):
            found[axis] = step
            step *= self.sizes[axis]
            if not number:
                step += self.gap
        return tuple(found)

    @property
    def span_bytes(self):
        return (sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True)) + 1) * self.width

    def places(self, rng, pages, page_tokens, unit_tokens, skip=0.2):
        """Different units, some left out; units may start at any token of a block that leaves them room."""
        units = page_tokens // unit_tokens
        starts = range(0, self.block_tokens - unit_tokens + 1, unit_tokens)
        shift = rng.randrange(self.block_tokens % unit_tokens + 1) if unit_tokens > 1 else 0
        every = [b * self.block_tokens + s + shift for b in range(self.blocks) for s in starts]
        chosen = rng.sample(every, min(len(every), pages * units))
        chosen += [-1] * (pages * units - len(chosen))
        rng.shuffle(chosen)
        return np.array([-1 if rng.random() < skip else p for p in chosen], np.int64).reshape(pages, units)


class Planes:
    """The planes as an engine has them, in host memory. ``memory``: SharedMemory that names them, once each."""

    def __init__(self, form: Form, rng: np.random.Generator, take=None):
        self.form = form
        count = form.layers * form.per_layer
        stride = -(-form.span_bytes // PAD) * PAD + PAD
        groups = np.array_split(np.arange(count), min(form.memories, count))
        self.plane_memory, self.plane_offset = [], []
        self.maps, self.fds = [], []
        for number, group in enumerate(groups):
            size = stride * len(group) + PAD
            self.plane_memory += [number] * len(group)
            self.plane_offset += [PAD + at * stride for at in range(len(group))]
            if take is not None:
                self.maps.append(take(size))
                continue
            self.fds.append(sealed(size))
            self.maps.append(np.frombuffer(mmap.mmap(self.fds[-1], size), np.uint8))
        for memory in self.maps:
            memory[:] = rng.integers(0, 256, len(memory), np.uint8)

    def kv(self, memories=None) -> PagedKv:
        form = self.form
        memories = memories or [
            SharedMemory(MemoryKind.MEMFD, len(memory), fd=os.dup(fd))
            for memory, fd in zip(self.maps, self.fds, strict=True)
        ]
        return PagedKv(
            tuple(memories),
            tuple(self.plane_memory),
            tuple(self.plane_offset),
            form.per_layer,
            form.blocks,
            form.block_tokens,
            form.heads,
            form.dim,
            form.width,
            form.strides,
            form.page_offset,
        )

    def tensors(self, maps=None):
        """The planes as torch sees them, over the same bytes."""
        found = []
        for memory, offset in zip(self.plane_memory, self.plane_offset, strict=True):
            raw = torch.from_numpy((maps or self.maps)[memory][offset:])
            words = raw[: len(raw) // self.form.width * self.form.width].view(WORDS[self.form.width])
            found.append(torch.as_strided(words, self.form.sizes, self.form.strides))
        return found

    def copy(self):
        return [memory.copy() for memory in self.maps]

    def close(self):
        for fd in self.fds:
            os.close(fd)


def part(form, page_tokens):
    return form.layers * form.per_layer * page_tokens * form.heads * form.dim * form.width


def twin(planes, places, rows, *, page_tokens, pack, layers=(0, None), maps=None):
    """What kernels/paged.py makes of it, in place. rows: uint8 [pages, page_bytes]."""
    form = planes.form
    first = layers[0]
    count = form.layers - first if layers[1] is None else layers[1]
    some = planes.tensors(maps)[first * form.per_layer : (first + count) * form.per_layer]
    inner = torch.from_numpy(rows[:, form.page_offset : form.page_offset + part(form, page_tokens)])
    move = kernels.pack_units if pack else kernels.unpack_units
    move(some, torch.from_numpy(places), inner, page_tokens, first * form.per_layer)


def sums(rows):
    return [xxh3_64_intdigest(bytes(row)) for row in rows]


def same(maps, others):
    return all(np.array_equal(one, other) for one, other in zip(maps, others, strict=True))


@st.composite
def forms(draw):
    """(Form, tokens of a page, tokens of a unit, (first layer, layers))."""
    unit_tokens = draw(st.sampled_from([1, 1, 2, 3, 4]))
    page_tokens = unit_tokens * draw(st.integers(1, 4))
    width = draw(st.sampled_from([1, 2, 4, 8]))
    layers = draw(st.integers(1, 4))
    form = Form(
        layers=layers,
        per_layer=draw(st.integers(1, 2)),
        blocks=draw(st.integers(1, 7)),
        block_tokens=unit_tokens * draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 3, 8, 40])),
        width=width,
        order=tuple(draw(st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)]))),
        gap=draw(st.sampled_from([0, 0, 1, 4])),
        memories=draw(st.integers(1, 3)),
        page_offset=width * draw(st.sampled_from([0, 0, 1, 16])),
    )
    first = draw(st.integers(0, layers - 1))
    return form, page_tokens, unit_tokens, (first, draw(st.integers(1, layers - first)))
