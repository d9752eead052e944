"""A copier over real stores, without an engine: tests say what is copied and see each CopyDone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from runtime_helpers import PAGE_BYTES, checksum, namespace, page, settle

from hicache.engine.actions import Copy, CopyIn
from hicache.engine.events import CopyDone
from hicache.keys import chain_keys, fingerprint
from hicache.runtime.copier import Copier
from hicache.runtime.options import ServiceOptions
from hicache.runtime.ports import TierPort
from hicache.runtime.stores import Stores, open_stores
from hicache.runtime.workers import Wake, Workers
from hicache.types import Batch, Completion, Op, PageRecord, PageStore

SPEC = namespace()
FINGERPRINT = fingerprint(SPEC)
DEVICE, HOST, DISK = 0, 1, 2
SLOTS = 16


def symbol(number: int) -> bytes:
    return number.to_bytes(16, "little")


def keys_of(pages: Sequence[int]) -> list[bytes]:
    """Keys of pages that each stand at a root: their order does not matter."""
    return [chain_keys(FINGERPRINT, symbol(number), 16)[0] for number in pages]


def records_of(pages: Sequence[int]) -> list[PageRecord]:
    return [PageRecord(FINGERPRINT, FINGERPRINT, symbol(number)) for number in pages]


class Rig:
    """``put`` and ``get`` go to the stores directly, ``copy`` and ``copy_in`` through the copier."""

    def __init__(self, stores: Stores, wake: Wake, *, chunk_bytes: int, bounce_bytes: int) -> None:
        self.stores = stores
        self.ports = stores.ports
        self.done: list[CopyDone] = []
        self.workers = Workers(2, wake.ring)
        self.copier = Copier(
            self.ports,
            self.workers,
            done=self.done.append,
            chunk_bytes=chunk_bytes,
            bounce_bytes=bounce_bytes,
            lanes=2,
            now_ns=time.monotonic_ns,
            soon=lambda call: call(),
        )
        self._copies = 0
        wake.call = self.poll
        for port in self.ports:
            port.on_local = wake.ring
            if not port.spec.keyed:
                port.open_segment(0, "default", PAGE_BYTES, SLOTS)

    def poll(self) -> None:
        self.workers.poll()
        for port in self.ports:
            port.poll()

    async def batch(
        self, tier: int, op: Op, pages: Sequence[int], buffers: Sequence[memoryview]
    ) -> Completion:
        port = self.ports[tier]
        found: list[Completion] = []
        keyed = port.spec.keyed
        port.submit(
            op,
            found.append,
            page_bytes=PAGE_BYTES,
            slots=() if keyed else list(pages),
            keys=keys_of(pages) if keyed else (),
            buffers=buffers,
            records=records_of(pages) if keyed and op is Op.PUT else (),
        )
        await settle(lambda: bool(found))
        return found[0]

    async def put(self, tier: int, pages: Sequence[int]) -> Completion:
        """Page n goes to slot n, or to its own key."""
        return await self.batch(tier, Op.PUT, pages, [memoryview(bytearray(page(n))) for n in pages])

    async def get(self, tier: int, pages: Sequence[int]) -> list[bytes | None]:
        buffers = [bytearray(PAGE_BYTES) for _ in pages]
        completion = await self.batch(tier, Op.GET, pages, [memoryview(each) for each in buffers])
        return [
            bytes(each) if outcome.name == "OK" else None
            for each, outcome in zip(buffers, completion.outcomes, strict=True)
        ]

    async def copy(self, src: int, dst: int, pages: Sequence[int]) -> CopyDone:
        """Copy pages between tiers, from slot n to slot n."""
        keyed = self.ports[src].spec.keyed or self.ports[dst].spec.keyed
        self._copies += 1
        self.copier.copy(
            Copy(
                self._copies,
                1,
                src,
                dst,
                PAGE_BYTES,
                () if self.ports[src].spec.keyed else list(pages),
                () if self.ports[dst].spec.keyed else list(pages),
                keys_of(pages) if keyed else (),
                records_of(pages) if self.ports[dst].spec.keyed else (),
            )
        )
        return await self.finished(self._copies)

    def start_copy_in(
        self, tier: int, pages: Sequence[int], source: object, slots: Sequence[int] = ()
    ) -> int:
        keyed = self.ports[tier].spec.keyed
        self._copies += 1
        self.copier.copy_in(
            CopyIn(
                self._copies,
                1,
                tier,
                PAGE_BYTES,
                pages,
                () if keyed else (slots or list(pages)),
                keys_of(pages) if keyed else (),
                records_of(pages) if keyed else (),
                source,
            )
        )
        return self._copies

    async def copy_in(self, tier: int, pages: Sequence[int], source: object) -> CopyDone:
        return await self.finished(self.start_copy_in(tier, pages, source))

    async def finished(self, copy: int) -> CopyDone:
        await settle(lambda: any(event.copy == copy for event in self.done))
        return next(event for event in self.done if event.copy == copy)

    def corrupt(self, tier: int, slot: int) -> None:
        """Flip a bit of a page in host memory behind the store's back."""
        memory = self.ports[tier].addressable
        assert memory is not None
        memory.views([slot])[0][7] ^= 1

    def check(self, tier: int, slot: int) -> None:
        memory = self.ports[tier].addressable
        assert memory is not None
        assert memory.checksums([slot]) == [checksum(page(slot))]


@contextlib.asynccontextmanager
async def rig(
    tmp_path: Path,
    *,
    chunk_bytes: int = 4 * PAGE_BYTES,
    bounce_bytes: int = 8 * PAGE_BYTES,
    wrap: Callable[[TierPort], None] | None = None,
) -> AsyncIterator[Rig]:
    wake = Wake(asyncio.get_running_loop())
    options = ServiceOptions(
        device="cpu",
        device_bytes=1 << 20,
        host_bytes=1 << 20,
        disk_path=str(tmp_path / "disk"),
        disk_bytes=16 << 20,
        prefault=False,
    )
    stores = open_stores(options, wake.ring)
    assert stores.disk is not None
    stores.disk.put_namespace(FINGERPRINT, SPEC)
    for port in stores.ports:
        if wrap is not None:
            wrap(port)
    made = Rig(stores, wake, chunk_bytes=chunk_bytes, bounce_bytes=bounce_bytes)
    try:
        yield made
        assert made.copier.in_flight == 0
        assert made.copier.queued == 0
    finally:
        wake.close()
        made.workers.close()
        for port in stores.ports:
            port.finish()
        made.poll()


class Altered:
    """A store whose completions a test may change on their way out."""

    def __init__(self, store: PageStore, change: Callable[[Op, Completion], Completion]) -> None:
        self._store = store
        self._change = change
        self._ops: dict[int, Op] = {}
        self.batches: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        self._ops[batch.id] = batch.op
        self.batches.append(batch)
        self._store.submit(batch)

    def poll(self) -> list[Completion]:
        return [self._change(self._ops[each.id], each) for each in self._store.poll()]

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)
