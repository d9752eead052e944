"""Traces made from a seed: multi-turn chat, retrieval over shared documents, coding agents, and mixes of them.

Each *kind* opens sessions; a session asks turn by turn, with a time to think between. A prompt is
a shared head (system prompt or documents, popularity skewed), then what was said in this session so far.
Equal settings give equal requests, in every process and on every machine: only ``random.Random`` draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterator
from random import Random

from hicache.sim.traces.arrivals import Arrivals, arrival_times
from hicache.sim.traces.kinds import Kind, Session
from hicache.sim.traces.model import Problems, Request

EVERY_SECOND = Arrivals()


@dataclasses.dataclass(frozen=True, slots=True)
class Mix:
    """What to generate: kinds with their share of new sessions, how sessions arrive, and how much.

    ``tick_ms``: the grain of its times, as of a log that is written now and then.
    """

    name: str
    kinds: tuple[tuple[Kind, float], ...]
    arrivals: Arrivals = EVERY_SECOND
    requests: int = 10_000
    seed: int = 1
    block_tokens: int = 512
    tick_ms: int = 1


class Generated:
    """A generated trace; it can be read again and again, and holds only its open sessions."""

    def __init__(self, mix: Mix) -> None:
        self.mix = mix
        self.problems = Problems()

    @property
    def name(self) -> str:
        """The mix and its seed."""
        return f"{self.mix.name}:seed={self.mix.seed}"

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.mix.block_tokens

    def sha256(self) -> str:
        """Of the settings, which fix every request."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self.mix), sort_keys=True).encode()).hexdigest()

    def __iter__(self) -> Iterator[Request]:
        """Requests in the order of their time."""
        mix = self.mix
        rng = Random(mix.seed)  # noqa: S311 - a workload, not a secret
        starts = arrival_times(mix.arrivals, Random(mix.seed ^ 0x5EED))  # noqa: S311 - the same
        next_start = next(starts)
        waiting: list[tuple[int, int, Session]] = []
        opened = 0
        for _ in range(mix.requests):
            while not waiting or next_start <= waiting[0][0]:
                session = self._open(rng, opened)
                heapq.heappush(waiting, (next_start, opened, session))
                opened += 1
                next_start = next(starts)
            at_ms, number, session = heapq.heappop(waiting)
            request, think_ms = session.ask(at_ms - at_ms % mix.tick_ms)
            yield request
            if think_ms is not None:
                heapq.heappush(waiting, (at_ms + think_ms, number, session))

    def _open(self, rng: Random, number: int) -> Session:
        kinds = self.mix.kinds
        kind = rng.choices([found for found, _ in kinds], [share for _, share in kinds])[0]
        own = Random(rng.getrandbits(64))  # noqa: S311 - the session's own, so that kinds do not disturb each other
        return Session(kind, own, number, self.mix.block_tokens, self.mix.seed)
