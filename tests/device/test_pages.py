"""The torch page kernels against naive loops: shapes, dtypes, strides, none, all."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")

import hypothesis  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hicache.device import kernels  # noqa: E402

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.float32,
    torch.int32,
    torch.float64,
    torch.int64,
    torch.complex64,
]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """A copy of the tensor's bits: equality of floats would call NaNs different and zeros equal."""
    return tensor.view(INTEGERS[tensor.element_size()]).clone()


def random_bits(shape, dtype, seed):
    """A contiguous tensor of random bits: NaNs, infinities and denormals included."""
    width = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, top, (*shape[:-1], shape[-1] * width), dtype=torch.uint8, generator=generator)
    return raw.view(dtype) if raw.numel() else torch.empty(shape, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Strides:
    """How a tensor lies in memory: axis order, gaps along the axes, least stride, offset, in elements."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    least: int
    offset: int

    def lay(self, tensor):
        """An equal tensor that lies so."""
        strides, step = [0] * tensor.dim(), self.least
        for axis in self.order:
            strides[axis] = step
            step *= max(tensor.shape[axis], 1) + self.gaps[axis]
        memory = random_bits((step + self.offset,), tensor.dtype, 7)
        laid = torch.as_strided(memory, tensor.shape, strides, self.offset)
        bits_of = INTEGERS[tensor.element_size()]
        laid.view(bits_of).copy_(tensor.view(bits_of))
        return laid


@st.composite
def strides(draw, dims):
    if draw(st.booleans()):
        return Strides(tuple(reversed(range(dims))), (0,) * dims, 1, 0)
    order = draw(st.permutations(range(dims))) if draw(st.booleans()) else list(reversed(range(dims)))
    gaps = draw(st.lists(st.sampled_from([0, 0, 1, 8]), min_size=dims, max_size=dims))
    least, offset = draw(st.sampled_from([1, 1, 2, 16])), draw(st.sampled_from([0, 0, 1, 16]))
    return Strides(tuple(order), tuple(gaps), least, offset)


INDEX_TYPES = st.sampled_from([torch.int64, torch.int32])


@st.composite
def pools(draw):
    """(pool, rows laid out for some pages, page indices): none, some or all of the slots."""
    slots, dims = draw(st.integers(0, 6)), draw(st.integers(0, 3))
    row = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 40]), min_size=dims, max_size=dims)))
    order = draw(st.permutations(range(slots)))
    count = draw(st.sampled_from([0, slots, slots // 2]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    pool = draw(strides(dims + 1)).lay(random_bits((slots, *row), dtype, seed))
    rows = draw(strides(dims + 1)).lay(random_bits((count, *row), dtype, seed + 1))
    return pool, rows, torch.tensor(order[:count], dtype=draw(INDEX_TYPES))


@hypothesis.given(pools(), st.booleans())
def test_gather_pages_copies_rows_bit_by_bit(case, repeat):
    pool, out, indices = case
    if repeat and len(indices):
        indices = indices[:1].repeat(len(indices))
    wanted = bits(out)
    for row, index in enumerate(indices.tolist()):
        wanted[row] = bits(pool)[index]
    before = bits(pool)
    kernels.gather_pages(pool, indices, out)
    assert torch.equal(bits(out), wanted)
    assert torch.equal(bits(pool), before)


@hypothesis.given(pools())
def test_scatter_pages_copies_rows_bit_by_bit_and_no_others(case):
    pool, staging, indices = case
    wanted = bits(pool)
    for row, index in enumerate(indices.tolist()):
        wanted[index] = bits(staging)[row]
    kernels.scatter_pages(staging, pool, indices)
    assert torch.equal(bits(pool), wanted)


@st.composite
def paged_kv(draw):
    """(layers, pages, blocks): layer-first tensors, page-first pages, the blocks of each page."""
    layers, per_page = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    block, heads, dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    count = draw(st.integers(0, 3))
    blocks = count * per_page + draw(st.sampled_from([0, 2]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    lay = draw(strides(5))
    per_layer = [
        lay.lay(random_bits((2, blocks, block, heads, dim), dtype, seed + number)) for number in range(layers)
    ]
    shape = (count, layers, 2, per_page * block, heads, dim)
    pages = draw(strides(6)).lay(random_bits(shape, dtype, seed + 50))
    chosen = draw(st.permutations(range(blocks)))[: count * per_page]
    table = torch.tensor(chosen, dtype=draw(INDEX_TYPES)).view(count, per_page)
    return per_layer, pages, table


def each_token(layers, blocks):
    """Every (page, layer, kv, token in page) and the (block, token in block) where it lies."""
    block = layers[0].shape[2]
    for page, row in enumerate(blocks.tolist()):
        for number in range(len(layers)):
            for kv in range(2):
                for token in range(len(row) * block):
                    yield (page, number, kv, token), (row[token // block], token % block)


@hypothesis.given(paged_kv())
def test_pack_layers_puts_each_token_where_the_page_layout_says(case):
    layers, out, blocks = case
    wanted = bits(out)
    for (page, number, kv, token), (block, place) in each_token(layers, blocks):
        wanted[page, number, kv, token] = bits(layers[number])[kv, block, place]
    kernels.pack_layers(layers, blocks, out)
    assert torch.equal(bits(out), wanted)


@hypothesis.given(paged_kv())
def test_unpack_layers_puts_each_token_back_and_leaves_other_blocks(case):
    layers, pages, blocks = case
    wanted = [bits(layer) for layer in layers]
    for (page, number, kv, token), (block, place) in each_token(layers, blocks):
        wanted[number][kv, block, place] = bits(pages)[page, number, kv, token]
    kernels.unpack_layers(pages, layers, blocks)
    for layer, want in zip(layers, wanted, strict=True):
        assert torch.equal(bits(layer), want)


def test_pack_then_unpack_restores_the_layers_through_rows_of_a_staging_buffer():
    layers = [random_bits((2, 8, 16, 4, 32), torch.bfloat16, seed) for seed in range(3)]
    blocks = torch.randperm(8, generator=torch.Generator().manual_seed(1)).view(2, 4)
    page_bytes = 3 * 2 * 64 * 4 * 32 * 2
    staging = torch.zeros((2, page_bytes + 4096), dtype=torch.uint8)
    pages = staging[:, :page_bytes].view(torch.bfloat16).unflatten(1, (3, 2, 64, 4, 32))
    kernels.pack_layers(layers, blocks, pages)
    back = [torch.zeros_like(layer) for layer in layers]
    kernels.unpack_layers(pages, back, blocks)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(layers, back, strict=True))
    assert not staging[:, page_bytes:].any()


def test_signalling_nans_travel_unchanged():
    snan = 0x7FF0000000000001
    pool = torch.full((4, 2), snan, dtype=torch.int64).view(torch.float64)
    back = torch.zeros((4, 2), dtype=torch.float64)
    kernels.scatter_pages(pool, back, torch.arange(4))
    assert torch.equal(bits(back), bits(pool))


POOL = torch.zeros(4, 8)
LAYER = torch.zeros(2, 3, 4, 1, 2)
TABLE = torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        pytest.param("gather_pages", (POOL, torch.arange(2), torch.zeros(3, 8)), id="other number of rows"),
        pytest.param("gather_pages", (POOL, torch.arange(2), torch.zeros(2, 7)), id="other row"),
        pytest.param("gather_pages", (POOL, torch.arange(2), torch.zeros(2, 8).half()), id="other dtype"),
        pytest.param("gather_pages", (POOL, torch.ones(2), torch.zeros(2, 8)), id="float indices"),
        pytest.param("gather_pages", (POOL, torch.ones(1, 1).int(), torch.zeros(1, 8)), id="2-d indices"),
        pytest.param("scatter_pages", (torch.zeros(3, 8), POOL, torch.arange(2)), id="scatter"),
        pytest.param(
            "scatter_pages",
            (torch.zeros(1, 1).cdouble(), torch.zeros(1, 1).cdouble(), torch.arange(1)),
            id="too wide",
        ),
        pytest.param("pack_layers", ([], TABLE, torch.zeros(2, 1, 2, 4, 1, 2)), id="no layers"),
        pytest.param("pack_layers", ([LAYER[0]], TABLE, torch.zeros(2, 1, 2, 4, 1, 2)), id="4-d layer"),
        pytest.param("pack_layers", ([LAYER], TABLE[0], torch.zeros(1, 1, 2, 4, 1, 2)), id="1-d blocks"),
        pytest.param("pack_layers", ([LAYER], TABLE, torch.zeros(2, 1, 2, 8, 1, 2)), id="other page"),
        pytest.param(
            "pack_layers", ([LAYER, LAYER.half()], TABLE, torch.zeros(2, 2, 2, 4, 1, 2)), id="mixed layers"
        ),
        pytest.param("unpack_layers", (torch.zeros(2, 1, 2, 4, 1, 3), [LAYER], TABLE), id="unpack"),
        pytest.param(
            "pack_layers",
            ([LAYER.cdouble()], TABLE, torch.zeros(2, 1, 2, 4, 1, 2).cdouble()),
            id="too wide layers",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(kernel, arguments):
    with pytest.raises(ValueError, match=r"must be|are|differ|too wide"):
        getattr(kernels, kernel)(*arguments)


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(IndexError):
        kernels.gather_pages(POOL, torch.tensor([4]), torch.zeros(1, 8))
    with pytest.raises(IndexError):
        kernels.scatter_pages(torch.zeros(1, 8), POOL.clone(), torch.tensor([4]))
