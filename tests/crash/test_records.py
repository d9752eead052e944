"""Bad records planted in a closed folder: a miss each, counted by kind, kept aside, storable again at once."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from runtime_helpers import PAGE_BYTES, TestClient, running
from xxhash import xxh3_64_intdigest

from hicache.runtime import Service, ServiceOptions
from hicache.tier.codec import HEADER_BYTES
from hicache.tier.inspect import disk_use
from hicache.tier.quarantine import QUARANTINE
from hicache.types import Ack

PAGES, SALTS = 6, 12
DISK_BYTES = 64 << 20


def options(folder: Path, scrub_bytes_per_s: int = 0) -> ServiceOptions:
    return ServiceOptions(
        host_bytes=8 << 20,
        disk_path=str(folder),
        disk_bytes=DISK_BYTES,
        prefault=False,
        scrub_bytes_per_s=scrub_bytes_per_s,
    )


async def fill(folder: Path) -> None:
    async with running(options(folder)) as service:
        client = TestClient(service)
        for salt in range(SALTS):
            assert (await client.store(PAGES, salt, ack=Ack.DURABLE)).durable_pages == PAGES
        await service.drain(10_000)


@contextmanager
def records_of(folder: Path) -> Iterator[dict[bytes, bytes]]:
    """Every record of a closed folder, by key; what is changed is written back behind the store's back."""
    for shard in sorted((folder / "shards").iterdir()):
        with lmdb.open(str(shard), max_dbs=4, map_size=DISK_BYTES) as env:
            table = env.open_db(b"pages", create=False)
            with env.begin(db=table) as txn:
                records = {bytes(key): bytes(value) for key, value in txn.cursor()}
            before = dict(records)
            yield records
            with env.begin(db=table, write=True) as txn:
                for key, record in records.items():
                    if before[key] != record:
                        txn.put(key, record)
        return  # so little fits into the first one


def resealed(record: bytes, at: int, new: bytes) -> bytes:
    """Another header whose checksum is right."""
    head = record[:at] + new + record[at + len(new) : HEADER_BYTES - 8]
    return head + struct.pack("<Q", xxh3_64_intdigest(head)) + record[HEADER_BYTES:]


def spoil(kind: str, record: bytes, other: bytes, rng: random.Random) -> bytes:
    if kind == "corrupt":
        at = rng.randrange(HEADER_BYTES, len(record))
        return record[:at] + bytes([record[at] ^ (1 << rng.randrange(8))]) + record[at + 1 :]
    if kind == "truncated":
        return record[: rng.randrange(1, len(record))]
    if kind == "swapped":
        return other
    if kind == "old-version":
        return resealed(record, 4, struct.pack("<H", 77))
    return rng.randbytes(len(record))


async def read_all(service: Service, client: TestClient) -> int:
    """Every page that can be had, compared with what it must hold."""
    granted = 0
    for salt in range(SALTS):
        for _ in range(PAGES + 1):  # a page that turns out to be bad ends the lease; what is above it stays
            found = await client.fetch(PAGES, salt)
            count = await client.read(found, salt) if found.lease else 0
            if found.lease:
                client.release(found)
            if count == client.match(PAGES, salt):
                break
        granted += count
    return granted


async def store_until_whole(service: Service, client: TestClient) -> None:
    """Store again what is missing; rot behind rot is found in its turn."""
    for _ in range(PAGES):
        for salt in range(SALTS):
            await client.store(PAGES, salt, ack=Ack.DURABLE)
        if await read_all(service, client) == PAGES * SALTS:
            return
    raise AssertionError("pages stay away")


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "swapped", "old-version", "foreign"])
def test_a_bad_record_is_a_miss_and_can_be_stored_again(
    tmp_path: Path, rng: random.Random, kind: str
) -> None:
    folder = tmp_path / "disk"

    async def story() -> None:
        await fill(folder)
        with records_of(folder) as records:
            assert len(records) == PAGES * SALTS
            keys = rng.sample(sorted(records), 10)
            spoiled = {
                key: spoil(kind, records[key], records[keys[at - 1]], rng) for at, key in enumerate(keys)
            }
            records.update(spoiled)
        async with running(options(folder)) as service:
            await service.recovered()
            client = TestClient(service)
            granted = await read_all(service, client)
            assert granted < PAGES * SALTS
            disk = next(tier for tier in service.stats().tiers if tier.kind == "disk")
            assert 1 <= disk.corrupt_pages <= 10
            house = service._running
            assert house.stores.disk is not None
            seen = house.stores.disk.stats
            assert sum(seen.corrupt.values()) == seen.purged_pages == disk.corrupt_pages
            assert len(seen.corrupt) <= (1 if kind in {"swapped", "old-version", "foreign"} else 3), (
                seen.corrupt
            )
            counters = service.stats().counters
            shown = sum(count for name, count in counters.items() if name.startswith("bad_records_"))
            assert shown == disk.corrupt_pages == counters["quarantined_pages"]
            kept = list((folder / QUARANTINE).iterdir())
            assert len(kept) == seen.quarantined_pages == disk.corrupt_pages
            assert {file.read_bytes() for file in kept} <= set(spoiled.values())
            assert disk_use(folder) <= DISK_BYTES
            await store_until_whole(service, client)

    asyncio.run(story())


def test_the_scrubber_finds_them_before_anybody_asks(tmp_path: Path, rng: random.Random) -> None:
    folder = tmp_path / "disk"

    async def story() -> None:
        await fill(folder)
        with records_of(folder) as records:
            keys = rng.sample(sorted(records), 9)
            for at, key in enumerate(keys):
                kind = ("corrupt", "truncated", "swapped")[at % 3]
                records[key] = spoil(kind, records[key], records[keys[at - 1]], rng)
        async with running(options(folder, scrub_bytes_per_s=1 << 30)) as service:
            for _ in range(1000):
                counters = service.stats().counters
                if counters["scrub_passes"] and counters["quarantined_pages"] == 9:
                    break
                await asyncio.sleep(0.01)
            assert counters["scrubbed_pages"] == PAGES * SALTS
            assert counters["scrub_corrupt_pages"] == 9
            assert counters["quarantined_pages"] == 9
            await service.recovered()
            client = TestClient(service)
            assert await read_all(service, client) < PAGES * SALTS, "what is gone is a miss"
            await store_until_whole(service, client)

    asyncio.run(story())


def test_quarantine_is_bounded(tmp_path: Path, rng: random.Random) -> None:
    """A 64th of the capacity at most, the oldest out first."""
    folder = tmp_path / "disk"

    async def story() -> None:
        async with running(
            ServiceOptions(host_bytes=32 << 20, disk_path=str(folder), disk_bytes=DISK_BYTES, prefault=False)
        ) as service:
            client = TestClient(service)
            for salt in range(40):
                await client.store(20, salt, ack=Ack.DURABLE)
            await service.drain(10_000)
        with records_of(folder) as records:
            for key, record in records.items():
                records[key] = spoil("corrupt", record, b"", rng)
            count = len(records)
        async with running(options(folder, scrub_bytes_per_s=1 << 30)) as service:
            while not service.stats().counters["scrub_passes"]:
                await asyncio.sleep(0.01)
            house = service._running
            assert house.stores.disk is not None
            while house.stores.disk.stats.purged_pages < count:
                await asyncio.sleep(0.01)
        held = sum(-(-file.stat().st_size // 4096) * 4096 for file in (folder / QUARANTINE).iterdir())
        assert count * 8192 > DISK_BYTES // 64 >= held > DISK_BYTES // 128

    asyncio.run(story())


assert PAGE_BYTES == 4096, "the figures above are made for this"
