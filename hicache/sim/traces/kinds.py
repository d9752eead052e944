"""Kinds of sessions, and one session: its context, and how it grows from turn to turn."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from array import array
from random import Random

from hicache.sim.traces.ids import mixed
from hicache.sim.traces.model import Request

#: Ids are positive and below 2^62, so that any reader of JSON takes them.
_ID_MASK = (1 << 62) - 1
#: Turns of which a session remembers the context, for answers made again.
_REMEMBERED = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Length:
    """Token counts of a log-normal law, by its median and the log's deviation, cut to low..high."""

    median: float
    sigma: float
    low: int = 1
    high: int = 1 << 20

    def draw(self, rng: Random) -> int:
        """One of them."""
        if not self.median:
            return 0
        return min(max(round(self.median * math.exp(rng.gauss(0.0, self.sigma))), self.low), self.high)


NOTHING = Length(0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What sessions of a kind look like.

    The head: ``heads`` shared ones of ``head`` tokens (Zipf's law with ``head_skew``), then
    ``documents_each`` of ``documents`` shared documents. The talk: ``first`` tokens asked at first, ``question``
    later, ``answer`` added by the model. ``stay``: chance of another turn, ``stay_more`` of one after the second
    (sessions that got going go on). ``think``: ms between turns; with ``pause_chance`` it is a ``pause``.
    ``branch``: chance that a turn starts again
    from an earlier one. ``restart``: chance that a turn keeps the head alone. Beyond ``context_max`` tokens
    the talk is summed up in ``summary`` tokens. ``rewrites_end``: the last block of a prompt does not come back in the
    next turn (templates that end prompts otherwise). Kinds of one ``family`` share their heads and documents.
    """

    name: str
    heads: int = 1
    head: Length = NOTHING
    head_skew: float = 1.0
    documents: int = 0
    documents_each: int = 0
    document: Length = NOTHING
    document_skew: float = 1.0
    first: Length = Length(800, 1.0)
    question: Length = Length(200, 1.0)
    answer: Length = Length(300, 0.8)
    stay: float = 0.5
    stay_more: float = 0.7
    think: Length = Length(30_000, 1.0)
    pause: Length = NOTHING
    pause_chance: float = 0.0
    branch: float = 0.0
    restart: float = 0.0
    context_max: int = 128_000
    summary: Length = Length(4_000, 0.5)
    rewrites_end: bool = False
    family: str = ""


@functools.cache
def _zipf(count: int, skew: float) -> tuple[float, ...]:
    return tuple(itertools.accumulate(1 / rank**skew for rank in range(1, count + 1)))


def _popular(rng: Random, count: int, skew: float) -> int:
    """A number below ``count``, small ones more often."""
    sums = _zipf(count, skew)
    return min(bisect.bisect_left(sums, rng.random() * sums[-1]), count - 1)


class Session:
    """One conversation. Ids of what it says alone come from its number; ids of shared heads from what is shared."""

    def __init__(self, kind: Kind, rng: Random, number: int, block_tokens: int, seed: int) -> None:
        self._kind = kind
        self._rng = rng
        self._name = f"{kind.name}-{number}"
        self._block_tokens = block_tokens
        self._private = mixed(mixed(seed) ^ number)
        self._said = 0  # private blocks so far
        self._turn = 0
        self._shared = mixed(mixed(seed) ^ int.from_bytes((kind.family or kind.name).encode(), "little"))
        self._blocks: array[int] = array("q")
        self._tokens = 0
        self._open_head()
        self._head = (self._tokens, len(self._blocks))
        self._earlier: list[int] = []

    def ask(self, at_ms: int) -> tuple[Request, int | None]:
        """The next request, and how long the session thinks before the one after it (None: it ends)."""
        kind, rng = self._kind, self._rng
        self._turn += 1
        if self._turn > 1:
            self._go_back()
        self._say((kind.first if self._turn == 1 else kind.question).draw(rng))
        answer = kind.answer.draw(rng)
        blocks = self._blocks[:]
        if kind.rewrites_end and len(blocks) > self._head[1]:
            blocks[-1] = mixed(~blocks[-1] & _ID_MASK ^ self._turn) & _ID_MASK
        request = Request(
            at_ms, self._tokens, answer, blocks, cls=kind.name, turn=self._turn, session=self._name
        )
        self._earlier = [*self._earlier[1 - _REMEMBERED :], self._tokens]
        self._say(answer)
        stay = kind.stay if self._turn == 1 else kind.stay_more
        if rng.random() >= stay:
            return request, None
        return request, (kind.pause if rng.random() < kind.pause_chance else kind.think).draw(rng)

    def _go_back(self) -> None:
        kind, rng = self._kind, self._rng
        dice = rng.random()
        if dice < kind.restart:
            self._cut(self._head[0])
            self._say(kind.first.draw(rng))
        elif dice < kind.restart + kind.branch:
            self._cut(rng.choice(self._earlier))
        elif self._tokens > kind.context_max:
            self._cut(self._head[0])
            self._say(kind.summary.draw(rng))

    def _cut(self, tokens: int) -> None:
        self._tokens = tokens
        del self._blocks[max(tokens // self._block_tokens, self._head[1]) :]

    def _say(self, tokens: int) -> None:
        self._tokens += tokens
        missing = self._tokens // self._block_tokens - len(self._blocks)
        if missing > 0:
            said = self._said
            self._blocks.extend(
                [mixed(self._private ^ number) & _ID_MASK for number in range(said, said + missing)]
            )
            self._said += missing

    def _open_head(self) -> None:
        """Shared tokens fill shared blocks; a block that a private token reaches into is private."""
        kind, rng = self._kind, self._rng
        path = self._shared
        if kind.heads and kind.head.median:
            number = _popular(rng, kind.heads, kind.head_skew)
            path = self._share(path, number, kind.head)
        for _ in range(kind.documents_each if kind.documents else 0):
            path = self._share(
                path, 1_000_000 + _popular(rng, kind.documents, kind.document_skew), kind.document
            )

    def _share(self, path: int, number: int, length: Length) -> int:
        path = mixed(path ^ number)
        tokens = length.draw(Random(self._shared ^ number))  # noqa: S311 - equal documents, equal lengths
        before = len(self._blocks)
        self._tokens += tokens
        whole = self._tokens // self._block_tokens
        self._blocks.extend([mixed(path ^ index) & _ID_MASK for index in range(before, whole)])
        return path
