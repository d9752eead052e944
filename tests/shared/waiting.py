"""Waiting with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(what: str, is_true: Callable[[], Any], timeout_s: float = 20.0) -> float:
    """Poll until it is true; answers how long that took, in seconds."""
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began
