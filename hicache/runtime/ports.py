"""A tier's store as the rest of the shell uses it: every batch carries what is to happen when it is done.

Beyond that a port keeps three things in order. Writes to a durable tier wait until its recovery has read it (*hold*).
A segment is closed only when no batch moves its pages. And it watches the medium: a write fault latches the tier to
read-only, repeated read faults take it off; both are told once. From then on PUTs are refused without a try, deletes
are owed, and probes (``runtime/watch.py``) find out when the medium is well again.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from hicache.errors import HicacheError
from hicache.runtime.busy import BusySegments
from hicache.runtime.mapping import Mappable, SharedPool, Slots
from hicache.runtime.pace import Pace
from hicache.runtime.turns import Turn
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
DELETES_PER_BATCH = 4096


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
        self.reason = ""  # why it is not ok
        self.since_ms = 0  # when it ceased to be

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
        elif op in {Op.PUT, Op.DELETE} and faults and self.writable:
            self.writable = False
            return True
        return False

    def restore(self) -> None:
        """The medium is well again."""
        self.writable = self.readable = True
        self.read_faults, self.reason, self.since_ms = 0, "", 0


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
        shared: SharedPool | None = None,
    ) -> None:
        self.index = index
        self.spec = spec
        self.store = store
        self.addressable = addressable
        self.mappable = mappable
        self.shared = shared  # a device's pool, where other processes may map it
        self.mapped: Slots | None = mappable or shared  # where clients can read leased pages in place
        self.health = Health()
        self.bytes_in = 0
        self.bytes_out = 0
        self.pace = Pace()  # of promotions out of the tier
        self.on_latched: Callable[[TierPort], None] = lambda _: None
        self.on_ill: Callable[[], None] = lambda: None  # it has just latched, and everybody knows
        self.on_restored: Callable[[TierPort], None] = lambda _: None
        self.on_lost: Callable[[TierPort, list[bytes]], None] = lambda _port, _keys: None
        self.now_ms: Callable[[], int] = lambda: 0
        self.on_opened: Callable[[TierPort, int, str], None] = lambda _port, _segment, _domain: None
        self.on_local: Callable[[], None] = lambda: None  # something for ``poll`` that no store rang for
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[Batch, Then]] = {}
        self._taken: deque[Completion] = deque()  # from the store, not handed out yet
        self._local: deque[Completion] = deque()
        self._held: deque[Batch] | None = None
        self._unopened: dict[int, tuple[str, int, int]] = {}
        self.busy = BusySegments()  # a transfer that goes past the store takes its slots here, too
        self._closed = False
        self._take_lost: Callable[[], list[bytes]] = getattr(store, "take_lost", list)
        self._given_ms: dict[int, int] = {}  # when the store got each batch, oldest first
        self._owed: dict[bytes, None] = {}  # deletes that the medium did not take
        self._failed_get: tuple[bytes, int] | None = None  # a page to try when the medium may be read again

    @property
    def oldest_batch_ms(self) -> int:
        """How long the store has been busy with its oldest batch."""
        return self.now_ms() - next(iter(self._given_ms.values())) if self._given_ms else 0

    @property
    def degraded_ms(self) -> int:
        """How long the tier has not been well."""
        return self.now_ms() - self.health.since_ms if self.health.reason else 0

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
        self.busy.take(slots)
        if self._held is not None and op is not Op.GET:
            self._held.append(batch)
        else:
            self._give(batch)

    def _give(self, batch: Batch) -> None:
        health = self.health
        if not health.writable and batch.op is Op.DELETE:
            self._owed.update(dict.fromkeys(batch.keys))
            self._answer(batch, Outcome.OK)
        elif not (health.writable if batch.op is Op.PUT else health.readable or batch.op is not Op.GET):
            self._answer(batch, Outcome.FAULT, f"tier {self.spec.name} is {health.state}: {health.reason}")
        else:
            self._submit(batch)

    def _submit(self, batch: Batch) -> None:
        try:
            self.store.submit(batch)
        except HicacheError as error:
            _log.error("tier %s refused a %s batch: %s", self.spec.name, batch.op.value, error)
            self._answer(batch, Outcome.FAULT, str(error))
        else:
            self._given_ms[batch.id] = self.now_ms()

    def _answer(self, batch: Batch, outcome: Outcome, reason: str = "") -> None:
        """Complete a batch that the store does not see."""
        pages = (
            0 if batch.op is Op.FLUSH else len(batch.keys) or len(batch.slots) or int(batch.op is Op.PROBE)
        )
        nothing = (0,) * pages
        self._local.append(Completion(batch.id, (outcome,) * pages, nothing, nothing, reason))
        self.on_local()

    def poll(self, turn: Turn | None = None) -> int:
        """Hand the completions that are there to whom they belong, all or as many as a turn takes; returns how many."""
        found = 0
        self._taken.extend(self.store.poll())
        while self._taken:
            completion = self._taken.popleft()
            batch, then = self._settle(completion)
            self._count(batch, completion)
            if self.spec.durable:
                self._watch(batch, completion)
            found += 1
            then(completion)
            if turn is not None and turn.over():
                return found
        lost = self._take_lost() if self._held is None else []  # before its recovery nobody knows these pages
        if lost:
            self.on_lost(self, lost)
        while self._local:
            completion = self._local.popleft()
            _, then = self._settle(completion)
            found += 1
            then(completion)
        return found

    def _watch(self, batch: Batch, completion: Completion) -> None:
        """See what a completion says of the medium."""
        if Outcome.FAULT in completion.outcomes:
            pairs = zip(batch.keys, completion.outcomes, strict=False)
            failed = [key for key, outcome in pairs if outcome is Outcome.FAULT]
            if batch.op is Op.DELETE:
                self._owed.update(dict.fromkeys(failed))
            elif batch.op is Op.GET and failed:
                self._failed_get = failed[0], batch.page_bytes
        if not self.health.judge(batch.op, completion):
            return
        self.health.reason = completion.error or f"{batch.op.value} failed"
        self.health.since_ms = self.health.since_ms or self.now_ms()
        _log.error("tier %s is %s from now on: %s", self.spec.name, self.health.state, self.health.reason)
        self.on_latched(self)
        self.on_ill()

    # --- after a latch

    def probe(self, then: Callable[[bool], None]) -> None:
        """Try the medium: a small write, and a read where reads had failed. ``then`` gets whether it is well."""

        def read(completion: Completion) -> None:
            if Outcome.FAULT in completion.outcomes:
                then(False)  # noqa: FBT003
            elif self.health.readable or self._failed_get is None:
                then(True)  # noqa: FBT003
            else:
                key, page_bytes = self._failed_get
                self._try(Op.GET, lambda got: then(Outcome.FAULT not in got.outcomes), key, page_bytes)

        self._try(Op.PROBE, read)

    def _try(self, op: Op, then: Then, key: bytes = b"", page_bytes: int = 0) -> None:
        """A batch of its own, past what is held or refused."""
        buffers = [memoryview(bytearray(page_bytes))] if key else []
        batch = Batch(next(self._ids), op, page_bytes, (), [key] if key else (), buffers)
        self._waiting[batch.id] = (batch, then)
        self._submit(batch)

    def restore(self) -> None:
        """The medium is well: what is owed goes first, then everything goes on."""
        self.health.restore()
        self._failed_get = None
        owed, self._owed = list(self._owed), {}
        for start in range(0, len(owed), DELETES_PER_BATCH):
            self.submit_now(Op.DELETE, owed[start : start + DELETES_PER_BATCH])
        self.on_restored(self)

    def _settle(self, completion: Completion) -> tuple[Batch, Then]:
        batch, then = self._waiting.pop(completion.id)
        self._given_ms.pop(completion.id, None)
        self.busy.leave(batch.slots)
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
        self.on_local()  # what the store has found meanwhile

    def _try_owed(self) -> None:
        batch = Batch(next(self._ids), Op.DELETE, keys=list(self._owed))
        self._waiting[batch.id] = (batch, lambda _: None)
        self._submit(batch)

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

    def close_segment(self, segment: int, then: Callable[[], None], *, reusable: bool = True) -> None:
        """Close a segment once nobody moves its pages, then call ``then``.

        ``reusable``: no process can have its memory mapped any more.
        """

        def close() -> None:
            if self._unopened.pop(segment, None) is None and not self._closed:
                if self.shared is not None:
                    self.shared.close_segment(segment, reusable=reusable)
                else:
                    self._slotted.close_segment(segment)
            then()

        self.busy.when_idle(segment, close)

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
            self._answer(batch, Outcome.FAULT, f"tier {self.spec.name} was closed")
        if self._owed:  # one more try: what is not deleted comes back at the next start
            self._try_owed()
        self.store.close()
