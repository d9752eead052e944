from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_kit import torch

from hicache.errors import UnsupportedError
from hicache.integrations.vllm.copying import HostBlocks
from hicache.integrations.vllm.layout import LayerTensor, PartLayout, geometry, plan

BLOCKS = 8  # enough that no other dimension is taken for the blocks


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    """A KV tensor of some engine: blocks first or behind keys and values, its dimensions in any order in memory."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]))
    split = draw(st.integers(1, 3))
    inner = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    pair = draw(st.booleans())
    shape = ([2] if pair else []) + [BLOCKS * split, *inner]
    order = draw(st.permutations(range(len(shape))))
    padding = draw(st.integers(0, 3))  # elements between the blocks' ends and the next, where it may be
    sizes = [shape[dim] for dim in order]
    strides_by_order = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    if padding and order[0] != (1 if pair else 0):
        padding = 0
    strides = [0] * len(shape)
    for dim, stride in zip(order, strides_by_order, strict=True):
        strides[dim] = stride
    strides[order[0]] += padding
    offset = draw(st.integers(0, 7))
    elements = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    seed = draw(st.integers(0, 1 << 30))
    raw = np.random.default_rng(seed).integers(0, 256, elements * dtype.itemsize, dtype=np.uint8)
    flat = torch.from_numpy(raw).view(dtype)
    return torch.as_strided(flat, shape, strides, offset), raw, 1 if pair else 0, split


def addresses(tensor: Any, at: int, split: int, block: int) -> Any:
    """Where a block's elements begin, in order: all indices one by one, nothing clever."""
    part = tensor.narrow(at, block * split, split)
    each = np.indices(tuple(part.shape)).reshape(part.dim(), -1)
    found = part.storage_offset() + (each * np.array(part.stride()).reshape(-1, 1)).sum(axis=0)
    return np.sort(found)


def block_bytes(raw: Any, item: int, places: Any) -> bytes:
    return bytes(raw.reshape(-1, item)[places].tobytes())


@settings(max_examples=80)
@given(made=tensors(), data=st.data())
def test_blocks_of_any_layout_travel_whole_and_touch_nothing_else(made: Any, data: st.DataObject) -> None:
    tensor, raw, at, split = made
    layer = LayerTensor.of("a", tensor)
    places = [addresses(tensor, at, split, block) for block in range(BLOCKS)]
    found = geometry(layer, BLOCKS)
    each = math.prod(tensor.shape) // BLOCKS * tensor.element_size()
    assert found.block_bytes == each
    page_blocks = data.draw(st.integers(1, 3))
    skip = data.draw(st.integers(0, page_blocks - 1))
    pages = data.draw(st.integers(1, BLOCKS // page_blocks))
    ids = data.draw(st.permutations(range(BLOCKS)))[: pages * page_blocks - skip]
    if data.draw(st.booleans()):
        ids = sorted(ids, reverse=data.draw(st.booleans()))
    part = PartLayout({"a": layer}, [("a", each)], (BLOCKS, page_blocks))
    blocks = HostBlocks(part)
    spans = [pages] if pages == 1 else [1, pages - 1]
    before = [block_bytes(raw, layer.item_bytes, place) for place in places]
    rows = [np.zeros((length, part.part_bytes), np.uint8) for length in spans]
    for move in plan(ids, spans, page_blocks, skip):
        blocks.save(rows, move, 0)
    stored = b"".join(row.tobytes() for row in rows)
    assert stored[: skip * each] == bytes(skip * each)
    assert stored[skip * each :] == b"".join(before[block] for block in ids)

    fresh = [np.random.default_rng(1).integers(0, 256, row.shape, dtype=np.uint8) for row in rows]
    whole = raw.copy()
    for move in plan(ids, spans, page_blocks, skip):
        blocks.load(fresh, move, 0)
    wanted = b"".join(row.tobytes() for row in fresh)[skip * each :]
    after = [block_bytes(raw, layer.item_bytes, place) for place in places]
    assert b"".join(after[block] for block in ids) == wanted
    assert all(after[block] == before[block] for block in range(BLOCKS) if block not in ids)
    assert (whole != raw).sum() <= len(ids) * each, "bytes between blocks are left alone"


def test_layers_packed_into_one_storage_block_by_block() -> None:
    """Each layer's blocks are found where another layer's lie between them."""
    whole = torch.arange(4 * 3 * 8, dtype=torch.int32).view(4, 3, 2, 4)  # blocks, layers, heads, content
    named = {f"l{n}": LayerTensor.of(f"l{n}", whole[:, n]) for n in range(3)}
    part = PartLayout(named, [(name, 32) for name in named], (4, 1))
    rows = [np.zeros((2, part.part_bytes), np.uint8)]
    blocks = HostBlocks(part)
    for move in plan([3, 1], [2], 1):
        for layer in range(3):
            blocks.save(rows, move, layer)
    assert rows[0].tobytes() == whole[[3, 1]].numpy().tobytes()


def test_layers_that_share_a_cache_are_one_layer_of_the_part() -> None:
    tensor = torch.zeros(4, 16)
    named = {"own": LayerTensor.of("own", tensor), "borrowed": LayerTensor.of("borrowed", tensor)}
    part = PartLayout(named, [("own", 64)], (4, 1))
    assert part.part_bytes == 64
    assert part.number("borrowed") == part.number("own") == 0
    assert part.owns("own")
    assert not part.owns("borrowed")
    assert part.number("elsewhere") is None
    assert not part.owns("elsewhere")


@pytest.mark.parametrize(
    ("shape", "strides", "why"),
    [
        ((6, 4), (4, 1), "none of its dimensions"),
        ((2, 2, 4), (8, 4, 1), "several of its dimensions"),
        ((4, 4), (2, 1), "overlap"),
        ((4, 4), (0, 1), "overlap"),
        ((), (), "none of its dimensions"),
    ],
)
def test_tensors_that_are_not_understood_are_refused(shape: Any, strides: Any, why: str) -> None:
    blocks = 2 if shape == (2, 2, 4) else 4
    tensor = LayerTensor("a", shape, strides, 2, 0, 1, 1 << 20, "cpu")
    with pytest.raises(UnsupportedError, match=why):
        geometry(tensor, blocks)


def test_a_tensor_larger_than_its_memory_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="beyond"):
        geometry(LayerTensor("a", (4, 4), (4, 1), 2, 0, 1, 31, "cpu"), 4)


def test_tensors_that_differ_from_the_configuration_are_refused() -> None:
    tensor = LayerTensor.of("a", torch.zeros(4, 16))
    with pytest.raises(UnsupportedError, match="64 bytes in the engine's tensor, and 32 by"):
        PartLayout({"a": tensor}, [("a", 32)], (4, 1))
    with pytest.raises(UnsupportedError, match="registered no KV tensor"):
        PartLayout({"a": tensor}, [("b", 64)], (4, 1))
    other = LayerTensor.of("b", torch.zeros(4, 16))
    with pytest.raises(UnsupportedError, match="a KV cache of its own"):
        PartLayout({"a": tensor, "b": other}, [("a", 64)], (4, 1))
    again = LayerTensor.of("b", torch.zeros(4, 16)[:, :])
    with pytest.raises(UnsupportedError, match="share one KV tensor"):
        same = {"a": again, "b": again}
        PartLayout(same, [("a", 64), ("b", 64)], (4, 1))


def test_a_plan_covers_every_block_once_in_bounded_moves() -> None:
    ids = list(range(300, 500)) + list(range(200, 0, -1))
    moves = plan(ids, [150, 50], 2)
    assert [block for move in moves for block in move.blocks.reshape(-1)] == ids
    assert all(move.pages <= 64 for move in moves)
    assert {move.step for move in moves} == {1, -1, 0}
