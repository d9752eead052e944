"""Statistics of a trace, exact, in one pass: what a cache could find, how far apart uses are, what is shared."""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

from hicache.sim.traces.distances import ReuseDistances
from hicache.sim.traces.facts import known_depth
from hicache.sim.traces.model import Request

#: Depths (in blocks) of which the table of sharing tells.
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """A distribution: its count, mean, and percentiles (101 values: smallest, 1 %, ... largest; nearest rank)."""

    count: int
    mean: float
    percentiles: tuple[int, ...]

    @classmethod
    def of(cls, values: Iterable[int]) -> Spread:
        """Of these values."""
        ordered = np.sort(np.fromiter(values, dtype=np.int64))
        if not len(ordered):
            return cls(0, 0.0, (0,) * 101)
        ranks = np.round(np.linspace(0, len(ordered) - 1, 101)).astype(np.int64)
        return cls(len(ordered), float(ordered.mean()), tuple(ordered[ranks].tolist()))


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """The tree of prefixes at a depth.

    Requests that reach it, different blocks there, those that were used more than once, and how many
    different blocks follow one that is followed at all.
    """

    depth: int
    requests: int
    blocks: int
    shared_blocks: int
    fan_out: float


@dataclasses.dataclass(frozen=True, slots=True)
class TraceStats:
    """All of it. ``hit_curve``: (capacity in blocks, share of blocks whose reuse distance is below it).

    Reuse distance: different blocks used between two uses of a block. It tells what an LRU cache of blocks by
    themselves finds; a prefix cache finds as much or less. ``unchained_blocks``: ids caught at two depths; a
    prefix-chained trace has none. ``reuse_gap_ms``: since the deepest block that a request finds was last used.
    """

    requests: int
    blocks: int
    unique_blocks: int
    hit_blocks: int
    span_ms: int
    sessions: int
    unchained_blocks: int
    input_tokens: Spread
    output_tokens: Spread
    blocks_each: Spread
    hits_each: Spread
    turns: Spread
    arrival_gap_ms: Spread
    reuse_gap_ms: Spread
    reuse_distance: Spread
    hit_curve: tuple[tuple[int, float], ...]
    uses: tuple[tuple[str, float], ...]
    sharing: tuple[Sharing, ...]
    classes: tuple[tuple[str, int], ...]

    @property
    def bound(self) -> float:
        """Hit ratio of an infinite cache."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0


class _Tree:
    """Blocks by depth, parent and uses."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.depth: dict[int, int] = {}
        self.uses: Counter[int] = Counter()
        self.reached: Counter[int] = Counter()
        self.unchained: set[int] = set()

    def add(self, blocks: array[int], known: int) -> None:
        """A request's blocks, of which the first ``known`` were seen before."""
        self.reached[len(blocks)] += 1
        self.uses.update(blocks)
        for at in range(known, len(blocks)):
            block, before = blocks[at], blocks[at - 1] if at else 0
            if block in self.depth:
                self.unchained.add(block)
            else:
                self.depth[block] = at + 1
                self.parent[block] = before
        if known and self.depth[blocks[known - 1]] != known:
            self.unchained.add(blocks[known - 1])

    def sharing(self) -> tuple[Sharing, ...]:
        """A row for each depth of DEPTHS that is reached."""
        at: Counter[int] = Counter(self.depth.values())
        shared = Counter(self.depth[block] for block, uses in self.uses.items() if uses > 1)
        children = Counter(self.parent[block] for block, depth in self.depth.items() if depth > 1)
        fan: dict[int, list[int]] = {}
        for block, count in children.items():
            fan.setdefault(self.depth[block], []).append(count)
        rows = []
        for depth in DEPTHS:
            if not at[depth]:
                break
            reached = sum(count for length, count in self.reached.items() if length >= depth)
            below = fan.get(depth, [])
            fan_out = sum(below) / len(below) if below else 0.0
            rows.append(Sharing(depth, reached, at[depth], shared[depth], fan_out))
        return tuple(rows)

    def use_shares(self) -> tuple[tuple[str, float], ...]:
        """The share of different blocks that were used once, twice, and so on."""
        groups = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4", 4, 4), ("5-10", 5, 10), ("11-100", 11, 100))
        counts = Counter(self.uses.values())
        total = max(len(self.uses), 1)
        rows = [
            (name, sum(counts[uses] for uses in range(low, high + 1)) / total) for name, low, high in groups
        ]
        return (*rows, (">100", sum(count for uses, count in counts.items() if uses > 100) / total))


class _Columns:
    """One number a request, for the spreads."""

    def __init__(self) -> None:
        self.inputs, self.outputs, self.lengths, self.hits = (array("q") for _ in range(4))
        self.gaps, self.reuse_gaps = array("q"), array("q")
        self.turns: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self._last_ms: int | None = None
        self._used_ms: dict[int, int] = {}
        self.span_ms = 0

    def add(self, request: Request, known: int) -> None:
        """A request that found ``known`` blocks."""
        self.inputs.append(request.input_tokens)
        self.outputs.append(request.output_tokens)
        self.lengths.append(len(request.blocks))
        self.hits.append(known)
        self.classes[request.cls] += 1
        if request.session:
            self.turns[request.session] += 1
        if self._last_ms is not None:
            self.gaps.append(request.at_ms - self._last_ms)
            self.span_ms += request.at_ms - self._last_ms
        self._last_ms = request.at_ms
        # the deepest block that is found was last used by the turn before, or by who shares the prefix
        if known:
            self.reuse_gaps.append(request.at_ms - self._used_ms[request.blocks[known - 1]])
        self._used_ms.update(dict.fromkeys(request.blocks, request.at_ms))


def trace_stats(requests: Iterable[Request]) -> TraceStats:
    """All statistics. Memory grows with the trace, by some 150 bytes a block."""
    tree, columns, distances = _Tree(), _Columns(), ReuseDistances()
    for request in requests:
        known = known_depth(request.blocks, tree.depth.keys())
        tree.add(request.blocks, known)
        columns.add(request, known)
        distances.add(request.blocks)
    return TraceStats(
        requests=len(columns.lengths),
        blocks=sum(columns.lengths),
        unique_blocks=len(tree.depth),
        hit_blocks=sum(columns.hits),
        span_ms=columns.span_ms,
        sessions=len(columns.turns),
        unchained_blocks=len(tree.unchained),
        input_tokens=Spread.of(columns.inputs),
        output_tokens=Spread.of(columns.outputs),
        blocks_each=Spread.of(columns.lengths),
        hits_each=Spread.of(columns.hits),
        turns=Spread.of(columns.turns.values()),
        arrival_gap_ms=Spread.of(columns.gaps),
        reuse_gap_ms=Spread.of(columns.reuse_gaps),
        reuse_distance=Spread.of(distances.all()),
        hit_curve=distances.curve(len(tree.depth)),
        uses=tree.use_shares(),
        sharing=tree.sharing(),
        classes=tuple(columns.classes.most_common(20)),
    )
