"""From a watch to the endpoints: the one loop of ``hicache publish``.

At the start, and after every gap with the sidecar, each endpoint says AllBlocksCleared and then what there is, parents
first. So it does when the sidecar has been out of reach for a while: what nobody can fetch is not to be routed to.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterable

import zmq

from hicache.errors import ConfigError
from hicache.integrations.kv_events.blocks import Blocks
from hicache.integrations.kv_events.outlet import Message, Outlet
from hicache.integrations.kv_events.spec import OutletSpec
from hicache.integrations.kv_events.wire import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    Event,
    encode,
)
from hicache.rpc.client.watch import EventBatch, PageEvents, WatchedNamespace, WatchKind
from hicache.rpc.client.watches import AsyncWatch
from hicache.types import SymbolKind

#: A message has about so many blocks; while a snapshot is told, messages rest so long, so that nobody is overrun.
MESSAGE_BLOCKS = 512
REST_S = 0.004
#: In quiet times an empty message says where the numbers are, so that whoever missed the last one notices.
BEAT_S = 1.0
log = logging.getLogger(__name__)


class Counts:
    """What was published so far, over all endpoints."""

    def __init__(self) -> None:
        self.stored_blocks = 0
        self.removed_blocks = 0
        self.resets = 0
        self.lost = 0
        self.caught_up = False
        self.revision = 0


class Publisher:
    """Publishes on several endpoints at once. Use on an event loop; ``now_s`` tells the time for the messages."""

    def __init__(self, specs: Iterable[OutletSpec], *, pod: str, now_s: Callable[[], float]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.counts = Counts()
        self._desks: list[_Desk] = []
        try:
            for spec in specs:
                # Numbers go on over restarts, so that consumers see one as a gap: what they had seen is void.
                first = int(now_s() * 1e6) if spec.sequence == "clock" else 0
                self._desks.append(_Desk(Outlet(self._context, spec, first), pod, now_s, self.counts))
        except ConfigError:
            self._close()
            raise

    @property
    def outlets(self) -> list[Outlet]:
        """The endpoints, in the order of their specs."""
        return [desk.outlet for desk in self._desks]

    async def run(self, new_watch: Callable[[], AsyncWatch]) -> None:
        """Publish what a client's watch says, until it ends or this is cancelled. Then nothing is there any more."""
        for desk in self._desks:
            desk.outlet.retell = functools.partial(self._retell, desk, new_watch)
        beside = [asyncio.create_task(outlet.answer()) for outlet in self.outlets]
        beside.append(asyncio.create_task(self._beat()))
        try:
            async with new_watch() as watch:
                async for batch in watch:
                    await self.publish(batch)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self._clear()
            for outlet in self.outlets:
                await outlet.stop()
            self._close()

    async def _beat(self) -> None:
        before: list[int] = []
        while True:
            await asyncio.sleep(BEAT_S)
            now = [outlet.messages for outlet in self.outlets]
            if now == before:
                for desk in self._desks:
                    desk.beat()
            before = now

    async def _retell(self, desk: _Desk, new_watch: Callable[[], AsyncWatch]) -> AsyncIterator[Message]:
        """What there is now, for one who asks for what an endpoint does not keep any more."""
        found: list[Message] = []
        other = desk.twin(lambda topic, payload: found.append((topic, payload)))
        other.clear()
        async with new_watch() as watch:
            async for batch in watch:
                for _ in other.tell(batch.events):
                    pass
                for message in found:
                    yield message
                found.clear()
                if batch.kind in {WatchKind.CAUGHT_UP, WatchKind.LOST}:
                    return

    async def publish(self, batch: EventBatch) -> None:
        """Hand one batch on."""
        self.counts.revision = batch.revision or self.counts.revision
        match batch.kind:
            case WatchKind.RESET:
                self.counts.resets += 1
                self.counts.caught_up = False
                log.info("a snapshot follows: %s", batch.why)
                self._clear()
            case WatchKind.LOST:
                self.counts.lost += 1
                self.counts.caught_up = False
                log.warning("the sidecar is out of reach: all blocks cleared until it is back")
                self._clear()
            case WatchKind.CAUGHT_UP:
                self.counts.caught_up = True
                log.info("the snapshot is told, revision=%d", batch.revision)
            case _:
                resting = batch.kind is WatchKind.SNAPSHOT
                for desk in self._desks:
                    for _ in desk.tell(batch.events):
                        await asyncio.sleep(REST_S if resting else 0)

    def _clear(self) -> None:
        for desk in self._desks:
            desk.clear()

    def _close(self) -> None:
        for desk in self._desks:
            desk.outlet.close()
        self._context.term()


class _Desk:
    """Turns events into one endpoint's messages."""

    def __init__(self, outlet: Outlet, pod: str, now_s: Callable[[], float], counts: Counts) -> None:
        self.outlet = outlet
        self._emit: Callable[[bytes, bytes], object] = outlet.send
        self._spec = outlet.spec
        self._pod = pod
        self._now_s = now_s
        self._counts = counts
        self._blocks = Blocks(self._spec.block_size)
        self._topics: dict[bytes, bytes | None] = {}  # by fingerprint; None: not published here
        self._cleared: set[bytes] = set()  # topics that have been told so since the last gap

    def twin(self, emit: Callable[[bytes, bytes], object]) -> _Desk:
        """One that tells somebody else the same way."""
        other = _Desk(self.outlet, self._pod, self._now_s, Counts())
        other._emit = emit
        return other

    def beat(self) -> None:
        """An empty message in every topic."""
        for topic in sorted(self._cleared):
            self.outlet.beat(topic, self._encode([]))

    def clear(self) -> None:
        """Everything known before is void. Topics that are met later are told so first."""
        self._blocks.clear()
        known = {topic for topic in self._topics.values() if topic is not None}
        if "{" not in self._spec.topic:
            known.add(self._spec.topic.encode())
        self._cleared.clear()
        for topic in sorted(known):
            self._say_cleared(topic)

    def tell(self, events: Iterable[PageEvents]) -> Iterable[None]:
        """Publish events; yields after each message."""
        topic, size = b"", 0
        batch: list[Event] = []
        for event in events:
            at = self._topic(event.namespace)
            if at is None:
                continue
            if batch and (at != topic or size >= MESSAGE_BLOCKS):
                self._send(topic, batch)
                yield
                batch, size = [], 0
            topic = at
            row = self._row(event)
            size += len(row.block_hashes)
            batch.append(row)
        if batch:
            self._send(topic, batch)
            yield

    def _row(self, event: PageEvents) -> BlockStored | BlockRemoved:
        medium = self._spec.medium(event.tier)
        if not event.stored:
            gone = self._blocks.removed(event)
            self._counts.removed_blocks += len(gone)
            return BlockRemoved([self._name(name) for name in gone], medium)
        stored = self._blocks.stored(event)
        self._counts.stored_blocks += len(stored.names)
        return BlockStored(
            [self._name(name) for name in stored.names],
            self._name(stored.parent) if stored.parent else None,
            stored.token_ids,
            stored.block_size,
            None,
            medium,
            event.namespace.spec.adapter or None,
        )

    def _name(self, name: bytes) -> BlockHash:
        return name if self._spec.hash == "bytes" else int.from_bytes(name[:8], "big")

    def _send(self, topic: bytes, batch: list[Event]) -> None:
        if topic not in self._cleared:
            self._say_cleared(topic)
        self._emit(topic, self._encode(batch))

    def _encode(self, batch: list[Event]) -> bytes:
        return encode(self._now_s(), batch, self._spec.rank, arrays=self._spec.format == "array")

    def _say_cleared(self, topic: bytes) -> None:
        self._cleared.add(topic)
        self._send(topic, [AllBlocksCleared()])

    def _topic(self, namespace: WatchedNamespace) -> bytes | None:
        """The topic of a namespace; None where it is not published here."""
        if namespace.fingerprint in self._topics:
            return self._topics[namespace.fingerprint]
        spec, topic = namespace.spec, None
        if not self._spec.model or self._spec.model == spec.model:
            why = self._unfit(namespace)
            if why:
                log.warning("%s: pages of %s are not published: %s", self._spec.bind, spec.model, why)
            else:
                topic = self._spec.topic.format(
                    pod=self._pod,
                    model=spec.model,
                    adapter=spec.adapter,
                    namespace=namespace.fingerprint.hex()[:16],
                ).encode()
        self._topics[namespace.fingerprint] = topic
        return topic

    def _unfit(self, namespace: WatchedNamespace) -> str:
        """Why a namespace's pages cannot be told in these formats; empty where they can."""
        spec = namespace.spec
        if spec.symbol_kind is not SymbolKind.TOKENS:
            return "the client names them by hashes, so that their token ids are not known"
        if spec.extra_key_bytes:
            return "their identity is more than token ids (extra keys), which routers would take for equal"
        if spec.salt:
            return "their cache salt keeps them apart, which routers would not"
        if not self._blocks.fits(spec.page_tokens):
            return f"pages of {spec.page_tokens} tokens are no multiple of block_size {self._spec.block_size}"
        return ""
