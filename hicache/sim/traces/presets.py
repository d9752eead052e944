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
    head=Length(890, 0.0),
    first=Length(7_200, 1.13, low=5, high=124_000),
    question=Length(620, 2.0, low=5, high=28_000),
    answer=Length(330, 0.7, low=1, high=2_000),
    stay=0.28,
    stay_more=0.5,
    think=Length(138_000, 1.05, low=12_000),
    branch=0.15,
    rewrites_end=True,
    family="chat",
)
#: A quarter of the first questions are short.
QUICK = dataclasses.replace(CHAT, name="quick", first=Length(40, 1.4, low=5), stay=0.22)
AGENT = Kind(
    "agent",
    heads=40,
    head=Length(8_500, 0.25),
    head_skew=2.0,
    first=Length(10_000, 1.1, low=50, high=170_000),
    question=Length(380, 1.9, low=20, high=60_000),
    answer=Length(240, 0.95, low=20, high=13_000),
    stay=0.97,
    stay_more=0.993,
    think=Length(16_000, 1.4, low=2_000),
    pause=Length(1_500_000, 1.6, low=60_000, high=50_000_000),
    pause_chance=0.03,
    branch=0.05,
    restart=0.003,
    context_max=185_000,
    summary=Length(80_000, 0.4),
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
        Mix(
            "conversation-like",
            ((CHAT, 0.72), (QUICK, 0.28)),
            Arrivals("poisson", 445.0),
            requests=12_031,
            tick_ms=3_000,
        ),
        Mix("agent-like", ((AGENT, 1.0),), Arrivals("poisson", 30_000.0), requests=25_448),
        Mix("rag", ((RAG, 1.0),), Arrivals("poisson", 400.0)),
        Mix("mix", ((CHAT, 0.6), (QUICK, 0.15), (RAG, 0.24), (AGENT, 0.01)), Arrivals("bursty", 900.0)),
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
