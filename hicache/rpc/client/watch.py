"""Watching which pages can be read where, without I/O: one stream after the other, as if it were one.

    start, or a gap ──► RESET ──► SNAPSHOT ... ──► CAUGHT_UP ──► NEWS, PROGRESS ...
                          ▲                                          │ stream ends
                          └── another epoch, or compacted ◄──────────┴── same epoch: NEWS goes on

``LOST`` says, once, that the sidecar has been out of reach for a while; what follows says what came of it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any

from hicache.errors import ExhaustedError, HicacheError, StaleError, UnavailableError
from hicache.keys import KEY_BYTES
from hicache.rpc.client import core as rules
from hicache.rpc.client.steps import EndWatch, NeedLink, NextEvents, OpenWatch, Sleep, Steps
from hicache.rpc.common import namespaces
from hicache.rpc.pb import events_pb2
from hicache.types import Namespace

PAUSE_FIRST_S = 0.05
PAUSE_MOST_S = 1.0
ROOT = bytes(KEY_BYTES)
Message = events_pb2.WatchEventsResponse


class WatchKind(enum.Enum):
    """What a batch of events is."""

    RESET = "reset"  # forget everything; a snapshot follows
    SNAPSHOT = "snapshot"  # part of what there is
    CAUGHT_UP = "caught-up"  # the snapshot is whole
    NEWS = "news"
    PROGRESS = "progress"  # nothing happened up to this revision
    LOST = "lost"  # the sidecar has been out of reach for ``lost_ms``


@dataclasses.dataclass(frozen=True, slots=True)
class WatchedNamespace:
    """Whose pages they are: everything that must be equal for pages to be reusable, and its fingerprint."""

    spec: Namespace
    fingerprint: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class PageEvents:
    """Consecutive pages of one history that became readable in a tier (``stored``), or are so no longer.

    ``parent``: the key of the page before the first, empty at the root. ``symbols`` (of stored ones) are the pages'
    token ids as little-endian int32, each page's followed by its extra key, or hashes, as the namespace says.
    """

    stored: bool
    namespace: WatchedNamespace
    tier: str
    parent: bytes
    keys: tuple[bytes, ...]
    symbols: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class EventBatch:
    """``revision``: what was told holds up to here (0: in the middle of a snapshot)."""

    kind: WatchKind
    revision: int = 0
    epoch: bytes = b""
    events: tuple[PageEvents, ...] = ()
    why: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class WatchAsk:
    """What a watch is to tell, and after how long without the sidecar it says LOST."""

    tiers: Sequence[int | str] = ()
    fingerprints: Sequence[bytes] = ()
    all_tenants: bool = False
    progress_ms: int = 0
    lost_ms: int = 5_000


class WatchState:
    """One watch. ``batch`` makes the steps to the next batch; ``end`` those that end it."""

    def __init__(self, core: rules.Core, ask: WatchAsk) -> None:
        self._core = core
        self._ask = ask
        self._stream: Any = None
        self._epoch = b""
        self._revision = 0  # 0: nothing to resume from
        self._caught_up = False
        self._why = "the watch begins"
        self._pause_s = PAUSE_FIRST_S
        self._away_ns = 0  # since when the sidecar is out of reach
        self._said_lost = False
        self._tiers: list[str] = []
        self._namespaces: dict[int, WatchedNamespace] = {}
        self.over = False

    def batch(self) -> Steps[EventBatch | None]:
        """The next batch, after however many reconnections; None when the watch was ended."""
        while not self._ended():
            try:
                if self._stream is None:
                    yield from self._open()
                message = yield NextEvents(self._stream)
                found = self._read(message)
                if found is not None:
                    return found
            except (UnavailableError, StaleError, ExhaustedError) as error:
                if self._ended():
                    break
                yield from self._drop()
                lost = self._lost()
                if lost is not None:
                    return lost
                yield Sleep(max(self._pause_s, error.retry_after_ms / 1000))
                self._pause_s = min(2 * self._pause_s, PAUSE_MOST_S)
            except HicacheError:
                if self._ended():
                    break
                yield from self._drop()
                raise
        yield from self._drop()
        return None

    def end(self) -> Steps[None]:
        """No more batches. Idempotent."""
        self.over = True
        yield from self._drop()

    def _ended(self) -> bool:
        return self.over or self._core.session.closed

    def _drop(self) -> Steps[None]:
        stream, self._stream = self._stream, None
        if stream is not None:
            yield EndWatch(stream)

    def _lost(self) -> EventBatch | None:
        now_ns = self._core.now_ns()
        self._away_ns = self._away_ns or now_ns
        if self._said_lost or now_ns - self._away_ns < self._ask.lost_ms * rules.NS_PER_MS:
            return None
        self._said_lost = True
        return EventBatch(WatchKind.LOST, self._revision, self._epoch)

    def _open(self) -> Steps[None]:
        link = self._core.session.current()
        if link is None:
            link = yield NeedLink(self._core.now_ns() + int(PAUSE_MOST_S * 1e9))
        assert link is not None, "NeedLink answers with a link, or raises"
        resume = self._caught_up and link.capabilities.epoch == self._epoch
        if self._caught_up and not resume:
            self._why = "the sidecar was restarted"
        request = events_pb2.WatchEventsRequest(
            session_id=link.session_id,
            start_revision=self._revision + 1 if resume else 0,
            server_epoch=self._epoch if resume else b"",
            tiers=[rules.tier_index(link, tier) for tier in self._ask.tiers],
            fingerprints=self._ask.fingerprints,
            all_tenants=self._ask.all_tenants,
            progress_ms=self._ask.progress_ms,
        )
        self._stream = yield OpenWatch(request)

    # --- messages

    def _read(self, message: Message | None) -> EventBatch | None:
        if message is None:
            raise UnavailableError("the stream of events ended")
        self._away_ns, self._said_lost, self._pause_s = 0, False, PAUSE_FIRST_S
        if message.kind == Message.OPENED:
            return self._opened(message)
        if message.kind == Message.COMPACTED:
            self._caught_up, self._why = False, "what happened meanwhile is not kept any more"
            raise UnavailableError("compacted")
        self._learn(message)
        if message.kind == Message.SNAPSHOT:
            return EventBatch(WatchKind.SNAPSHOT, 0, self._epoch, tuple(self._events(message)))
        self._revision = message.revision
        if message.kind == Message.SNAPSHOT_DONE:
            self._caught_up, self._why = True, "the stream broke off while the snapshot was told"
            return EventBatch(WatchKind.CAUGHT_UP, self._revision, self._epoch)
        events = tuple(self._events(message))
        return EventBatch(
            WatchKind.NEWS if events else WatchKind.PROGRESS, self._revision, self._epoch, events
        )

    def _opened(self, message: Message) -> EventBatch | None:
        self._tiers = [tier.name for tier in message.tiers]
        self._namespaces.clear()
        if not message.snapshot:
            return None
        self._epoch, self._caught_up, self._revision = message.server_epoch, False, 0
        return EventBatch(WatchKind.RESET, 0, self._epoch, (), self._why)

    def _learn(self, message: Message) -> None:
        for each in message.namespaces:
            spec = namespaces.from_message(each.namespace, each.tenant)
            self._namespaces[each.namespace_id] = WatchedNamespace(spec, each.fingerprint)

    def _events(self, message: Message) -> Iterator[PageEvents]:
        at = first = 0
        parents, keys, symbols = message.parents, message.keys, message.symbols
        rows = zip(message.namespace_id, message.tier, message.stored, message.pages, strict=True)
        for number, (namespace_id, tier, stored, pages) in enumerate(rows):
            namespace = self._namespaces[namespace_id]
            parent = parents[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            end = at + pages * namespace.spec.symbol_bytes if stored else at
            yield PageEvents(
                stored,
                namespace,
                self._tiers[tier],
                b"" if parent == ROOT else parent,
                tuple(keys[k * KEY_BYTES : (k + 1) * KEY_BYTES] for k in range(first, first + pages)),
                symbols[at:end],
            )
            at, first = end, first + pages
