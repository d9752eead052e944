"""A tier's store as the rest of the shell uses it: every batch carries what is to happen when it is done.

Beyond that a port keeps three things in order. Writes to a durable tier wait until its recovery has read it (*hold*).
A segment is closed only when no batch moves its pages. And it watches the medium: a write fault latches the tier to
read-only, repeated read faults take it off; both are told once.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from hicache.errors import HicacheError
from hicache.runtime.mapping import Mappable
from hicache.runtime.pace import Pace
from hicache.types import (
    SLOTS_PER_SEGMENT,
    AddressableStore,
    Batch,
    Completion,
    Op,
    Outcome,
    PageStore,
    TierSpec,
)

_log = logging.getLogger(__name__)

Then = Callable[[Completion], None]
READ_FAULTS_TO_GIVE_UP = 3


class SlottedStore(PageStore, Protocol):
    """What every slotted store offers beside the port."""

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """Give a segment its domain and slot size."""

    def close_segment(self, segment: int) -> None:
        """Give its memory back."""

    def free(self, slots: Sequence[int]) -> None:
        """The slots hold nothing from now on."""


class Health:
    """What a tier's medium has shown so far."""

    def __init__(self) -> None:
        self.writable = True
        self.readable = True
        self.read_faults = 0  # in a row

    @property
    def state(self) -> str:
        """``ok``, ``read-only`` or ``off``."""
        if not self.readable:
            return "off"
        return "ok" if self.writable else "read-only"

    def judge(self, op: Op, completion: Completion) -> bool:
        """Take in a completion; True when the tier has just latched, or is given up."""
        faults = Outcome.FAULT in completion.outcomes
        if op is Op.GET:
            self.read_faults = self.read_faults + 1 if faults else 0
            if self.readable and self.read_faults >= READ_FAULTS_TO_GIVE_UP:
                self.readable = self.writable = False
                return True
        elif op is Op.PUT and faults and self.writable:
            self.writable = False
            return True
        return False


class TierPort:
    """One tier. The loop's thread owns it."""

    def __init__(
        self,
        index: int,
        spec: TierSpec,
        store: PageStore,
        *,
        addressable: AddressableStore | None = None,
        mappable: Mappable | None = None,
    ) -> None:
        self.index = index
        self.spec = spec
        self.store = store
        self.addressable = addressable
        self.mappable = mappable
        self.health = Health()
        self.bytes_in = 0
        self.bytes_out = 0
        self.pace = Pace()  # of promotions out of the tier
        self.on_latched: Callable[[TierPort], None] = lambda _: None
        self.on_opened: Callable[[TierPort, int, str], None] = lambda _port, _segment, _domain: None
        self.on_local: Callable[[], None] = lambda: None  # something for ``poll`` that no store rang for
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[Batch, Then]] = {}
        self._local: deque[Completion] = deque()
        self._held: deque[Batch] | None = None
        self._unopened: dict[int, tuple[str, int, int]] = {}
        self._moving: Counter[int] = Counter()  # batches under way, by segment
        self._closing: dict[int, Callable[[], None]] = {}
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Batches that are not done."""
        return len(self._waiting)

    # --- batches

    def submit(
        self,
        op: Op,
        then: Then,
        *,
        page_bytes: int = 0,
        slots: Sequence[int] = (),
        keys: Sequence[bytes] = (),
        **columns: Sequence[object],
    ) -> None:
        """Give the store a batch; ``then`` gets its completion, later and on this thread, whatever happens.

        ``columns``: the remaining ones of ``Batch`` (buffers, checksums, records).
        """
        batch = Batch(next(self._ids), op, page_bytes, slots, keys, **columns)  # type: ignore[arg-type]
        self._waiting[batch.id] = (batch, then)
        for segment in {slot // SLOTS_PER_SEGMENT for slot in slots}:
            self._moving[segment] += 1
        if self._held is not None and op is not Op.GET:
            self._held.append(batch)
        else:
            self._give(batch)

    def _give(self, batch: Batch) -> None:
        try:
            self.store.submit(batch)
        except HicacheError as error:
            _log.error("tier %s refused a %s batch: %s", self.spec.name, batch.op.value, error)
            self._refuse(batch, str(error))

    def _refuse(self, batch: Batch, reason: str) -> None:
        pages = 0 if batch.op is Op.FLUSH else len(batch.keys) or len(batch.slots)
        nothing = (0,) * pages
        self._local.append(Completion(batch.id, (Outcome.FAULT,) * pages, nothing, nothing, reason))
        self.on_local()

    def poll(self) -> int:
        """Hand every completion that is there to whom it belongs; returns how many."""
        found = 0
        for completion in self.store.poll():
            batch, then = self._settle(completion)
            self._count(batch, completion)
            if self.spec.durable and self.health.judge(batch.op, completion):
                _log.error(
                    "tier %s is %s from now on: %s", self.spec.name, self.health.state, completion.error
                )
                self.on_latched(self)
            found += 1
            then(completion)
        while self._local:
            completion = self._local.popleft()
            _, then = self._settle(completion)
            found += 1
            then(completion)
        return found

    def _settle(self, completion: Completion) -> tuple[Batch, Then]:
        batch, then = self._waiting.pop(completion.id)
        for segment in {slot // SLOTS_PER_SEGMENT for slot in batch.slots}:
            self._moving[segment] -= 1
            if not self._moving[segment]:
                del self._moving[segment]
                closing = self._closing.pop(segment, None)
                if closing is not None:
                    closing()
        return batch, then

    def _count(self, batch: Batch, completion: Completion) -> None:
        if batch.op is Op.PUT:
            self.bytes_in += batch.page_bytes * completion.outcomes.count(Outcome.OK)
        elif batch.op is Op.GET:
            self.bytes_out += batch.page_bytes * completion.outcomes.count(Outcome.OK)

    # --- recovery

    def hold_writes(self) -> None:
        """From now on what changes the store waits, in order."""
        assert self._held is None, "writes are held already"
        self._held = deque()

    def submit_now(self, op: Op, keys: Sequence[bytes]) -> None:
        """Give the store a batch past what is held; nobody waits for it."""
        batch = Batch(next(self._ids), op, keys=keys)
        self._waiting[batch.id] = (batch, lambda _: None)
        self._give(batch)

    def release_writes(self) -> None:
        """Hand on what has waited."""
        held, self._held = self._held or deque(), None
        for batch in held:
            self._give(batch)

    # --- segments and slots

    @property
    def _slotted(self) -> SlottedStore:
        assert not self.spec.keyed, "segments belong to slotted tiers"
        return cast(SlottedStore, self.store)

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """Open a segment. Without memory for it now, that is tried again whenever its slots are wanted."""
        try:
            self._slotted.open_segment(segment, domain, page_bytes, slots)
        except HicacheError as error:
            _log.error("tier %s: segment %d cannot be opened: %s", self.spec.name, segment, error)
            self._unopened[segment] = (domain, page_bytes, slots)
            return
        self._unopened.pop(segment, None)
        self.on_opened(self, segment, domain)

    def reopen(self, slots: Sequence[int]) -> None:
        """Try again to open what of these slots' segments could not be opened before."""
        if self._unopened:
            for segment in {slot // SLOTS_PER_SEGMENT for slot in slots} & self._unopened.keys():
                self.open_segment(segment, *self._unopened[segment])

    def close_segment(self, segment: int, then: Callable[[], None]) -> None:
        """Close a segment once no batch moves its pages, then call ``then``."""

        def close() -> None:
            if self._unopened.pop(segment, None) is None and not self._closed:
                self._slotted.close_segment(segment)
            then()

        if self._moving[segment]:
            self._closing[segment] = close
        else:
            close()

    def free(self, slots: Sequence[int]) -> None:
        """These slots hold nothing from now on."""
        if self._unopened:
            slots = [slot for slot in slots if slot // SLOTS_PER_SEGMENT not in self._unopened]
        self._slotted.free(slots)

    def finish(self) -> None:
        """Refuse what was held, finish what the store was given, close it. Idempotent.

        May run on another thread while the owner does nothing with the port; ``poll`` gives the last completions.
        """
        if self._closed:
            return
        self._closed = True
        held, self._held = self._held or deque(), None
        for batch in held:
            self._refuse(batch, f"tier {self.spec.name} was closed")
        self.store.close()
