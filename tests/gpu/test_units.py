"""Between an engine's layouts and pages: the twin and Triton against a loop over tokens."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")

from hypothesis import HealthCheck, Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hicache.device import kernels  # noqa: E402

RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.int64]
SHAPES = {
    "kv-nhd": "2 b t h d",
    "kv-hnd": "2 b h t d",
    "block-kv-nhd": "b 2 t h d",
    "block-kv-hnd": "b 2 h t d",
    "nhd": "b t h d",
    "hnd": "b h t d",
    "tokens": "b h d",
    "latent": "b t d",
}


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str
    layers: int
    blocks: int
    block: int
    heads: int
    dim: int
    dtype: torch.dtype
    units: int
    unit_tokens: int
    pages: int
    first: int
    gap: int  # elements between the vectors' ends
    pad: int  # bytes behind each row
    seed: int

    @property
    def sizes(self):
        block = 1 if self.layout == "tokens" else self.block
        heads = 1 if self.layout == "latent" else self.heads
        return {"2": 2, "b": self.blocks, "t": block, "h": heads, "d": self.dim}

    def make(self):
        """Layers, planes, places and rows, on the CPU."""
        rng = torch.Generator().manual_seed(self.seed)
        width = torch.empty((), dtype=self.dtype).element_size()
        shape = [self.sizes[axis] for axis in SHAPES[self.layout].split()]
        layers = []
        for _ in range(self.layers):
            wide = [*shape[:-1], (shape[-1] + self.gap) * width]
            raw = torch.randint(0, 256, wide, dtype=torch.uint8, generator=rng)
            layers.append(raw.view(self.dtype)[..., : shape[-1]])
        ends = self.sizes["b"] * self.sizes["t"] // self.unit_tokens
        chosen = torch.randperm(ends, generator=rng)[: self.pages * self.units]
        places = (chosen * self.unit_tokens).view(self.pages, self.units)
        skipped = torch.rand(places.shape, generator=rng) < 0.1
        places[skipped] = -1
        tokens = self.units * self.unit_tokens
        vectors = len([p for layer in layers for p in kernels.planes(layer, self.layout)])
        row = (self.first + vectors) * tokens * self.sizes["h"] * self.dim * width
        rows = torch.randint(0, 256, (self.pages, row + self.pad), dtype=torch.uint8, generator=rng)
        return layers, places, rows


@st.composite
def cases(draw):
    layout = draw(st.sampled_from(sorted(SHAPES)))
    unit_tokens = 1 if layout == "tokens" else draw(st.sampled_from([1, 2, 4]))
    block = 1 if layout == "tokens" else unit_tokens * draw(st.integers(1, 3))
    units, pages = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 3]))
    needed = -(-pages * units * unit_tokens // block)
    dtype = draw(st.sampled_from(DTYPES))
    width = torch.empty((), dtype=dtype).element_size()
    return Case(
        layout,
        draw(st.integers(1, 3)),
        needed + draw(st.integers(1, 2)),
        block,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 3, 8, 16])),
        dtype,
        units,
        unit_tokens,
        pages,
        draw(st.integers(0, 2)),
        draw(st.sampled_from([0, 0, 1, 8])),
        draw(st.sampled_from([0, 0, width, 64])),
        draw(st.integers(0, 99)),
    )


def bits(tensor):
    return tensor.view(RAW[tensor.element_size()])


def by_hand(case, layers, places, rows, *, pack):
    """Token by token, as the words of kernels/paged.py have it."""
    planes = [plane for layer in layers for plane in kernels.planes(layer, case.layout)]
    tokens = case.units * case.unit_tokens
    block = case.sizes["t"]
    for page in range(case.pages):
        for number, plane in enumerate(planes):
            for token in range(tokens):
                place = int(places[page, token // case.unit_tokens])
                if place < 0:
                    continue
                place += token % case.unit_tokens
                vector = bits(plane)[place // block, place % block]
                size = vector.numel() * plane.element_size()
                start = ((case.first + number) * tokens + token) * size
                if pack:
                    rows[page, start : start + size] = vector.contiguous().view(torch.uint8).reshape(-1)
                else:
                    source = rows[page, start : start + size].clone().view(RAW[plane.element_size()])
                    vector.copy_(source.view(vector.shape))


WIDE = Case("kv-nhd", 2, 6, 16, 8, 128, torch.bfloat16, 2, 16, 2, 1, 0, 4096, 1)
BY_TOKEN = Case("tokens", 2, 40, 1, 2, 64, torch.bfloat16, 16, 1, 2, 0, 0, 0, 2)
LATENT = Case("latent", 2, 5, 16, 1, 576, torch.bfloat16, 2, 16, 2, 0, 0, 0, 3)
IN_BLOCKS = Case("block-kv-hnd", 1, 3, 32, 2, 64, torch.float16, 1, 8, 4, 0, 0, 64, 4)


def moved(layers, layout, place):
    """The layers where the kernels read them: strides stay."""
    if place.type == "cpu":
        return layers
    found = []
    for layer in layers:
        last = layer.stride(-2) if layer.dim() > 1 else layer.shape[-1]
        memory = torch.as_strided(layer, (*layer.shape[:-1], last), layer.stride(), layer.storage_offset())
        found.append(memory.to(place)[..., : layer.shape[-1]])
    return found


@given(cases())
@example(WIDE)
@example(BY_TOKEN)
@example(LATENT)
@example(IN_BLOCKS)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # the interpreter is too slow to shrink with
)
@pytest.mark.parametrize("pack", [True, False], ids=["pack", "unpack"])
def test_units_move_as_the_page_layout_says(place, pack, case):
    layers, places, rows = case.make()
    ours = moved([layer.clone(memory_format=torch.preserve_format) for layer in layers], case.layout, place)
    wanted_layers = [layer.clone() for layer in layers]
    wanted_rows = rows.clone()
    by_hand(case, wanted_layers, places, wanted_rows, pack=pack)
    planes = [plane for layer in ours for plane in kernels.planes(layer, case.layout)]
    given_rows = rows.clone().to(place)
    move = kernels.pack_units if pack else kernels.unpack_units
    move(planes, places.to(place), given_rows, case.units * case.unit_tokens, case.first)
    assert torch.equal(given_rows.cpu(), wanted_rows)
    for got, want in zip(ours, wanted_layers, strict=True):
        assert torch.equal(bits(got).cpu(), bits(want))


def test_blocks_smaller_and_larger_than_pages_have_places():
    smaller = kernels.places_of_blocks(torch.tensor([[3, -1], [0, 2]]), 16, 32)
    assert smaller.tolist() == [[48, -16], [0, 32]]
    larger = kernels.places_of_blocks(
        torch.tensor([5, 0]), 64, 32
    )  # the second half of block 2, the first of 0
    assert larger.tolist() == [[160], [0]]
    for blocks, block, page in ((torch.tensor([[1]]), 24, 32), (torch.tensor([1]), 48, 32)):
        with pytest.raises(ValueError, match="must be whole"):
            kernels.places_of_blocks(blocks, block, page)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"planes": []}, id="no planes"),
        pytest.param({"planes": [torch.zeros(2, 4, 1)]}, id="3-d plane"),
        pytest.param({"planes": [torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2).half()]}, id="mixed"),
        pytest.param({"planes": [torch.zeros(2, 4, 1, 2).cdouble()]}, id="too wide"),
        pytest.param({"places": torch.zeros(1, 2).int()}, id="32-bit places"),
        pytest.param({"places": torch.zeros(1, 0).long()}, id="no units"),
        pytest.param({"page_tokens": 7}, id="units do not divide the page"),
        pytest.param({"page_tokens": 16}, id="units larger than a block"),
        pytest.param({"rows": torch.zeros(1, 63, dtype=torch.uint8)}, id="short rows"),
        pytest.param({"rows": torch.zeros(2, 64, dtype=torch.uint8)}, id="other rows"),
        pytest.param({"rows": torch.zeros(1, 64)}, id="float rows"),
        pytest.param({"first": -1}, id="negative plane"),
    ],
)
def test_what_does_not_go_together_is_refused(place, change):
    arguments = {
        "planes": [torch.zeros(2, 4, 1, 2)],
        "places": torch.zeros(1, 2).long(),
        "rows": torch.zeros(1, 64, dtype=torch.uint8),
        "page_tokens": 8,
        "first": 0,
    } | change
    with pytest.raises(ValueError, match=r"must|differ|too wide"):
        kernels.pack_units(*arguments.values())


def test_layouts_are_known_by_name():
    with pytest.raises(ValueError, match="layout must be one of kv-nhd"):
        kernels.planes(torch.zeros(2, 3, 4, 5, 6), "nhdx")
    with pytest.raises(ValueError, match="must be"):
        kernels.planes(torch.zeros(3, 4, 5, 6), "kv-nhd")
    with pytest.raises(ValueError, match="two kv"):
        kernels.planes(torch.zeros(3, 3, 4, 5, 6), "kv-nhd")
