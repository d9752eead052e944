"""The lossless float codec: exponents relative to their channel, two in a byte, Huffman-coded.

    rows u32 | channels u32 | escapes u32 | side frame bytes u32 | pairs frame bytes u32
    | side frame: bases, escaped distances, their places | pairs frame
    | what is not exponent (``forms``)                                                    (little-endian)

A page is segments of ``rows`` x ``channels`` numbers, and what is left over; rows 0 means no segments. Each channel
of each segment has a base, a little above its typical largest exponent; what is left over has one more. What is coded
is the distance below the base, modulo 256: 0 to 15 as four bits, anything else beside, with its place (as u32 gaps,
the lowest bytes of all of them first). So any bytes survive.

Two distances share a byte: of the same channel, one row apart, since neighbouring tokens are large and small
together. Besides that gain, Huffman coding has half the symbols to work on, which makes it twice as fast. Measured:
docs/CODECS.md.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np

from hicache.tier.codec import forms
from hicache.tier.codec.forms import Form
from hicache.tier.codec.frames import U8, Positions, deflate, inflate, nonzero, scratch

#: What can be split into exponents and the rest.
FORMS = frozenset(forms.FLOATS)
_HEAD = struct.Struct("<5I")
_DISTANCES = 16
_PLACEHOLDER = 3  # stands where a distance is escaped: a common one
_MAX_ESCAPED_PART = 32  # more than one number in so many: not worth it
_GROUP_ROWS, _MARGIN = 16, 3
_PAIR_NUMBERS = 64  # runs of at least this many numbers are paired: shorter ones make numpy slow
_SAMPLE = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Segments of rows (tokens) by channels in the page's numbers; rows 0: none is known."""

    rows: int = 0
    channels: int = 0

    def segments(self, count: int) -> int:
        """Whole segments in ``count`` numbers."""
        size = self.rows * self.channels
        return count // size if size else 0


FLAT = Shape()


def distances(plane: U8, shape: Shape, out: U8) -> U8:
    """Distances below the bases into ``out``; returns the bases."""
    count = len(plane)
    segments = shape.segments(count)
    body = segments * shape.rows * shape.channels
    bases = np.empty(segments * shape.channels + 1, dtype=np.uint8)
    bases[-1] = _one_base(plane[body:]) if body < count else 0
    if segments:
        found = _channel_bases(plane[:body].reshape(segments, shape.rows, shape.channels))
        np.copyto(bases[:-1].reshape(found.shape), found)
    _below(bases, plane, shape, out)
    return bases


def _below(bases: U8, source: U8, shape: Shape, out: U8) -> None:
    """Base - source, modulo 256, everywhere: distances of exponents, and exponents of distances."""
    segments = shape.segments(len(source))
    body = segments * shape.rows * shape.channels
    if segments:
        dims = (segments, shape.rows, shape.channels)
        np.subtract(
            bases[:-1].reshape(segments, 1, shape.channels),
            source[:body].reshape(dims),
            out=out[:body].reshape(dims),
        )
    np.subtract(bases[-1], source[body:], out=out[body:])


def _channel_bases(planes: U8) -> U8:
    """Mean over groups of rows of each group's maximum, and a margin: steadier than the maximum of all rows."""
    segments, rows, channels = planes.shape
    groups = rows // _GROUP_ROWS
    found: U8
    if groups < 2:
        found = planes.max(axis=1)
        return found
    grouped = planes[:, : groups * _GROUP_ROWS].reshape(segments, groups, _GROUP_ROWS, channels).max(axis=2)
    total = grouped.sum(axis=1, dtype=np.uint16 if groups <= 256 else np.uint32)
    found = ((total + groups // 2) // groups + _MARGIN).astype(np.uint8)
    return found


def _one_base(plane: U8) -> int:
    """The base that leaves the fewest escapes, as far as a sample tells."""
    counts = np.bincount(plane[:: max(1, len(plane) // _SAMPLE)], minlength=256)
    sums = np.concatenate([np.zeros(_DISTANCES, np.intp), np.cumsum(counts)])
    inside = sums[_DISTANCES:] - sums[:-_DISTANCES]
    return int(np.argmax(inside))


def pack(raw: U8, form: Form, shape: Shape, room: int) -> U8 | None:
    """``room`` free bytes and the payload; None when too many distances do not fit four bits, or for half a number."""
    count, odd = divmod(len(raw), forms.item_bytes(form))
    if odd or not count:
        return None
    shape = shape if shape.segments(count) else FLAT
    plane, below = scratch("plane", count), scratch("below", count + count % 2)
    forms.split_exponents(raw, form, plane)
    bases = distances(plane, shape, below[:count])
    below[count:] = 0  # where one is left without a partner
    places = _far(below[:count])
    if len(places) > count // _MAX_ESCAPED_PART:
        return None
    side = deflate(np.concatenate([bases, below[places], _gaps(places)]))
    below[places] = _PLACEHOLDER
    packed = scratch("packed", len(below) // 2)
    _pair(below, packed, shape)
    pairs = deflate(packed)
    head = _HEAD.pack(shape.rows, shape.channels, len(places), len(side), len(pairs))
    start = room + len(head) + len(side) + len(pairs)
    record = np.empty(start + forms.rest_bytes(form, count), dtype=np.uint8)
    np.copyto(record[room : room + len(head)], np.frombuffer(head, np.uint8))
    np.copyto(record[start - len(pairs) - len(side) : start - len(pairs)], np.frombuffer(side, np.uint8))
    np.copyto(record[start - len(pairs) : start], np.frombuffer(pairs, np.uint8))
    forms.split_rest(raw, form, record[start:])
    return record


def unpack(payload: U8, form: Form, target: U8) -> bool:
    """The page into ``target``; False when the payload is not one. Sizes are checked before they are believed."""
    item = forms.item_bytes(form)
    count, odd = divmod(len(target), item)
    if odd or len(payload) < _HEAD.size:
        return False
    rows, channels, escapes, side_bytes, pairs_bytes = _HEAD.unpack(payload[: _HEAD.size].tobytes())
    shape = Shape(rows, channels)
    start = _HEAD.size + side_bytes + pairs_bytes
    if start + forms.rest_bytes(form, count) != len(payload):
        return False
    if rows * channels > count or bool(rows) != bool(channels) or escapes > count:
        return False
    side = scratch("side", shape.segments(count) * channels + 1 + 5 * escapes)
    packed = scratch("packed", (count + 1) // 2)
    frames = payload[_HEAD.size : start]
    if not inflate(frames[:side_bytes], side) or not inflate(frames[side_bytes:], packed):
        return False
    below = scratch("below", count + count % 2)
    _unpair(packed, below, shape)
    below = below[:count]
    bases, escaped = side[: len(side) - 5 * escapes], side[len(side) - 5 * escapes :]
    places = _places(escaped[escapes:])
    if escapes and places[-1] >= count:
        return False
    below[places] = escaped[:escapes]
    _below(bases, below, shape, below)  # in place: they are exponents now
    forms.join(below, payload[start:], form, target)
    return True


def _far(below: U8) -> Positions:
    """Places of the distances that four bits do not hold."""
    mask = scratch("mask", len(below)).view(np.bool_)
    np.greater_equal(below, _DISTANCES, out=mask)
    return nonzero(mask)


def _gaps(places: Positions) -> U8:
    """Rising places as gaps, byte plane by byte plane."""
    gaps = places.astype("<u4")
    gaps[1:] -= gaps[:-1].copy()
    return np.ascontiguousarray(gaps.view(np.uint8).reshape(-1, 4).T).reshape(-1)


def _places(gaps: U8) -> Positions:
    """The places again; they rise, whatever the gaps are."""
    planes = gaps.reshape(4, -1)
    return np.cumsum(np.ascontiguousarray(planes.T).view("<u4").reshape(-1), dtype=np.intp)


def _pairs(numbers: U8, packed: U8, shape: Shape) -> tuple[tuple[U8, U8, U8], ...]:
    """Views (first of each pair, second of each pair, both packed), of an even count of numbers.

    Runs of ``step`` numbers alternate: a whole number of rows, at least ``_PAIR_NUMBERS``. What is left after an even
    count of runs, or everything where no shape is known, is paired half with half.
    """
    step = shape.channels * -(-_PAIR_NUMBERS // max(1, shape.channels))
    body = len(numbers) // (2 * step) * (2 * step) if step else 0
    step = max(1, step)
    runs, rest = numbers[:body].reshape(-1, 2, step), numbers[body:].reshape(2, -1)
    return (
        (runs[:, 0], runs[:, 1], packed[: body // 2].reshape(-1, step)),
        (rest[0], rest[1], packed[body // 2 :]),
    )


def _pair(below: U8, packed: U8, shape: Shape) -> None:
    for first, second, both in _pairs(below, packed, shape):
        np.multiply(second, 16, out=both)
        np.bitwise_or(both, first, out=both)


def _unpair(packed: U8, below: U8, shape: Shape) -> None:
    for first, second, both in _pairs(below, packed, shape):
        np.bitwise_and(both, 15, out=first)
        np.right_shift(both, 4, out=second)
