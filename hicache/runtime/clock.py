"""The only reader of time. Everything else takes a ``Clock``, so that tests can hand in one of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Alarm(Protocol):
    """A call that is still to come."""

    def cancel(self) -> None:
        """It is not to come. Fine after it came."""


class Clock:
    """Real time. ``now_ms`` and ``now_ns`` never go back and have no meaning outside this process."""

    def now_ms(self) -> int:
        """Milliseconds, monotonic."""
        return time.monotonic_ns() // 1_000_000

    def now_ns(self) -> int:
        """Nanoseconds, monotonic; for measuring."""
        return time.monotonic_ns()

    def wall_s(self) -> float:
        """Seconds since 1970, for people; may jump."""
        return time.time()

    def alarm(self, delay_ms: int, call: Callable[[], None]) -> Alarm:
        """Have the running event loop make a call in ``delay_ms``."""
        return asyncio.get_running_loop().call_later(delay_ms / 1000, call)
