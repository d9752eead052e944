"""What a trace is, whatever file it came from: requests in order, each a list of block ids.

Ids are *prefix-chained*: equal ids stand for an equal block and equal everything before it. A trace can be
read again and again, and is never held in memory: only the request at hand, and what went wrong.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from typing import Protocol

#: Problems that are kept word for word; the rest is only counted.
PROBLEMS_KEPT = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One look-up and what it would store. ``blocks``: ``array("q")``, one id a block of the prompt.

    ``cls``, ``turn``, ``session``: what the trace knows of the request's kind, the turn of its conversation
    (1: the first; 0: not known) and which conversation it belongs to.
    """

    at_ms: int
    input_tokens: int
    output_tokens: int
    blocks: array[int]
    cls: str = ""
    turn: int = 0
    session: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A line that could not be used (a block's number where the file is binary; 0: the file as a whole)."""

    line: int
    text: str


class Problems(list[Problem]):
    """What went wrong in an iteration: the first hundred in full, and the count of all."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def note(self, line: int, text: str) -> None:
        """Count it, and keep it while there is room."""
        self.total += 1
        if len(self) < PROBLEMS_KEPT:
            self.append(Problem(line, text))


class Trace(Protocol):
    """Requests that can be read again and again. ``problems`` tells of the latest iteration."""

    @property
    def name(self) -> str:
        """Where it came from, for people."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def problems(self) -> Problems:
        """What the latest iteration could not use."""
        ...

    def __iter__(self) -> Iterator[Request]:
        """The requests, in the order of the file."""
        ...

    def sha256(self) -> str:
        """Of the uncompressed input bytes (of a generated trace: of its settings)."""
        ...
