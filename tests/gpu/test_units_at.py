"""The quantising kernels by address, a layer at a time, as a copier launches them: Triton against the twin's pages."""

from __future__ import annotations

import importlib.util

import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")

from hicache.device import kernels  # noqa: E402
from hicache.device.copying.cuda_seam import Coding  # noqa: E402
from hicache.device.copying.kv import EngineKv  # noqa: E402
from hicache.device.driver import UnitMove  # noqa: E402

LAYERS, BLOCKS, BLOCK, HEADS, DIM, TOKENS, PAGES = 3, 8, 4, 2, 32, 8, 3
SHAPES = {
    "kv-nhd": (2, BLOCKS, BLOCK, HEADS, DIM),
    "block-kv-hnd": (BLOCKS, 2, HEADS, BLOCK, DIM),
    "latent": (BLOCKS, BLOCK, HEADS * DIM),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of what is refused
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("codec", ["fp8-e4m3", "int8-g64", "int4-g64"])
@pytest.mark.parametrize("layout", sorted(SHAPES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_layer_by_layer_is_the_twins_page(codec, layout, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = torch.Generator().manual_seed(1)
    kind = getattr(torch, dtype)
    layers = [torch.randn(SHAPES[layout], generator=make).to(device, kind) for _ in range(LAYERS)]
    layers[1].view(-1)[-1] = float("inf")  # in a block that no page has
    kv = EngineKv.of(layers, layout=layout, page_tokens=TOKENS, codec=codec)
    places = torch.from_numpy(kv.places_of_blocks(torch.tensor([5, 2, 0, 3, 1, 6]))).to(device)
    raw = torch.zeros((PAGES, kv.raw_bytes), dtype=torch.uint8)
    host = [plane.cpu() for plane in kv.planes]
    kernels.pack_units(host, places.cpu(), raw, TOKENS)
    wanted = torch.zeros((PAGES, kv.page_bytes), dtype=torch.uint8)
    kernels.encode_rows(raw.view(kind), codec, wanted, torch.zeros(PAGES, dtype=torch.int32))

    rows = torch.zeros((PAGES, kv.page_bytes), dtype=torch.uint8, device=device)
    refused = torch.zeros(PAGES, dtype=torch.int32, device=device)
    table = rows.data_ptr() + torch.arange(PAGES, device=device) * kv.page_bytes
    for layer in range(LAYERS):
        move, coding, pointers = launch(kv, kv.planes, layer, places, table)
        kernels.encode_units_at(move, coding, refused.data_ptr())
        del pointers
    assert torch.equal(rows.cpu(), wanted) and not refused.any()

    empty = [torch.zeros_like(layer) for layer in layers]
    into = EngineKv.of(empty, layout=layout, page_tokens=TOKENS, codec=codec)
    for layer in range(LAYERS):
        move, coding, pointers = launch(into, into.planes, layer, places, table)
        kernels.decode_units_at(move, coding)
        del pointers
    back = torch.zeros_like(raw)
    kernels.decode_rows(wanted, codec, back.view(kind))
    found = torch.zeros_like(raw)
    kernels.pack_units([plane.cpu() for plane in into.planes], places.cpu(), found, TOKENS)
    assert torch.equal(found, back)

    kv.planes[-1][int(places[1, 0]) // BLOCK, 0, 0, 0] = float("nan")
    for layer in range(LAYERS):
        move, coding, pointers = launch(kv, kv.planes, layer, places, table)
        kernels.encode_units_at(move, coding, refused.data_ptr())
        del pointers
    assert refused.tolist() == [0, 1, 0]


def launch(kv, planes, layer, places, table):
    """A layer's move and coding, and the table that must live until it was launched."""
    first = layer * kv.planes_per_layer
    some = planes[first : first + kv.planes_per_layer]
    pointers = torch.tensor([plane.data_ptr() for plane in some], dtype=torch.int64).to(places.device)
    _, block, heads, dim = some[0].shape
    move = UnitMove(
        planes=pointers.data_ptr(),
        plane_count=len(some),
        places=places.data_ptr(),
        rows=table.data_ptr(),
        pages=len(places),
        units=places.shape[1],
        unit_tokens=TOKENS // places.shape[1],
        block_tokens=block,
        heads=heads,
        head_size=dim,
        element_bytes=2,
        strides=some[0].stride(),
        aligned_to=2,
    )
    dtype = str(some[0].dtype).removeprefix("torch.")
    return move, Coding(kv.codec, len(planes), first, dtype), pointers
