"""Traces: what was asked of a cache, from files of many formats or made from a seed."""

from __future__ import annotations

import os
from pathlib import Path

from hicache.errors import InvalidArgumentError
from hicache.sim.traces.files import LineTrace
from hicache.sim.traces.formats import FORMATS, MOONCAKE
from hicache.sim.traces.model import Problem, Problems, Request, Trace
from hicache.sim.traces.presets import generated

__all__ = ["Problem", "Problems", "Request", "Trace", "generated", "open_trace"]


def open_trace(
    path: str | os.PathLike[str], *, format: str = "auto", strict: bool = False, block_tokens: int = 0
) -> Trace:
    """The trace in a file. Raises InvalidArgumentError."""
    form = FORMATS.get(format, MOONCAKE) if format == "auto" else FORMATS.get(format)
    if form is None:
        raise InvalidArgumentError(f"no trace format named {format!r}", hint=f"one of {', '.join(FORMATS)}")
    return LineTrace(Path(path), form, block_tokens=block_tokens, strict=strict)
