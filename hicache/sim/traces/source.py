"""Bytes of a trace file, whatever it is packed with: a stream, never the whole file."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from hicache.errors import InvalidArgumentError

#: A longer line is skipped and named; one request of a million tokens has far less.
LINE_BYTES_MAX = 64 << 20
_CHUNK_BYTES = 1 << 18
#: Packed bytes taken at a time: what they unpack to is held at once.
_PACKED_BYTES = 1 << 14


class _Zstd(io.RawIOBase):
    """Frames of zstd as one stream. The library's own reader ends in silence where a frame is cut; this one raises."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Zstd(raw), _CHUNK_BYTES)


def _gzip(raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(raw, "rb"))


def _xz(raw: IO[bytes]) -> IO[bytes]:
    return lzma.open(raw, "rb")


def _bz2(raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", bz2.open(raw, "rb"))


#: First bytes of a packed file -> what unpacks it.
UNPACK: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\x1f\x8b": _gzip,
    b"\xfd7zXZ\x00": _xz,
    b"BZh": _bz2,
}

#: What a damaged or cut packed file raises while it is read.
DAMAGE = (zstandard.ZstdError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes as a stream. Raises InvalidArgumentError where the file cannot be opened."""
    try:
        raw = path.open("rb", buffering=_CHUNK_BYTES)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}") from error
    with raw:
        try:
            magic = raw.read(6)
            raw.seek(0)
        except OSError as error:
            raise InvalidArgumentError(
                f"cannot read {path}: {error.strerror}", hint="a trace is a file, not a pipe"
            ) from error
        unpack = next((found for start, found in UNPACK.items() if magic.startswith(start)), None)
        if unpack is None:
            yield raw
            return
        with unpack(raw) as stream:
            yield stream


def lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines with their ends; of one beyond LINE_BYTES_MAX only that many bytes and no end."""
    readline = stream.readline
    while line := readline(LINE_BYTES_MAX):
        yield line
        while len(line) == LINE_BYTES_MAX and not line.endswith(b"\n"):
            line = readline(LINE_BYTES_MAX)


def sha256(path: Path) -> str:
    """Of the uncompressed bytes. Raises InvalidArgumentError where they cannot be read to the end."""
    digest = hashlib.sha256()
    with opened(path) as stream:
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        except DAMAGE as error:
            raise InvalidArgumentError(f"trace {path} cannot be read to its end: {error}") from error
    return digest.hexdigest()
