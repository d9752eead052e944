"""What a device store offers, and the one way to open one.

torch is imported by ``open_device`` and not before: a host-only sidecar runs without it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from hicache.errors import ConfigError, ExhaustedError, InvalidArgumentError
from hicache.types import SLOTS_PER_SEGMENT, Notify, PageStore, TierSpec, segment_slots

if TYPE_CHECKING:
    from hicache.device.kv import SharedMemory
    from hicache.device.segment import Layout, Sums


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceOptions:
    """Settings of a device store.

    ``staging_bytes``: size of the staging buffer of each of the two copy streams of ``cpu``, beside the tier's
    capacity. A batch moves through it in chunks; it grows to one slot where a slot is larger. Small is better: a
    chunk that is still in the processor's cache at its next step takes less time than one that is not.

    ``cuda_staging_bytes``: the same for each of a CUDA lane's three stages, on the device and, pinned, on the host.
    Large is better: a large copy reaches the speed of the link.

    ``copy_engine``: how a CUDA device copies: ``auto`` (measured), ``kernel``, ``staged``, ``batch`` or ``dma``.

    ``share``: segments can be handed out to other processes (``DeviceStore.shared``).

    ``timeout_ms``: a CUDA device that gives no answer for so long is given up; 0: never.
    """

    staging_bytes: int = 4 << 20
    cuda_staging_bytes: int = 64 << 20
    copy_engine: str = "auto"
    share: bool = False
    timeout_ms: int = 30_000


class DeviceStore(PageStore, Protocol):
    """A slotted store whose slots only the device reaches: pages come and go through ``submit``.

    PUT, DELETE and FLUSH run on one stream and GET on another. Each stream keeps submission order, in effects
    and in completions; between the streams there is none, so a page is read once its PUT has completed (a GET
    that overtakes it finds a MISS). FLUSH completes when all that was submitted before it, on both, is done.
    """

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """Give a segment its domain and slot size. Its slots start empty.

        Raises InvalidArgumentError where it is open already or the slots do not fit, ExhaustedError beyond
        ``capacity_bytes // segment_bytes`` segments or without memory.
        """

    def close_segment(self, segment: int, *, reusable: bool = True) -> None:
        """Give the segment's memory back. Raises InvalidArgumentError while batches move its pages.

        ``reusable``: nobody who was handed the segment's memory can have it mapped any more.
        """

    def layout(self, segment: int) -> Layout:
        """Where the slots of an open segment lie in its memory."""

    def shared(self, segment: int) -> SharedMemory:
        """How other processes map an open segment's memory. A descriptor is the store's own: never close it.

        Raises UnsupportedError where the store does not share, UnavailableError before the memory has been wiped: no
        byte of an earlier segment can be read in what is handed out.
        """

    def fd(self, segment: int) -> int:
        """The descriptor of ``shared``. Raises UnsupportedError where it has none."""

    def columns(self, slots: Sequence[int]) -> tuple[Sums, Sums]:
        """Checksums of the pages that the slots hold (of others anything); how often each ceased to be what it was."""

    def free(self, slots: Sequence[int]) -> None:
        """The slots hold nothing from now on; a PUT submitted before and not finished ends as FAULT."""


def open_device(
    name: str,
    spec: TierSpec,
    notify: Notify,
    options: DeviceOptions | None = None,
    *,
    now_ns: Callable[[], int] = lambda: 0,
) -> DeviceStore:
    """Open the store of a device tier.

    Args:
        name: ``cpu``, or CUDA devices: see ``device_indices``.
        spec: the tier; its capacity bounds the pool, of several devices together.
        notify: called from a copy thread when ``poll`` has something to give; must not raise.
        options: staging size, copy engine, sharing.
        now_ns: the clock of ``options.timeout_ms``; without one devices are waited for.

    Raises:
        InvalidArgumentError: no such device, or a spec that is not a slotted tier.
        UnsupportedError: a CUDA device that this machine does not have.
        ConfigError: torch is not installed, the copy engine is not known, or fewer segments than devices.
    """
    indices = device_indices(name) if name != "cpu" else []
    options = options or DeviceOptions()
    _check(spec, options)
    try:
        importlib.import_module("torch")
    except ImportError as error:
        hint = "pip install hicache[torch]"
        raise ConfigError(f"device {name!r} needs torch: {error}", hint=hint) from error
    if indices:
        from hicache.device.cuda import open_cuda
        from hicache.device.cuda_driver import CudaDriver

        return open_cuda(spec, notify, options, [CudaDriver(index) for index in indices], now_ns=now_ns)
    from hicache.device.cpu import CpuDevice

    return CpuDevice(spec, notify, options)


def device_indices(name: str) -> list[int]:
    """The CUDA devices of a name: ``cuda`` (the first), ``cuda:1``, ``cuda:0,cuda:1``, ``cuda:0-3``.

    Raises InvalidArgumentError for any other, and for a device that is named twice.
    """
    found: list[int] = []
    for part in name.split(","):
        if part == "cpu":
            raise InvalidArgumentError(f"device {name!r}: 'cpu' stands alone, beside no other device")
        match = re.fullmatch(r"cuda(?::(\d{1,3})(?:-(\d{1,3}))?)?", part)
        if not match:
            raise InvalidArgumentError(
                f"no device is called {part!r}",
                hint="known devices: 'cpu', 'cuda:<n>', 'cuda:0,cuda:1', 'cuda:0-3'",
            )
        first = int(match[1] or 0)
        last = int(match[2] or first)
        if last < first:
            raise InvalidArgumentError(f"device {name!r}: {part!r} ends before it begins")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise InvalidArgumentError(f"device {name!r} names a device twice")
    return found


def check_room(spec: TierSpec, segment: int, page_bytes: int, slots: int, opened: Collection[int]) -> None:
    """What every device asks before it opens a segment; see ``DeviceStore.open_segment``."""
    if segment < 0 or segment in opened:
        raise InvalidArgumentError(f"segment {segment} is open already, or negative")
    room = segment_slots(spec, page_bytes) if page_bytes > 0 else 0
    if not 1 <= slots <= min(room, SLOTS_PER_SEGMENT):
        raise InvalidArgumentError(
            f"segment {segment}: {slots} slots of {page_bytes} bytes do not fit, {room} would",
            hint=f"a segment has {spec.segment_bytes} bytes",
        )
    limit = spec.capacity_bytes // spec.segment_bytes
    if len(opened) >= limit:
        raise ExhaustedError(f"tier {spec.name!r}: all {limit} segments are open")


def _check(spec: TierSpec, options: DeviceOptions) -> None:
    checks = (
        (not spec.keyed, "a device tier is slotted, not keyed"),
        (spec.segment_bytes > 0, "segment_bytes must be positive"),
        (spec.capacity_bytes >= 0, "capacity_bytes must not be negative"),
        (options.staging_bytes > 0, "staging_bytes must be positive"),
        (options.timeout_ms >= 0, "timeout_ms must not be negative"),
        (options.cuda_staging_bytes > 0, "cuda_staging_bytes must be positive"),
    )
    for ok, problem in checks:
        if not ok:
            raise InvalidArgumentError(f"tier {spec.name!r}: {problem}")
