"""What the simulator's tests share: small traces, a machine with round figures, cells in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hicache.sim.cell import Cell, World, run_cell
from hicache.sim.hardware import Hardware
from hicache.sim.links import LinkSpec
from hicache.sim.models import Model
from hicache.sim.options import Arrivals, Capacity, Mode, Settings, Size, Unit
from hicache.sim.packed import PackedTrace, pack
from hicache.sim.traces import Request
from hicache.types import TierKind

TOKENS = 16
#: 1 KiB a token, so that a block of 16 tokens is 16 KiB; a token takes 1 ms to compute, a look nothing.
MODEL = Model("round", 1, 0, 1, 1, 1024, 0.5e6, 1, "made up")
GB = 1e9
#: A block of 16 KiB takes 1 ms to the GPU, 2 ms from it, 4 ms from disk, 8 ms to disk.
HARDWARE = Hardware(
    "round",
    1e9,
    1.0,
    1e9,
    LinkSpec(16_384_000.0),
    LinkSpec(8_192_000.0),
    LinkSpec(4_096_000.0),
    LinkSpec(2_048_000.0),
    "made up",
)
SETTINGS = Settings(model=MODEL, hardware=HARDWARE)


def request(at_ms: int, blocks: Sequence[int], output_tokens: int = 0, **more: Any) -> Request:
    """A prompt of whole blocks and one token more."""
    return Request(at_ms, len(blocks) * TOKENS + 1, output_tokens, array("q", blocks), **more)


def packed(folder: Path, requests: Iterable[Request]) -> PackedTrace:
    found = list(requests)
    name = hashlib.sha256(repr(found).encode()).hexdigest()
    return pack(found, folder, name="test", sha256=name, block_tokens=TOKENS)


def chat(seed: int, requests: int, *, sessions: int = 12, gap_ms: int = 50) -> list[Request]:
    """Conversations that share a few heads and grow by a block or two a turn; ids are prefix-chained."""
    rng = random.Random(seed)
    ids: dict[tuple[int, int], int] = {}
    talks: dict[int, list[int]] = {}
    found = []
    for at in range(requests):
        session = rng.randrange(sessions)
        if session not in talks or len(talks[session]) > 30 or rng.random() < 0.1:
            talks[session] = [-1 - rng.randrange(3), rng.randrange(1 << 30)]
        talks[session] += [rng.randrange(1 << 30) for _ in range(rng.randint(1, 3))]
        parent, blocks = 0, []
        for content in talks[session]:
            parent = ids.setdefault((parent, content), len(ids) + 1)
            blocks.append(parent)
        found.append(request(at * gap_ms, blocks, rng.randrange(40), cls="chat", turn=len(blocks)))
    return found


def capacity(**pages: int) -> Capacity:
    """``capacity(host=8, disk=40)``: pages by tier, fastest first."""
    sizes = tuple(Size(TierKind(name), count, Unit.PAGES) for name, count in pages.items())
    return Capacity("+".join(f"{name}:{count}p" for name, count in pages.items()), sizes)


def cell(
    room: Capacity, mode: str = "instant", *, policy: str = "lru", seed: int = 1, speed: float = 1.0
) -> Cell:
    return Cell(policy, room, Mode(Arrivals(mode), speed), seed)


def result_of(trace: PackedTrace, what: Cell, settings: Settings = SETTINGS) -> dict[str, Any]:
    return run_cell(what, settings, trace, lambda: 0)


def world_of(trace: PackedTrace, what: Cell, **changes: Any) -> World:
    return World(what, dataclasses.replace(SETTINGS, **changes), trace)
