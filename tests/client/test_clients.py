"""Both clients against a real sidecar."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from hicache.errors import (
    ConfigError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from hicache.types import Use

PAGE = 64 << 10
PAGES = 12
TOKENS = np.arange(64 * PAGES + 5, dtype=np.int32)


def pages_of(seed: int = 1, count: int = PAGES, page_bytes: int = PAGE) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, page_bytes), dtype=np.uint8)


def namespace(client: Any, **fields: Any) -> Any:
    return client.namespace(**({"model": "m", "page_bytes": PAGE} | fields))


@pytest.mark.parametrize("plane", ["shm", "stream"])
def test_what_is_stored_is_read_back(make_client: Any, sidecar: Any, plane: str) -> None:
    async def scenario() -> None:
        data = pages_of()
        async with make_client(sidecar.target, data_plane=plane) as client:
            cache = namespace(client)
            assert (await cache.match(TOKENS)).matched_pages == 0
            async with await cache.fetch(TOKENS) as miss:
                assert len(miss) == 0 and not miss.operation
                assert await miss.views() == []
            stored = await cache.store(TOKENS, data)
            assert (stored.present_pages, stored.committed.stored_pages) == (0, PAGES)
            found = await cache.match(TOKENS.tolist(), touch=True, use=Use("chat"))
            assert (found.matched_pages, found.matched_tokens) == (PAGES, 64 * PAGES)
            assert found.run_tiers == ("host",)
            async with await cache.fetch(TOKENS, wait_ms=1000) as lease:
                assert len(lease) == lease.granted_pages == lease.matched_pages == PAGES
                assert lease.tier_pages == {"host": PAGES}
                assert lease.zero_copy == (plane == "shm")
                await read_all_ways(lease, data)
            assert not lease.still_valid()
            with pytest.raises(NotFoundError, match="released"):
                await lease.views()
            again = await cache.store(TOKENS, data, use=Use("chat", 2, 0.5))
            assert (again.present_pages, again.committed.stored_pages) == (PAGES, 0)

    asyncio.run(scenario())


async def read_all_ways(lease: Any, data: Any) -> None:
    views = await lease.views()
    assert all(view.readonly for view in views)
    assert [bytes(view) for view in views] == [row.tobytes() for row in data]
    arrays = await lease.numpy(np.uint16)
    assert not arrays[0].flags.writeable
    assert (np.stack(arrays) == data.view(np.uint16)).all()
    whole = np.zeros_like(data)
    assert await lease.copy_into(whole) == PAGES
    assert (whole == data).all()
    part = bytearray(3 * PAGE)
    assert await lease.copy_into(part, first=2, count=3, verify="off") == 3
    assert bytes(part) == data[2:5].tobytes()
    single = [bytearray(PAGE) for _ in range(2)]
    assert await lease.copy_into(single, first=PAGES - 2) == 2
    assert single[1] == data[-1].tobytes()
    with pytest.raises(InvalidArgumentError, match="not in a lease"):
        await lease.copy_into(whole, first=1, count=PAGES)
    with pytest.raises(InvalidArgumentError, match="too small"):
        await lease.copy_into(bytearray(PAGE), count=2)
    with pytest.raises(InvalidArgumentError, match="read-only"):
        await lease.copy_into(bytes(PAGE), count=1)
    assert lease.still_valid()
    await lease.renew(60_000)
    assert 50_000 < lease.remaining_ms < 60_000


def test_a_reservation_commits_in_parts_and_aborts_the_rest(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        data = pages_of()
        async with make_client(sidecar.target) as client:
            cache = namespace(client)
            async with await cache.reserve(TOKENS) as room:
                assert list(room.missing) == list(range(PAGES))
                for page in range(4):
                    await room.write(page, data[page])
                view = room.buffer(4)
                view[:] = data[4].data
                assert (await room.commit([0, 1], last=False)).stored_pages == 2
                assert (await room.commit(last=False, durable=False)).stored_pages == 3
                with pytest.raises(ValueError, match="released"):
                    view[0] = 1  # the commit took it back
                with pytest.raises(InvalidArgumentError, match="committed already"):
                    room.buffer(0)
                with pytest.raises(InvalidArgumentError, match="not missing"):
                    room.buffer(PAGES)
                with pytest.raises(InvalidArgumentError, match="bytes given"):
                    await room.write(5, b"short")
                room.buffer(5)
            assert room.ended
            assert (await cache.match(TOKENS)).matched_pages == 5
            assert client.core.memory.used_bytes == 0
            with contextlib.suppress(RuntimeError):
                async with await cache.reserve(TOKENS) as room:
                    assert room.present_pages == 5
                    await room.write(5, data[5])
                    raise RuntimeError("the engine failed")
            assert (await cache.match(TOKENS)).matched_pages == 5
            assert client.core.memory.used_bytes == 0
            stats = await client.admin.stats()
            assert (stats.reservations, stats.leases) == (0, 0)

    asyncio.run(scenario())


def test_load_and_store_with_functions_and_tensors(make_client: Any, sidecar: Any) -> None:
    torch = pytest.importorskip("torch")

    async def scenario() -> None:
        data = pages_of()
        async with make_client(sidecar.target) as client:
            cache = namespace(client)

            def fill(page: int, view: memoryview) -> None:
                view[:] = data[page].data

            assert (await cache.store(torch.from_numpy(TOKENS), fill)).committed.stored_pages == PAGES
            into = torch.zeros((PAGES, PAGE // 2), dtype=torch.bfloat16)
            assert await cache.load(TOKENS, into) == PAGES
            assert (into.view(torch.uint8).numpy() == data).all()
            half = np.zeros((PAGES // 2, PAGE), np.uint8)
            assert await cache.load(TOKENS, half) == PAGES // 2
            async with await cache.fetch(TOKENS, max_pages=3) as lease:
                tensor = await lease.torch(torch.bfloat16)
                assert tensor.shape == (3, PAGE // 2)
                assert (tensor.view(torch.uint8).numpy() == data[:3]).all()
                with pytest.raises(UnsupportedError, match="kills this process"):
                    await lease.torch(copy=False)

    asyncio.run(scenario())


def test_extra_keys_and_hashes_tell_prompts_apart(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        data = pages_of()
        async with make_client(sidecar.target) as client:
            images = namespace(client, extra_key_bytes=16)
            one, two = [bytes(16)] * PAGES, [b"", *[b"\1" * 16] * (PAGES - 1)]
            await images.store(TOKENS, data, extra_keys=one)
            assert (await images.match(TOKENS, extra_keys=one)).matched_pages == PAGES
            assert (await images.match(TOKENS, extra_keys=two)).matched_pages == 1
            hashed = namespace(client, symbol_kind="hashes", symbol_hash_bytes=16)
            hashes = [os.urandom(16) for _ in range(PAGES)]
            await hashed.store(hashes, data)
            assert (await hashed.match(b"".join(hashes))).matched_pages == PAGES
            assert (await hashed.match([*hashes[:2], bytes(16)])).matched_pages == 2

    asyncio.run(scenario())


def test_many_leases_go_with_one_call(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            leases = [await cache.fetch(TOKENS, ttl_ms=1000) for _ in range(3)]
            assert await client.renew(leases, 60_000) == []
            assert all(lease.remaining_ms > 50_000 for lease in leases)
            await client.release(leases)
            assert not any(lease.still_valid() for lease in leases)
            assert (await client.admin.stats()).leases == 0

    asyncio.run(scenario())


def test_an_expired_lease_is_refused(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            lease = await cache.fetch(TOKENS, ttl_ms=200)
            assert lease.still_valid()
            await asyncio.sleep(0.25)
            assert not lease.still_valid()
            with pytest.raises(NotFoundError, match="expired"):
                await lease.copy_into(bytearray(PAGES * PAGE))
            await lease.release()

    asyncio.run(scenario())


def test_admin_calls(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            pin = await client.admin.pin(cache_of(cache), TOKENS, "host")
            assert (pin.pages, pin.pin > 0) == (PAGES, True)
            kept = await client.admin.clear()
            assert (kept.pages, kept.kept_pages) == (0, PAGES)
            await client.admin.unpin(pin.pin)
            assert (await client.admin.tree(cache_of(cache))).nodes[0].pages == PAGES
            assert (await client.admin.evict(cache_of(cache), TOKENS)).pages == PAGES
            assert (await cache.match(TOKENS)).matched_pages == 0
            assert (await client.admin.check()).ok
            assert (await client.admin.stats()).tiers[0].name == "host"
            with pytest.raises(InvalidArgumentError, match="no tier 'tape'"):
                await client.admin.pin(cache_of(cache), TOKENS, "tape")

    asyncio.run(scenario())


def cache_of(handle: Any) -> Any:
    return getattr(handle, "_inner", handle)


def test_pages_come_back_from_disk(make_client: Any, idle_sidecar: Any) -> None:
    pytest.importorskip("lmdb")
    idle_sidecar.service |= {
        "host_bytes": 16 << 20,
        "host_segment_bytes": 2 << 20,
        "disk_path": str(idle_sidecar.home / "disk"),
        "disk_bytes": 256 << 20,
    }
    idle_sidecar.start()

    async def scenario() -> None:
        data = pages_of()
        async with make_client(idle_sidecar.target) as client:
            cache = namespace(client)
            stored = await cache.store(TOKENS, data, durable=True)
            assert stored.committed.durable_pages == PAGES
            evicted = await client.admin.evict(cache_of(cache), TOKENS, "host")
            assert evicted.pages == PAGES
            assert (await cache.match(TOKENS)).run_tiers == ("disk",)
            async with await cache.fetch(TOKENS) as lease:
                assert lease.pending_pages == PAGES - len(lease)
                while lease.operation:
                    await lease.wait(5_000)
                assert len(lease) == PAGES
                assert (lease.pending_pages, lease.pending_ms) == (0, 0)
                out = np.zeros_like(data)
                await lease.copy_into(out)
                assert (out == data).all()
            await client.admin.evict(cache_of(cache), TOKENS, "host")
            moving = await cache.prefetch(TOKENS, "host")
            assert moving.matched_pages == PAGES
            done = await client.wait_operation(moving.operation, 5_000)
            assert done.done and not done.failed_pages
            assert (await cache.match(TOKENS)).run_tiers == ("host",)
            host, disk = (await client.admin.stats()).tiers
            assert (disk.hit_bytes, disk.written_bytes) == (data.nbytes, data.nbytes)
            assert (disk.written_per_hit, host.written_bytes) == (1.0, 3 * data.nbytes)

    asyncio.run(scenario())


def test_memory_that_the_sidecar_takes_back_is_unmapped(make_client: Any, idle_sidecar: Any) -> None:
    """Pages of another size need the segments; the server gets them back only when the client has let go."""
    idle_sidecar.service |= {"host_bytes": 8 << 20, "host_segment_bytes": 1 << 20, "expiry_grace_ms": 100}
    idle_sidecar.start()

    async def scenario() -> None:
        async with make_client(idle_sidecar.target) as client:
            small, large = namespace(client), namespace(client, page_bytes=2 * PAGE)
            tokens = [np.arange(n * 10_000, n * 10_000 + 64 * PAGES, dtype=np.int32) for n in range(12)]
            for prompt in tokens:
                await small.store(prompt, pages_of())
                async with await small.fetch(prompt) as lease:
                    await lease.copy_into(bytearray(len(lease) * PAGE))
            mapped = len(client.core.arena)
            assert mapped >= 4
            data = pages_of(2, page_bytes=2 * PAGE)
            for prompt in tokens:
                await large.store(prompt, data, wait_ms=20_000)
                async with await large.fetch(prompt) as lease:
                    out = np.zeros_like(data)[: len(lease)]
                    await lease.copy_into(out)
                    assert len(lease) == PAGES and (out == data).all()
            assert (await client.admin.check()).ok
            regions = {id_: client.core.arena.find(id_) for id_ in client.core.arena._regions}
            assert len({region.info.page_bytes for region in regions.values() if region}) >= 1
            assert len(regions) <= 8

    asyncio.run(scenario())


def test_threads_and_tasks_share_a_client(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        data = pages_of()
        async with make_client(sidecar.target) as client:
            cache = namespace(client)

            async def engine(number: int) -> None:
                prompt = np.arange(number * 1000, number * 1000 + 64 * 4, dtype=np.int32)
                mine = (data[:4] + number).astype(np.uint8)
                for _ in range(5):
                    await cache.store(prompt, mine)
                    async with await cache.fetch(prompt) as lease:
                        out = np.zeros_like(mine)
                        assert await lease.copy_into(out) == 4
                        assert (out == mine).all()

            await asyncio.gather(*(engine(number) for number in range(12)))
            assert client.core.memory.used_bytes == 0
            found = await asyncio.gather(
                *(cache.match(TOKENS) for _ in range(300))
            )  # more than may be in flight
            assert len(found) == 300
            stats = await client.admin.stats()
            assert (stats.leases, stats.reservations, stats.sessions) == (0, 0, 1)

    asyncio.run(scenario())


# --- restarts and failures


@pytest.mark.parametrize("plane", ["shm", "stream"])
def test_a_restart_loses_leases_and_nothing_else(make_client: Any, sidecar: Any, plane: str) -> None:
    async def scenario() -> None:
        data = pages_of()
        async with make_client(sidecar.target, data_plane=plane) as client:
            cache = namespace(client)
            await cache.store(TOKENS, data)
            lease = await cache.fetch(TOKENS)
            room = await cache.reserve(np.arange(7000, 7000 + 64 * 3, dtype=np.int32))
            await room.write(0, data[0])
            await asyncio.to_thread(sidecar.restart)
            assert (await cache.match(TOKENS, timeout_s=10)).matched_pages == 0
            assert not lease.still_valid()
            with pytest.raises(StaleError, match="fetch again"):
                await lease.views()
            with pytest.raises(StaleError):
                await lease.renew()
            with pytest.raises(StaleError):
                await room.commit()
            await lease.release()
            await room.abort()
            assert client.core.memory.used_bytes == 0
            assert (await cache.store(TOKENS, data)).committed.stored_pages == PAGES
            async with await cache.fetch(TOKENS) as lease:
                out = np.zeros_like(data)
                assert await lease.copy_into(out) == PAGES
                assert (out == data).all()

    asyncio.run(scenario())


def test_no_sidecar_is_a_clear_error_within_the_timeout(make_client: Any, idle_sidecar: Any) -> None:
    async def scenario() -> None:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=r"not attached to .*is the sidecar running"):
            async with make_client(idle_sidecar.target, connect_timeout_s=0.5):
                pass
        assert time.monotonic() - began < 5

    asyncio.run(scenario())


def test_calls_wait_for_a_sidecar_that_starts(make_client: Any, idle_sidecar: Any) -> None:
    async def scenario() -> None:
        client = make_client(idle_sidecar.target)
        call = asyncio.ensure_future(namespace(client).match(TOKENS, timeout_s=20))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(idle_sidecar.start)
        assert (await call).matched_pages == 0
        await client.close()

    asyncio.run(scenario())


def test_a_gone_sidecar_does_not_hang_release_or_close(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target, timeout_s=1) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            lease = await cache.fetch(TOKENS)
            await asyncio.to_thread(sidecar.kill)
            began = time.monotonic()
            with pytest.raises(UnavailableError):
                await cache.match(TOKENS)
            assert time.monotonic() - began < 3
            await lease.release()
        assert time.monotonic() - began < 8
        with pytest.raises(UnavailableError, match="closed"):
            await cache.match(TOKENS)
        await client.close()

    asyncio.run(scenario())


def test_a_stopped_sidecar_process_is_noticed(make_client: Any, idle_sidecar: Any) -> None:
    """A sidecar that stands still ends the life line by its silence; when it goes on, the session is resumed."""
    idle_sidecar.server |= {"keep_alive_ms": 200, "resume_window_ms": 10_000}
    idle_sidecar.start()

    async def scenario() -> None:
        async with make_client(idle_sidecar.target) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            lease = await cache.fetch(TOKENS)
            os.kill(idle_sidecar.process.pid, signal.SIGSTOP)
            try:
                await until(lambda: not client.attached)
            finally:
                os.kill(idle_sidecar.process.pid, signal.SIGCONT)
            await until(lambda: client.attached)
            assert lease.still_valid()
            assert await lease.copy_into(bytearray(PAGES * PAGE)) == PAGES
            await lease.renew()
            assert client.core.session.incarnation == 1

    asyncio.run(scenario())


async def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it came to pass in time"
        await asyncio.sleep(0.02)


def test_goodbye_ends_the_session(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            await cache.fetch(TOKENS)
        async with make_client(sidecar.target) as other:
            assert (await other.admin.stats()).sessions == 1
            # the slots rest for the server's grace: a reader of the ended session may still be copying
            for _ in range(100):
                if not (await other.admin.stats()).leases:
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("its lease outlived the session")

    asyncio.run(scenario())


def test_draining_is_seen(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target, timeout_s=2) as client:
            cache = namespace(client)
            await cache.store(TOKENS, pages_of())
            await client.admin.drain(2_000)
            await until(lambda: client.draining)

    asyncio.run(scenario())


# --- TCP


def test_tcp_with_a_token_streams(make_client: Any, idle_sidecar: Any) -> None:
    tokens = idle_sidecar.home / "tokens"
    tokens.write_text("default secret-token-of-this-test admin\n")
    tokens.chmod(0o600)
    port = 20_000 + os.getpid() % 20_000
    idle_sidecar.server |= {
        "tcp_address": f"127.0.0.1:{port}",
        "token_file": str(tokens),
        "allow_plain_tcp": True,
    }
    idle_sidecar.start()
    target = f"127.0.0.1:{port}"

    async def scenario() -> None:
        data = pages_of()
        async with make_client(target, token="secret-token-of-this-test") as client:
            cache = namespace(client)
            await cache.store(TOKENS, data)
            async with await cache.fetch(TOKENS) as lease:
                assert not lease.zero_copy
                out = np.zeros_like(data)
                await lease.copy_into(out)
                assert (out == data).all()
        with pytest.raises(UnauthenticatedError):
            async with make_client(target, token="wrong"):
                pass
        with pytest.raises(UnsupportedError, match="not a unix socket"):
            async with make_client(target, token="secret-token-of-this-test", data_plane="shm"):
                pass

    asyncio.run(scenario())


# --- arguments and processes


def test_bad_arguments_are_named(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            with pytest.raises(InvalidArgumentError, match="page_tokens"):
                namespace(client, page_tokens=0)
            with pytest.raises(InvalidArgumentError, match="tenant"):
                namespace(client, tenant="other")
            with pytest.raises(InvalidArgumentError, match="symbol_kind"):
                namespace(client, symbol_kind="words")
            cache = namespace(client)
            for bad in ([1.5], [2**31], np.zeros((2, 2), np.int32), np.array([2**40]), b"abc"):
                with pytest.raises(InvalidArgumentError):
                    await cache.match(bad)
            with pytest.raises(InvalidArgumentError, match="wait_ms"):
                await cache.fetch(TOKENS, wait_ms=-1)
            with pytest.raises(InvalidArgumentError, match="turn"):
                await cache.fetch(TOKENS, use=Use(turn=-1))
            with pytest.raises(InvalidArgumentError, match="max_pages"):
                await cache.fetch(TOKENS, max_pages=0)
        with pytest.raises(ConfigError, match="data_plane"):
            make_client(sidecar.target, data_plane="carrier pigeon")
        with pytest.raises(ConfigError, match="no target"):
            make_client("")

    asyncio.run(scenario())


def test_a_fork_is_refused(sidecar: Any) -> None:
    import hicache

    with hicache.Client(sidecar.target) as client:
        client.core._process -= 1  # as a forked child sees it
        with pytest.raises(UnsupportedError, match="make a Client in the child"):
            namespace(client).match(TOKENS)
        client.core._process += 1
