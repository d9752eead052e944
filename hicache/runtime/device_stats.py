"""What the devices of the device tier tell: copy engines that were measured and chosen, bytes by path, faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from hicache.runtime.ports import TierPort
from hicache.types import TierKind


@dataclasses.dataclass(frozen=True, slots=True)
class CopyChoice:
    """The engine that copies a shape. ``gb_per_s``: what was measured, by engine; the chosen one was the fastest.

    ``direction``: to host, to device. ``rows``: few, many (pages of one copy).
    """

    direction: str
    page_bytes: int
    rows: str
    engine: str
    gb_per_s: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStats:
    """One device. ``copy_engine``: what was asked for; ``auto``: measured, and then ``choices`` says what was found.

    Bytes that the device copied from or to the host's memory directly, and those that went through a bounce buffer,
    since that memory was not registered (yet); ``registered_bytes``: how much of it is. ``problem``: why the device was
    given up; empty while it serves.
    """

    name: str
    tier: str
    copy_engine: str
    choices: tuple[CopyChoice, ...]
    direct_bytes: int
    bounced_bytes: int
    registered_bytes: int
    faults: int
    problem: str


class Choice(Protocol):
    """As the store tells it."""

    @property
    def engine(self) -> str:
        """The chosen one."""

    @property
    def gb_per_s(self) -> Mapping[str, float]:
        """Of all that were measured."""


class Told(Protocol):
    """What a device store says of one device (``device.cuda.DeviceStats``)."""

    @property
    def device(self) -> str:
        """Its name."""

    @property
    def choices(self) -> Mapping[tuple[str, int, str], Choice]:
        """By direction, bytes of a page, few or many."""

    @property
    def direct_bytes(self) -> int:
        """Copied without a bounce buffer."""

    @property
    def bounced_bytes(self) -> int:
        """Copied through one."""

    @property
    def registered_bytes(self) -> int:
        """Of host memory."""

    @property
    def faults(self) -> int:
        """Copies that failed."""

    @property
    def problem(self) -> str:
        """Why it was given up."""


def device_stats(ports: Sequence[TierPort], copy_engine: str) -> tuple[DeviceStats, ...]:
    """Of every device that tells anything (``cpu`` has nothing to choose from, and does not)."""
    found: list[DeviceStats] = []
    for port in ports:
        told = getattr(port.store, "stats", None) if port.spec.kind is TierKind.DEVICE else None
        if told is None:
            continue
        each = cast(Sequence[Told], told if isinstance(told, tuple | list) else [told])
        found += [_one(port.spec.name, copy_engine, device) for device in each]
    return tuple(found)


def _one(tier: str, copy_engine: str, told: Told) -> DeviceStats:
    choices = [
        CopyChoice(direction, page_bytes, rows, choice.engine, dict(choice.gb_per_s))
        for (direction, page_bytes, rows), choice in sorted(told.choices.items())
    ]
    return DeviceStats(
        name=told.device,
        tier=tier,
        copy_engine=copy_engine,
        choices=tuple(choices),
        direct_bytes=told.direct_bytes,
        bounced_bytes=told.bounced_bytes,
        registered_bytes=told.registered_bytes,
        faults=told.faults,
        problem=told.problem,
    )
