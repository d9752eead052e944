"""How sure a result is: bootstrap intervals over stretches of consecutive requests, alone and in pairs.

Requests near each other are alike, so single requests are not drawn anew but whole stretches of them (the rows of a
result, some two hundred). Two results of one trace are compared on the same draws: what both share cancels out.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hicache.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Table = NDArray[np.float64]

DRAWS = 2000
SEED = 20261121
#: Quotients that results are judged by: (above, below) columns of the rows.
MEASURES = {
    "hit_ratio": ("hits", "asked"),
    "ttft_ms": ("ttft_us", "requests"),
    "computed_s": ("computed_us", "requests"),
}
_SCALE = {"hit_ratio": 1.0, "ttft_ms": 1e-3, "computed_s": 1e-6}


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A value with the bounds that hold 95 % of the draws."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def interval(rows: Sequence[Sequence[int]], columns: Sequence[str], measure: str = "hit_ratio") -> Interval:
    """One result's quotient."""
    table = np.asarray(rows, np.float64)
    above, below = _columns(columns, measure)
    drawn = _drawn(len(table), table[:, [above, below]])
    ratios = drawn[:, 0] / np.maximum(drawn[:, 1], 1) * _SCALE[measure]
    return _interval(_quotient(table, above, below, measure), ratios)


def difference(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    columns: Sequence[str],
    measure: str = "hit_ratio",
) -> Interval:
    """First minus second, on the same draws. Raises InvalidArgumentError for results that do not pair up."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or not np.array_equal(
        a[:, columns.index("requests")], b[:, columns.index("requests")]
    ):
        raise InvalidArgumentError(
            "these results do not pair up: they have other stretches of requests",
            hint="compare results of the same trace with the same warm-up",
        )
    above, below = _columns(columns, measure)
    drawn = _drawn(len(a), np.hstack([a[:, [above, below]], b[:, [above, below]]]))
    gaps = drawn[:, 0] / np.maximum(drawn[:, 1], 1) - drawn[:, 2] / np.maximum(drawn[:, 3], 1)
    value = _quotient(a, above, below, measure) - _quotient(b, above, below, measure)
    return _interval(value, gaps * _SCALE[measure])


def _columns(columns: Sequence[str], measure: str) -> tuple[int, int]:
    above, below = MEASURES[measure]
    return list(columns).index(above), list(columns).index(below)


def _quotient(table: Table, above: int, below: int, measure: str) -> float:
    return float(table[:, above].sum() / max(table[:, below].sum(), 1) * _SCALE[measure])


def _drawn(count: int, table: Table) -> Table:
    """Sums of ``count`` rows drawn with replacement, DRAWS times; the same draws for the same count."""
    generator = np.random.default_rng(SEED)
    times = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    found: Table = times @ table
    return found


def _interval(value: float, draws: Table) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))
