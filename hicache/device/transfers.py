"""Copies between slots and engines' paged KV: what ``runtime`` asks for. ``opening.open_transfers`` has who does it.

    open_kv ─► KvHandle     maps the engine's memory (blocks: on a worker)
    load    slots ─► planes     layer after layer; a counter tells of each
    pack    planes ─► host buffers     waits for each layer's counter
    close_kv ─► unmaps when the last transfer has ended

A transfer ends exactly once, whatever happens, and touches the engine's memory no more once it has. Nothing here blocks
the owner's thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hicache.device.kv import Counter, PagedKv, Places
from hicache.types import Outcome


class KvHandle(Protocol):
    """An engine's paged KV as it is mapped here."""

    kv: PagedKv


@dataclasses.dataclass(frozen=True, slots=True)
class HostSlots:
    """Writable slots of one size in host memory: where each begins. ``keep``: what keeps them mapped."""

    addresses: npt.NDArray[np.int64]
    page_bytes: int
    keep: Sequence[object]


@dataclasses.dataclass(frozen=True, slots=True)
class HostPages:
    """Pages in host memory, or room for them: ``page_bytes`` a page, in slots or in one buffer a page.

    ``checksums``: of a load, what the pages' bytes are to have; empty: not compared. Slots and a column of checksums
    cost the owner's thread no object a page.
    """

    buffers: Sequence[memoryview] | HostSlots
    checksums: Sequence[int] | npt.NDArray[np.uint64] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class DevicePages:
    """Pages in slots of the device tier. Its store knows their checksums."""

    slots: Sequence[int]
    verify: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """Pages between slots and planes.

    ``places``: int64 ``[pages, units]``, checked before (``PagedKv.check_places``); a unit at a negative place is not
    moved; ``pack`` has none. Layers [first_layer, first_layer + layers). ``counter``: a load sets it to the layers that
    have arrived (counted from its first), and to FAILED where a page or more has failed; a pack takes a layer only when
    it shows more than the layer's number. ``deadline_ns``: by the owner's clock, of a pack's waiting; what has not come
    then has failed.
    """

    id: int
    kv: KvHandle
    pages: HostPages | DevicePages
    places: Places
    page_tokens: int
    page_bytes: int
    first_layer: int = 0
    layers: int = 0  # 0: all from the first
    counter: Counter | None = None
    deadline_ns: int = 0  # 0: none


@dataclasses.dataclass(frozen=True, slots=True)
class TransferDone:
    """How a transfer ended: an outcome and a checksum (of the page's bytes; 0 unless OK) a page.

    OK, MISS (the slot no longer held the page), CORRUPT (its bytes are not what its checksum says), FAULT (``error``).
    """

    id: int
    outcomes: tuple[Outcome, ...]
    checksums: tuple[int, ...]
    error: str = ""


class Transfers(Protocol):
    """One thread owns it; ``open_kv`` may be called from any."""

    memory_kinds: tuple[str, ...]  # that open_kv can map here
    device_uuids: tuple[bytes, ...]

    def open_kv(self, kv: PagedKv) -> KvHandle:
        """Map an engine's memory. Blocks. Takes the descriptors over.

        Raises UnsupportedError (memory that cannot be mapped here: says why and what to do), InvalidArgumentError (a
        memfd that may shrink, or is smaller than it says), ExhaustedError.
        """

    def close_kv(self, handle: KvHandle, then: Callable[[], None]) -> None:
        """Unmap when no transfer uses it any more, then call ``then`` (from any thread). Never blocks.

        Packs that wait for a layer fail now. Raises UnavailableError where it was called already.
        """

    def check(self, handle: KvHandle, device_pages: bool) -> None:  # noqa: FBT001
        """Raise UnsupportedError where pages of that tier cannot be moved to or from that memory."""

    def load(self, transfer: Transfer) -> None:
        """Queue a transfer to an engine.

        Raises UnavailableError once closed (also the region), InvalidArgumentError for pages, places and layers that do
        not go together.
        """

    def pack(self, transfer: Transfer) -> None:
        """Queue a transfer from an engine, into host buffers. Raises as ``load``; UnsupportedError for device slots."""

    def poll(self) -> list[TransferDone]:
        """What has ended since the last call; never blocks."""

    def close(self) -> None:
        """End every transfer (those not begun fail), unmap everything. Idempotent."""
