"""Messages of paged KV: registrations, loads, and commits out of a KV region."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hicache.device.kv import MemoryKind, PagedKv, Places, SharedMemory
from hicache.rpc.client.kv import Counter, Loaded
from hicache.rpc.pb import cache_pb2, region_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class LoadAsk:
    """What a caller asks of Load. ``layers``: how many, from ``first_layer``."""

    places: Places
    first_page: int
    first_layer: int
    layers: int
    verify: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StoreAsk:
    """What a caller asks of a Commit out of a KV region. ``wait_ms``: for the layers; 0: the reservation's time."""

    places: Places
    first_page: int
    durable: bool
    last: bool
    wait_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a transfer goes: the session's KV region, and its counter."""

    session_id: bytes
    region_id: int
    counter: Counter | None

    @property
    def timeline_id(self) -> int:
        """0: no counter."""
        return self.counter.timeline.region_id if self.counter is not None else 0

    @property
    def index(self) -> int:
        """Of the counter in its timeline."""
        return self.counter.index if self.counter is not None else 0


def register_kv(
    session_id: bytes, request_id: bytes, kv: PagedKv, tokens: Mapping[int, bytes]
) -> region_pb2.RegisterRequest:
    """A KV region. ``tokens``: of the descriptors that were sent, by the place of their memory."""
    message = region_pb2.PagedKv(
        memories=[_memory(memory, tokens.get(at, b"")) for at, memory in enumerate(kv.memories)],
        plane_memory=kv.plane_memory,
        plane_offset=kv.plane_offset,
        planes_per_layer=kv.planes_per_layer,
        blocks=kv.blocks,
        block_tokens=kv.block_tokens,
        heads=kv.heads,
        head_size=kv.head_size,
        element_bytes=kv.element_bytes,
        strides=kv.strides,
        page_offset=kv.page_offset,
    )
    return region_pb2.RegisterRequest(session_id=session_id, request_id=request_id, kv=message)


def _memory(memory: SharedMemory, token: bytes) -> region_pb2.Memory:
    message = region_pb2.Memory(size_bytes=memory.size_bytes, device_uuid=memory.device_uuid)
    match memory.kind:
        case MemoryKind.MEMFD:
            message.fd_token = token
        case MemoryKind.CUDA_FD:
            message.cuda_fd_token = token
        case MemoryKind.CUDA_IPC:
            message.cuda_ipc = memory.handle
    return message


def register_timeline(session_id: bytes, request_id: bytes, counters: int) -> region_pb2.RegisterRequest:
    """Counters that the server is to make."""
    timeline = region_pb2.Timeline(counters=counters)
    return region_pb2.RegisterRequest(session_id=session_id, request_id=request_id, timeline=timeline)


def load(route: Route, request_id: bytes, lease: int, ask: LoadAsk) -> cache_pb2.LoadRequest:
    """Leased pages into a KV region."""
    return cache_pb2.LoadRequest(
        session_id=route.session_id,
        request_id=request_id,
        lease_id=lease,
        region_id=route.region_id,
        first_page=ask.first_page,
        page_units=ask.places.shape[1],
        places=ask.places.astype("<i8").tobytes(),
        first_layer=ask.first_layer,
        layers=ask.layers,
        timeline_id=route.timeline_id,
        counter=route.index,
        unverified=not ask.verify,
    )


def parse_loaded(message: cache_pb2.LoadResponse) -> Loaded:
    """The answer to Load."""
    return Loaded(
        message.loaded_pages,
        tuple(message.missing_pages),
        tuple(message.corrupt_pages),
        message.reason,
        message.moved_bytes,
    )


def commit(route: Route, request_id: bytes, reservation: int, ask: StoreAsk) -> cache_pb2.CommitRequest:
    """Reserved pages out of a KV region."""
    pages = len(ask.places)
    pieces = [(ask.first_page, pages, route.region_id, 0)] if pages else []
    return cache_pb2.CommitRequest(
        session_id=route.session_id,
        request_id=request_id,
        reservation_id=reservation,
        first_page=[piece[0] for piece in pieces],
        pages=[piece[1] for piece in pieces],
        region_id=[piece[2] for piece in pieces],
        offset=[piece[3] for piece in pieces],
        durable=ask.durable,
        last=ask.last,
        page_units=ask.places.shape[1] if pages else 0,
        places=ask.places.astype("<i8").tobytes(),
        timeline_id=route.timeline_id if pages else 0,
        counter=route.index if pages else 0,
        layers_wait_ms=ask.wait_ms if pages else 0,
    )
