"""The lossy codecs: never further off than they say, never where they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from codec_kit import KEY, namespace, normal, words
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from hicache.keys import fingerprint
from hicache.tier.codec import Codec, PageCodec, decode
from hicache.tier.codec.lossy import GROUP
from hicache.tier.codec_names import FP8, INT4, INT8, LOSSY
from hicache.types import Outcome, PageRecord

DTYPES = ("bfloat16", "float16")
CODECS = {FP8: Codec.FP8, INT8: Codec.INT8, INT4: Codec.INT4}
Numbers = npt.NDArray[np.float64]


def through(data: bytes, dtype: str, name: str) -> tuple[bytes, Codec]:
    """What is read back, and how it was stored. Checksums are of what is read back."""
    encoded = PageCodec(namespace(len(data), dtype, name)).encode(memoryview(data), KEY)
    into = bytearray(len(data))
    found = decode(encoded.record, KEY, memoryview(into))
    assert found.outcome is Outcome.OK, found.reason
    assert found.checksum == encoded.checksum == xxh3_64_intdigest(into)
    assert encoded.source_checksum == xxh3_64_intdigest(data)
    return bytes(into), encoded.codec


def bounds(x: Numbers, y: Numbers, dtype: str, name: str) -> Numbers:
    """The largest error that the codec's text allows each number."""
    short = -len(x) % GROUP
    groups = np.concatenate([x, np.repeat(x[-1:], short)]).reshape(-1, GROUP)
    low, high = (np.repeat(f(axis=1), GROUP)[: len(x)] for f in (groups.min, groups.max))
    peak = np.maximum(abs(low), abs(high))
    smallest = 2.0**-24 if dtype == "float16" else 2.0**-133
    half = np.maximum(np.abs(y) * (2.0**-11 if dtype == "float16" else 2.0**-8), smallest)
    if name == FP8:
        return np.maximum(np.maximum(np.abs(x) / 16, peak * 2.0**-17), smallest)
    if name == INT8:
        return peak / 252 + half
    return (high - low) / 29 + peak * 2.0**-11 + half


def check(data: bytes, dtype: str, name: str) -> None:
    x = words(data, dtype)
    got, codec = through(data, dtype, name)
    with np.errstate(over="ignore"):
        spread = np.float32(x.max()) - np.float32(x.min()) if np.isfinite(x).all() and len(x) else np.inf
    if not np.isfinite(spread):
        assert codec not in CODECS.values()
        assert got == data
        return
    assert codec is CODECS[name]
    y = words(got, dtype)
    assert np.isfinite(y).all()
    wrong = np.abs(x - y) > bounds(x, y, dtype, name)
    assert not wrong.any(), (x[wrong][:3], y[wrong][:3], bounds(x, y, dtype, name)[wrong][:3])
    if name != INT4:
        assert not y[x == 0].any()


@given(
    count=st.integers(1, 500),
    seed=st.integers(0, 99),
    power=st.integers(-30, 14),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(LOSSY),
)
def test_normal_numbers_are_within_the_bound(
    count: int, seed: int, power: int, dtype: str, name: str
) -> None:
    scale = 2.0**power if dtype == "bfloat16" else 2.0 ** (power // 2)
    check(normal(count, dtype, seed, scale), dtype, name)


@given(data=st.binary(min_size=2, max_size=600), dtype=st.sampled_from(DTYPES), name=st.sampled_from(LOSSY))
def test_any_bits_are_within_the_bound_or_exact(data: bytes, dtype: str, name: str) -> None:
    """Subnormals, extremes, infinities and NaNs among them."""
    check(data[: len(data) // 2 * 2], dtype, name)


_EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x03FF, 0x0400, 0x3F80, 0x3C00, 0x7BFF, 0xFBFF]
_EDGES += [0x7F7F, 0xFF7F, 0x7F80, 0x7C00, 0xFC00, 0x7E00, 0x7FC0, 0xFFFF, 0x7F00, 0x4380, 0x5F00]


@given(
    numbers=st.lists(st.sampled_from(_EDGES), min_size=1, max_size=200),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(LOSSY),
)
def test_extremes_are_within_the_bound_or_exact(numbers: list[int], dtype: str, name: str) -> None:
    check(np.array(numbers, np.uint16).tobytes(), dtype, name)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_pattern_is_within_the_bound(dtype: str, name: str) -> None:
    """Each alone in its group of equals, and all in their order; and both halves of the range by themselves."""
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[
        np.isfinite(words(every.tobytes(), dtype)) & (np.abs(words(every.tobytes(), dtype)) < 1e38)
    ]
    check(finite.tobytes(), dtype, name)
    check(np.repeat(finite[::37], GROUP).tobytes(), dtype, name)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_page_with_one_infinity_or_nan_is_stored_without_loss(name: str, bad: float) -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float16)
    values[1234] = bad
    got, codec = through(values.tobytes(), "float16", name)
    assert (got, codec in CODECS.values()) == (values.tobytes(), False)


@pytest.mark.parametrize(("name", "ratio"), [(FP8, 1.96), (INT8, 1.93), (INT4, 3.5)])
def test_lossy_pages_are_as_small_as_said(name: str, ratio: float) -> None:
    data = normal(1 << 16)
    encoded = PageCodec(namespace(len(data), codec=name)).encode(memoryview(data), KEY)
    assert len(data) / encoded.record.nbytes > ratio


@given(seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_fp8_changes_nothing_more_the_second_time(seed: int, dtype: str) -> None:
    """A page that went to disk and back may go there again."""
    once, _ = through(normal(500, dtype, seed), dtype, FP8)
    twice, _ = through(once, dtype, FP8)
    assert once == twice


@pytest.mark.parametrize("name", [*LOSSY, "lossless"])
def test_pages_that_are_no_16_bit_floats_are_exact(name: str) -> None:
    """An odd size, or a dtype that is not quantised: the runtime refuses such namespaces, the codec loses nothing."""
    for data, dtype in (
        (normal(500)[1:], "bfloat16"),
        (normal(500), "int8"),
        (normal(500, "float32"), "float32"),
    ):
        assert through(data, dtype, name)[0] == data


# -- in the store


def test_only_the_namespace_that_asked_is_lossy(tmp_path: Path, drive: Any) -> None:
    data = normal(4096)
    driver = drive(tmp_path)
    for at, codec in enumerate(("lossless", "raw", *LOSSY)):
        spec = namespace(len(data), codec=codec)
        name = fingerprint(spec)
        driver.store.put_namespace(name, spec)
        key = bytes([at]) * 32
        done = driver.put(
            {key: data},
            records=[PageRecord(name, name, bytes(64))],
            checksums=[xxh3_64_intdigest(data)],  # of the source: accepted
        )
        assert list(done.outcomes) == [Outcome.OK]
        [got] = driver.get([key], len(data))
        assert (got == data) == (codec not in LOSSY)
        assert list(done.checksums) == [xxh3_64_intdigest(got)], "a PUT says what a GET will give"


@pytest.mark.parametrize("name", LOSSY)
def test_a_source_that_is_not_what_its_checksum_says_is_refused(
    tmp_path: Path, drive: Any, name: str
) -> None:
    data = normal(4096)
    spec = namespace(len(data), codec=name)
    driver = drive(tmp_path)
    driver.store.put_namespace(fingerprint(spec), spec)
    record = PageRecord(fingerprint(spec), fingerprint(spec), bytes(64))
    lossy_sum = PageCodec(spec).encode(memoryview(data), KEY).checksum
    for wrong in (1, lossy_sum):
        done = driver.put({KEY: data}, records=[record], checksums=[wrong])
        assert list(done.outcomes) == [Outcome.CORRUPT]
