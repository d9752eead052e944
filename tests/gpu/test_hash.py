"""xxh3-64 on the device is xxhash's; rows move by address."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the device room needs torch")
xxhash = pytest.importorskip("xxhash", reason="the reference")

from hypothesis import HealthCheck, Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hicache.device import kernels  # noqa: E402

QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),  # the interpreter is too slow to shrink with
}


def random_rows(count, stride, seed):
    return torch.randint(
        0, 256, (count, stride), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@given(st.integers(0, 6), st.integers(31, 700), st.sampled_from([0, 8, 64]), st.integers(0, 99))
@example(5, 128, 0, 1)  # exactly one block
@example(3, 129, 64, 2)
@example(9, 1024, 0, 3)  # eight blocks: the chain's look-ahead, exactly
@example(2, 2048 * 4, 0, 4)
@settings(max_examples=12, **QUIET)
def test_hash_rows_is_xxh3(place, count, words, pad, seed):
    rows, size = random_rows(count, words * 8 + pad, seed), words * 8
    out = torch.zeros(count, dtype=torch.int64, device=place)
    kernels.hash_rows(rows.to(place), size, out)
    wanted = [xxhash.xxh3_64_intdigest(row[:size].numpy().tobytes()) for row in rows]
    assert [value % 2**64 for value in out.tolist()] == wanted


@pytest.mark.parametrize("size", [0, 8, 240, 244, 1001])
def test_sizes_that_the_host_hashes_are_refused(place, size):
    assert not kernels.can_hash(size)
    with pytest.raises(ValueError, match="row_bytes must be"):
        kernels.hash_rows(torch.zeros((1, 2048), dtype=torch.uint8), size, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("rows", "out"),
    [
        (torch.zeros((1, 100), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros((1, 256)), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros((2, 256), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros((1, 256), dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_what_does_not_go_together_is_refused(place, rows, out):
    with pytest.raises(ValueError, match="must be"):
        kernels.hash_rows(rows, 256, out)


@given(st.integers(0, 5), st.integers(1, 5000), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 9))
@example(3, 4096 * 4, 16, 0)
@settings(max_examples=10, **QUIET)
def test_rows_move_by_address(place, count, size, step, seed):
    if place.type == "cpu" and not kernels.FUSED:
        pytest.skip("by address there is only Triton")
    stride = -(-size // 16) * 16 + 16
    source = random_rows(count + 1, stride, seed).to(place)
    target = random_rows(count + 1, stride, seed + 1).to(place)
    wanted = target.clone()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    shift = step % 16
    for to, at in enumerate(order):
        wanted[to, shift : shift + size] = source[at, shift : shift + size]
    tables = torch.tensor(
        [
            [target[to].data_ptr() + shift for to in range(count)],
            [source[at].data_ptr() + shift for at in order],
        ],
        dtype=torch.int64,
        device=place,
    )
    kernels.move_rows_at(tables[0].data_ptr(), tables[1].data_ptr(), count, size, step)
    assert torch.equal(target, wanted)
