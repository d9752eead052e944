"""Encoding a page: with what its namespace has learned, or on its own."""

from __future__ import annotations

import numpy as np

from hicache.tier.codec import exponents, lossy
from hicache.tier.codec.estimate import MIN_SAVING, RAW_PLAN, Codec, Estimator, Plan, plan, shapes_of
from hicache.tier.codec.forms import Form, form_of
from hicache.tier.codec.frames import U8, deflate
from hicache.tier.codec.record import (
    HEADER_BYTES,
    QUANTISERS,
    Encoded,
    store_packed,
    store_quantised,
    store_raw,
)
from hicache.tier.codec_names import FAST, LOSSLESS, RAW
from hicache.types import Namespace

_QUANTISERS = {name: codec for codec, name in QUANTISERS.items()}


class PageCodec:
    """How pages of one namespace are stored. One for each namespace, shared by the threads that encode.

    ``setting`` ("lossless", "lossless-fast", "raw") is the store's and holds for a lossless namespace; a namespace
    that names another codec gets that one. None: nothing is known of the pages.
    """

    def __init__(self, namespace: Namespace | None = None, *, setting: str = LOSSLESS) -> None:
        name = namespace.codec if namespace is not None else LOSSLESS
        self._name = setting if name == LOSSLESS else name
        self._form = form_of(namespace.kv_dtype) if namespace is not None else Form.OPAQUE
        self._estimator = Estimator(self._form, () if self._name == FAST else shapes_of(namespace))

    def encode(self, page: memoryview, key: bytes) -> Encoded:
        """The record of a page, which is not changed, and not referred to afterwards."""
        raw = np.frombuffer(page, dtype=np.uint8) if page.nbytes else np.empty(0, np.uint8)
        if self._name == RAW:
            return store_raw(raw, key, self._form)
        quantiser = _QUANTISERS.get(self._name)
        if quantiser is not None and self._form in lossy.FORMS:
            packed = lossy.pack(raw, self._name, self._form, HEADER_BYTES)
            if packed is not None:
                return store_quantised(raw, key, Plan(quantiser, self._form), packed)
        chosen = self._estimator.plan(raw)
        stored = _lossless(raw, key, chosen, self._form)
        if stored.codec is not chosen.codec:
            self._estimator.doubt()
        return stored


def encode(page: memoryview, key: bytes, *, dtype: str = "", compress: bool = True) -> Encoded:
    """The record of a single page, without loss.

    Args:
        page: contiguous bytes; not changed, and not referred to afterwards.
        key: 16 to 32 bytes, echoed in the header.
        dtype: the KV dtype of the namespace, a hint for the codec; any value is safe.
        compress: False stores raw.
    """
    raw = np.frombuffer(page, dtype=np.uint8) if page.nbytes else np.empty(0, np.uint8)
    form = form_of(dtype)
    return _lossless(raw, key, plan(raw, form) if compress else RAW_PLAN, form)


def _lossless(raw: U8, key: bytes, chosen: Plan, form: Form) -> Encoded:
    packed = _pack(raw, chosen)
    if packed is None:
        return store_raw(raw, key, form)
    return store_packed(raw, key, chosen, packed)


def _pack(raw: U8, chosen: Plan) -> U8 | None:
    """Room for a header and the payload; None when it does not pay."""
    packed: U8 | None = None
    if chosen.codec is Codec.ZSTD:
        frame = np.frombuffer(deflate(raw), dtype=np.uint8)
        packed = np.empty(HEADER_BYTES + len(frame), dtype=np.uint8)
        np.copyto(packed[HEADER_BYTES:], frame)
    elif chosen.codec is Codec.EXPONENTS:
        packed = exponents.pack(raw, chosen.form, chosen.shape, HEADER_BYTES)
    if packed is None or len(packed) - HEADER_BYTES > len(raw) * (1 - MIN_SAVING):
        return None
    return packed
