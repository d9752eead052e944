"""The record of one page on disk: a checked header and a payload, compressed when it pays. Pure functions.

    magic 4s | version u16 | codec u8 | zero u8 | raw bytes u64 | stored bytes u64 | xxh3 of raw u64
    | xxh3 of stored u64 | key 32s | xxh3 of all before u64                                  (little-endian)

The payload is hashed twice on purpose: the stored bytes before a decompressor sees them, the decoded page
before anybody uses it. Without a checksum 396 of 400 flipped bits decode silently wrong.

Lossless beyond raw is two cheap ideas. Byte planes: in 16-bit floats the high byte (sign and exponent)
carries about 3 bits, the low byte is noise; the high bytes go through Huffman-only zstd, the low bytes stay
as they are. Sampled estimate: the order-0 entropy of a few thousand bytes says beforehand whether compressing
pays at all.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import threading
from typing import cast

import numpy as np
import numpy.typing as npt
import zstandard
from xxhash import xxh3_64_intdigest

from hicache.keys import KEY_BYTES
from hicache.types import Outcome

MAGIC = b"HKVP"
VERSION = 1
_HEADER = struct.Struct(f"<4sHBBQQQQ{KEY_BYTES}s")
_SEAL = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _SEAL.size

#: KV dtypes whose pages are split into byte planes; "" means: find out by sampling.
PLANE_DTYPES = frozenset({"bfloat16", "float16", "half"})

_MIN_BYTES = 512  # smaller pages are not worth a frame
_MIN_SAVING = 0.05  # compress only for at least this part of the page
_SAMPLE_BLOCKS = 8
_SAMPLE_BYTES = 4096  # of each plane, over all blocks
_LEVEL, _WINDOW_LOG = 1, 15

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


class Codec(enum.IntEnum):
    """How the payload is stored. Numbers are on disk: never reuse one."""

    RAW = 0
    ZSTD = 1  # one frame of the whole page
    PLANES = 2  # one frame of the high bytes, then the low bytes as they are


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A record ready to store, and the xxh3-64 of the raw page it holds."""

    record: memoryview
    checksum: int
    codec: Codec


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
    """What a record was worth: OK with the page's checksum, or CORRUPT with a reason."""

    outcome: Outcome
    checksum: int = 0
    reason: str = ""


class _Thread(threading.local):
    """What each thread has for itself: zstd contexts (shared ones crash), and scratch for planes."""

    def __init__(self) -> None:
        params = zstandard.ZstdCompressionParameters(
            compression_level=_LEVEL,
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            min_match=7,
            target_length=0,
            window_log=_WINDOW_LOG,
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=params)
        self.decompressor = zstandard.ZstdDecompressor()
        self._scratch = np.empty(0, dtype=np.uint8)

    def scratch(self, size: int) -> U8:
        if self._scratch.size < size:
            self._scratch = np.empty(size, dtype=np.uint8)
        return self._scratch[:size]


_thread = _Thread()


def encode(page: memoryview, key: bytes, *, dtype: str = "", compress: bool = True) -> Encoded:
    """The record of a page.

    Args:
        page: contiguous bytes; not changed, and not referred to afterwards.
        key: 32 bytes, echoed in the header.
        dtype: the KV dtype of the namespace, a hint for the codec; any value is safe.
        compress: False stores raw.
    """
    raw = np.frombuffer(page, dtype=np.uint8)
    codec = _choose(raw, dtype) if compress else Codec.RAW
    if codec is not Codec.RAW:
        packed = _compress(raw, codec)
        if packed is not None:
            return _finish(packed, key, codec, _hash(raw), len(raw))
    record = np.empty(HEADER_BYTES + len(raw), dtype=np.uint8)
    np.copyto(record[HEADER_BYTES:], raw)
    # The copy is what is hashed: it cannot change any more.
    return _finish(record, key, Codec.RAW, _hash(record[HEADER_BYTES:]), len(raw))


def decode(record: memoryview, key: bytes, into: memoryview) -> Decoded:
    """Decode a record straight into ``into``, verifying everything. Never raises for bad input.

    On CORRUPT the contents of ``into`` are undefined.
    """
    stored = np.frombuffer(record, dtype=np.uint8) if record.nbytes else np.empty(0, np.uint8)
    if len(stored) < HEADER_BYTES:
        return _bad(f"{len(stored)} bytes are no record")
    head = stored[:HEADER_BYTES].tobytes()
    magic, version, codec, zero, raw_bytes, stored_bytes, raw_hash, stored_hash, echo = _HEADER.unpack_from(
        head
    )
    payload = stored[HEADER_BYTES:]
    checks = (
        (
            _SEAL.unpack_from(head, _HEADER.size)[0] == xxh3_64_intdigest(head[: _HEADER.size]),
            "header checksum",
        ),
        (magic == MAGIC and version == VERSION and not zero, "magic or version"),
        (echo == key, "another page's record"),
        (raw_bytes == into.nbytes, "page size"),
        (stored_bytes == len(payload), "stored size"),
        (codec in tuple(Codec), "codec"),
    )
    for good, what in checks:
        if not good:
            return _bad(what)
    target = np.frombuffer(into, dtype=np.uint8)
    if codec != Codec.RAW:
        if _hash(payload) != stored_hash:
            return _bad("stored checksum")
        if not _decompress(payload, Codec(codec), target):
            return _bad("payload")
    elif raw_bytes:
        np.copyto(target, payload)
    return Decoded(Outcome.OK, raw_hash) if _hash(target) == raw_hash else _bad("page checksum")


def _bad(reason: str) -> Decoded:
    return Decoded(Outcome.CORRUPT, reason=reason)


def _hash(data: U8) -> int:
    return xxh3_64_intdigest(cast(bytes, data))  # any contiguous buffer; releases the GIL


def _finish(record: U8, key: bytes, codec: Codec, raw_hash: int, raw_bytes: int) -> Encoded:
    assert len(key) == KEY_BYTES, "keys are 32 bytes"
    payload = record[HEADER_BYTES:]
    stored_hash = 0 if codec is Codec.RAW else _hash(payload)
    head = _HEADER.pack(MAGIC, VERSION, codec, 0, raw_bytes, len(payload), raw_hash, stored_hash, key)
    record[:HEADER_BYTES] = np.frombuffer(head + _SEAL.pack(xxh3_64_intdigest(head)), dtype=np.uint8)
    return Encoded(memoryview(cast(bytes, record)), raw_hash, codec)


def _choose(raw: U8, dtype: str) -> Codec:
    """The codec whose estimated saving pays, RAW when none does."""
    if len(raw) < _MIN_BYTES:
        return Codec.RAW
    saving = {Codec.RAW: _MIN_SAVING}
    if len(raw) % 2 == 0 and (dtype in PLANE_DTYPES or not dtype):
        saving[Codec.PLANES] = (1 - _entropy_bits(_sample(raw[1::2])) / 8) / 2
    if dtype not in PLANE_DTYPES:
        saving[Codec.ZSTD] = 1 - _entropy_bits(_sample(raw)) / 8
    return max(saving, key=lambda codec: saving[codec])


def _sample(plane: U8) -> U8:
    """A few blocks spread over the plane."""
    block = _SAMPLE_BYTES // _SAMPLE_BLOCKS
    if len(plane) <= _SAMPLE_BYTES:
        return plane
    gap = (len(plane) - block) // (_SAMPLE_BLOCKS - 1)
    return np.concatenate([plane[at * gap : at * gap + block] for at in range(_SAMPLE_BLOCKS)])


def _entropy_bits(sample: U8) -> float:
    """Order-0 entropy, bits a byte."""
    counts = np.bincount(sample, minlength=256)
    p = counts[counts > 0] / len(sample)
    return float(-(p * np.log2(p)).sum())


def _compress(raw: U8, codec: Codec) -> U8 | None:
    """Room for a header and the packed payload; None when it did not pay after all."""
    if codec is Codec.ZSTD:
        frame, rest = _thread.compressor.compress(cast(bytes, raw)), raw[:0].view(np.uint16)
    else:
        words = raw.view(np.uint16)
        scratch = _thread.scratch(len(raw) + len(words))
        shifted, high = scratch[: len(raw)].view(np.uint16), scratch[len(raw) :]
        np.right_shift(words, 8, out=shifted)
        np.copyto(high, shifted, casting="unsafe")
        frame, rest = _thread.compressor.compress(cast(bytes, high)), words
    if len(frame) + len(rest) > len(raw) * (1 - _MIN_SAVING):
        return None
    record = np.empty(HEADER_BYTES + len(frame) + len(rest), dtype=np.uint8)
    split = HEADER_BYTES + len(frame)
    np.copyto(record[HEADER_BYTES:split], np.frombuffer(frame, dtype=np.uint8))
    np.copyto(record[split:], rest, casting="unsafe")  # the low byte of each word
    return record


def _decompress(payload: U8, codec: Codec, target: U8) -> bool:
    """Unpack into ``target``; False when the payload does not decode to exactly its size."""
    if codec is Codec.ZSTD:
        return _inflate(payload, target)
    if len(target) % 2 or len(payload) < len(target) // 2:
        return False
    words = target.view(np.uint16)
    split = len(payload) - len(words)
    high = _thread.scratch(len(words))
    if not _inflate(payload[:split], high):
        return False
    np.left_shift(high, 8, out=words, dtype=np.uint16)
    np.bitwise_or(words, payload[split:], out=words)
    return True


def _inflate(frame: U8, target: U8) -> bool:
    """One zstd frame into exactly ``target``: the size it claims is checked before anything is decoded."""
    try:
        if zstandard.frame_content_size(cast(bytes, frame)) != len(target):
            return False
        with _thread.decompressor.stream_reader(cast(bytes, frame), closefd=False) as reader:
            filled = 0
            while filled < len(target) and (got := reader.readinto(cast(bytearray, target[filled:]))):
                filled += got
    except (zstandard.ZstdError, ValueError):
        return False
    return filled == len(target)
