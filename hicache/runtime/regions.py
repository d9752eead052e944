"""Shared memory between sessions and the service.

Client regions are the session's own: we own a descriptor, only ever pread it, and close it when the session ends and
the copies under way are done. Arena regions are ours: each time a segment of a mappable tier is opened it becomes a
region with an id of its own; when the segment is closed the region retires, and its room is used again only when every
session that was handed its descriptor has said that it no longer maps it, or has ended.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import logging
import os
from collections.abc import Callable, Iterable

from hicache.device.kv import SharedMemory
from hicache.errors import HicacheError, InvalidArgumentError, NotFoundError
from hicache.runtime.mapping import Layout, Mappable, SharedPool

_log = logging.getLogger(__name__)


class RegionKind(enum.Enum):
    """What a session's own region is."""

    CLIENT = "client"  # memory that Commit copies pages from
    KV = "kv"  # an engine's paged KV
    TIMELINE = "timeline"  # counters, made here


@dataclasses.dataclass(frozen=True, slots=True)
class RegionInfo:
    """A session's own region."""

    region_id: int
    size_bytes: int
    kind: RegionKind = RegionKind.CLIENT


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaInfo:
    """One arena region: what a client needs to read it."""

    region_id: int
    tenant: str
    size_bytes: int
    page_bytes: int
    first_slot_offset: int
    slot_stride: int
    slots: int
    memory: SharedMemory | None = None  # of a device's pool: how it is mapped; its slots have no counters


class ClientRegion:
    """A descriptor that a client gave us, closed when nobody needs it any more."""

    def __init__(self, region_id: int, session: int, fd: int, size_bytes: int) -> None:
        self.info = RegionInfo(region_id, size_bytes)
        self.session = session
        self.fd = fd
        self._holds = 1  # the registry's

    def hold(self) -> None:
        """A copy reads from it."""
        self._holds += 1

    def release(self) -> None:
        """Undo one ``hold``."""
        assert self._holds > 0, "a region was released twice"
        self._holds -= 1
        if not self._holds:
            os.close(self.fd)
            self.fd = -1


@dataclasses.dataclass(slots=True)
class _Retiring:
    arena: ArenaInfo
    waiting_for: set[int]
    then: Callable[[bool], None]


class RegionRegistry:
    """All regions of one service. The loop's thread owns it.

    ``on_retired(tenant, region_id)``: tells that tenant's sessions, answers those that must confirm.
    """

    def __init__(self) -> None:
        self.on_retired: Callable[[str, int], set[int]] = lambda _tenant, _region: set()
        self._ids = itertools.count(1)
        self._clients: dict[int, ClientRegion] = {}
        self._arenas: dict[tuple[int, int], ArenaInfo] = {}  # (tier, segment)
        self._fds: dict[int, tuple[ArenaInfo, Callable[[], int]]] = {}  # region -> (info, its descriptor)
        self._pools: dict[int, Callable[[], SharedMemory]] = {}  # of those, a device's: how it is mapped
        self._retiring: dict[int, _Retiring] = {}
        self._unsure: set[int] = set()  # of these regions somebody may keep a mapping for as long as it lives

    def next_id(self) -> int:
        """For a region that somebody else keeps: numbers are unique among all kinds."""
        return next(self._ids)

    # --- clients' own

    def register(self, session: int, fd: int) -> RegionInfo:
        """Take a descriptor over, whatever comes of it. Raises InvalidArgumentError for one that is not open."""
        try:
            size_bytes = os.fstat(fd).st_size
        except OSError as error:
            raise InvalidArgumentError(f"the region's descriptor cannot be used: {error}") from error
        region = ClientRegion(next(self._ids), session, fd, size_bytes)
        self._clients[region.info.region_id] = region
        return region.info

    def unregister(self, session: int, region: int) -> None:
        """Forget a region of the session; unknown ones are fine. Copies under way finish first."""
        found = self._clients.get(region)
        if found is not None and found.session == session:
            del self._clients[region]
            found.release()

    def find(self, session: int, region: int) -> ClientRegion:
        """A region of the session. Raises NotFoundError for one that it has not registered."""
        found = self._clients.get(region)
        if found is None or found.session != session:
            raise NotFoundError(
                f"region {region} is not registered by this session", hint="register it first"
            )
        return found

    def end_session(self, session: int) -> None:
        """Let go of everything of a session; it maps nothing any more, or that is no concern of ours."""
        for region in [each.info.region_id for each in self._clients.values() if each.session == session]:
            self.unregister(session, region)
        for region in list(self._retiring):
            self.released(session, region)

    # --- arenas

    def arenas(self, tenant: str) -> list[ArenaInfo]:
        """The tenant's arena regions."""
        mine = [arena for arena in self._arenas.values() if arena.tenant == tenant]
        return [seen for arena in mine if (seen := self._seen(arena)) is not None]

    def _seen(self, arena: ArenaInfo) -> ArenaInfo | None:
        """The region as a client is told of it; None for one of a pool that cannot be mapped, or not yet."""
        share = self._pools.get(arena.region_id)
        if share is None:
            return arena
        try:
            return dataclasses.replace(arena, memory=share())
        except HicacheError as error:
            _log.debug("region %d is not listed: %s", arena.region_id, error)
            return None

    def arena_fd(self, tenant: str, region: int) -> int:
        """The descriptor of an arena region: pass it on, never close it. Raises NotFoundError for another's."""
        found = self._fds.get(region)
        if found is None or found[0].tenant != tenant:
            raise NotFoundError(f"arena region {region} is gone or never was", hint="list the regions again")
        fd = found[1]()
        if fd < 0:
            raise NotFoundError(
                f"region {region} has no descriptor", hint="it is mapped by its CUDA IPC handle"
            )
        return fd

    def arena_at(self, tier: int, segment: int) -> ArenaInfo:
        """The region that an open segment of a mappable tier is."""
        return self._arenas[tier, segment]

    def arena_opened(self, tier: int, segment: int, tenant: str, store: Mappable) -> None:
        """A segment was opened."""
        self._opened(tier, segment, self._arena(tenant, store.layout(segment)), lambda: store.fd(segment))

    def pool_opened(self, tier: int, segment: int, tenant: str, store: SharedPool) -> None:
        """A segment of a device's pool was opened, which other processes may map."""
        arena = self._arena(tenant, store.layout(segment))
        self._pools[arena.region_id] = lambda: store.shared(segment)
        self._opened(tier, segment, arena, lambda: store.shared(segment).fd)

    def _arena(self, tenant: str, layout: Layout) -> ArenaInfo:
        return ArenaInfo(
            next(self._ids),
            tenant,
            layout.size_bytes,
            layout.page_bytes,
            layout.first_slot_offset,
            layout.stride,
            layout.slots,
        )

    def _opened(self, tier: int, segment: int, arena: ArenaInfo, fd: Callable[[], int]) -> None:
        assert (tier, segment) not in self._arenas, "a segment was opened twice"
        self._arenas[tier, segment] = arena
        self._fds[arena.region_id] = (arena, fd)

    def may_stay_mapped(self, regions: Iterable[int]) -> None:
        """A session that had these handed out has ended, and its process may live on and keep what it has mapped."""
        self._unsure.update(region for region in regions if region in self._fds or region in self._retiring)

    def arena_retired(self, tier: int, segment: int, then: Callable[[bool], None]) -> None:
        """A segment is being closed; ``then`` is called when no session maps it any more, perhaps at once.

        It gets whether that is certain: whoever was handed the memory has said so, or is dead.
        """
        arena = self._arenas.pop((tier, segment), None)
        if arena is None:  # it could never be opened
            then(True)  # noqa: FBT003
            return
        del self._fds[arena.region_id]
        self._pools.pop(arena.region_id, None)
        waiting_for = set(self.on_retired(arena.tenant, arena.region_id))
        if waiting_for:
            self._retiring[arena.region_id] = _Retiring(arena, waiting_for, then)
        else:
            self._gone(arena.region_id, then)

    def _gone(self, region: int, then: Callable[[bool], None]) -> None:
        sure = region not in self._unsure
        self._unsure.discard(region)
        then(sure)

    def released(self, session: int, region: int) -> None:
        """A session maps a retired region no longer. Anything else that it may say is ignored."""
        retiring = self._retiring.get(region)
        if retiring is None:
            return
        retiring.waiting_for.discard(session)
        if not retiring.waiting_for:
            del self._retiring[region]
            self._gone(region, retiring.then)

    @property
    def retiring(self) -> int:
        """Arena regions that wait for sessions to unmap them."""
        return len(self._retiring)

    def close(self) -> None:
        """Let go of every client region."""
        for region in list(self._clients.values()):
            self.unregister(region.session, region.info.region_id)
        self._retiring.clear()
