"""Several devices behind one DeviceStore.

A segment lives on one device: the one with the most free room when it is opened. A batch is split by segment, and
completes as one when all its parts have; parts overtake each other on the devices, completions do not. A device that is
given up takes its segments with it (their batches end as FAULT) and gets no new ones; the others go on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from hicache.device.kv import SharedMemory
from hicache.device.segment import Indices, Layout, Sums
from hicache.device.store import DeviceStore, check_room
from hicache.errors import ConfigError, ExhaustedError, InvalidArgumentError, UnavailableError
from hicache.types import SLOTS_PER_SEGMENT, Batch, Completion, Op, Outcome, TierSpec

_log = logging.getLogger(__name__)


class Device(DeviceStore, Protocol):
    """What each of them offers."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def problem(self) -> str:
        """Why it was given up; empty while it serves."""

    def check(self, batch: Batch) -> None:
        """Raise InvalidArgumentError for a batch that ``submit`` would refuse."""

    def settle(self) -> None:
        """Finish what was submitted; from then on only ``poll`` and ``close`` are called."""


D = TypeVar("D", bound=Device)


@dataclasses.dataclass(slots=True)
class _Whole:
    """A batch under way on one device or several."""

    batch: Batch
    parts: dict[int, Indices]  # device -> places in the batch; none where it has the whole batch
    left: int
    outcomes: list[Outcome]
    checksums: list[int]
    error: str = ""
    done: Completion | None = None

    def take(self, device: int, completion: Completion) -> None:
        """One device is done with its part."""
        self.left -= 1
        self.error = self.error or completion.error
        places = self.parts.get(device)
        if places is None:
            self.outcomes, self.checksums = list(completion.outcomes), list(completion.checksums)
        else:
            for at, place in enumerate(places.tolist()):
                self.outcomes[place] = completion.outcomes[at]
                if completion.checksums:
                    self.checksums[place] = completion.checksums[at]
        if not self.left:
            sums = () if self.batch.op is Op.DELETE else tuple(self.checksums)
            self.done = Completion(self.batch.id, tuple(self.outcomes), sums, error=self.error)


class ManyDevices(Generic[D]):
    """The DeviceStore of several devices. One thread owns it: all calls come from there.

    Args:
        spec: the tier; its segments are divided evenly.
        opens: open one device each, for its part of the tier.
        between: called at the end, when nothing is under way and the devices' memory is still there.

    Raises ConfigError where there are fewer segments than devices.
    """

    def __init__(
        self,
        spec: TierSpec,
        opens: Sequence[Callable[[TierSpec], D]],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._spec = spec
        self._between = between
        self._where: dict[int, int] = {}  # segment -> device
        self._wholes: dict[int, _Whole] = {}
        self._lanes: dict[bool, collections.deque[_Whole]] = {  # GET, and the others: in order of submission
            True: collections.deque(),
            False: collections.deque(),
        }
        self._closed = False
        self._rooms = shares(spec.capacity_bytes // spec.segment_bytes, len(opens))
        self.devices: list[D] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for room, opened in zip(self._rooms, opens, strict=True):
                part = dataclasses.replace(spec, capacity_bytes=room * spec.segment_bytes)
                self.devices.append(opened(part))
            undo.pop_all()
        _log.info(
            "tier %s: segments of %d bytes, %s",
            spec.name,
            spec.segment_bytes,
            ", ".join(
                f"{room} on {device.name}" for room, device in zip(self._rooms, self.devices, strict=True)
            ),
        )

    def device_of(self, segment: int) -> D:
        """Where an open segment lives. Raises InvalidArgumentError for one that is not open."""
        if segment not in self._where:
            raise InvalidArgumentError(f"segment {segment} is not open")
        return self.devices[self._where[segment]]

    # --- segments

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """See DeviceStore. Another device is tried where one has no memory."""
        self._check_open()
        check_room(self._spec, segment, page_bytes, slots, self._where)
        used = collections.Counter(self._where.values())
        free = {at: room - used[at] for at, room in enumerate(self._rooms)}
        lost = [device.name for device in self.devices if device.problem]
        problem = f"all segments of tier {self._spec.name!r} are open"
        if lost:
            problem += f" but those of {', '.join(lost)}, which was given up"
        for at in sorted(free, key=lambda at: -free[at]):
            if free[at] < 1 or self.devices[at].problem:
                continue
            try:
                self.devices[at].open_segment(segment, domain, page_bytes, slots)
            except ExhaustedError as error:
                problem = error.message
                continue
            self._where[segment] = at
            return
        raise ExhaustedError(f"segment {segment}: {problem}")

    def close_segment(self, segment: int, *, reusable: bool = True) -> None:
        """See DeviceStore."""
        self.device_of(segment).close_segment(segment, reusable=reusable)
        del self._where[segment]

    def free(self, slots: Sequence[int]) -> None:
        """See DeviceStore."""
        for at, places in self._split(slots).items():
            self.devices[at].free([slots[place] for place in places.tolist()])

    def layout(self, segment: int) -> Layout:
        """See DeviceStore."""
        return self.device_of(segment).layout(segment)

    def shared(self, segment: int) -> SharedMemory:
        """See DeviceStore."""
        return self.device_of(segment).shared(segment)

    def fd(self, segment: int) -> int:
        """See DeviceStore."""
        return self.device_of(segment).fd(segment)

    def columns(self, slots: Sequence[int]) -> tuple[Sums, Sums]:
        """See DeviceStore."""
        split = self._split(slots)
        if len(split) == 1:
            return self.devices[next(iter(split))].columns(slots)
        every = np.asarray(slots, np.int64)
        checksums, generations = np.zeros(len(slots), np.uint64), np.zeros(len(slots), np.uint64)
        for at, places in split.items():
            checksums[places], generations[places] = self.devices[at].columns(every[places].tolist())
        return checksums, generations

    # --- the port

    def submit(self, batch: Batch) -> None:
        """Queue a batch. Raises InvalidArgumentError where it does not fit, UnavailableError once closed."""
        self._check_open()
        if batch.op is Op.FLUSH:
            parts = {at: batch for at in range(len(self.devices))}
            whole = _Whole(batch, {}, len(parts), [], [])
        else:
            places = self._split(batch.slots)
            parts = {at: _part(batch, mine) for at, mine in places.items()}
            if len(parts) == 1:
                places = {}
            blank = len(batch.slots)
            whole = _Whole(batch, places, len(parts), [Outcome.FAULT] * blank, [0] * blank)
        if len(parts) > 1:
            for at, part in parts.items():
                self.devices[at].check(part)  # all or none of it is taken
        for at, part in parts.items():
            self.devices[at].submit(part)
        self._wholes[batch.id] = whole
        self._lanes[batch.op is Op.GET].append(whole)

    def poll(self) -> list[Completion]:
        """Completions since the last call, in order within a lane; never blocks."""
        for at, device in enumerate(self.devices):
            for completion in device.poll():
                whole = self._wholes[completion.id]
                whole.take(at, completion)
                if whole.done is not None:
                    del self._wholes[completion.id]
        found = []
        for lane in (self._lanes[True], self._lanes[False]):  # GETs first: a FLUSH comes behind them
            while lane and lane[0].done is not None:
                found.append(lane[0].done)
                lane.popleft()
        return found

    def close(self) -> None:
        """Finish what was submitted, give all memory back. ``poll`` still gives the rest. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for device in self.devices:
            device.settle()
        self._between()
        for device in self.devices:
            device.close()

    def _split(self, slots: Sequence[int]) -> dict[int, Indices]:
        """Device -> places in ``slots``. Raises InvalidArgumentError for a slot that no open segment has."""
        try:
            segments = np.asarray(slots, np.int64).reshape(len(slots)) // SLOTS_PER_SEGMENT
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgumentError(f"slots must be integers: {error}") from error
        owners = np.zeros(len(segments), np.int64)
        for segment in np.unique(segments).tolist():
            self.device_of(segment)
            owners[segments == segment] = self._where[segment]
        found = {at: np.flatnonzero(owners == at) for at in np.unique(owners).tolist()}
        return found or {0: np.empty(0, np.int64)}

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"tier {self._spec.name!r} is closed")


def shares(segments: int, devices: int) -> list[int]:
    """So many segments for each device, as even as can be. Raises ConfigError where one would get none."""
    if segments < devices:
        raise ConfigError(
            f"device: the tier has {segments} segments, too few for {devices} devices",
            hint="raise device_bytes, or lower device_segment_bytes",
        )
    return [segments // devices + (at < segments % devices) for at in range(devices)]


def _part(batch: Batch, places: Indices) -> Batch:
    """What one device gets of a batch. Raises InvalidArgumentError where the columns do not fit together."""
    for name, column in (("buffers", batch.buffers), ("checksums", batch.checksums)):
        if column and len(column) != len(batch.slots):
            raise InvalidArgumentError(f"batch {batch.id}: {len(batch.slots)} slots, {len(column)} {name}")
    if len(places) == len(batch.slots):
        return batch
    order = places.tolist()
    return dataclasses.replace(
        batch,
        slots=[batch.slots[place] for place in order],
        buffers=[batch.buffers[place] for place in order] if batch.buffers else (),
        checksums=[batch.checksums[place] for place in order] if batch.checksums else (),
    )
