"""A cache's tensors to pages and back: the same bits, and the pages that the kernels make."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the integrations need torch")

from hicache.device import kernels  # noqa: E402 - after the skip
from hicache.integrations.transformers import pages as paging  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGES = 2


class Lease(list[bytes]):
    """Pages to read."""

    def copy_into(self, into: Any, first: int, count: int, *, verify: str) -> None:
        assert verify == "on-copy"
        data = torch.frombuffer(bytearray(b"".join(self[first : first + count])), dtype=torch.uint8)
        paging.page_rows(into).copy_(data.view(count, -1))


def bits(tensor: Any) -> bytes:
    return bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def packed(layers: Any, shape: paging.PageShape) -> list[bytes]:
    packer, found = paging.PagePacker(layers, shape, PAGES), []
    for page in range(PAGES):
        data = bytearray(shape.page_bytes)
        packer(page, memoryview(data))
        found.append(bytes(data))
    return found


def cache_of(shape: paging.PageShape, device: str) -> Any:
    """Random bits, NaNs too; some tokens more than whole pages."""
    size = (shape.layers, 2, 1, shape.heads, PAGES * shape.page_tokens + 3, shape.dim * shape.dtype.itemsize)
    raw = torch.randint(0, 256, size, dtype=torch.uint8).to(device)
    return [tuple(pair.view(shape.dtype)) for pair in raw]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("batch_bytes", [1, 1 << 20])
def test_what_is_read_is_what_was_stored(
    dtype: str, batch_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "BATCH_BYTES", batch_bytes)
    shape = paging.PageShape(layers=3, page_tokens=4, heads=2, dim=6, dtype=getattr(torch, dtype))
    layers = cache_of(shape, device)
    reader = paging.PageReader(shape, torch.device(device))
    reader.read(Lease(packed(layers, shape)))
    assert reader.pages == PAGES
    read = list(reader.layers())
    assert len(read) == 3
    for (keys, values), (old_keys, old_values) in zip(read, layers, strict=True):
        assert keys.shape == values.shape == (1, 2, 8, 6)
        assert keys.device.type == device
        assert bits(keys) == bits(old_keys[:, :, :8])
        assert bits(values) == bits(old_values[:, :, :8])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_are_those_of_the_kernels(dtype: str) -> None:
    shape = paging.PageShape(layers=3, page_tokens=4, heads=2, dim=6, dtype=getattr(torch, dtype))
    layers = cache_of(shape, "cpu")
    engine = [  # the same KV as an engine has it: blocks of two tokens, four blocks in order
        torch.stack([tensor[0, :, :8].transpose(0, 1).reshape(4, 2, 2, 6) for tensor in pair])
        for pair in layers
    ]
    wanted = shape.empty(PAGES, torch.device("cpu"))
    kernels.pack_layers(engine, torch.arange(4).view(PAGES, 2), wanted)
    assert b"".join(packed(layers, shape)) == bits(wanted)


def test_the_packer_starts_at_any_page() -> None:
    shape = paging.PageShape(layers=1, page_tokens=4, heads=1, dim=2, dtype=torch.float32)
    layers = cache_of(shape, "cpu")
    data = bytearray(shape.page_bytes)
    paging.PagePacker(layers, shape, PAGES)(1, memoryview(data))
    assert bytes(data) == packed(layers, shape)[1]


def test_a_lease_of_no_pages_gives_no_layers() -> None:
    shape = paging.PageShape(layers=1, page_tokens=4, heads=1, dim=2, dtype=torch.float32)
    reader = paging.PageReader(shape, torch.device("cpu"))
    reader.read(Lease())
    assert (reader.pages, list(reader.layers())) == (0, [])
