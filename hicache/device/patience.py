"""How long a device may be silent before it is given up."""

from __future__ import annotations

from collections.abc import Callable

from hicache.device.driver import DriverError


class Unanswered(DriverError):
    """No answer in time. What the device was given may still happen: its memory must not be used again."""

    def __init__(self, timeout_ns: int) -> None:
        super().__init__("ready", f"no answer for {timeout_ns / 1e9:g} s", fatal=True)


class Patience:
    """``timeout_ns`` of silence are borne, by the clock ``now_ns``; 0: any."""

    def __init__(self, now_ns: Callable[[], int], timeout_ns: int) -> None:
        self.now_ns = now_ns
        self.timeout_ns = timeout_ns

    def check(self, since_ns: int) -> None:
        """The device was asked and is not ready. Raises Unanswered where it has been silent too long."""
        if self.timeout_ns and self.now_ns() - since_ns > self.timeout_ns:
            raise Unanswered(self.timeout_ns)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Ask until it is ready. Raises Unanswered, and what ``ready`` raises."""
        since_ns = self.now_ns()
        while not ready():
            self.check(since_ns)


#: Waits for ever.
ENDLESS = Patience(lambda: 0, 0)
