"""Traces: what was asked of a cache, from files of many formats or made from a seed."""

from __future__ import annotations

import os
from pathlib import Path

from hicache.errors import InvalidArgumentError
from hicache.recording import MAGIC
from hicache.sim.traces import formats, source
from hicache.sim.traces.files import LineTrace
from hicache.sim.traces.model import Problem, Problems, Request, Trace
from hicache.sim.traces.presets import generated
from hicache.sim.traces.recording import RecordingTrace

__all__ = ["FORMAT_NAMES", "Problem", "Problems", "Request", "Trace", "generated", "open_trace"]

FORMAT_NAMES = (*formats.FORMATS, formats.RECORDING)


def open_trace(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    strict: bool = False,
    block_tokens: int = 0,
    tokenizer: str = "",
) -> Trace:
    """The trace in a file; nothing but its first lines is read yet.

    ``format`` "auto": told by those. ``strict``: a bad line raises, with its number, where it would be noted in
    ``problems``. ``block_tokens`` 0: the format's own. ``tokenizer``: for prompts that are text. Raises
    InvalidArgumentError, ConfigError.
    """
    where = Path(path)
    if format not in {"auto", *FORMAT_NAMES}:
        raise InvalidArgumentError(
            f"no trace format named {format!r}", hint=f"one of {', '.join(FORMAT_NAMES)}"
        )
    if format == formats.RECORDING or (format == "auto" and _is_recording(where)):
        return RecordingTrace(where, block_tokens=block_tokens, strict=strict)
    found = formats.first_lines(where)
    name = formats.told_by(where, found) if format == "auto" else format
    form = formats.FORMATS[name]
    if name == "text" and tokenizer:
        form = formats.with_tokenizer(form, tokenizer)
    if name == "lmcache":
        block_tokens = block_tokens or formats.chunk_tokens(found)
    return LineTrace(where, form, block_tokens=block_tokens, strict=strict)


def _is_recording(path: Path) -> bool:
    with source.opened(path) as stream:
        try:
            return stream.read(len(MAGIC)) == MAGIC
        except source.DAMAGE:
            return False
