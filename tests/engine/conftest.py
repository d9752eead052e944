"""What the engine's tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import remembering


@pytest.fixture(autouse=True, scope="module")
def policies_of_the_tests() -> Iterator[None]:
    """The policies and admissions that check the engine have names."""
    with remembering.known():
        yield
