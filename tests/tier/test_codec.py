"""The record on disk: any bytes round-trip, any damage is noticed."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest

pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from hicache.tier.codec import HEADER_BYTES, Codec, decode, encode
from hicache.types import Outcome

KEY = bytes(range(32))
DTYPES = ("", "bfloat16", "float16", "float8_e4m3", "int8", "no such type")


def normal_bf16(count: int, seed: int = 0) -> bytes:
    floats = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)
    return (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def samples() -> list[bytes]:
    return [
        normal_bf16(1024),
        normal_bf16(1024) + b"x",
        bytes(5000),
        os.urandom(4096),
        b"abc",
        np.arange(4096, dtype=np.int8).tobytes(),
    ]


@given(
    data=st.one_of(
        st.binary(max_size=2000),
        st.builds(lambda b, n: b * n, st.binary(min_size=1, max_size=9), st.integers(1, 900)),
        st.builds(normal_bf16, st.integers(0, 3000), st.integers(0, 9)),
        st.builds(lambda n, s: normal_bf16(n, s)[1:], st.integers(1, 3000), st.integers(0, 9)),
    ),
    dtype=st.sampled_from(DTYPES),
    compress=st.booleans(),
)
def test_any_bytes_round_trip(data: bytes, dtype: str, compress: bool) -> None:
    encoded = encode(memoryview(data), KEY, dtype=dtype, compress=compress)
    assert encoded.checksum == xxh3_64_intdigest(data)
    assert encoded.record.nbytes <= len(data) + HEADER_BYTES
    into = memoryview(bytearray(len(data)))
    decoded = decode(encoded.record, KEY, into)
    assert decoded.outcome is Outcome.OK
    assert decoded.checksum == encoded.checksum
    assert into == data


@pytest.mark.parametrize("data", samples())
def test_every_flipped_bit_is_noticed(data: bytes, rng: random.Random) -> None:
    record = bytearray(encode(memoryview(data), KEY).record)
    bits = range(len(record) * 8)
    head = range(HEADER_BYTES * 8 + 256)
    for bit in sorted({*(b for b in head if b in bits), *rng.sample(bits, min(len(bits), 2000))}):
        record[bit // 8] ^= 1 << bit % 8
        into = memoryview(bytearray(len(data)))
        assert decode(memoryview(record), KEY, into).outcome is Outcome.CORRUPT, bit
        record[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("data", samples())
def test_every_truncation_and_extension_is_noticed(data: bytes) -> None:
    record = bytes(encode(memoryview(data), KEY).record)
    into = memoryview(bytearray(len(data)))
    cuts = {*range(0, len(record), max(1, len(record) // 300)), len(record) - 1}
    for wrong in (*(record[:n] for n in cuts), record + b"\0", record + record):
        assert decode(memoryview(wrong), KEY, into).outcome is Outcome.CORRUPT


@given(st.binary(max_size=3000))
def test_garbage_never_raises(garbage: bytes) -> None:
    assert decode(memoryview(garbage), KEY, memoryview(bytearray(100))).outcome is Outcome.CORRUPT


def test_another_pages_record_is_refused() -> None:
    data = normal_bf16(512)
    record = encode(memoryview(data), KEY).record
    into = memoryview(bytearray(len(data)))
    assert decode(record, bytes(32), into).reason == "another page's record"
    assert decode(record, KEY, memoryview(bytearray(len(data) + 2))).reason == "page size"


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    """A record whose checksums all hold, but whose zstd frame claims 8 MiB: nothing is allocated for it."""
    import zstandard

    from hicache.tier import codec

    frame = zstandard.compress(bytes(8 << 20))
    record = np.zeros(HEADER_BYTES + len(frame), dtype=np.uint8)
    record[HEADER_BYTES:] = np.frombuffer(frame, dtype=np.uint8)
    lying = codec._finish(record, KEY, Codec.ZSTD, 0, 1000).record
    assert decode(lying, KEY, memoryview(bytearray(1000))).reason == "payload"


def test_bf16_numbers_shrink_as_far_as_their_exponents_allow() -> None:
    data = normal_bf16(1 << 20)
    for dtype in ("", "bfloat16"):
        encoded = encode(memoryview(data), KEY, dtype=dtype)
        assert encoded.codec is Codec.PLANES
        assert len(data) / encoded.record.nbytes > 1.45


def test_noise_is_stored_raw_without_trying() -> None:
    for dtype in DTYPES:
        assert encode(memoryview(os.urandom(1 << 16)), KEY, dtype=dtype).codec is Codec.RAW


def test_bytes_of_low_entropy_are_compressed_whole() -> None:
    encoded = encode(memoryview(bytes(1 << 16)), KEY, dtype="int8")
    assert encoded.codec is Codec.ZSTD
    assert encoded.record.nbytes < 1000


def test_threads_do_not_share_contexts() -> None:
    data = [normal_bf16(20_000 + 500 * i, i) for i in range(8)]
    wrong: list[int] = []

    def work(mine: bytes) -> None:
        into = memoryview(bytearray(len(mine)))
        for _ in range(20):
            record = encode(memoryview(mine), KEY).record
            if decode(record, KEY, into).outcome is not Outcome.OK or into != mine:
                wrong.append(len(mine))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
