"""Which codec pays for a page, from samples; and what one namespace has learned of it.

A sample of a few thousand bytes tells the order-0 entropy, and so what Huffman coding will gain, before anything is
tried. A namespace keeps the answer for a while, longer each time it is confirmed: pages that do not compress cost a
copy and a checksum. How numbers are arranged (which of them share a channel) is found once in a while, by trying the
arrangements that the namespace's counts allow, or some common ones.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np

from hicache.tier.codec import exponents, forms
from hicache.tier.codec.exponents import FLAT, Shape
from hicache.tier.codec.forms import FLOATS, Form
from hicache.tier.codec.frames import U8, scratch
from hicache.types import Namespace

MIN_BYTES = 512  # smaller pages are not worth a frame
MIN_SAVING = 0.05  # compress only for at least this part of the page
_SAMPLE_BLOCKS, _SAMPLE_BYTES = 8, 4096  # of one plane, over all blocks
_SHAPE_BLOCKS, _SHAPE_SAMPLE = 64, 32768
_SHAPE_SAVING_BITS = 0.03  # a number
_BASE_BITS = 2.0  # what the base of a channel takes when it is packed
_MAX_TRUST = 64  # pages for which an answer holds
_SHAPE_TRUST = 16  # answers for which a shape holds
_PROBES = 64
_GUESSED_CHANNELS = (64, 128, 256, 384, 512, 768, 1024, 2048)
_GUESSED_ROWS = 128


class Codec(enum.IntEnum):
    """How a payload is stored. Numbers are on disk: never reuse one."""

    RAW = 0
    ZSTD = 1  # one frame of the whole page
    PLANES = 2  # format version 1 only: one frame of the high bytes, then the low bytes as they are
    EXPONENTS = 3  # ``exponents``
    FP8 = 4  # ``lossy``
    INT8 = 5
    INT4 = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How to store a page. ``form`` and ``shape`` matter to EXPONENTS."""

    codec: Codec
    form: Form = Form.OPAQUE
    shape: Shape = FLAT


RAW_PLAN = Plan(Codec.RAW)
_WHOLE_PLAN = Plan(Codec.ZSTD)


def plan(raw: U8, form: Form) -> Plan:
    """What pays for this page, its arrangement unknown. OPAQUE: it may be anything."""
    if len(raw) < MIN_BYTES:
        return RAW_PLAN
    savings = {RAW_PLAN: MIN_SAVING, _WHOLE_PLAN: 1 - entropy_bits(_sample(raw)) / 8}
    for float_form in FLOATS if form is Form.OPAQUE else (form,):
        item = forms.item_bytes(float_form)
        if float_form in FLOATS and len(raw) % item == 0:
            bits = entropy_bits(_sample_exponents(raw, float_form))
            count = len(raw) // item
            stored = count * bits / 8 + forms.rest_bytes(float_form, count)
            savings[Plan(Codec.EXPONENTS, float_form)] = 1 - stored / len(raw)
    return max(savings, key=lambda one: savings[one])


def find_shape(raw: U8, form: Form, shapes: Sequence[Shape]) -> Shape:
    """The arrangement that makes this page smallest; FLAT when none is worth its bases."""
    count = len(raw) // forms.item_bytes(form)
    plane, below = scratch("plane", count), scratch("below", count)
    forms.split_exponents(raw, form, plane)
    best, best_bits = FLAT, 0.0
    for shape in (FLAT, *shapes):
        if shape is not FLAT and not shape.segments(count):
            continue
        bases = exponents.distances(plane, shape, below)
        sampled = _sample(below, _SHAPE_BLOCKS, _SHAPE_SAMPLE)
        bits = entropy_bits(np.minimum(sampled, 15)) + 8 * float((sampled > 14).mean())
        bits += len(bases) * _BASE_BITS / count
        if shape is FLAT:
            best_bits = bits - _SHAPE_SAVING_BITS
        elif bits < best_bits:
            best, best_bits = shape, bits
    return best


def shapes_of(namespace: Namespace | None) -> tuple[Shape, ...]:
    """Arrangements to try: [layer, K or V, token, head, dim], heads before tokens, tokens first; or guesses."""
    guesses = tuple(Shape(_GUESSED_ROWS, channels) for channels in _GUESSED_CHANNELS)
    if namespace is None:
        return guesses
    head, token = namespace.head_size, namespace.kv_heads * namespace.head_size
    known = [
        Shape(namespace.page_tokens, channels) for channels in (token, head, 2 * namespace.layers * token)
    ]
    return tuple(dict.fromkeys(shape for shape in known if shape.channels > 1)) or guesses


class Estimator:
    """What is known of one namespace's pages. Threads may share it: at worst a page is sampled twice."""

    def __init__(self, form: Form, shapes: Sequence[Shape]) -> None:
        self._form = form
        self._shapes = shapes
        self._plan = RAW_PLAN
        self._trust = self._left = 0
        self._shape_left = 0

    def plan(self, raw: U8) -> Plan:
        """How to store this page."""
        if len(raw) < MIN_BYTES:
            return RAW_PLAN
        if _is_constant(raw):
            return _WHOLE_PLAN
        if self._left > 0:
            self._left -= 1
            return self._plan
        self._learn(raw)
        return self._plan

    def doubt(self) -> None:
        """The plan did not pay: sample again at the next page."""
        self._trust = self._left = 0

    def _learn(self, raw: U8) -> None:
        before, found = self._plan, plan(raw, self._form)
        same = (found.codec, found.form) == (before.codec, before.form)
        if found.codec is Codec.EXPONENTS and self._shapes:
            self._shape_left = self._shape_left - 1 if same else 0
            if self._shape_left > 0:
                found = before
            else:
                found = dataclasses.replace(found, shape=find_shape(raw, found.form, self._shapes))
                self._shape_left = _SHAPE_TRUST
        self._trust = min(_MAX_TRUST, 2 * self._trust + 1) if same else 1
        self._left = self._trust
        self._plan = found


def _is_constant(raw: U8) -> bool:
    """Whether a few probes all over the page find one byte only: an empty page, most likely."""
    probes = raw[:: max(1, len(raw) // _PROBES) | 1]
    return bool((probes == probes[0]).all())


def _blocks(size: int, blocks: int, sample: int) -> list[slice]:
    """A few blocks spread over ``size`` entries; all of them when there are not more."""
    if size <= sample:
        return [slice(0, size)]
    block = sample // blocks
    gap = (size - block) // (blocks - 1)
    return [slice(at * gap, at * gap + block) for at in range(blocks)]


def _sample(plane: U8, blocks: int = _SAMPLE_BLOCKS, sample: int = _SAMPLE_BYTES) -> U8:
    return np.concatenate([plane[where] for where in _blocks(len(plane), blocks, sample)])


def _sample_exponents(raw: U8, form: Form) -> U8:
    item = forms.item_bytes(form)
    parts = [
        raw[where.start * item : where.stop * item]
        for where in _blocks(len(raw) // item, _SAMPLE_BLOCKS, _SAMPLE_BYTES)
    ]
    found = np.empty(sum(map(len, parts)) // item, dtype=np.uint8)
    forms.split_exponents(np.concatenate(parts), form, found)
    return found


def entropy_bits(sample: U8) -> float:
    """Order-0 entropy, bits a byte."""
    counts = np.bincount(sample, minlength=256)
    p = counts[counts > 0] / len(sample)
    return float(-(p * np.log2(p)).sum())
