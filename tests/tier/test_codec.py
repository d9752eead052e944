"""The codec: any bytes round-trip, and what pays is chosen."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from codec_kit import KEY, LOSSLESS_DTYPES, any_page, namespace, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from hicache.tier.codec import HEADER_BYTES, Codec, Encoded, PageCodec, decode, encode, estimate, exponents
from hicache.tier.codec.exponents import Shape
from hicache.tier.codec.forms import FLOATS, Form, item_bytes
from hicache.types import Outcome


def back(encoded: Encoded, size: int, key: bytes = KEY) -> bytes:
    into = bytearray(size)
    decoded = decode(encoded.record, key, memoryview(into))
    assert (decoded.outcome, decoded.reason) == (Outcome.OK, "")
    assert decoded.checksum == encoded.checksum
    return bytes(into)


@given(data=any_page, dtype=st.sampled_from(LOSSLESS_DTYPES), compress=st.booleans())
def test_any_bytes_round_trip(data: bytes, dtype: str, compress: bool) -> None:
    encoded = encode(memoryview(data), KEY, dtype=dtype, compress=compress)
    assert encoded.checksum == encoded.source_checksum == xxh3_64_intdigest(data)
    assert encoded.record.nbytes <= len(data) + HEADER_BYTES
    assert back(encoded, len(data)) == data


@given(
    pages=st.lists(any_page, min_size=1, max_size=4),
    dtype=st.sampled_from(LOSSLESS_DTYPES),
    setting=st.sampled_from(["lossless", "lossless-fast", "raw"]),
    heads=st.integers(0, 3),
)
def test_a_namespaces_pages_round_trip_whatever_it_said_of_them(
    pages: list[bytes], dtype: str, setting: str, heads: int
) -> None:
    """What was learned of one page is tried on the next, which may be quite another."""
    codec = PageCodec(namespace(2000, dtype, kv_heads=heads), setting=setting)
    for data in pages * 2:
        encoded = codec.encode(memoryview(data), KEY)
        assert encoded.record.nbytes <= len(data) + HEADER_BYTES
        assert back(encoded, len(data)) == data


@settings(max_examples=200)
@given(
    data=any_page,
    form=st.sampled_from(FLOATS),
    rows=st.integers(1, 70),
    channels=st.integers(1, 130),
    shaped=st.booleans(),
)
def test_exponents_round_trip_in_any_shape(
    data: bytes, form: Form, rows: int, channels: int, shaped: bool
) -> None:
    raw = np.frombuffer(data[: len(data) // item_bytes(form) * item_bytes(form)], np.uint8)
    packed = exponents.pack(raw, form, Shape(rows, channels) if shaped else Shape(), 0) if len(raw) else None
    if packed is not None:
        target = np.empty_like(raw)
        assert exponents.unpack(packed, form, target)
        assert target.tobytes() == raw.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_survives(dtype: str) -> None:
    """Infinities, NaNs, subnormals, both zeros: among ordinary numbers, so that the float codec is used."""
    every = np.arange(1 << 16, dtype=np.uint16).tobytes()
    data = normal(1 << 20, dtype) + every + normal(1 << 20, dtype)
    encoded = encode(memoryview(data), KEY, dtype=dtype)
    assert encoded.codec is Codec.EXPONENTS
    assert back(encoded, len(data)) == data


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_pages_and_destinations_at_odd_addresses(offset: int) -> None:
    data = normal(5000)
    held = memoryview(bytearray(offset) + data)[offset:]
    encoded = encode(held, KEY, dtype="bfloat16")
    assert encoded.codec is Codec.EXPONENTS
    into = memoryview(bytearray(len(data) + offset))[offset:]
    odd = memoryview(bytearray(offset) + encoded.record)[offset:]
    assert decode(odd, KEY, into).outcome is Outcome.OK
    assert into == data


@pytest.mark.parametrize("length", [16, 20, 32])
def test_keys_of_16_to_32_bytes(length: int) -> None:
    encoded = encode(memoryview(b"page"), KEY[:length])
    assert back(encoded, 4, KEY[:length]) == b"page"


# -- what pays


@pytest.mark.parametrize(
    ("dtype", "codec", "ratio"),
    [
        ("bfloat16", Codec.EXPONENTS, 1.45),
        ("", Codec.EXPONENTS, 1.45),
        ("float16", Codec.EXPONENTS, 1.12),
        ("float32", Codec.EXPONENTS, 1.15),
    ],
)
def test_floats_shrink_as_far_as_their_exponents_allow(dtype: str, codec: Codec, ratio: float) -> None:
    data = normal(1 << 19, dtype)
    encoded = encode(memoryview(data), KEY, dtype=dtype)
    assert encoded.codec is codec
    assert len(data) / encoded.record.nbytes > ratio


def test_one_byte_floats_shrink() -> None:
    halves = np.frombuffer(normal(1 << 18, "float16"), np.uint16)
    data = (halves >> 8).astype(np.uint8).tobytes()  # e5m2 by truncation
    encoded = encode(memoryview(data), KEY, dtype="float8_e5m2")
    assert encoded.codec is Codec.ZSTD
    assert len(data) / encoded.record.nbytes > 1.3


def channelled(tokens: int) -> bytes:
    """[layer, K or V, token, channel] with a scale for each channel."""
    rng = np.random.default_rng(3)
    scale = 2.0 ** rng.integers(-6, 6, (2, 2, 1, 64))
    values = (rng.standard_normal((2, 2, tokens, 64)) * scale).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def test_channels_are_found_with_hints_and_without() -> None:
    data = channelled(512)
    page = memoryview(data)
    sizes = {}
    for name, spec, setting in (
        ("hinted", namespace(len(data), page_tokens=512), "lossless"),
        ("guessed", namespace(len(data), page_tokens=1, layers=0, kv_heads=0, head_size=0), "lossless"),
        ("flat", namespace(len(data), page_tokens=512), "lossless-fast"),
    ):
        encoded = PageCodec(spec, setting=setting).encode(page, KEY)
        assert back(encoded, len(data)) == data
        sizes[name] = encoded.record.nbytes
    assert sizes["hinted"] < sizes["guessed"] * 1.001
    assert sizes["guessed"] < sizes["flat"] * 0.95


def test_noise_is_stored_raw_without_trying() -> None:
    data = os.urandom(1 << 16)
    for dtype in LOSSLESS_DTYPES:
        assert encode(memoryview(data), KEY, dtype=dtype).codec is Codec.RAW


def test_noise_is_hardly_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace of incompressible pages looks at ever fewer of them."""
    looked = 0
    real = estimate.plan

    def count(*arguments: object) -> object:
        nonlocal looked
        looked += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(estimate, "plan", count)
    codec = PageCodec(namespace(4096, "int8"))
    for page in range(300):
        data = np.random.default_rng(page).bytes(4096)
        assert codec.encode(memoryview(data), KEY).codec is Codec.RAW
    assert looked <= 12


def test_a_namespace_notices_that_its_pages_changed() -> None:
    codec = PageCodec(namespace(8192))
    for _ in range(200):
        assert codec.encode(memoryview(os.urandom(8192)), KEY).codec is Codec.RAW
    kinds = [codec.encode(memoryview(normal(4096)), KEY).codec for _ in range(130)]
    assert kinds[-1] is Codec.EXPONENTS
    # and the other way round: the first page that does not pay makes it look again
    kinds = [codec.encode(memoryview(os.urandom(8192)), KEY).codec for _ in range(130)]
    assert set(kinds) == {Codec.RAW}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", ""])
def test_empty_pages_are_nearly_nothing(dtype: str) -> None:
    codec = PageCodec(namespace(1 << 16, dtype))
    for data in (normal(1 << 15), bytes(1 << 16)):
        encoded = codec.encode(memoryview(data), KEY)
        assert back(encoded, len(data)) == data
    assert encoded.codec is Codec.ZSTD
    assert encoded.record.nbytes < 1000


def test_threads_do_not_share_contexts() -> None:
    data = [normal(20_000 + 500 * i, seed=i) for i in range(8)]
    codec = PageCodec(namespace(40_000))
    wrong: list[int] = []

    def work(mine: bytes) -> None:
        into = memoryview(bytearray(len(mine)))
        for _ in range(20):
            record = codec.encode(memoryview(mine), KEY).record
            if decode(record, KEY, into).outcome is not Outcome.OK or into != mine:
                wrong.append(len(mine))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
