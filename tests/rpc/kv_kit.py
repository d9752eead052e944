"""An engine's paged KV in a memfd, what a raw client says of it, and the bytes that pages have in it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from server_kit import PAGE_BYTES, PAGE_TOKENS, Attached, Client, House, serving, tokens
from xxhash import xxh3_64_intdigest

from hicache.device.opening import KvTransfers
from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2
from hicache.runtime import Service, ServiceOptions

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE, ELEMENT_BYTES = 4, 16, 8, 2, 32, 2
PLANES = 2 * LAYERS
TOKEN_BYTES = HEADS * HEAD_SIZE * ELEMENT_BYTES
assert PLANES * PAGE_TOKENS * TOKEN_BYTES == PAGE_BYTES


class Kv:
    """``planes``: bytes, [planes, blocks * block_tokens, token_bytes], in a memfd that cannot shrink."""

    def __init__(self, *, planes: int = PLANES, token_bytes: int = TOKEN_BYTES, seal: bool = True) -> None:
        shape = (planes, BLOCKS * BLOCK_TOKENS, token_bytes)
        self.size_bytes = int(np.prod(shape))
        self.fd = os.memfd_create("engine", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size_bytes)
        if seal:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, self.size_bytes)
        self.planes = np.frombuffer(self.map, np.uint8).reshape(shape)
        self.token_bytes = token_bytes

    def fill(self, seed: int) -> None:
        self.planes[:] = np.random.default_rng(seed).integers(0, 256, self.planes.shape, np.uint8)

    def page(self, places: list[int]) -> bytes:
        """A page whose units lie at these places."""
        tokens = PAGE_TOKENS // len(places)
        rows = np.concatenate([np.arange(place, place + tokens) for place in places])
        return self.planes[:, rows].tobytes()

    def message(self, token: bytes, **changes: Any) -> region_pb2.PagedKv:
        stride = (BLOCK_TOKENS * self.token_bytes, self.token_bytes, HEAD_SIZE * ELEMENT_BYTES, ELEMENT_BYTES)
        planes = len(self.planes)
        plane_bytes = self.size_bytes // planes
        fields: dict[str, Any] = {
            "memories": [region_pb2.Memory(size_bytes=self.size_bytes, fd_token=token)],
            "plane_memory": [0] * planes,
            "plane_offset": [plane * plane_bytes for plane in range(planes)],
            "planes_per_layer": 2,
            "blocks": BLOCKS,
            "block_tokens": BLOCK_TOKENS,
            "heads": self.token_bytes // (HEAD_SIZE * ELEMENT_BYTES),
            "head_size": HEAD_SIZE,
            "element_bytes": ELEMENT_BYTES,
            "strides": [each // ELEMENT_BYTES for each in stride],
        }
        return region_pb2.PagedKv(**(fields | changes))

    def close(self) -> None:
        del self.planes
        self.map.close()
        os.close(self.fd)


def packed(places: list[list[int]]) -> bytes:
    return np.array(places, "<i8").tobytes()


class Counters:
    """A timeline as its session maps it."""

    def __init__(self, fd: int, counters: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, counters * 8)

    def get(self, number: int) -> int:
        return int.from_bytes(self.map[8 * number : 8 * number + 8], "little")

    def set(self, number: int, value: int) -> None:
        self.map[8 * number : 8 * number + 8] = value.to_bytes(8, "little")

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Engine:
    """A raw session: one attached client, its namespace, and short words for its calls."""

    def __init__(self, client: Client, attached: Attached, namespace: int) -> None:
        self.client, self.attached, self.namespace = client, attached, namespace
        self.id = attached.id

    @classmethod
    async def attach(cls, client: Client, **spec: Any) -> Engine:
        attached = await client.attach()
        return cls(client, attached, await client.namespace(attached, **spec))

    async def put(self, fd: int) -> bytes:
        return (await self.client.transact(fdproto.Put(self.id), (fd,))).payload

    async def register(self, kv: Kv, request_id: bytes = b"", **changes: Any) -> int:
        message = kv.message(await self.put(kv.fd), **changes)
        request = region_pb2.RegisterRequest(session_id=self.id, request_id=request_id, kv=message)
        return int((await self.client.region.Register(request)).region_id)

    async def timeline(self, counters: int = 4) -> tuple[int, Counters]:
        request = region_pb2.RegisterRequest(
            session_id=self.id, timeline=region_pb2.Timeline(counters=counters)
        )
        made = await self.client.region.Register(request)
        assert made.size_bytes == 8 * counters
        (fd,) = (await self.client.transact(fdproto.Get(self.id, made.region_id))).fds
        return made.region_id, Counters(fd, counters)

    async def unregister(self, region: int) -> None:
        request = region_pb2.UnregisterRequest(session_id=self.id, region_id=region)
        await self.client.region.Unregister(request)

    async def reserve(self, pages: int, **fields: Any) -> Any:
        prompt = tokens(PAGE_TOKENS * pages)
        return await self.client.cache.Reserve(
            cache_pb2.ReserveRequest(
                session_id=self.id, namespace_id=self.namespace, prompt=prompt, wait_ms=1000, **fields
            )
        )

    def commit_request(self, region: int, reservation: int, places: list[list[int]], **fields: Any) -> Any:
        said = {
            "reservation_id": reservation,
            "first_page": [0],
            "pages": [len(places)],
            "region_id": [region],
            "offset": [0],
            "page_units": len(places[0]),
            "places": packed(places),
            "last": True,
        }
        return cache_pb2.CommitRequest(session_id=self.id, **(said | fields))

    async def commit(self, region: int, reservation: int, places: list[list[int]], **fields: Any) -> Any:
        return await self.client.cache.Commit(self.commit_request(region, reservation, places, **fields))

    async def store(self, region: int, places: list[list[int]], **fields: Any) -> Any:
        """Reserve and commit pages of the one prompt of these tests."""
        reserved = await self.reserve(len(places))
        return await self.commit(region, reserved.reservation_id, places, **fields)

    async def fetch(self, pages: int, **fields: Any) -> Any:
        prompt = tokens(PAGE_TOKENS * pages)
        return await self.client.cache.Fetch(
            cache_pb2.FetchRequest(
                session_id=self.id, namespace_id=self.namespace, prompt=prompt, wait_ms=2000, **fields
            )
        )

    async def release(self, lease: int) -> None:
        await self.client.cache.ReleaseLeases(
            cache_pb2.ReleaseLeasesRequest(session_id=self.id, lease_ids=[lease])
        )

    def load_request(self, lease: int, region: int, places: list[list[int]], **fields: Any) -> Any:
        said = {
            "lease_id": lease,
            "region_id": region,
            "page_units": len(places[0]),
            "places": packed(places),
        }
        return cache_pb2.LoadRequest(session_id=self.id, **(said | fields))

    async def load(self, lease: int, region: int, places: list[list[int]], **fields: Any) -> Any:
        return await self.client.cache.Load(self.load_request(lease, region, places, **fields))


@contextlib.asynccontextmanager
async def engine(
    tmp_path: Path, *, open_transfers: Any = None, server: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[House, Engine]]:
    """A server over a real service with a host tier, and a session."""
    options: dict[str, Any] = {"host_bytes": 8 << 20, "host_segment_bytes": 1 << 20, "prefault": False}
    more = {} if open_transfers is None else {"open_transfers": open_transfers}
    service = Service(ServiceOptions(**(options | settings)), **more)
    await service.start()
    try:
        async with serving(tmp_path, service, **(server or {})) as house:
            yield house, await Engine.attach(house.client)
        service.check()
    finally:
        await service.close()


def checksum(data: bytes) -> int:
    return int(xxh3_64_intdigest(data))


class Stepped:
    """Opens transfers that move only when a test says so."""

    def __init__(self) -> None:
        self.transfers: KvTransfers | None = None

    def __call__(self, store: Any, notify: Any, *, now_ns: Any) -> KvTransfers:
        self.transfers = KvTransfers(store, notify, now_ns, threaded=False)
        return self.transfers

    def step(self) -> bool:
        assert self.transfers is not None
        return self.transfers.step()

    async def finish(self) -> None:
        """Until nothing moves any more, and everybody has heard of it."""
        idle = 0
        while idle < 20:
            idle = 0 if self.step() else idle + 1
            await asyncio.sleep(0.001)


def mappings(name: str) -> int:
    """How often this process has a memfd of this name mapped."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"memfd:{name}")
