"""Named mixes, fitted to real traces where one is named (docs/TRACES.md sets them side by side)."""

from __future__ import annotations

import dataclasses

from hicache.errors import InvalidArgumentError
from hicache.sim.traces.arrivals import Arrivals
from hicache.sim.traces.generate import Generated, Mix
from hicache.sim.traces.kinds import Kind, Length

CHAT = Kind(
    "chat",
    heads=1,
    head=Length(700, 0.0),
    first=Length(5_300, 1.15, low=340, high=120_000),
    question=Length(1_500, 1.3, low=10, high=60_000),
    answer=Length(330, 0.8, low=1, high=8_000),
    stay=0.27,
    stay_more=0.62,
    think=Length(90_000, 1.0, low=2_000),
    branch=0.04,
)
AGENT = Kind(
    "agent",
    heads=3,
    head=Length(8_500, 0.3),
    first=Length(8_000, 1.2, low=50, high=80_000),
    question=Length(420, 1.5, low=20, high=40_000),
    answer=Length(350, 0.9, low=20, high=8_000),
    stay=0.97,
    stay_more=0.985,
    think=Length(11_000, 1.3, low=1_000),
    branch=0.01,
    restart=0.004,
    context_max=165_000,
    summary=Length(30_000, 0.8),
)
RAG = Kind(
    "rag",
    heads=4,
    head=Length(800, 0.4),
    documents=2_000,
    documents_each=3,
    document=Length(2_200, 0.7, low=200, high=16_000),
    document_skew=0.9,
    first=Length(120, 0.8, low=5, high=4_000),
    question=Length(80, 0.8, low=5, high=2_000),
    answer=Length(220, 0.7, low=5, high=2_000),
    stay=0.25,
    stay_more=0.4,
    think=Length(25_000, 0.9),
)

PRESETS = {
    mix.name: mix
    for mix in (
        Mix("conversation-like", ((CHAT, 1.0),), Arrivals("poisson", 480.0)),
        Mix("agent-like", ((AGENT, 1.0),), Arrivals("poisson", 400_000.0)),
        Mix("rag", ((RAG, 1.0),), Arrivals("poisson", 400.0)),
        Mix("mix", ((CHAT, 0.72), (RAG, 0.25), (AGENT, 0.03)), Arrivals("bursty", 900.0)),
    )
}


def generated(
    preset: str,
    *,
    requests: int = 0,
    seed: int = 1,
    block_tokens: int = 0,
    process: str = "",
    every_ms: float = 0,
) -> Generated:
    """A preset's trace; 0 and "": the preset's own. Raises InvalidArgumentError for an unknown name."""
    mix = PRESETS.get(preset)
    if mix is None:
        raise InvalidArgumentError(f"no preset named {preset!r}", hint=f"one of {', '.join(PRESETS)}")
    arrivals = dataclasses.replace(
        mix.arrivals,
        process=process or mix.arrivals.process,
        every_ms=every_ms or mix.arrivals.every_ms,
    )
    return Generated(
        dataclasses.replace(
            mix,
            arrivals=arrivals,
            requests=requests or mix.requests,
            seed=seed,
            block_tokens=block_tokens or mix.block_tokens,
        )
    )
