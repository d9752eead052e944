"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.cli import units
from hicache.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("1.5 gib", 3 << 29),
        ("64 KiB", 65536),
        ("10kB", 10_000),
        ("1_000", 1000),
        ("0", 0),
        ("17B", 17),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8Gig", "-1GiB", "1e9", "8GiB8", "nan", "8 GiB of"])
def test_what_is_not_a_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r"8GiB, 512MiB or 1\.5GB"):
        units.parse_size(text)


def test_a_letter_alone_is_ambiguous() -> None:
    with pytest.raises(ConfigError, match="GiB counts in 1024s, GB in 1000s"):
        units.parse_size("8G")


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [
        ("30s", 30_000),
        ("500ms", 500),
        ("1.5s", 1500),
        ("2m", 120_000),
        ("1h", 3_600_000),
        ("0", 0),
        ("1d", 86_400_000),
    ],
)
def test_durations(text: str, duration_ms: int) -> None:
    assert units.parse_duration_ms(text) == duration_ms


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1 fortnight"])
def test_what_is_not_a_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="500ms, 30s, 5m or 1h"):
        units.parse_duration_ms(text)


@given(st.integers(0, 1 << 50))
def test_what_is_printed_is_read_back(number: int) -> None:
    assert units.parse_size(units.exact_size(number)) == number
    assert units.parse_duration_ms(units.exact_duration(number)) == number


def test_tables_show_three_digits() -> None:
    assert [units.human_size(n) for n in (0, 999, 1536, 10 << 20, 3 << 40)] == [
        "0 B",
        "999 B",
        "1.50 KiB",
        "10.0 MiB",
        "3.00 TiB",
    ]
    assert [units.human_duration(n) for n in (0.25, 12.34, 999, 1500, 600_000, 7_200_000, 1e9)] == [
        "250 us",
        "12.3 ms",
        "999 ms",
        "1.5 s",
        "10 min",
        "2 h",
        "12 d",
    ]
