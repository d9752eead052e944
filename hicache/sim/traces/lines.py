"""Traces of JSON lines: what a line of each format says.

A format is a function that makes a *parser* for one pass over a file (some remember what came before). A parser
takes a line's object and gives its request, or None for a line that stands for none. It raises KeyError, TypeError
or ValueError for a bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hicache.sim.traces.ids import narrowed
from hicache.sim.traces.model import Request

Line = Mapping[str, Any]
Parser = Callable[[Line], Request | None]


def whole(value: object, name: str) -> int:
    """A count or a time of a line. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number")
    if not -1e15 < value < 1e15:  # also what is not a number at all
        raise ValueError(f"{name} is out of range")
    return round(value)


def text(value: object) -> str:
    """A name of a line: whatever it is written as."""
    return value if isinstance(value, str) else str(value)


def _list(line: Line, name: str) -> list[object]:
    found = line[name]
    if not isinstance(found, list):
        raise TypeError(f"{name} must be a list")
    return found


def mooncake(block_tokens: int) -> Parser:
    """Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (chained, 512 tokens).

    Also ``type``, ``turn`` and ``chat_id``, which our own converter adds.
    """

    def parse(line: Line) -> Request:
        blocks = narrowed(_list(line, "hash_ids"))
        at_ms = whole(line.get("timestamp", 0), "timestamp")
        asked = whole(line.get("input_length", len(blocks) * block_tokens), "input_length")
        answered = whole(line.get("output_length", 0), "output_length")
        if "type" not in line and "turn" not in line and "chat_id" not in line:
            return Request(at_ms, asked, answered, blocks)
        return Request(
            at_ms,
            asked,
            answered,
            blocks,
            cls=text(line.get("type", "")),
            turn=whole(line.get("turn", 0), "turn"),
            session=text(line.get("chat_id", "")),
        )

    return parse
