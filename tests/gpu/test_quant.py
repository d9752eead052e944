"""Quantised pages: the bounds, the disk tier's codecs bit for bit, and Triton against the twin."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hicache.device import kernels  # noqa: E402

CODECS = ["fp8-e4m3", "int8-g64", "int4-g64"]
DTYPES = [torch.bfloat16, torch.float16]
SUBNORMAL = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def numbers(kind, count, dtype, seed):
    """Numbers as they may be: normal, of all sizes, zeros, the dtype's whole range, negative only."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=rng)
    if kind == "sizes":
        x *= 10 ** (torch.rand(count // 64, generator=rng) * 12 - 8).repeat_interleave(64)
    elif kind == "zeros":
        x *= torch.rand(count, generator=rng) > 0.98
    elif kind == "range":
        x = torch.randint(-(2**15), 2**15, (count,), generator=rng).to(torch.int16).view(dtype).float()
        x = x.nan_to_num(0, 1, -1).clamp(-1e38, 1e38)
    elif kind == "negative":
        x = -x.abs()
    top = 65504.0 if dtype is torch.float16 else 3e38
    return x.clamp(-top, top).to(dtype)


def layers_of(values, layout, pages, block, heads, dim):
    """One layer's tensor with the numbers in it, in any layout; every block is used."""
    blocks = values.numel() // (2 * block * heads * dim)
    shape = {"kv-nhd": (2, blocks, block, heads, dim), "block-kv-hnd": (blocks, 2, heads, block, dim)}
    return values.view(shape[layout])


def quantise(layer, layout, codec, place, *, units=2):
    """(rows, refused) of the layer's blocks, two blocks a page, on the CPU."""
    layer = layer.to(place)
    planes = kernels.planes(layer, layout)
    blocks, block, heads, dim = planes[0].shape
    table = kernels.places_of_blocks(torch.arange(blocks).view(-1, units), block, units * block).to(place)
    size = kernels.quantised_bytes(2 * units * block * heads * dim, codec)
    rows = torch.zeros((blocks // units, size), dtype=torch.uint8, device=place)
    refused = torch.zeros(len(rows), dtype=torch.int32, device=place)
    kernels.quantise_units(planes, table, rows, codec, page=(units * block, 2, 0), refused=refused)
    back = torch.zeros_like(layer)
    kernels.dequantise_units(kernels.planes(back, layout), table, rows, codec, page=(units * block, 2, 0))
    return rows.cpu(), refused.cpu(), back.cpu()


CASES = {
    "kind": st.sampled_from(["normal", "sizes", "zeros", "range", "negative"]),
    "dtype": st.sampled_from(DTYPES),
    "layout": st.sampled_from(["kv-nhd", "block-kv-hnd"]),
    "seed": st.integers(0, 999),
}
QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),  # the interpreter is too slow to shrink with
}
# numpy, which the interpreter computes with, warns of infinities and NaNs on the way
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def in_page_order(layer, layout, units=2):
    """The numbers of each page, in groups of 64."""
    k, v = kernels.planes(layer, layout)
    planes = torch.stack([k, v]).view(2, -1, units, *k.shape[1:]).transpose(0, 1)
    return planes.reshape(len(planes[:, 0]), -1, 64)


@pytest.mark.parametrize("codec", CODECS)
@given(**CASES)
@settings(max_examples=8, **QUIET)
def test_what_comes_back_is_within_the_bound(place, codec, kind, dtype, layout, seed):
    layer = layers_of(numbers(kind, 2 * 4 * 4 * 2 * 32, dtype, seed), layout, 2, 4, 2, 32)
    _, refused, back = quantise(layer, layout, codec, place)
    assert not refused.any()
    x, y = in_page_order(layer, layout).double(), in_page_order(back, layout).double()
    t, off = (
        SUBNORMAL[dtype],
        (in_page_order(layer, layout).double() - in_page_order(back, layout).double()).abs(),
    )
    m, a, b = x.abs().amax(2, keepdim=True), x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    u = (y.abs() * ROUNDING[dtype]).clamp(min=t)
    if codec == "fp8-e4m3":
        bound = torch.maximum(x.abs() / 16, m / 2**17).clamp(min=t)
    elif codec == "int8-g64":
        bound = m / 252 + u
    else:
        bound = (b - a) / 29 + torch.maximum(a.abs(), b.abs()) / 2**11 + u
    assert (off <= bound).all()
    if codec != "int4-g64":
        assert (y[x == 0] == 0).all()


@pytest.mark.parametrize("codec", CODECS)
@given(**CASES)
@settings(max_examples=8, **QUIET)
def test_codes_and_numbers_are_the_disk_tiers(place, codec, kind, dtype, layout, seed):
    pytest.importorskip("zstandard", reason="the disk tier's codecs need it")
    import numpy as np

    from hicache.tier.codec import lossy
    from hicache.tier.codec.forms import Form

    layer = layers_of(numbers(kind, 2 * 4 * 4 * 2 * 32, dtype, seed), layout, 2, 4, 2, 32)
    rows, _, back = quantise(layer, layout, codec, place)
    form = Form.BFLOAT16 if dtype is torch.bfloat16 else Form.FLOAT16
    for row, x, y in zip(rows, in_page_order(layer, layout), in_page_order(back, layout), strict=True):
        raw = x.contiguous().view(torch.uint8).numpy().reshape(-1)
        parameters, codes = lossy._CODECS[codec][0](lossy._wide(raw, form), form)
        if codec == "int4-g64":  # ours gives zero no sign
            words = parameters.view(np.uint16)
            words[words == 0x8000] = 0
        assert np.array_equal(row.numpy(), np.concatenate([parameters, codes]))
        payload = np.concatenate([np.zeros(4, np.uint8), row.numpy()])
        target = np.empty(len(raw), np.uint8)
        assert lossy.unpack(payload, codec, form, target)
        assert np.array_equal(y.contiguous().view(torch.uint8).numpy().reshape(-1), target)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), "range"])
def test_a_page_that_cannot_be_quantised_says_so_and_others_do_not_suffer(place, codec, bad):
    x = numbers("normal", 2 * 4 * 4 * 2 * 32, torch.bfloat16, 3)
    clean = layers_of(x.clone(), "kv-nhd", 2, 4, 2, 32)
    if bad == "range":
        x[64:66] = torch.tensor([3e38, -3e38])
    else:
        x[77] = bad
    rows, refused, _ = quantise(layers_of(x, "kv-nhd", 2, 4, 2, 32), "kv-nhd", codec, place)
    assert refused.tolist() == [1, 0]
    assert torch.equal(rows[1], quantise(clean, "kv-nhd", codec, place)[0][1])


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_decode_to_the_twins_finite_numbers(place, codec):
    rng = torch.Generator().manual_seed(5)
    size = kernels.quantised_bytes(2 * 4 * 2 * 32, codec)
    rows = torch.randint(0, 256, (3, size), dtype=torch.uint8, generator=rng)
    table = torch.tensor([[0], [4], [8]])
    found = []
    for where in ("cpu", place):
        layer = torch.zeros((2, 3, 4, 2, 32), dtype=torch.float16, device=where)
        planes = kernels.planes(layer, "kv-nhd")
        kernels.dequantise_units(planes, table.to(where), rows.to(where), codec, page=(4, 2, 0))
        found.append(layer.cpu())
    assert torch.isfinite(found[0]).all()
    assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))


def test_some_layers_of_a_page_are_quantised_into_their_place(place):
    if place.type == "cpu" and not kernels.FUSED:
        pytest.skip("the twin takes whole pages")
    layers = [numbers("normal", 2 * 2 * 4 * 2 * 32, torch.bfloat16, s).view(2, 2, 4, 2, 32) for s in (1, 2)]
    table = torch.tensor([[0], [4]], device=place)
    for codec in CODECS:
        size = kernels.quantised_bytes(4 * 4 * 2 * 32, codec)
        refused = torch.zeros(2, dtype=torch.int32, device=place)
        parts, whole = (torch.zeros((2, size), dtype=torch.uint8, device=place) for _ in range(2))
        planes = [plane for layer in layers for plane in kernels.planes(layer.to(place), "kv-nhd")]
        kernels.quantise_units(planes, table, whole, codec, page=(4, 4, 0), refused=refused)
        for first in (2, 0):
            some = planes[first : first + 2]
            kernels.quantise_units(some, table, parts, codec, page=(4, 4, first), refused=refused)
        assert torch.equal(parts, whole)


@pytest.mark.parametrize(
    ("codec", "dtype", "dim", "match"),
    [
        ("int8", torch.bfloat16, 64, "codec must be"),
        ("int8-g64", torch.float32, 64, "numbers must be"),
        ("int8-g64", torch.bfloat16, 24, "whole groups"),
    ],
)
def test_what_is_not_quantised_is_refused(place, codec, dtype, dim, match):
    layer = torch.zeros((2, 1, 1, 1, dim), dtype=dtype)
    with pytest.raises(ValueError, match=match):
        kernels.quantise_units(
            kernels.planes(layer, "kv-nhd"),
            torch.zeros((1, 1), dtype=torch.int64),
            torch.zeros((1, 132), dtype=torch.uint8),
            codec,
            page=(1, 2, 0),
            refused=torch.zeros(1, dtype=torch.int32),
        )
