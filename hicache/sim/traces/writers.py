"""Traces into files: Mooncake's JSON lines, or our recording; packed by the file's ending."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from hicache import recording
from hicache.errors import InvalidArgumentError
from hicache.recording import BlockBuilder, Entry, EntryKind
from hicache.sim.traces.model import Request

WRITABLE = ("mooncake", "recording")

_PACK: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".zst": lambda raw: cast(
        "IO[bytes]", zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
    ),
    ".gz": lambda raw: cast("IO[bytes]", gzip.GzipFile(fileobj=raw, mode="wb", mtime=0)),
    ".xz": lambda raw: cast("IO[bytes]", lzma.LZMAFile(raw, "wb")),  # noqa: SIM115 - the caller does
    ".bz2": lambda raw: cast("IO[bytes]", bz2.BZ2File(raw, "wb")),
}


@contextlib.contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    try:
        raw = path.open("wb")
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {path}: {error.strerror}") from error
    with raw:
        pack = _PACK.get(path.suffix)
        if pack is None:
            yield raw
            return
        with pack(raw) as stream:
            yield stream


def writable(path: Path, form: str = "auto") -> str:
    """The format to write: the one that is named, else by the file's ending (.hcrec: recording)."""
    if form == "auto":
        stem = path.stem if path.suffix in _PACK else path.name
        return "recording" if stem.endswith(".hcrec") else "mooncake"
    if form not in WRITABLE:
        raise InvalidArgumentError(f"cannot write format {form!r}", hint=f"one of {', '.join(WRITABLE)}")
    return form


def write(
    path: Path, requests: Iterable[Request], *, block_tokens: int, form: str = "auto", origin: str = ""
) -> int:
    """Write requests as they come; returns how many. Raises InvalidArgumentError."""
    writer = _write_mooncake if writable(path, form) == "mooncake" else _write_recording
    with _created(path) as stream:
        return writer(stream, requests, block_tokens, origin)


def _write_mooncake(stream: IO[bytes], requests: Iterable[Request], _block_tokens: int, _origin: str) -> int:
    count = 0
    for request in requests:
        line: dict[str, object] = {
            "timestamp": request.at_ms,
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": request.blocks.tolist(),
        }
        if request.cls:
            line["type"] = request.cls
        if request.turn:
            line["turn"] = request.turn
        if request.session:
            line["chat_id"] = request.session
        stream.write(json.dumps(line).encode() + b"\n")
        count += 1
    return count


def _write_recording(stream: IO[bytes], requests: Iterable[Request], block_tokens: int, origin: str) -> int:
    stream.write(recording.opening({"block_tokens": block_tokens, "origin": origin}))
    builder = BlockBuilder()
    count = 0
    for request in requests:
        builder.add(
            Entry(
                EntryKind.LOOKUP,
                request.at_ms,
                "",
                block_tokens,
                request.blocks,
                request.input_tokens,
                request.output_tokens,
                session=request.session,
                cls=request.cls,
                turn=request.turn,
            )
        )
        if builder.full:
            stream.write(builder.take())
        count += 1
    if len(builder):
        stream.write(builder.take())
    return count


def coarser(requests: Iterable[Request], factor: int) -> Iterator[Request]:
    """The same requests in blocks ``factor`` times as large.

    A large block is known by its last small one, which stands for everything before it; a rest that fills no
    large block is left out, as a cache of such pages would leave it.
    """
    for request in requests:
        yield Request(
            request.at_ms,
            request.input_tokens,
            request.output_tokens,
            array("q", request.blocks[factor - 1 :: factor]),
            cls=request.cls,
            turn=request.turn,
            session=request.session,
        )
