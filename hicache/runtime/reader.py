"""Leased pages as bytes, for clients that cannot map the arena.

Every page is copied out of its tier, verified, and only then is the lease looked at again: if it is still live, the
page was the leased one from the first byte to the last.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from hicache.engine import events
from hicache.engine.actions import FetchResult
from hicache.errors import CorruptError, InvalidArgumentError, NotFoundError, UnavailableError
from hicache.keys import chain_keys
from hicache.runtime.bounce import page_buffer
from hicache.runtime.extents import lease_slots
from hicache.runtime.ports import TierPort
from hicache.runtime.workers import resolve
from hicache.types import Completion, Namespace, Op, Outcome

#: What one stream reads at a time, and all the memory it takes; one page where that is more.
READ_AHEAD_BYTES = 1 << 20


class Leases(Protocol):
    """The engine's reads that this needs."""

    def lease_view(self, session: int, lease: int) -> FetchResult:
        """The lease as it stands; raises NotFoundError."""

    def lease_prompt(self, session: int, lease: int) -> tuple[int, bytes]:
        """Its namespace and the symbols of its pages."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Stream:
    """One read under way."""

    session: int
    lease: int
    namespace: int
    spec: Namespace
    prompt: bytes
    keys: list[bytes]
    port: TierPort


async def get_pages(
    port: TierPort, buffers: Sequence[memoryview], *, slots: Sequence[int], keys: Sequence[bytes]
) -> Completion:
    """Read pages of a tier into buffers, verified there."""
    arrived: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
    port.submit(
        Op.GET,
        lambda completion: resolve(arrived, completion),
        page_bytes=buffers[0].nbytes,
        slots=slots,
        keys=keys,
        buffers=buffers,
    )
    return await arrived


class PageReader:
    """Reads leases, each from the tier that it is in."""

    def __init__(
        self,
        leases: Leases,
        ports: Sequence[TierPort],
        *,
        namespace: Callable[[int], tuple[Namespace, bytes]],
        handle: Callable[[events.Event], None],
    ) -> None:
        self._leases = leases
        self._ports = ports
        self._namespace = namespace
        self._handle = handle

    async def read(
        self, session: int, lease: int, first: int, count: int
    ) -> AsyncIterator[tuple[memoryview, int]]:
        """Pages [first, first + count) with their checksums; ``count`` 0: all from ``first``.

        A page is valid until the next one is asked for. Raises NotFoundError when the lease is gone,
        InvalidArgumentError for pages that it does not grant, CorruptError for a page whose bytes are not what was
        stored (it is not served any more), UnavailableError when the tier fails.
        """
        view = self._leases.lease_view(session, lease)
        granted = view.granted_pages
        last = first + count if count else granted
        if not 0 <= first <= last <= granted:
            raise InvalidArgumentError(
                f"pages {first} to {last} of lease {lease}: it grants {granted}",
                hint="wait for its operation first",
            )
        number, prompt = self._leases.lease_prompt(session, lease)
        spec, fingerprint = self._namespace(number)
        port = self._ports[view.tier]
        keys: list[bytes] = []
        if port.spec.keyed:
            keys = chain_keys(fingerprint, prompt[: last * spec.symbol_bytes], spec.symbol_bytes)
        stream = _Stream(session, lease, number, spec, prompt, keys, port)
        step = max(1, READ_AHEAD_BYTES // spec.page_bytes)
        memory = page_buffer(min(step, last - first) * spec.page_bytes)
        for start in range(first, last, step):
            pages = range(start, min(start + step, last))
            for page in await self._get(stream, pages, memory):
                yield page

    async def _get(self, stream: _Stream, pages: range, memory: memoryview) -> list[tuple[memoryview, int]]:
        size = stream.spec.page_bytes
        buffers = [memory[at * size : (at + 1) * size] for at in range(len(pages))]
        view = self._leases.lease_view(stream.session, stream.lease)
        self._require(stream, view, pages)
        slots = [] if stream.port.spec.keyed else lease_slots(view)[pages.start : pages.stop]
        keys = stream.keys[pages.start : pages.stop]
        completion = await get_pages(stream.port, buffers, slots=slots, keys=keys)
        after = self._leases.lease_view(stream.session, stream.lease)  # raises where it ended meanwhile
        for page, outcome in zip(pages, completion.outcomes, strict=True):
            if outcome is not Outcome.OK:
                self._refuse(stream, page, outcome, completion.error)
        self._require(stream, after, pages)
        return list(zip(buffers, completion.checksums, strict=True))

    def _require(self, stream: _Stream, view: FetchResult, pages: range) -> None:
        if view.granted_pages < pages.stop:
            raise NotFoundError(
                f"lease {stream.lease} lost pages from {view.granted_pages} on: their tier lost them",
                hint="fetch again",
            )

    def _refuse(self, stream: _Stream, page: int, outcome: Outcome, error: str) -> None:
        if outcome is Outcome.FAULT:
            raise UnavailableError(f"page {page} of lease {stream.lease} cannot be read: {error}")
        prompt = stream.prompt[: (page + 1) * stream.spec.symbol_bytes]
        self._handle(events.PageCorrupt(stream.namespace, stream.port.index, prompt))
        raise CorruptError(
            f"page {page} of lease {stream.lease} is not what was stored ({outcome.value})",
            hint="compute it again",
        )
