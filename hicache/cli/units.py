"""Sizes and durations as people write them: ``8GiB``, ``1.5GB``, ``30s``. Pure functions.

A size without a unit is bytes. ``K``, ``M``, ``G`` alone are refused: half of the world means 1000, the other
half 1024. A duration needs its unit, except zero.
"""

from __future__ import annotations

import re
from fractions import Fraction

from hicache.errors import ConfigError

_NUMBER_UNIT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")

SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
DURATION_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

_BINARY = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_CLOCK = (("h", 3_600_000), ("m", 60_000), ("s", 1000))


def parse_size(text: str) -> int:
    """Bytes. Raises ConfigError; fractions of a byte are cut off."""
    found = _NUMBER_UNIT.fullmatch(text)
    unit = found.group(2).lower() if found else ""
    if found is None or unit not in SIZE_UNITS:
        hint = "write for example 8GiB, 512MiB or 1.5GB"
        if unit in {"k", "m", "g", "t"}:
            letter = unit.upper()
            hint = f"{letter}iB counts in 1024s, {letter}B in 1000s"
        raise ConfigError(f"{text!r} is not a size", hint=hint)
    return int(Fraction(found.group(1).replace("_", "")) * SIZE_UNITS[unit])


def parse_duration_ms(text: str) -> int:
    """Milliseconds. Raises ConfigError."""
    found = _NUMBER_UNIT.fullmatch(text)
    unit = found.group(2).lower() if found else ""
    zero = found is not None and not unit and Fraction(found.group(1).replace("_", "")) == 0
    if found is None or (unit not in DURATION_UNITS_MS and not zero):
        raise ConfigError(f"{text!r} is not a duration", hint="write for example 500ms, 30s, 5m or 1h")
    return int(Fraction(found.group(1).replace("_", "")) * DURATION_UNITS_MS.get(unit, 1))


def exact_size(size_bytes: int) -> str:
    """The shortest spelling that ``parse_size`` reads back as the same number."""
    for unit, factor in _BINARY:
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def exact_duration(duration_ms: int) -> str:
    """The shortest spelling that ``parse_duration_ms`` reads back as the same number."""
    for unit, factor in _CLOCK:
        if duration_ms and duration_ms % factor == 0:
            return f"{duration_ms // factor}{unit}"
    return f"{duration_ms}ms"


def human_size(size_bytes: float) -> str:
    """Three digits for a table: ``1.50 GiB``."""
    for unit, factor in _BINARY:
        if size_bytes >= factor:
            value = size_bytes / factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{size_bytes:.0f} B"


def human_duration(duration_ms: float) -> str:
    """Two digits and a unit, from microseconds to days: ``1.2 s``."""
    if duration_ms < 1:
        return f"{duration_ms * 1000:.0f} us"
    if duration_ms < 1000:
        return f"{duration_ms:.{1 if duration_ms < 100 else 0}f} ms"
    seconds = duration_ms / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"
