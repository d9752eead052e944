"""The formats of JSON lines, by name, and how a file's first lines tell which it is."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from hicache.errors import ConfigError, InvalidArgumentError
from hicache.sim.traces import lines, source
from hicache.sim.traces.lines import Line, Parser

RECORDING = "recording"
#: Lines that are looked at to tell a format.
LOOKED_AT = 50


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """A format of JSON lines. ``block_tokens``: what its files have unless told otherwise."""

    name: str
    title: str
    expected: str
    block_tokens: int
    parser: Callable[[int], Parser]


def _no_tokenizer(_block_tokens: int) -> Parser:
    raise ConfigError(
        "prompts as text need a tokenizer", hint="name one: --tokenizer tokenizer.json, or a name on the hub"
    )


FORMATS = {
    found.name: found
    for found in (
        Format(
            "mooncake",
            "Mooncake trace",
            'expected {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [int, ...]}',
            512,
            lines.mooncake,
        ),
        Format(
            "bailian",
            "Qwen-Bailian trace",
            'expected {"chat_id": n, "parent_chat_id": n, "timestamp": s, "hash_ids": [int, ...], ...}',
            16,
            lines.bailian,
        ),
        Format(
            "lmcache",
            "LMCache look-up",
            'expected {"timestamp": s, "chunk_size": n, "seq_len": n, "chunk_hashes": ["0x...", ...]}',
            256,
            lines.lookups,
        ),
        Format("tokens", "token", 'expected {"timestamp": ms, "token_ids": [int, ...]}', 64, lines.tokens),
        Format("text", "text", 'expected {"timestamp": ms, "prompt": "..."}', 64, _no_tokenizer),
    )
}


def with_tokenizer(form: Format, name: str) -> Format:
    """The text format, with a tokenizer: a tokenizer.json, or a name that the hub knows. Raises ConfigError."""
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ConfigError(
            "prompts as text need the package tokenizers", hint="pip install tokenizers"
        ) from error
    try:
        made = library.Tokenizer
        tokenizer = made.from_file(name) if Path(name).exists() else made.from_pretrained(name)
    except Exception as error:
        raise ConfigError(f"--tokenizer: cannot load {name}: {error}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return dataclasses.replace(form, parser=lines.texts(encode))


def format_of(line: Line) -> str:
    """The format that a line's keys tell; empty: none that is known."""
    keys = line.keys()
    if "chunk_hashes" in keys:
        return "lmcache"
    if "hash_ids" in keys:
        return "bailian" if "parent_chat_id" in keys else "mooncake"
    if keys & set(lines.TOKEN_KEYS):
        return "tokens"
    return "text" if keys & set(lines.TEXT_KEYS) else ""


def first_lines(path: Path) -> list[Line]:
    """The first lines that are JSON objects. Raises InvalidArgumentError where the file cannot be opened."""
    found: list[Line] = []
    with source.opened(path) as stream:
        try:
            for raw in islice(source.lines(stream), LOOKED_AT):
                line = _object(raw)
                if line is not None:
                    found.append(line)
        except source.DAMAGE:
            pass  # told when the trace is read
    return found


def _object(raw: bytes) -> Line | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def told_by(path: Path, found: list[Line]) -> str:
    """The format of a file from its first lines. Raises InvalidArgumentError."""
    for line in found:
        name = format_of(line)
        if name:
            return name
    if not path.stat().st_size:
        raise InvalidArgumentError(f"{path} is empty")
    raise InvalidArgumentError(
        f"{path}: its first {LOOKED_AT} lines are of no trace format that is known",
        hint=f"name it with --format: {', '.join([*FORMATS, RECORDING])}",
    )


def chunk_tokens(found: list[Line]) -> int:
    """What the first of these lines says a block has; 0: none says it."""
    for line in found:
        size = line.get("chunk_size")
        if isinstance(size, int) and 0 < size < 1 << 20:
            return size
    return 0
