"""Engine-driven copies against a real sidecar: every layout, other block sizes, quantised pages, and no wrong page."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a copier needs torch")

import hicache  # noqa: E402
import hicache.aio  # noqa: E402
from hicache.device import kernels  # noqa: E402
from hicache.errors import (  # noqa: E402
    CorruptError,
    ExhaustedError,
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnavailableError,
    UnsupportedError,
)
from hicache.rpc.client.copier import _leased, open_engine  # noqa: E402

AXES = {
    "kv-nhd": "2bthd",
    "kv-hnd": "2bhtd",
    "block-kv-nhd": "b2thd",
    "block-kv-hnd": "b2htd",
    "nhd": "bthd",
    "hnd": "bhtd",
    "tokens": "bhd",
    "latent": "btd",
}
APART = {"nhd", "hnd", "tokens"}
LAYERS, TOKENS, HEADS, DIM, PAGES = 3, 16, 2, 32, 6
MODELS = itertools.count()
PROMPT = np.arange(TOKENS * PAGES, dtype=np.int32)


def make_kv(
    layout: str, *, tokens: int, block: int, seed: int = 0, dtype=torch.bfloat16, layers: int = LAYERS
):
    """Room for more than ``tokens`` tokens of random numbers."""
    block = 1 if layout == "tokens" else block
    sizes = {"2": 2, "b": 2 * tokens // block + 3, "t": block, "h": HEADS, "d": DIM}
    shape = [sizes[axis] for axis in AXES[layout]]
    rng = torch.Generator().manual_seed(seed)

    def one():
        return torch.randn(shape, generator=rng, dtype=torch.float32).to(dtype)

    return [(one(), one()) if layout in APART else one() for _ in range(layers)], block, sizes["b"]


def some_blocks(block: int, blocks: int, tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(blocks)[: -(-tokens // block)]


def tokens_of(copier: Any, blocks: np.ndarray, tokens: int) -> Any:
    """The prompt's vectors, token by token: [planes, tokens, heads, dim]."""
    kv = copier.kv
    at = np.arange(tokens)
    block, place = blocks[at // kv.block_tokens], at % kv.block_tokens
    return torch.stack([plane[torch.from_numpy(block), torch.from_numpy(place)] for plane in kv.planes])


def open_copier(client: Any, layout: str, block: int, seed: int = 0, **how: Any) -> tuple[Any, np.ndarray]:
    layers, block, blocks = make_kv(
        layout,
        tokens=len(PROMPT),
        block=block,
        seed=seed,
        **{k: how.pop(k) for k in ("dtype", "layers") if k in how},
    )
    copier = client.copier(layers, layout=layout, page_tokens=TOKENS, **how)
    return copier, some_blocks(block, blocks, len(PROMPT), seed)


def new_model() -> str:
    return f"model {next(MODELS)}"


def store_all(client: Any, copier: Any, blocks: Any, model: str = "", **how: Any) -> Any:
    cache = client.namespace(model=model or new_model(), **copier.namespace_fields())
    with cache.reserve(PROMPT) as room, copier.store(room, blocks, **how) as store:
        assert store.commit().stored_pages == PAGES
    assert client.core.memory.used_bytes == 0, "staging memory is free again"
    return cache


@pytest.mark.parametrize("layout", sorted(AXES))
def test_two_engines_share_pages_whatever_their_layouts_and_blocks(lasting_sidecar: Any, layout: str) -> None:
    with hicache.Client(lasting_sidecar.target) as mine, hicache.Client(lasting_sidecar.target) as theirs:
        source, at = open_copier(mine, layout, block=16, seed=1)
        model = store_all(mine, source, at).spec.model
        wanted = tokens_of(source, at, len(PROMPT))
        others = ["latent"] if layout == "latent" else ["kv-nhd", "block-kv-hnd", "hnd", "tokens"]
        for number, (other, block) in enumerate((o, b) for o in others for b in (16, 4, 64, 24)):
            target, to = open_copier(theirs, other, block=block, seed=2 + number)
            with theirs.namespace(model=model, **target.namespace_fields()).fetch(PROMPT) as lease:
                assert len(lease) == PAGES
                load = target.load(lease, to)
                load.wait(30)
                assert load.pages == PAGES and load.done and load.layers_done == LAYERS
            assert torch.equal(tokens_of(target, to, len(PROMPT)), wanted), (other, block)


def test_nothing_else_is_written(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        source, at = open_copier(client, "kv-nhd", block=16, seed=1)
        cache = store_all(client, source, at)
        target, to = open_copier(client, "kv-hnd", block=24, seed=2)
        before = [plane.clone() for plane in target.kv.planes]
        with cache.fetch(PROMPT) as lease:
            target.load(lease, to, first_page=2, layers=range(1, 2)).wait(30)
        tokens = np.arange((PAGES - 2) * TOKENS)
        mask = torch.zeros(before[0].shape[:2], dtype=torch.bool)
        mask[torch.from_numpy(to[tokens // 24]), torch.from_numpy(tokens % 24)] = True
        wanted = tokens_of(source, at, len(PROMPT))
        for number, (plane, old) in enumerate(zip(target.kv.planes, before, strict=True)):
            assert torch.equal(plane[~mask], old[~mask]), "the other tokens are as they were"
            if number // 2 != 1:
                assert torch.equal(plane, old), "the other layers are as they were"
        found = tokens_of(target, to, len(tokens))
        assert torch.equal(found[2:4], wanted[2:4, 2 * TOKENS :])


def test_places_skip_and_scatter(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        source, at = open_copier(client, "kv-nhd", block=16, seed=1)
        cache = store_all(client, source, at)
        wanted = tokens_of(source, at, len(PROMPT))
        target, _ = open_copier(client, "kv-nhd", block=16, seed=2)
        before = [plane.clone() for plane in target.kv.planes]
        # units of two tokens, which begin in the middle of units, too; one is left out
        rng = np.random.default_rng(3)
        starts = rng.permutation(target.kv.planes[0].shape[0] * 5)[: PAGES * 8]
        places = (starts // 5 * 16 + starts % 5 * 3 + 1).reshape(PAGES, 8)
        places[3, 5] = -1
        with cache.fetch(PROMPT) as lease:
            target.load(lease, places=places).wait(30)
        flat = [plane.reshape(-1, HEADS, DIM) for plane in target.kv.planes]
        for unit, place in enumerate(places.reshape(-1).tolist()):
            for plane in range(len(flat)):
                if place >= 0:
                    found = flat[plane][place : place + 2]
                    assert torch.equal(found, wanted[plane, 2 * unit : 2 * unit + 2])
        written = torch.zeros(len(flat[0]), dtype=torch.bool)
        used = torch.from_numpy(places[places >= 0])
        written[used] = written[used + 1] = True
        for plane, old in zip(flat, before, strict=True):
            assert torch.equal(plane[~written], old.reshape(-1, HEADS, DIM)[~written])


@pytest.mark.parametrize("codec", ["fp8-e4m3", "int8-g64", "int4-g64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_quantised_pages_are_the_twins_and_within_their_bounds(
    lasting_sidecar: Any, codec: str, dtype: Any
) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        source, at = open_copier(client, "kv-hnd", block=16, seed=4, codec=codec, dtype=dtype)
        cache = store_all(client, source, at)
        numbers = PAGES * source.kv.raw_bytes // 2
        assert cache.page_bytes * PAGES == kernels.quantised_bytes(numbers, codec) < 0.6 * 2 * numbers
        vectors = tokens_of(source, at, len(PROMPT))
        raw = vectors.view(-1, PAGES, TOKENS, HEADS, DIM).transpose(0, 1).reshape(PAGES, -1).contiguous()
        rows = torch.empty((PAGES, cache.page_bytes), dtype=torch.uint8)
        kernels.encode_rows(raw, codec, rows, torch.zeros(PAGES, dtype=torch.int32))
        back = torch.empty_like(raw)
        kernels.decode_rows(rows, codec, back)
        target, to = open_copier(client, "nhd", block=64, seed=5, codec=codec, dtype=dtype)
        with cache.fetch(PROMPT) as lease:
            assert np.array_equal(np.stack(lease.numpy()), rows.numpy()), (
                "the twin's bytes are what is stored"
            )
            target.load(lease, to).wait(30)
        found = tokens_of(target, to, len(PROMPT))
        found = found.view(-1, PAGES, TOKENS, HEADS, DIM).transpose(0, 1).reshape(PAGES, -1)
        assert torch.equal(found.view(torch.int16), back.view(torch.int16))
        assert within(codec, raw.double().view(-1, 64), found.double().view(-1, 64), dtype)


def within(codec: str, x: Any, y: Any, dtype: Any) -> bool:
    """The bounds of docs and ``kernels/quant.py``."""
    rounding = y.abs() * torch.finfo(dtype).eps / 2
    most, low, high = x.abs().amax(1, True), x.amin(1, True), x.amax(1, True)
    if codec == "fp8-e4m3":
        tiny = torch.full_like(x, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        bound = torch.maximum(torch.maximum(x.abs() / 16, (most / 2**17).expand_as(x)), tiny)
    elif codec == "int8-g64":
        bound = most / 252 + rounding
    else:
        bound = (high - low) / 29 + torch.maximum(low.abs(), high.abs()) / 2**11 + rounding
    return bool(((x - y).abs() <= bound).all())


def test_pages_that_cannot_be_quantised_are_counted_and_not_stored(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        source, at = open_copier(client, "kv-nhd", block=16, seed=4, codec="int8-g64")
        source.kv.planes[1][int(at[4]), 3, 0, 0] = float("inf")
        cache = client.namespace(model=new_model(), **source.namespace_fields())
        with cache.reserve(PROMPT) as room, source.store(room, at) as store:
            assert store.commit().stored_pages == 4
            assert store.refused_pages == 1 and store.done
        assert client.core.memory.used_bytes == 0
        assert cache.match(PROMPT).matched_pages == 4


def test_quantised_and_plain_pages_never_meet() -> None:
    layers, _, _ = make_kv("kv-nhd", tokens=32, block=16)
    halves, _, _ = make_kv("kv-nhd", tokens=32, block=16, dtype=torch.float16)
    found = []
    for tensors in (layers, halves):
        for codec in (None, "fp8-e4m3", "int8-g64", "int4-g64"):
            copies = open_engine(tensors, layout="kv-nhd", page_tokens=16, codec=codec)
            fields = copies.kv.namespace_fields()
            found.append((fields["kv_dtype"], fields["layout"], fields["page_bytes"]))
            copies.close()
    assert len({(dtype, layout) for dtype, layout, _ in found}) == len(found)


# --- layer by layer


def test_a_layered_store_takes_each_layer_when_it_is_ready(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        engine, at = open_copier(client, "kv-nhd", block=16, seed=6)
        final = tokens_of(engine, at, len(PROMPT))
        for plane in engine.kv.planes:
            plane.zero_()
        cache = client.namespace(model=new_model(), **engine.namespace_fields())
        with cache.reserve(PROMPT) as room, engine.store(room, at, layered=True) as store:
            for layer in range(LAYERS):
                with pytest.raises(UnavailableError):
                    store.wait(0.02)
                index = np.arange(len(PROMPT))
                for plane in (2 * layer, 2 * layer + 1):  # "computed" now, and not before
                    engine.kv.planes[plane][
                        torch.from_numpy(at[index // 16]), torch.from_numpy(index % 16)
                    ] = final[plane]
                store.layer_ready(layer)
            assert store.commit(timeout_s=30).stored_pages == PAGES
        target, to = open_copier(client, "kv-nhd", block=16, seed=7)
        with cache.fetch(PROMPT) as lease:
            load = target.load(lease, to)
            for layer in range(LAYERS):
                load.wait_layer(layer, timeout_s=30)
                found = tokens_of(target, to, len(PROMPT))[2 * layer : 2 * layer + 2]
                assert torch.equal(found, final[2 * layer : 2 * layer + 2])
            load.wait(30)
            with pytest.raises(InvalidArgumentError, match="layer 3"):
                load.wait_layer(LAYERS)


def test_an_abandoned_store_gives_its_memory_back(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        engine, at = open_copier(client, "kv-nhd", block=16)
        cache = client.namespace(model=new_model(), **engine.namespace_fields())
        with cache.reserve(PROMPT) as room:
            with engine.store(room, at, layered=True) as store:
                store.layer_ready(0)
                assert client.core.memory.used_bytes
            assert client.core.memory.used_bytes == 0
            with pytest.raises(UnavailableError, match="cancelled"):
                store.commit()
            waiting = engine.store(room, at, layered=True)
            engine.close()  # nobody waits for ever
            with pytest.raises(UnavailableError):
                waiting.wait(30)
            assert client.core.memory.used_bytes == 0
            with pytest.raises(UnavailableError, match="closed"):
                engine.store(room, at)
            assert client.core.memory.used_bytes == 0


def test_present_pages_are_skipped_and_room_is_bounded(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        engine, at = open_copier(client, "kv-nhd", block=16)
        small = hicache.Client(lasting_sidecar.target, write_limit_bytes=3 * engine.kv.page_bytes)
        with small:
            tight = small.copier(
                [torch.stack([*engine.kv.planes[2 * n : 2 * n + 2]]) for n in range(LAYERS)],
                layout="kv-nhd",
                page_tokens=TOKENS,
            )
            cache = small.namespace(model=new_model(), **tight.namespace_fields())
            with cache.reserve(PROMPT[: 2 * TOKENS]) as room, tight.store(room, at) as store:
                assert store.commit().stored_pages == 2
            with cache.reserve(PROMPT) as room:
                with tight.store(room, at) as store:
                    assert (store.first_page, store.pages, store.left_pages) == (2, 3, 1)
                    with pytest.raises(ExhaustedError) as full:
                        tight.store(room, at)
                    assert full.value.hint
                    assert store.commit(last=False).stored_pages == 3
                with tight.store(room, at[5:], first_page=5) as store:
                    assert (store.first_page, store.pages) == (5, 1)
                    assert store.commit().stored_pages == 1
            into, to = open_copier(small, "kv-hnd", block=16, seed=3)
            with cache.fetch(PROMPT) as lease:
                into.load(lease, to).wait(30)
            assert torch.equal(tokens_of(into, to, len(PROMPT)), tokens_of(engine, at, len(PROMPT)))


# --- never a wrong page


def test_an_expired_lease_is_an_error_and_not_pages(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target, deadline_margin_ms=0) as client:
        engine, at = open_copier(client, "kv-nhd", block=16)
        cache = store_all(client, engine, at)
        with cache.fetch(PROMPT) as lease:
            lease._state.deadline_ns = 0
            with pytest.raises(NotFoundError, match="expired"):
                engine.load(lease, at)
        with cache.fetch(PROMPT) as lease:
            slow = threading.Event()
            move = engine.copies._planes.move

            def late(*arguments: Any, **more: Any) -> None:
                slow.wait(30)
                move(*arguments, **more)

            engine.copies._planes.move = late
            load = engine.load(lease, at)
            lease._state.deadline_ns = 0  # it ran out while the copy was under way
            slow.set()
            with pytest.raises(NotFoundError, match="expired"):
                load.wait(30)
            engine.copies._planes.move = move
        with cache.fetch(PROMPT) as lease:
            load = engine.load(lease, at)
        with pytest.raises(HicacheError) if not _ended_well(load) else _Nothing():
            load.wait(30)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _ended_well(load: Any) -> bool:
    load.wait_end()
    return load._error is None


def test_slots_that_were_reused_are_seen(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target) as client:
        engine, at = open_copier(client, "kv-nhd", block=16)
        cache = store_all(client, engine, at)
        with cache.fetch(PROMPT) as lease:
            lease._state.generations = lease._state.generations + np.uint64(
                1
            )  # as if the server had moved on
            with pytest.raises(NotFoundError, match="reused"):
                engine.load(lease, at)


def test_a_flipped_bit_in_the_arena_is_corrupt(sidecar: Any) -> None:
    with hicache.Client(sidecar.target) as client:
        for codec in (None, "int8-g64"):
            engine, at = open_copier(client, "kv-nhd", block=16, codec=codec)
            cache = store_all(client, engine, at, model=f"flipped {codec}")
            with cache.fetch(PROMPT) as lease:
                flip(sidecar, lease, 3)
                load = engine.load(lease, at)
                with pytest.raises(CorruptError, match="page 3"):
                    load.wait(30)
                assert load.corrupt_pages == (3,)
                engine.load(lease, at[:3]).wait(30)  # the others are sound
                partial = engine.load(lease, at, layers=range(1))
                with pytest.raises(CorruptError):
                    partial.wait(30)
                unverified = engine.load(lease, at, verify="off")
                unverified.wait(30)


def flip(sidecar: Any, lease: Any, page: int) -> None:
    """One bit where a page lies, through the sidecar's own writable mapping. Skips where that is forbidden."""
    pid, needle = sidecar.process.pid, bytes(lease.views()[page])
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            for begin, end, name in re.findall(r"^(\w+)-(\w+) rw-s \S+ \S+ \S+ +(.*)$", maps, re.MULTILINE):
                memory.seek(int(begin, 16))
                at = memory.read(int(end, 16) - int(begin, 16)).find(needle) if "memfd" in name else -1
                if at >= 0:
                    memory.seek(int(begin, 16) + at)
                    memory.write(bytes([needle[0] ^ 1]))
                    return
    except PermissionError:
        pytest.skip("this kernel does not let us write another process's memory")
    raise AssertionError("the page was not found")


def test_a_restarted_sidecar_leaves_no_good_load(sidecar: Any) -> None:
    with hicache.Client(sidecar.target) as client:
        engine, at = open_copier(client, "kv-nhd", block=16)
        cache = store_all(client, engine, at)
        lease = cache.fetch(PROMPT)
        regions = len(client.core.arena)
        assert regions
        sidecar.restart()
        for _ in range(200):
            if not lease.still_valid():
                break
            time.sleep(0.02)
        with pytest.raises((StaleError, NotFoundError)):
            engine.load(lease, at)
        with cache.fetch(PROMPT) as empty:  # nothing is cached: nothing is loaded
            load = engine.load(empty, at)
            load.wait(30)
            assert load.pages == 0


def test_memory_that_goes_is_told_and_closing_the_client_closes_its_copiers(lasting_sidecar: Any) -> None:
    told: list[Any] = []
    with hicache.Client(lasting_sidecar.target) as client:
        engine, at = open_copier(client, "kv-nhd", block=16)
        arena = client.core.arena
        assert engine.copies.forget in arena.watchers
        arena.watchers.append(told.append)
        with store_all(client, engine, at).fetch(PROMPT) as lease:
            region = lease._state.runs[0].region
            engine.load(lease, at).wait(30)
            span = _leased(client.core, lease._state, 0, 1)[0]
            assert span.memory is region and not span.gone()
            arena._regions.pop(region.info.region_id)
            assert span.gone(), "not registered again once it is no longer listed"
            arena._regions[region.info.region_id] = region
    assert region in told and engine.closed
    assert engine.copies.forget not in arena.watchers
    with pytest.raises(HicacheError):
        engine.load(lease, at)


def test_streamed_pages_are_loaded_and_stored(lasting_sidecar: Any) -> None:
    with hicache.Client(lasting_sidecar.target, data_plane="stream") as client:
        engine, at = open_copier(client, "kv-nhd", block=16, seed=1)
        cache = store_all(client, engine, at)
        target, to = open_copier(client, "hnd", block=4, seed=2)
        with cache.fetch(PROMPT) as lease:
            target.load(lease, to).wait(30)
        assert torch.equal(tokens_of(target, to, len(PROMPT)), tokens_of(engine, at, len(PROMPT)))


def test_what_does_not_go_together_is_refused(lasting_sidecar: Any) -> None:
    layers, _, _ = make_kv("kv-nhd", tokens=32, block=16)
    with hicache.Client(lasting_sidecar.target) as client:
        for wrong in (
            {"layout": "nope"},
            {"layout": "nhd"},
            {"layout": "kv-nhd", "codec": "zip"},
            {"layout": "kv-nhd", "page_tokens": 0},
            {"layout": "kv-nhd", "colour": 1},
        ):
            with pytest.raises(InvalidArgumentError):
                client.copier(layers, **{"page_tokens": 16, **wrong})
        with pytest.raises(InvalidArgumentError, match="differ"):
            client.copier([*layers, layers[0][:, :3]], layout="kv-nhd", page_tokens=16)
        with pytest.raises(UnsupportedError, match="meta"):
            client.copier([layer.to("meta") for layer in layers], layout="kv-nhd", page_tokens=16)
        engine, at = open_copier(client, "kv-nhd", block=16)
        cache = store_all(client, engine, at)
        other = client.namespace(model=new_model(), page_bytes=4096)
        with cache.fetch(PROMPT) as lease, other.fetch(PROMPT) as foreign:
            for bad in (
                {"blocks": [999] * PAGES},
                {"blocks": at, "places": [[0]]},
                {},
                {"places": [[0] * 5] * PAGES},
                {"blocks": [0] * PAGES},
                {"places": [[15, 20, 30, 40, 50, 60, 70, 80]]},
                {"blocks": at, "layers": range(2, 9)},
                {"blocks": np.zeros(3)},
            ):
                with pytest.raises(InvalidArgumentError):
                    engine.load(lease, **bad)
            with pytest.raises(InvalidArgumentError, match="namespace_fields"):
                engine.load(foreign, at)
        other = np.arange(500, 500 + TOKENS, dtype=np.int32)
        with cache.reserve(other) as room, pytest.raises(InvalidArgumentError, match="cannot be stored"):
            engine.store(room, places=[[-1]])


def test_the_asyncio_client_has_it_too(lasting_sidecar: Any) -> None:
    async def scenario() -> None:
        async with hicache.aio.Client(lasting_sidecar.target) as client:
            engine, at = open_copier(client, "kv-nhd", block=16, seed=1)
            cache = client.namespace(model=new_model(), **engine.namespace_fields())
            async with (
                await cache.reserve(PROMPT) as room,
                await engine.store(room, at, layered=True) as store,
            ):
                for layer in range(LAYERS):
                    store.layer_ready(layer)
                await store.wait(30)
                assert (await store.commit()).stored_pages == PAGES
            target, to = open_copier(client, "kv-nhd", block=64, seed=2)
            async with await cache.fetch(PROMPT) as lease:
                load = await target.load(lease, to)
                await load.wait_layer(0, timeout_s=30)
                await load.wait(30)
                assert load.done and load.pages == PAGES and not load.corrupt_pages
                cancelled = await target.load(lease, to)
                cancelled.cancel()
                cancelled.handle.wait_end()
            assert torch.equal(tokens_of(target, to, len(PROMPT)), tokens_of(engine, at, len(PROMPT)))

    asyncio.run(scenario())
