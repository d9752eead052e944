"""When sessions begin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from random import Random

from hicache.errors import InvalidArgumentError

PROCESSES = ("poisson", "even", "bursty", "daily")
_DAY_MS = 86_400_000


@dataclasses.dataclass(frozen=True, slots=True)
class Arrivals:
    """How sessions begin: ``every_ms`` apart on average.

    ``poisson``: independent; ``even``: a clock's tick; ``bursty``: gaps of a gamma law with squared
    variation ``burst`` (1 would be poisson); ``daily``: poisson whose rate swings by ``swing`` over a day.
    """

    process: str = "poisson"
    every_ms: float = 1000.0
    burst: float = 4.0
    swing: float = 0.8


def arrival_times(arrivals: Arrivals, rng: Random) -> Iterator[int]:
    """Milliseconds from the start, without end. Raises InvalidArgumentError for settings that cannot be."""
    if arrivals.process not in PROCESSES:
        raise InvalidArgumentError(
            f"no arrival process named {arrivals.process!r}", hint=f"one of {', '.join(PROCESSES)}"
        )
    if not (arrivals.every_ms > 0 and arrivals.burst > 0 and 0 <= arrivals.swing < 1):
        raise InvalidArgumentError("arrivals: every_ms and burst must be above 0, swing in 0..1")
    return _times(arrivals, rng)


def _times(arrivals: Arrivals, rng: Random) -> Iterator[int]:
    at_ms = 0.0
    while True:
        yield round(at_ms)
        at_ms += _gap_ms(arrivals, rng, at_ms)


def _gap_ms(arrivals: Arrivals, rng: Random, at_ms: float) -> float:
    mean = arrivals.every_ms
    if arrivals.process == "even":
        return mean
    if arrivals.process == "bursty":
        return rng.gammavariate(1 / arrivals.burst, mean * arrivals.burst)
    if arrivals.process == "daily":
        mean /= 1 - arrivals.swing * math.cos(2 * math.pi * at_ms / _DAY_MS)
    return rng.expovariate(1 / mean)
