"""An engine's KV and a real sidecar: stored out of it, loaded into another's, layer by layer, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="an engine's KV is tensors")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from kv_client_kit import PAGE_TOKENS, Engine, Form, namespace_fields

import hicache
import hicache.aio
from hicache.errors import (
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnavailableError,
    UnsupportedError,
)
from hicache.rpc.client import FetchQuery
from hicache.rpc.server import ServerOptions, serve
from hicache.runtime import Service, ServiceOptions

PAGES = 6
TOKENS = np.arange(PAGES * PAGE_TOKENS, dtype=np.int32)
FORMS = [
    Form("kv-nhd"),
    Form("block-kv-hnd", block=8),  # two blocks a page
    Form("latent", block=32, dtype=torch.float32),  # two pages a block
    Form("nhd", pairs=True, dtype=torch.uint8),
]
FORM = FORMS[0]


def salt() -> str:
    """Of a namespace that no other test has."""
    return secrets.token_hex(8)


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def blocks_of(form: Form, seed: int) -> Any:
    """Block ids for the prompt's pages, in no order."""
    count = PAGES * PAGE_TOKENS // form.block
    return np.random.default_rng(seed).permutation(form.blocks)[:count]


async def store(cache: Any, kv: Any, places: Any, tokens: Any = TOKENS, **how: Any) -> Any:
    async with await cache.reserve(tokens) as room:
        return await (await room.store_kv(kv, places, **how)).result(20)


LOADER = textwrap.dedent(
    """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import numpy as np
    import hicache
    from test_kv import FORMS, PAGE_TOKENS, TOKENS, Engine, blocks_of, namespace_fields

    with hicache.Client(sys.argv[2]) as client:
        for number, form in enumerate(FORMS):
            engine = Engine(form)
            cache = client.namespace(**namespace_fields(form), salt=sys.argv[3] + str(number))
            with client.register_kv(engine.tensors, layout=form.layout) as kv, cache.fetch(TOKENS) as lease:
                places = kv.places(blocks_of(form, seed=77), PAGE_TOKENS)
                loaded = lease.load(kv, places).result(20)
            print(json.dumps([loaded.ok, loaded.pages, engine.bytes_of(places).tobytes().hex()]))
    """
)


@pytest.mark.parametrize("make_client", ["sync"], indirect=True)  # the other process takes its time
def test_another_process_loads_what_this_one_stored(make_client: Any, lasting_sidecar: Any) -> None:
    """In all kinds of layouts, into other blocks, bit for bit; and the bytes between are those of the layout."""
    stored: list[bytes] = []
    prefix = salt()

    async def scenario() -> None:
        async with make_client(lasting_sidecar.target) as client:
            for number, form in enumerate(FORMS):
                engine = Engine(form, seed=number + 1)
                kv = await client.register_kv(engine.tensors, layout=form.layout)
                assert unwrapped(kv)._state.tensors == engine.tensors  # not freed under the sidecar
                assert (kv.layers, kv.closed) == (form.layers, False)
                places = kv.places(blocks_of(form, seed=number), PAGE_TOKENS)
                assert places.shape == (PAGES, max(1, PAGE_TOKENS // form.block))
                cache = client.namespace(**namespace_fields(form), salt=f"{prefix}{number}")
                assert (await store(cache, kv, places)).stored_pages == PAGES
                expected = engine.bytes_of(places)
                out = np.zeros_like(expected)
                async with await cache.fetch(TOKENS) as lease:
                    await lease.copy_into(out)
                assert (out == expected).all()
                stored.append(expected.tobytes())
                before = open_fds()
                assert await kv.close()
                assert await kv.close() and kv.closed and open_fds() == before - 1
                with pytest.raises(NotFoundError, match="closed"):
                    await store(cache, kv, places, TOKENS + 1)

    asyncio.run(scenario())
    script = [sys.executable, "-c", LOADER, str(Path(__file__).parent), lasting_sidecar.target, prefix]
    found = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    for line, expected in zip(found.stdout.splitlines(), stored, strict=True):
        ok, pages, raw = json.loads(line)
        assert ok and pages == PAGES and bytes.fromhex(raw) == expected


def test_layers_are_stored_as_they_are_computed_and_loaded_one_by_one(
    make_client: Any, lasting_sidecar: Any
) -> None:
    async def scenario() -> None:
        source, target, truth = Engine(FORM), Engine(FORM), Engine(FORM, seed=3)
        async with make_client(lasting_sidecar.target) as client:
            a = await client.register_kv(source.tensors, layout=FORM.layout)
            b = await client.register_kv(target.tensors, layout=FORM.layout)
            cache, places = (
                client.namespace(**namespace_fields(FORM), salt=salt()),
                a.places(range(PAGES), PAGE_TOKENS),
            )
            async with await cache.reserve(TOKENS) as room:
                outward = await room.store_kv(a, places, layered=True, wait_ms=20_000)
                for layer in range(FORM.layers):
                    assert not outward.done and (await cache.match(TOKENS)).matched_pages == 0
                    source.tensors[layer].copy_(truth.tensors[layer])  # the layer is computed only now
                    outward.layer_done(layer)
                assert (await outward.result(20)).stored_pages == PAGES
                assert outward.done and not outward.failed and room.ended
            outward.layer_done(0)  # too late, and harmless
            with pytest.raises(InvalidArgumentError, match="layer 4 is not one of"):
                outward.layer_done(FORM.layers)
            async with await cache.fetch(TOKENS) as lease:
                load = await lease.load(b, b.places(range(20, 20 - PAGES, -1), PAGE_TOKENS), layered=True)
                for layer in range(FORM.layers):
                    assert await load.wait_layer(layer, 20)
                    assert load.layers_done > layer
                    moved = target.tensors[layer][:, list(range(20, 20 - PAGES, -1))]
                    assert torch.equal(moved, truth.tensors[layer][:, :PAGES])
                loaded = await load.result(20)
                assert loaded.ok and loaded.pages == PAGES and loaded.moved_bytes == PAGES * FORM.page_bytes
                assert load.done and load.layers_done == FORM.layers
        timelines = client.core.timelines._made
        assert [timeline.free for timeline in timelines] == [len(timelines[0].values)]

    asyncio.run(scenario())


def test_some_layers_some_pages_and_places_that_are_left_out(make_client: Any, lasting_sidecar: Any) -> None:
    async def scenario() -> None:
        form = FORMS[1]
        source, target = Engine(form, seed=5), Engine(form)
        async with make_client(lasting_sidecar.target) as client:
            a = await client.register_kv(source.tensors, layout=form.layout)
            b = await client.register_kv(target.tensors, layout=form.layout)
            cache, places = (
                client.namespace(**namespace_fields(form), salt=salt()),
                a.places(range(12), PAGE_TOKENS),
            )
            async with await cache.reserve(TOKENS) as room:  # in parts, and one page by itself
                await room.write(4, source.bytes_of(places)[4].tobytes())
                with pytest.raises(InvalidArgumentError, match="written already"):
                    await room.store_kv(a, places[3:6], first_page=3)
                first = await (await room.store_kv(a, places[:3], last=False)).result(20)
                assert first.stored_pages == 3
                await (await room.store_kv(a, places[3:4], last=False)).result(20)
                assert (await room.commit(last=False)).stored_pages == 1
                assert (await (await room.store_kv(a, places[5:6])).result(20)).stored_pages == 1
            assert (await cache.match(TOKENS)).matched_pages == PAGES
            async with await cache.fetch(TOKENS) as lease:
                some = b.places([2, 3, -1, 5], PAGE_TOKENS)
                load = await lease.load(b, some, first_page=1, first_layer=1, layers=2, layered=True)
                with pytest.raises(InvalidArgumentError, match="layer 0 is not one of"):
                    await load.wait_layer(0)
                assert await load.wait_layer(2, 20) and (await load.result(20)).pages == 2
                assert load.layers_done == 2
                for layer in range(form.layers):
                    moved, old = target.tensors[layer], source.tensors[layer]
                    expected = torch.zeros_like(moved)
                    if layer in {1, 2}:
                        expected[2:4], expected[5] = old[2:4], old[5]
                    assert torch.equal(moved, expected)
                for wrong, why in (
                    ({"places": places, "first_page": 1}, "not in a lease of"),
                    ({"places": places[0]}, "places must be integers"),
                    ({"places": places, "first_layer": 3, "layers": 2}, "not in a KV of 4"),
                    ({"places": places + 1}, "does not lie in one block"),
                    ({"places": places[[0, 1, 0]]}, "two pages of a load go to one place"),
                    ({"places": places, "layers": range(2)}, "layers must be a whole number"),
                    ({"places": places, "first_page": 0.5}, "first_page must be a whole number"),
                ):
                    with pytest.raises(InvalidArgumentError, match=why):
                        await (await lease.load(b, wrong.pop("places"), **wrong)).result(20)
                with pytest.raises(InvalidArgumentError, match="KV region is asked for, not list"):
                    await lease.load(target.tensors, places)
                none = await (await lease.load(b, places[:0])).result(20)
                assert none.ok and none.pages == 0
            with pytest.raises(NotFoundError, match="released"):
                await lease.load(b, places)
            again = await cache.reserve(TOKENS)
            assert (await (await again.store_kv(a, places[:0])).result()).stored_pages == 0

    asyncio.run(scenario())


def test_a_refused_store_leaves_its_pages_to_be_stored(make_client: Any, lasting_sidecar: Any) -> None:
    async def scenario() -> None:
        engine = Engine(FORM, seed=2)
        async with make_client(lasting_sidecar.target) as client:
            kv = await client.register_kv(engine.tensors, layout=FORM.layout)
            cache, places = (
                client.namespace(**namespace_fields(FORM), salt=salt()),
                kv.places(range(PAGES), PAGE_TOKENS),
            )
            async with await cache.reserve(TOKENS) as room:
                refused = await room.store_kv(kv, places + 1)
                with pytest.raises(InvalidArgumentError, match="does not lie in one block"):
                    await refused.result(20)
                assert refused.failed
                with pytest.raises(InvalidArgumentError, match=f"from page 0 on, where {PAGES} are missing"):
                    await room.store_kv(kv, np.concatenate([places, places]))
                stored = await room.store_kv(kv, places)
                assert (await stored.result(20)).stored_pages == PAGES

    asyncio.run(scenario())


def test_a_region_that_settles_cuts_stores_that_wait_for_layers(
    make_client: Any, lasting_sidecar: Any
) -> None:
    async def scenario() -> None:
        engine = Engine(FORM, seed=2)
        async with make_client(lasting_sidecar.target) as client:
            kv = await client.register_kv(engine.tensors, layout=FORM.layout)
            cache, places = (
                client.namespace(**namespace_fields(FORM), salt=salt()),
                kv.places(range(PAGES), PAGE_TOKENS),
            )
            async with await cache.reserve(TOKENS) as room:
                outward = await room.store_kv(kv, places, layered=True)
                with pytest.raises(UnavailableError, match="has not ended"):
                    await outward.result(0.05)
                outward.layer_done(FORM.layers - 2)
                before = kv._state.registration
                assert await kv.settle(20)
                with pytest.raises(CorruptError, match="not all computed"):
                    await outward.result(20)
                again = await room.store_kv(kv, places)  # registered again
                assert (await again.result(20)).stored_pages == PAGES
                assert kv._state.registration not in {None, before}

    asyncio.run(scenario())


async def _awaitable(found: Any) -> Any:
    return await found


@pytest.mark.parametrize("restart", [False, True], ids=["killed", "restarted"])
def test_a_sidecar_that_dies_lets_go_of_whoever_waits(make_client: Any, sidecar: Any, restart: bool) -> None:
    async def scenario() -> None:
        engine = Engine(FORM, seed=2)
        async with make_client(sidecar.target, timeout_s=10) as client:
            kv = await client.register_kv(engine.tensors, layout=FORM.layout)
            cache, places = (
                client.namespace(**namespace_fields(FORM), salt=salt()),
                kv.places(range(PAGES), PAGE_TOKENS),
            )
            await store(cache, kv, places, layered=False)
            lease = await cache.fetch(TOKENS)
            assert (await (await lease.load(kv, places, layered=True)).result(20)).ok
            sidecar.process.send_signal(signal.SIGSTOP)  # it hears nothing, and copies nothing
            load = await lease.load(kv, places, layered=True)
            waiting = asyncio.create_task(_awaitable(load.wait_layer(0, 30)))
            await asyncio.sleep(0.1)
            assert not waiting.done() and not load.done
            sidecar.kill()
            async with asyncio.timeout(5):
                assert await waiting is False
                with pytest.raises((UnavailableError, StaleError)):
                    await load.result(5)
            assert load.failed and load.layers_done == 0
            if restart:
                sidecar.start()
                assert (await store(cache, kv, places)).stored_pages == PAGES
                async with await cache.fetch(TOKENS) as lease:
                    assert (await (await lease.load(kv, places, layered=True)).result(20)).ok
                assert await kv.close()

    asyncio.run(scenario())


def test_threads_load_and_store_at_once(lasting_sidecar: Any) -> None:
    source = Engine(FORM, seed=4)
    with hicache.Client(lasting_sidecar.target) as client:
        a = client.register_kv(source.tensors, layout=FORM.layout)
        cache = client.namespace(**namespace_fields(FORM), salt=salt())
        good: list[bool] = []

        def work(number: int) -> None:
            mine = Engine(FORM)
            tokens = TOKENS + 1000 * number
            places = a.places(np.roll(np.arange(24), number)[:PAGES], PAGE_TOKENS)
            with client.register_kv(mine.tensors, layout=FORM.layout) as b:
                with cache.reserve(tokens) as room:
                    room.store_kv(a, places).result(30)
                with cache.fetch(tokens) as lease:
                    whole = b.places(np.arange(24)[::-1][:PAGES], PAGE_TOKENS)
                    loads = [
                        lease.load(b, whole[at : at + 1], first_page=at, layered=True) for at in range(PAGES)
                    ]
                    arrived = all(load.wait_layer(FORM.layers - 1, 30) for load in loads)
                    right = all(load.result(30).ok for load in loads)
                same = (mine.bytes_of(whole) == source.bytes_of(places)).all()
                good.append(arrived and right and bool(same))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert good == [True] * 6
        assert len(client.core.timelines._made) == 1
        assert client.core.timelines._made[0].free == len(client.core.timelines._made[0].values)


def test_one_registration_serves_many_threads(sidecar: Any) -> None:
    engine = Engine(FORM, seed=4)
    with hicache.Client(sidecar.target) as client:
        kv = client.register_kv(engine.tensors, layout=FORM.layout)
        sidecar.restart()
        client.connect()
        seen: list[Any] = []
        cache, places = (
            client.namespace(**namespace_fields(FORM), salt=salt()),
            kv.places(range(PAGES), PAGE_TOKENS),
        )

        def work(number: int) -> None:
            with cache.reserve(TOKENS + 1000 * number) as room:
                room.store_kv(kv, places).result(30)
            seen.append(kv._state.registration)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(seen) == 6 and len(set(seen)) == 1


def test_closing_the_client_ends_its_transfers(lasting_sidecar: Any) -> None:
    engine = Engine(FORM, seed=4)
    client = hicache.Client(lasting_sidecar.target)
    kv = client.register_kv(engine.tensors, layout=FORM.layout)
    room = client.namespace(**namespace_fields(FORM), salt=salt()).reserve(TOKENS)
    outward = room.store_kv(kv, kv.places(range(PAGES), PAGE_TOKENS), layered=True)
    client.close()
    with pytest.raises((UnavailableError, StaleError, NotFoundError)):
        outward.result(10)

    async def scenario() -> None:
        client = hicache.aio.Client(lasting_sidecar.target)
        kv = await client.register_kv(engine.tensors, layout=FORM.layout)
        room = await client.namespace(**namespace_fields(FORM), salt=salt()).reserve(TOKENS)
        outward = await room.store_kv(kv, kv.places(range(PAGES), PAGE_TOKENS), layered=True)
        unborn = await room.store_kv(kv, kv.places([], PAGE_TOKENS), last=False)
        await client.close()
        with pytest.raises((UnavailableError, StaleError, NotFoundError)):
            await outward.result(10)
        assert outward.done and (await unborn.result(10)).stored_pages == 0

    asyncio.run(scenario())


def test_memory_that_cannot_be_shared_is_refused_with_what_to_do(
    make_client: Any, lasting_sidecar: Any
) -> None:
    async def scenario() -> None:
        async with make_client(lasting_sidecar.target) as client:
            plain = [torch.zeros(FORM.shape, dtype=FORM.dtype)]
            with pytest.raises(UnsupportedError, match=r"client\.kv_memory"):
                await client.register_kv(plain, layout="kv-nhd")
            memory = client.kv_memory(1 << 20)
            tensor = memory.tensor(FORM.shape, FORM.dtype)
            with pytest.raises(InvalidArgumentError, match="layout must be one of"):
                await client.register_kv([tensor], layout="bhsd")
            with pytest.raises(InvalidArgumentError, match="needs the layout"):
                await client.register_kv([tensor])
            kv = await client.register_kv([tensor], layout="kv-nhd")
            with pytest.raises(InvalidArgumentError, match="says its layout itself"):
                await client.register_kv(kv.kv, layout="kv-nhd")
            again = await client.register_kv(kv.kv)  # ready words
            assert await kv.close() and await again.close()
            async with make_client(lasting_sidecar.target, data_plane="stream") as other:
                with pytest.raises(UnsupportedError, match="over the sidecar's unix socket"):
                    await other.register_kv([tensor], layout="kv-nhd")
                kv = await client.register_kv([tensor], layout="kv-nhd")
                room = await other.namespace(**namespace_fields(FORM), salt=salt()).reserve(TOKENS)
                with pytest.raises(InvalidArgumentError, match="another client's"):
                    await room.store_kv(kv, kv.places([0], PAGE_TOKENS))

    asyncio.run(scenario())


# --- the device tier


def test_leases_in_the_device_tier_are_loaded_and_read(make_client: Any, device_sidecar: Any) -> None:
    async def scenario() -> None:
        source, target = Engine(FORM, seed=6), Engine(FORM)
        async with make_client(device_sidecar.target) as client:
            a = await client.register_kv(source.tensors, layout=FORM.layout)
            b = await client.register_kv(target.tensors, layout=FORM.layout)
            cache, places = (
                client.namespace(**namespace_fields(FORM), salt=salt()),
                a.places(range(PAGES), PAGE_TOKENS),
            )
            await store(cache, a, places)
            expected = source.bytes_of(places)
            there = b.places(range(10, 10 + PAGES), PAGE_TOKENS)
            async with await cache.fetch(TOKENS, device=True, wait_ms=5000) as lease:
                assert len(lease) == PAGES and lease.tier_pages == {"device": PAGES}
                load = await lease.load(b, there, layered=True)
                assert await load.wait_layer(FORM.layers - 1, 20) and (await load.result(20)).ok
                assert (target.bytes_of(there) == expected).all()
                out = np.zeros_like(expected)
                assert await lease.copy_into(out) == PAGES and (out == expected).all()
                assert [bytes(view) for view in await lease.views()] == [row.tobytes() for row in expected]
            host = FetchQuery(unwrapped(cache), TOKENS)
            device = FetchQuery(unwrapped(cache), TOKENS, device=True)
            target.wipe()
            for each in await client.fetch_many([host, device], wait_ms=5000):
                assert (await (await each.load(b, there)).result(20)).ok
                assert (target.bytes_of(there) == expected).all()
                await each.release()
            lease, room = await cache.fetch_and_reserve(TOKENS, device=True, wait_ms=5000)
            assert len(lease) == PAGES and not room.missing_pages
            await lease.release()

    asyncio.run(scenario())


def unwrapped(found: Any) -> Any:
    return getattr(found, "_inner", found)


def test_pages_in_a_shared_pool_are_read_in_place(make_client: Any, device_sidecar: Any) -> None:
    """Of a device in host memory; nothing but the lease's time says how long they are what they were."""

    async def scenario() -> None:
        source = Engine(FORM, seed=8)
        async with make_client(device_sidecar.target) as client:
            a = await client.register_kv(source.tensors, layout=FORM.layout)
            cache = client.namespace(**namespace_fields(FORM), salt=salt())
            places = a.places(range(PAGES), PAGE_TOKENS)
            await store(cache, a, places)
            lease = await cache.fetch(TOKENS, device=True, wait_ms=5000)
            assert lease.zero_copy and len(lease) == PAGES
            state = unwrapped(lease)._state
            assert all(not run.region.info.counted for run in state.runs)
            views = await lease.views()
            assert all(view.readonly for view in views)
            assert [bytes(view) for view in views] == [row.tobytes() for row in source.bytes_of(places)]
            with pytest.raises(UnsupportedError, match=r"views\(\) or numpy"):
                await lease.tensors()
            ticket = lease.ticket()
            reader = await client.reader(ticket)
            assert reader.unsound(0, PAGES) == [] and reader.still_valid()
            assert lease.still_valid()
            await lease.renew(60)  # less the client's margin
            await asyncio.sleep(0.05)
            assert not lease.still_valid()
            await lease.release()

    asyncio.run(scenario())


def test_pages_that_no_memory_is_shared_of_are_no_tensors(make_client: Any, lasting_sidecar: Any) -> None:
    async def scenario() -> None:
        engine = Engine(FORM, seed=8)
        async with make_client(lasting_sidecar.target, data_plane="stream") as client:
            cache = client.namespace(**namespace_fields(FORM), salt=salt())
            await cache.store(TOKENS, engine.bytes_of(np.arange(PAGES)[:, None] * PAGE_TOKENS))
            async with await cache.fetch(TOKENS) as lease, await cache.fetch(TOKENS + 1) as none:
                assert await none.tensors() == []
                with pytest.raises(UnsupportedError, match="share-device"):
                    await lease.tensors()

    asyncio.run(scenario())


def test_without_a_device_tier_device_leases_are_refused(make_client: Any, lasting_sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(lasting_sidecar.target) as client:
            cache = client.namespace(**namespace_fields(FORM), salt=salt())
            with pytest.raises(UnsupportedError, match="no device tier"):
                await cache.fetch(TOKENS, device=True)
            query = FetchQuery(unwrapped(cache), TOKENS, device=True)
            good = FetchQuery(unwrapped(cache), TOKENS)
            refused, found = await client.fetch_many([query, good])
            assert isinstance(refused, UnsupportedError) and len(found) == 0

    asyncio.run(scenario())


# --- rot


def test_a_page_that_went_bad_is_named_and_the_others_are_right(tmp_path: Path) -> None:
    """The server is in this process, so that a slot can be spoilt."""

    async def scenario() -> None:
        source, target = Engine(FORM, seed=7), Engine(FORM)
        service = Service(ServiceOptions(host_bytes=8 << 20, prefault=False))
        await service.start()
        server = await serve(service, ServerOptions(socket_path=str(tmp_path / "s")))
        async with hicache.aio.Client(f"unix://{tmp_path / 's'}") as client:
            a = await client.register_kv(source.tensors, layout=FORM.layout)
            b = await client.register_kv(target.tensors, layout=FORM.layout)
            cache, places = (
                client.namespace(**namespace_fields(FORM), salt=salt()),
                a.places(range(PAGES), PAGE_TOKENS),
            )
            await store(cache, a, places)
            expected = source.bytes_of(places)
            assert service._house is not None
            memory = service._house.ports[0].addressable
            assert memory is not None
            bad = expected[2].tobytes()
            (slot,) = [slot for slot in range(PAGES) if bytes(memory.views([slot])[0]) == bad]
            memory.views([slot])[0][17] ^= 2
            async with await cache.fetch(TOKENS) as lease:
                load = await lease.load(b, places, layered=True)
                loaded = await load.result(20)
                assert not loaded.ok and loaded.corrupt == (2,) and loaded.pages == PAGES - 1
                assert load.failed and await load.wait_layer(0) is False
                moved = target.bytes_of(places)
                others = [0, 1, 3, 4, 5]
                assert (moved[others] == expected[others]).all()
                assert lease.still_valid()
            assert (await cache.match(TOKENS)).matched_pages == 2  # the sidecar gave it up
        await server.stop(0)
        await service.close()

    asyncio.run(scenario())
