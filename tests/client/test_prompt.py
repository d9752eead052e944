"""Tokens and hashes in every form become the same bytes, or a clear error."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.errors import InvalidArgumentError
from hicache.rpc.client.prompt import pack
from hicache.types import Namespace, SymbolKind

TOKENS = Namespace(model="m", page_tokens=4, page_bytes=64)
IMAGES = Namespace(model="m", page_tokens=2, page_bytes=64, extra_key_bytes=16)
HASHES = Namespace(
    model="m", page_tokens=4, page_bytes=64, symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=16
)
INT32 = st.integers(-(2**31), 2**31 - 1)


@given(ids=st.lists(INT32, max_size=40))
def test_all_forms_of_tokens_are_the_same_bytes(ids: list[int]) -> None:
    raw = array.array("i", ids).tobytes()
    whole = raw[: len(ids) // 4 * 16]
    spread = np.zeros(2 * len(ids), np.int64)
    spread[::2] = ids
    forms: list[Any] = [
        ids, tuple(ids), raw, bytearray(raw), memoryview(raw), np.array(ids, np.int32), np.array(ids, np.int64),
        np.array(ids, ">i4"), spread[::2], [np.int64(i) for i in ids],
    ]  # fmt: skip
    assert {pack(TOKENS, form) for form in forms} == {whole}


def test_tensors_are_tokens_too() -> None:
    torch = pytest.importorskip("torch")
    ids = [5, -1, 2**31 - 1, 7]
    assert pack(TOKENS, torch.tensor(ids)) == pack(TOKENS, ids)
    assert pack(TOKENS, torch.tensor(ids, dtype=torch.int32)) == pack(TOKENS, ids)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ([2**31, 0, 0, 0], "does not fit in int32"),
        ([1.0], "must be integers"),
        (["a"], "must be integers"),
        (7, "must be integers"),
        (None, "must be integers"),
        (np.array([1.0]), "array of integers"),
        (np.array([True]), "array of integers"),
        (np.zeros((2, 2), np.int32), "one-dimensional"),
        (np.array([2**31], np.uint32), "do not fit in int32"),
        (np.array([-(2**31) - 1]), "do not fit in int32"),
        (b"123", "whole number of int32"),
    ],
)
def test_what_is_no_token_is_refused(tokens: Any, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        pack(TOKENS, tokens)


def test_extra_keys_follow_each_page() -> None:
    ids = [1, 2, 3, 4, 5]
    raw = array.array("i", ids).tobytes()
    assert pack(IMAGES, ids, [b"k" * 16, b""]) == raw[:8] + b"k" * 16 + raw[8:16] + bytes(16)
    assert pack(IMAGES, ids[:1], None or []) == b""


@pytest.mark.parametrize(
    ("spec", "tokens", "extra_keys", "problem"),
    [
        (IMAGES, [1, 2], None, "0 extra keys were given"),
        (IMAGES, [1, 2, 3, 4], [b"k" * 16], "2 whole pages, but 1"),
        (IMAGES, [1, 2], [b"short"], "extra key 0 has 5 bytes"),
        (IMAGES, b"12345", [b""], "whole number of int32"),
        (TOKENS, [1, 2, 3, 4], [b"k" * 16], "the namespace has none"),
        (HASHES, [bytes(16)], [b""], "token namespaces only"),
        (HASHES, [bytes(15)], None, "hash 0 is 15 bytes"),
        (HASHES, [7], None, "hash 0 is int"),
        (HASHES, bytes(17), None, "16-byte symbols"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    spec: Namespace, tokens: Any, extra_keys: Any, problem: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        pack(spec, tokens, extra_keys)


def test_hashes_are_packed() -> None:
    hashes = [bytes([i]) * 16 for i in range(3)]
    assert pack(HASHES, hashes) == pack(HASHES, b"".join(hashes)) == b"".join(hashes)
