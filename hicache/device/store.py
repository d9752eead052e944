"""What a device store offers, and the one way to open one.

torch is imported by ``open_device`` and not before: a host-only sidecar runs without it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Collection, Sequence
from typing import Protocol

from hicache.errors import ConfigError, ExhaustedError, InvalidArgumentError
from hicache.types import SLOTS_PER_SEGMENT, Notify, PageStore, TierSpec, segment_slots


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceOptions:
    """Settings of a device store.

    ``staging_bytes``: size of the staging buffer of each of the two copy streams of ``cpu``, beside the tier's
    capacity. A batch moves through it in chunks; it grows to one slot where a slot is larger. Small is better: a
    chunk that is still in the processor's cache at its next step takes less time than one that is not.

    ``cuda_staging_bytes``: the same for each of a CUDA lane's three stages, on the device and, pinned, on the host.
    Large is better: a large copy reaches the speed of the link.

    ``copy_engine``: how a CUDA device copies: ``auto`` (measured), ``kernel``, ``staged``, ``batch`` or ``dma``.
    """

    staging_bytes: int = 4 << 20
    cuda_staging_bytes: int = 64 << 20
    copy_engine: str = "auto"


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

    def close_segment(self, segment: int) -> None:
        """Give the segment's memory back. Raises InvalidArgumentError while batches move its pages."""

    def free(self, slots: Sequence[int]) -> None:
        """The slots hold nothing from now on; a PUT submitted before and not finished ends as FAULT."""


def open_device(
    name: str, spec: TierSpec, notify: Notify, options: DeviceOptions | None = None
) -> DeviceStore:
    """Open the store of a device tier.

    Args:
        name: ``cpu``, or ``cuda:<n>`` (``cuda`` is ``cuda:0``).
        spec: the tier; its capacity bounds the pool.
        notify: called from a copy thread when ``poll`` has something to give; must not raise.
        options: staging size, copy engine.

    Raises:
        InvalidArgumentError: no such device, or a spec that is not a slotted tier.
        UnsupportedError: a CUDA device that this machine does not have.
        ConfigError: torch is not installed, or the copy engine is not known.
    """
    cuda = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name != "cpu" and not cuda:
        raise InvalidArgumentError(f"no device is called {name!r}", hint="known devices: 'cpu', 'cuda:<n>'")
    options = options or DeviceOptions()
    _check(spec, options)
    try:
        importlib.import_module("torch")
    except ImportError as error:
        hint = "pip install hicache[torch]"
        raise ConfigError(f"device {name!r} needs torch: {error}", hint=hint) from error
    if cuda:
        from hicache.device.cuda import CudaDevice
        from hicache.device.cuda_driver import CudaDriver

        return CudaDevice(spec, notify, options, CudaDriver(int(cuda[1] or 0)))
    from hicache.device.cpu import CpuDevice

    return CpuDevice(spec, notify, options)


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
        (options.cuda_staging_bytes > 0, "cuda_staging_bytes must be positive"),
    )
    for ok, problem in checks:
        if not ok:
            raise InvalidArgumentError(f"tier {spec.name!r}: {problem}")
