"""The record of one page on disk: a checked header and a payload. Format version 2; version 1 is still read.

    magic 4s | version u16 | codec u8 | form u8 | raw bytes u64 | stored bytes u64 | xxh3 of the page u64
    | xxh3 of the payload u64 | key 32s | xxh3 of all before u64                          (little-endian)

The payload is hashed twice on purpose: the stored bytes before a decompressor sees them, the decoded page before
anybody uses it. Without a checksum 396 of 400 flipped bits decode silently wrong. The page's checksum is of what
decoding gives: of a lossy codec, not of what was stored. Keys shorter than 32 bytes are echoed with zeros behind.
Later versions keep the header's length and its last checksum, so that they are told apart from damage.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import cast

import numpy as np
from xxhash import xxh3_64_intdigest

from hicache.keys import KEY_BYTES
from hicache.tier.codec import exponents, lossy, planes
from hicache.tier.codec.estimate import Codec, Plan
from hicache.tier.codec.forms import Form
from hicache.tier.codec.frames import U8, checksum, inflate
from hicache.types import Outcome

MAGIC = b"HKVP"
VERSION = 2
_HEADER = struct.Struct(f"<4sHBBQQQQ{KEY_BYTES}s")
_SEAL = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _SEAL.size

#: Names of the codecs that quantise.
QUANTISERS = {Codec.FP8: "fp8-e4m3", Codec.INT8: "int8-g64", Codec.INT4: "int4-g64"}
_CODECS_OF_VERSION = {
    1: frozenset({Codec.RAW, Codec.ZSTD, Codec.PLANES}),
    2: frozenset(Codec) - {Codec.PLANES},
}
_FORMS = frozenset(Form)


class Kind(enum.Enum):
    """What a record turned out to be. Everything but GOOD is CORRUPT to the reader, and counted by kind."""

    GOOD = "good"
    HEADER = "header"  # no header of ours, or a damaged one
    VERSION = "version"  # a version, codec or form that this release does not read
    FOREIGN = "foreign key"  # another page's record, whole as it may be
    SIZE = "size"  # cut off, too long, or of pages of another size
    STORED = "stored checksum"  # the payload is not what was written
    PAYLOAD = "payload"  # it does not decode
    PAGE = "page checksum"  # what it decodes to is not the page


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A record ready to store.

    ``checksum`` is of the page that decoding gives, ``source_checksum`` of the page that was encoded: xxh3-64, the
    same unless ``codec`` is a lossy one.
    """

    record: memoryview
    checksum: int
    codec: Codec
    source_checksum: int


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
    """What a record was worth: OK with the page's checksum, or CORRUPT with what is wrong with it."""

    outcome: Outcome
    checksum: int = 0
    kind: Kind = Kind.GOOD

    @property
    def reason(self) -> str:
        """The kind in words; empty when all is well."""
        return "" if self.kind is Kind.GOOD else self.kind.value


@dataclasses.dataclass(frozen=True, slots=True)
class _Head:
    """A header's fields, as they stand there."""

    version: int
    codec: int
    form: int
    raw_bytes: int
    stored_bytes: int
    raw_hash: int
    stored_hash: int
    echo: bytes


# --- writing


def store_raw(raw: U8, key: bytes, form: Form) -> Encoded:
    """The record of a page as it is. The copy is what is hashed: it cannot change any more."""
    record = np.empty(HEADER_BYTES + len(raw), dtype=np.uint8)
    np.copyto(record[HEADER_BYTES:], raw)
    page = checksum(record[HEADER_BYTES:])
    return _finish(record, key, Plan(Codec.RAW, form), len(raw), (page, page))


def store_packed(raw: U8, key: bytes, plan: Plan, packed: U8) -> Encoded:
    """The record of a page that ``exponents`` or ``frames`` packed behind ``HEADER_BYTES`` free ones."""
    page = checksum(raw)
    return _finish(packed, key, plan, len(raw), (page, page))


def store_quantised(raw: U8, key: bytes, plan: Plan, packed: U8) -> Encoded:
    """The record of a page that ``lossy`` packed behind ``HEADER_BYTES`` free bytes."""
    back = np.empty(len(raw), dtype=np.uint8)
    known = lossy.unpack(packed[HEADER_BYTES:], QUANTISERS[plan.codec], plan.form, back)
    assert known, "what was packed just now does not unpack"
    return _finish(packed, key, plan, len(raw), (checksum(back), checksum(raw)))


def _finish(record: U8, key: bytes, plan: Plan, raw_bytes: int, hashes: tuple[int, int]) -> Encoded:
    """Put the header before the payload. ``hashes``: of the page that decoding gives, of the page encoded."""
    assert 16 <= len(key) <= KEY_BYTES, "keys are 16 to 32 bytes"
    payload = record[HEADER_BYTES:]
    stored_hash = 0 if plan.codec is Codec.RAW else checksum(payload)
    sizes = (raw_bytes, len(payload))
    head = _HEADER.pack(MAGIC, VERSION, plan.codec, plan.form, *sizes, hashes[0], stored_hash, key)
    record[:HEADER_BYTES] = np.frombuffer(head + _SEAL.pack(xxh3_64_intdigest(head)), dtype=np.uint8)
    return Encoded(memoryview(cast(bytes, record)), hashes[0], plan.codec, hashes[1])


# --- reading


def decode(record: memoryview, key: bytes, into: memoryview) -> Decoded:
    """Decode a record straight into ``into``, verifying everything. Never raises for bad input.

    Sizes that a record claims are checked before memory is taken or anything is decoded. On CORRUPT the contents of
    ``into`` are undefined.
    """
    stored = np.frombuffer(record, dtype=np.uint8) if record.nbytes else np.empty(0, np.uint8)
    head = _parse(stored[:HEADER_BYTES].tobytes())
    if isinstance(head, Kind):
        return _bad(head)
    payload = stored[HEADER_BYTES:]
    for good, kind in (
        (_is_known(head), Kind.VERSION),
        (head.echo == key.ljust(KEY_BYTES, b"\0"), Kind.FOREIGN),
        (head.raw_bytes == into.nbytes and head.stored_bytes == len(payload), Kind.SIZE),
    ):
        if not good:
            return _bad(kind)
    return _decode_payload(head, payload, np.frombuffer(into, dtype=np.uint8) if into.nbytes else payload[:0])


def _parse(head: bytes) -> _Head | Kind:
    """The header, if its own checksum holds."""
    if len(head) < HEADER_BYTES:
        return Kind.SIZE
    magic, *fields = _HEADER.unpack_from(head)
    sealed = _SEAL.unpack_from(head, _HEADER.size)[0] == xxh3_64_intdigest(head[: _HEADER.size])
    return _Head(*fields) if sealed and magic == MAGIC else Kind.HEADER


def _is_known(head: _Head) -> bool:
    return head.codec in _CODECS_OF_VERSION.get(head.version, ()) and head.form in _FORMS


def _decode_payload(head: _Head, payload: U8, target: U8) -> Decoded:
    if head.codec != Codec.RAW:
        if checksum(payload) != head.stored_hash:
            return _bad(Kind.STORED)
        if not _unpack(payload, Codec(head.codec), Form(head.form), target):
            return _bad(Kind.PAYLOAD)
    elif head.raw_bytes != head.stored_bytes:
        return _bad(Kind.PAYLOAD)
    else:
        np.copyto(target, payload)
    return Decoded(Outcome.OK, head.raw_hash) if checksum(target) == head.raw_hash else _bad(Kind.PAGE)


def _unpack(payload: U8, codec: Codec, form: Form, target: U8) -> bool:
    """The payload's page into ``target``; False when it does not decode to exactly its size."""
    if codec is Codec.ZSTD:
        return inflate(payload, target)
    if codec is Codec.PLANES:
        return planes.unpack(payload, target)
    if codec is Codec.EXPONENTS:
        return form in exponents.FORMS and exponents.unpack(payload, form, target)
    return form in lossy.FORMS and lossy.unpack(payload, QUANTISERS[codec], form, target)


def _bad(kind: Kind) -> Decoded:
    return Decoded(Outcome.CORRUPT, kind=kind)
