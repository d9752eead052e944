"""The formats of JSON lines, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hicache.sim.traces import lines
from hicache.sim.traces.lines import Parser


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """A format of JSON lines. ``block_tokens``: what its files have unless told otherwise."""

    name: str
    title: str
    expected: str
    block_tokens: int
    parser: Callable[[int], Parser]


MOONCAKE = Format(
    "mooncake",
    "Mooncake trace",
    'expected {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [int, ...]}',
    512,
    lines.mooncake,
)

FORMATS = {found.name: found for found in (MOONCAKE,)}
