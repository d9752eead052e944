"""Packed columns beside protobuf's own encoding and decoding."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hicache.rpc.common.columns import fixed64_columns, packed_fixed64
from hicache.rpc.pb import cache_pb2

TOP = (1 << 64) - 1
COLUMNS = [
    [],
    [0],
    [TOP],
    [1, 0, TOP, 1 << 63, 255],
    list(range(15)),  # 120 bytes: a length of one byte
    list(range(16)),  # 128: of two
    [7] * 4096,
]


def column(values):
    return np.array(values, np.uint64)


@pytest.mark.parametrize("checksums", COLUMNS)
@pytest.mark.parametrize("generations", [[], [3, TOP]])
def test_the_bytes_are_those_that_protobuf_makes(checksums, generations):
    theirs = cache_pb2.Extents(checksums=checksums, generations=generations)
    raw = packed_fixed64(5, column(checksums)) + packed_fixed64(6, column(generations))
    assert raw == theirs.SerializeToString()
    found = fixed64_columns(raw, 6, 5)
    assert [each.tolist() for each in found] == [generations, checksums]
    assert all(each.dtype == np.uint64 and each.flags.aligned for each in found)


def test_a_high_field_number_is_told_from_its_low_bits():
    raw = packed_fixed64(5 + (1 << 11), column([9])) + packed_fixed64(5, column([1]))
    assert fixed64_columns(raw, 5, 5 + (1 << 11))[0].tolist() == [1]
    message = cache_pb2.Extents.FromString(raw)
    assert list(message.checksums) == [1]
    assert fixed64_columns(message.SerializeToString(), 5 + (1 << 11))[0].tolist() == [9]


def test_merging_leaves_the_other_columns_and_marks_the_message_as_there():
    answer = cache_pb2.FetchResponse(granted_pages=2)
    answer.extents.pages.extend([2])
    answer.extents.MergeFromString(packed_fixed64(5, column([4, 5])) + packed_fixed64(6, column([1, 1])))
    expected = cache_pb2.Extents(pages=[2], checksums=[4, 5], generations=[1, 1])
    again = cache_pb2.FetchResponse.FromString(answer.SerializeToString())
    assert again == cache_pb2.FetchResponse(granted_pages=2, extents=expected)
    assert again.HasField("extents")


def test_random_messages_read_as_protobuf_reads_them():
    rng = random.Random(5)
    for _ in range(300):
        sizes = [rng.choice([0, 1, 2, 40]) for _ in range(6)]
        small, big = [[rng.getrandbits(rng.randint(1, bits)) for _ in range(40)] for bits in (32, 64)]
        message = cache_pb2.Extents(
            pages=small[: sizes[0]],
            region_id=big[: sizes[1]],
            offset=big[: sizes[2]],
            first_slot=small[: sizes[3]],
            checksums=big[: sizes[4]],
            generations=big[::-1][: sizes[5]],
        )
        found = fixed64_columns(message.SerializeToString(), 5, 6)
        assert [each.tolist() for each in found] == [list(message.checksums), list(message.generations)]


def test_unknown_fields_of_every_kind_are_stepped_over():
    known = packed_fixed64(5, column([8, 9]))
    inside = packed_fixed64(5, column([1]))
    unknown = {
        "varint": bytes([9 << 3 | 0, 0xFF, 0x01]),
        "fixed64": bytes([9 << 3 | 1]) + bytes(8),
        "bytes": bytes([9 << 3 | 2, len(inside)]) + inside,
        "group": bytes([9 << 3 | 3]) + inside + bytes([10 << 3 | 3, 10 << 3 | 4, 9 << 3 | 4]),
        "fixed32": bytes([9 << 3 | 5]) + bytes(4),
        "known number, other kind": bytes([5 << 3 | 0, 7]),
    }
    for name, extra in unknown.items():
        for raw in (extra + known, known + extra):
            message = cache_pb2.Extents.FromString(raw)
            assert list(message.checksums) == [8, 9], name
            for each in (raw, message.SerializeToString()):
                assert fixed64_columns(each, 5)[0].tolist() == [8, 9], name


def test_a_column_in_parts_or_unpacked_is_one_column():
    parts = packed_fixed64(5, column([1, 2])) + bytes([5 << 3 | 1]) + (3).to_bytes(8, "little")
    raw = parts + packed_fixed64(5, column([4]))
    assert list(cache_pb2.Extents.FromString(raw).checksums) == [1, 2, 3, 4]
    assert fixed64_columns(raw, 5)[0].tolist() == [1, 2, 3, 4]
