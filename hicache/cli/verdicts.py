"""One line of what ``hicache doctor`` reports."""

from __future__ import annotations

import dataclasses
import enum


class Verdict(enum.Enum):
    """How bad it is."""

    FINE = "fine"
    ADVICE = "advice"
    CHANGE = "change"


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
