"""Prompts: token ids or block hashes, in the forms that engines have them, to the bytes of the wire."""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache import keys
from hicache.errors import InvalidArgumentError
from hicache.types import Namespace, SymbolKind

#: bytes (little-endian int32, or packed hashes), arrays or tensors of integers, lists of ints, lists of hashes.
Tokens = bytes | bytearray | memoryview | npt.NDArray[Any] | Sequence[int] | Sequence[bytes] | Any

TOKEN_BYTES = 4
INT32 = np.iinfo(np.int32)


def pack(spec: Namespace, tokens: Tokens, extra_keys: Sequence[bytes] | None = None) -> bytes:
    """The bytes of a prompt's whole pages; a partial last page of tokens is dropped.

    Raises InvalidArgumentError for ids that are no int32, hashes of another width, or extra keys that do not fit.
    """
    if spec.symbol_kind is SymbolKind.HASHES:
        if extra_keys is not None:
            raise InvalidArgumentError("extra_keys go with token namespaces only")
        return keys.whole_pages(spec, _pack_hashes(tokens, spec.symbol_hash_bytes))
    raw = _pack_tokens(tokens)
    if spec.extra_key_bytes:
        return _interleave(spec, raw, extra_keys)
    if extra_keys is not None:
        raise InvalidArgumentError(
            "extra_keys given, but the namespace has none", hint="open it with extra_key_bytes=their width"
        )
    return keys.whole_pages(spec, raw)


def _pack_hashes(hashes: Any, width: int) -> bytes:
    if isinstance(hashes, bytes | bytearray | memoryview):
        return bytes(hashes)
    for index, item in enumerate(hashes):
        if not isinstance(item, bytes) or len(item) != width:
            what = f"{len(item)} bytes" if isinstance(item, bytes) else type(item).__name__
            raise InvalidArgumentError(f"hash {index} is {what}; the namespace takes {width} bytes each")
    return b"".join(hashes)


def _pack_tokens(tokens: Any) -> bytes:
    if isinstance(tokens, bytes | bytearray | memoryview):
        return bytes(tokens)
    if type(tokens).__module__.partition(".")[0] == "torch":
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, np.ndarray):
        return _pack_array(tokens)
    try:
        packed = array.array("i", tokens)
    except OverflowError as error:
        raise InvalidArgumentError(f"a token id does not fit in int32: {error}") from error
    except TypeError as error:
        raise InvalidArgumentError(
            f"tokens must be integers: {error}",
            hint="give bytes, an integer array or tensor, or a list of ints",
        ) from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _pack_array(tokens: npt.NDArray[Any]) -> bytes:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"tokens must be a one-dimensional array of integers, not {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.dtype.newbyteorder("<") != np.dtype("<i4") and tokens.size:
        low, high = int(tokens.min()), int(tokens.max())
        if low < INT32.min or high > INT32.max:
            raise InvalidArgumentError(f"token ids from {low} to {high} do not fit in int32")
    return tokens.astype("<i4", copy=False).tobytes()


def _interleave(spec: Namespace, raw: bytes, extra_keys: Sequence[bytes] | None) -> bytes:
    """Each page's ids followed by its extra key; an empty key stands for zeros."""
    width, ids = spec.extra_key_bytes, TOKEN_BYTES * spec.page_tokens
    if len(raw) % TOKEN_BYTES:
        raise InvalidArgumentError(f"prompt of {len(raw)} bytes is not a whole number of int32 token ids")
    pages = len(raw) // ids
    if extra_keys is None or len(extra_keys) < pages:
        given = 0 if extra_keys is None else len(extra_keys)
        raise InvalidArgumentError(
            f"the prompt has {pages} whole pages, but {given} extra keys were given",
            hint="give one for each page, b'' for pages that need none",
        )
    parts: list[bytes] = []
    for page in range(pages):
        key = extra_keys[page]
        if len(key) not in {0, width}:
            raise InvalidArgumentError(f"extra key {page} has {len(key)} bytes; the namespace takes {width}")
        parts += (raw[page * ids : (page + 1) * ids], key or bytes(width))
    return b"".join(parts)
