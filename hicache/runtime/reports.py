"""What readers in shared memory say of pages whose checksums said no: checked here before anything follows from it.

A page is read again as any other read of its tier, on that tier's own threads, which compare the checksum. Only what
they find bad leaves; so a false report costs its reader a little reading, and nobody else anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from hicache.engine import PagePlace, events
from hicache.engine.actions import FetchResult
from hicache.errors import InvalidArgumentError
from hicache.keys import chain_keys
from hicache.runtime.bounce import page_buffer
from hicache.runtime.door import Door
from hicache.runtime.extents import lease_slots
from hicache.runtime.ports import TierPort
from hicache.runtime.reader import READ_AHEAD_BYTES, get_pages
from hicache.types import Namespace, Outcome

#: What a read of a page that should be there can show.
BAD = frozenset({Outcome.CORRUPT, Outcome.MISS})


class Reads(Protocol):
    """The engine's reads that this needs."""

    def lease_view(self, session: int, lease: int) -> FetchResult:
        """The lease as it stands; raises NotFoundError."""

    def lease_prompt(self, session: int, lease: int) -> tuple[int, bytes]:
        """Its namespace and the symbols of its pages."""

    def page_places(self, namespace: int, prompt: bytes) -> list[PagePlace]:
        """The tiers in which the last page of a prompt is, with its slots."""


class CorruptReports:
    """Takes reports about pages of leases."""

    def __init__(
        self,
        reads: Reads,
        ports: Sequence[TierPort],
        *,
        door: Door,
        namespace: Callable[[int], tuple[Namespace, bytes]],
        handle: Callable[[events.Event], None],
    ) -> None:
        self._reads = reads
        self._ports = ports
        self._door = door
        self._namespace = namespace
        self._handle = handle

    async def report(self, session: int, lease: int, pages: Sequence[int]) -> int:
        """Look at these pages of a lease again; answers how many were bad, and have left.

        A bad page leaves every tier whose copy is bad; a sound copy elsewhere goes on to serve. Pages that the lease
        does not grant any more are passed over: somebody else has seen it. Raises NotFoundError where the lease is
        gone, or goes meanwhile; InvalidArgumentError for pages that it never had; StaleError, UnavailableError.
        """
        self._door.require(session)
        view = self._reads.lease_view(session, lease)
        if any(not 0 <= page < view.matched_pages for page in pages):
            raise InvalidArgumentError(f"lease {lease} has {view.matched_pages} pages")
        number, prompt = self._reads.lease_prompt(session, lease)
        spec, fingerprint = self._namespace(number)
        wanted = sorted({page for page in pages if page < view.granted_pages})
        if not wanted:
            return 0
        port = self._ports[view.tier]
        last = (wanted[-1] + 1) * spec.symbol_bytes
        keys = chain_keys(fingerprint, prompt[:last], spec.symbol_bytes) if port.spec.keyed else []
        before = lease_slots(view)
        bad = await _bad(port, wanted, spec.page_bytes, before, keys)
        self._door.require(session)
        now = self._reads.lease_view(session, lease)  # raises where it ended, and what was read means nothing
        after = lease_slots(now)
        bad = [page for page in bad if page < now.granted_pages and before[page] == after[page]]
        for page in bad:
            upto = prompt[: (page + 1) * spec.symbol_bytes]
            self._handle(events.PageCorrupt(number, port.index, upto))
        for page in bad:
            await self._elsewhere(port, number, prompt[: (page + 1) * spec.symbol_bytes])
        return len(bad)

    async def _elsewhere(self, bad: TierPort, number: int, prompt: bytes) -> None:
        """Look at the other copies of a page that was bad in a tier: what harmed it may have harmed them."""
        spec, fingerprint = self._namespace(number)
        key = chain_keys(fingerprint, prompt, spec.symbol_bytes)[-1]
        memory = page_buffer(spec.page_bytes)
        for place in self._reads.page_places(number, prompt):
            port = self._ports[place.tier]
            if port is bad:
                continue
            keyed = port.spec.keyed
            completion = await get_pages(
                port, [memory], slots=[] if keyed else [place.slot], keys=[key] if keyed else []
            )
            if completion.outcomes[0] in BAD and place in self._reads.page_places(number, prompt):
                self._handle(events.PageCorrupt(number, place.tier, prompt))


async def _bad(
    port: TierPort, pages: Sequence[int], page_bytes: int, slots: Sequence[int], keys: Sequence[bytes]
) -> list[int]:
    """Those that the lease's tier does not have as they were stored."""
    step = max(1, READ_AHEAD_BYTES // page_bytes)
    memory = page_buffer(min(step, len(pages)) * page_bytes)
    found: list[int] = []
    for start in range(0, len(pages), step):
        part = pages[start : start + step]
        completion = await get_pages(
            port,
            [memory[at * page_bytes : (at + 1) * page_bytes] for at in range(len(part))],
            slots=[] if keys else [slots[page] for page in part],
            keys=[keys[page] for page in part] if keys else [],
        )
        found += [page for page, outcome in zip(part, completion.outcomes, strict=True) if outcome in BAD]
    return found
