"""A digest of a model's files: of all bytes where they are few, else of every tensor's header and samples.

Other weights differ nearly everywhere, so samples of each tensor tell them apart: a fine-tuned model, a merged adapter
and another quantisation all do. What samples cannot see is a file that was changed in a few bytes on purpose or by
damage. Reading all of a large model would take as long as loading it; the samples take seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hicache.errors import UnsupportedError

#: Weights in the formats that vLLM loads.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

#: In a folder beside the weights, but none: training state, and what other loaders take.
NOT_WEIGHTS = frozenset(
    {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin"}
)

#: Files up to this size are read whole.
WHOLE_BYTES = 64 << 20
SAMPLES = 16  # of a tensor
SAMPLE_BYTES = 4096
STEP_BYTES = 8 << 20  # between samples of files whose tensors are not known
MOST_HEADER_BYTES = 256 << 20
THREADS = 8


def folder_digest(path: Path) -> str:
    """SHA-256 over the weights in a folder, or of one file. Raises UnsupportedError where there are none."""
    try:
        files = _weight_files(path)
        if not files:
            raise UnsupportedError(
                f"no weights ({', '.join(SUFFIXES)}) in {path}",
                hint="set model_identity to a name that changes with the weights",
            )
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(_file_digest, files))
    except OSError as error:
        raise UnsupportedError(f"the weights in {path} cannot be read: {error}") from error
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{file.name}\0".encode() + digest)
    return whole.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [file for file in path.iterdir() if file.suffix in SUFFIXES and file.name not in NOT_WEIGHTS]
    return sorted(file for file in found if file.is_file())


def _file_digest(path: Path) -> bytes:
    """Of the size, and of all bytes or samples."""
    with path.open("rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        digest = hashlib.sha256(struct.pack("<Q", size))
        pieces = [(0, size)] if size <= WHOLE_BYTES else list(_pieces(fd, size, path.suffix))
        for begin, end in pieces:
            _add(digest, fd, begin, end)
    return digest.digest()


def _add(digest: hashlib._Hash, fd: int, begin: int, end: int) -> None:
    while begin < end:
        data = os.pread(fd, min(end - begin, 1 << 20), begin)
        if not data:
            raise OSError(f"the file ends at {begin}, while it is read")
        digest.update(data)
        begin += len(data)


def _pieces(fd: int, size: int, suffix: str) -> Iterator[tuple[int, int]]:
    """What is read of a large file."""
    if suffix == ".safetensors":
        yield from _tensor_pieces(fd, size)
        return
    yield from _samples(0, size, max(SAMPLES, size // STEP_BYTES))


def _tensor_pieces(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The header, which names all tensors, and samples of each (format: huggingface.co/docs/safetensors)."""
    length = struct.unpack("<Q", os.pread(fd, 8, 0))[0]
    if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
        raise UnsupportedError(f"not a safetensors file: its header would have {length} bytes")
    begin = 8 + length
    yield 0, begin
    header = os.pread(fd, length, 8)
    try:
        tensors = {
            name: said["data_offsets"] for name, said in json.loads(header).items() if name != "__metadata__"
        }
        spans = sorted((begin + int(first), begin + int(last)) for first, last in tensors.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(f"not a safetensors file: {error}") from error
    for first, last in spans:
        yield from _samples(first, min(last, size), SAMPLES)


def _samples(begin: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """Pieces spread evenly over a stretch, its first and last bytes among them; all of it if it is short."""
    length = end - begin
    if length <= count * SAMPLE_BYTES:
        yield begin, end
        return
    for number in range(count):
        at = begin + (length - SAMPLE_BYTES) * number // (count - 1)
        yield at, at + SAMPLE_BYTES
