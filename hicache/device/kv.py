"""Words for memory that processes share and for an engine's paged KV in it. Imports without torch.

What a plane, a unit and a place are says ``kernels/paged.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hicache.errors import InvalidArgumentError

Places = npt.NDArray[np.int64]
#: What a counter shows of a transfer that has failed: more than any number of layers, so that nobody waits for ever.
FAILED = 1 << 63
UUID_BYTES, IPC_HANDLE_BYTES = 16, 64
MAX_PLANES, MAX_ELEMENT_BYTES = 4096, 8
MAX_STRIDE = 1 << 59  # in bytes it stays a signed word, also of an axis of one entry, which any stride fits


class MemoryKind(enum.StrEnum):
    """How memory of another process is reached."""

    MEMFD = "memfd"  # host memory, by a descriptor that is sealed against shrinking
    CUDA_IPC = "cuda-ipc"  # by the runtime's handle
    CUDA_FD = "cuda-fd"  # by a descriptor of the driver's virtual memory management


@dataclasses.dataclass(frozen=True, slots=True)
class SharedMemory:
    """One allocation of another process.

    ``handle``: of CUDA_IPC, 64 bytes. ``fd``: of the other kinds; whoever opens the memory takes it over, whatever
    comes of it. ``device_uuid``: 16 bytes, of CUDA memory.
    """

    kind: MemoryKind
    size_bytes: int
    handle: bytes = b""
    fd: int = -1
    device_uuid: bytes = b""

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for what cannot be."""
        cuda = self.kind is not MemoryKind.MEMFD
        by_handle = self.kind is MemoryKind.CUDA_IPC
        checks = (
            (self.size_bytes > 0, "has no bytes"),
            (
                len(self.handle) == (IPC_HANDLE_BYTES if by_handle else 0),
                f"a handle of {len(self.handle)} bytes",
            ),
            ((self.fd < 0) == by_handle, "a descriptor goes with memfd and cuda-fd"),
            (
                len(self.device_uuid) == (UUID_BYTES if cuda else 0),
                f"a UUID of {len(self.device_uuid)} bytes",
            ),
        )
        for ok, problem in checks:
            if not ok:
                raise InvalidArgumentError(f"memory of kind {self.kind}: {problem}")


@dataclasses.dataclass(frozen=True, slots=True)
class PagedKv:
    """An engine's paged KV: planes ``[blocks, block_tokens, heads, head_size]`` in shared memory, all alike.

    ``plane_memory`` and ``plane_offset``: one entry a plane, in the order in which planes lie in a page: which of
    ``memories``, and the byte where it begins there. ``strides``: of the four axes, in elements, none negative.
    ``page_offset``: where in a page these planes' bytes begin.
    """

    memories: tuple[SharedMemory, ...]
    plane_memory: tuple[int, ...]
    plane_offset: tuple[int, ...]
    planes_per_layer: int
    blocks: int
    block_tokens: int
    heads: int
    head_size: int
    element_bytes: int
    strides: tuple[int, int, int, int]
    page_offset: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError where planes do not lie in their memory."""
        sizes = (self.blocks, self.block_tokens, self.heads, self.head_size, self.planes_per_layer)
        planes = len(self.plane_memory)
        checks = (
            (min(sizes) > 0, "sizes must be positive"),
            (0 < planes <= MAX_PLANES and planes == len(self.plane_offset), f"1 to {MAX_PLANES} planes"),
            (
                planes % max(self.planes_per_layer, 1) == 0,
                f"{planes} planes are not layers of {self.planes_per_layer}",
            ),
            (self.element_bytes in {1, 2, 4, 8}, "elements have 1, 2, 4 or 8 bytes"),
            (
                0 <= min(self.strides) <= max(self.strides) < MAX_STRIDE,
                "four strides, none negative, and within 59 bits",
            ),
            (
                0 <= self.page_offset < 1 << 63 and not self.page_offset % max(1, self.element_bytes),
                "page_offset must be whole elements, not negative, and within 63 bits",
            ),
        )
        for ok, problem in checks:
            if not ok:
                raise InvalidArgumentError(f"paged KV: {problem}")
        span = self.span_bytes
        for plane, (memory, offset) in enumerate(zip(self.plane_memory, self.plane_offset, strict=True)):
            size = self.memories[memory].size_bytes if 0 <= memory < len(self.memories) else -1
            if offset < 0 or offset % self.element_bytes or offset + span > size:
                raise InvalidArgumentError(
                    f"paged KV: plane {plane} takes {span} bytes from byte {offset} of memory {memory},"
                    f" which has {size}"
                    if size >= 0
                    else f"paged KV: plane {plane} is in memory {memory}, which is none"
                )

    @property
    def planes(self) -> int:
        """How many, of all layers."""
        return len(self.plane_memory)

    @property
    def layers(self) -> int:
        """How many."""
        return self.planes // self.planes_per_layer

    @property
    def token_bytes(self) -> int:
        """One token in one plane."""
        return self.heads * self.head_size * self.element_bytes

    @property
    def span_bytes(self) -> int:
        """From a plane's first byte to behind its last."""
        shape = (self.blocks, self.block_tokens, self.heads, self.head_size)
        last = sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        return (last + 1) * self.element_bytes

    def part_bytes(self, page_tokens: int) -> int:
        """What these planes have of a page."""
        return self.planes * page_tokens * self.token_bytes

    def check_places(self, places: Places, page_tokens: int) -> None:
        """Raise InvalidArgumentError unless int64 ``[pages, units]`` name tokens of these planes."""
        units = places.shape[1] if places.ndim == 2 else 0
        if not units or page_tokens % units or self.block_tokens % (page_tokens // units):
            raise InvalidArgumentError(
                f"{units} units a page: they must divide its {page_tokens} tokens, and a block of"
                f" {self.block_tokens} into whole units"
            )
        unit_tokens = page_tokens // units
        used = places[places >= 0]
        if len(used) and int(used.max()) >= self.blocks * self.block_tokens:
            raise InvalidArgumentError(f"place {int(used.max())} is outside {self.blocks} blocks")
        if len(used) and int((used % self.block_tokens).max()) + unit_tokens > self.block_tokens:
            raise InvalidArgumentError(f"a unit of {unit_tokens} tokens does not lie in one block")


def check_apart(places: Places, unit_tokens: int) -> None:
    """Raise InvalidArgumentError where a load would write a token twice: one of its pages would not be there."""
    used = np.sort(places[places >= 0])
    twice = np.flatnonzero(np.diff(used) < unit_tokens)
    if len(twice):
        raise InvalidArgumentError(
            f"two pages of a load go to one place, {int(used[twice[0]])}", hint="name each block once"
        )


class Counter(Protocol):
    """One counter of a timeline, shared with another process. From any thread."""

    def get(self) -> int:
        """As it stands."""

    def set(self, value: int) -> None:
        """Everything that was written before is seen by whoever sees the value."""
