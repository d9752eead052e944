"""Who may come in: the service's state, and the sessions it knows."""

from __future__ import annotations

import itertools

from hicache.errors import StaleError, UnavailableError

SERVING, DRAINING, FAILED, STOPPED = "serving", "draining", "failed", "stopped"
RETRY_MS = 1_000


class Door:
    """``state`` is serving, draining, failed or stopped."""

    def __init__(self) -> None:
        self.state = STOPPED
        self._ids = itertools.count(1)
        self._sessions: dict[int, tuple[str, str]] = {}  # session -> (tenant, name)

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, tenant: str, name: str) -> int:
        """A new session's number. Raises UnavailableError unless the service is serving."""
        self.admit()
        session = next(self._ids)
        self._sessions[session] = (tenant, name)
        return session

    def end(self, session: int) -> bool:
        """Forget a session; whether it was there."""
        return self._sessions.pop(session, None) is not None

    def admit(self, session: int | None = None) -> None:
        """Let new work in: what takes leases or room.

        Raises UnavailableError unless the service is serving, StaleError for a session that is not open.
        """
        if self.state != SERVING:
            retry_ms = RETRY_MS if self.state == DRAINING else 0
            raise UnavailableError(f"the service is {self.state}", retry_after_ms=retry_ms)
        if session is not None:
            self.require(session)

    def alive(self) -> None:
        """Raise UnavailableError where the engine must not even be read: the service has failed or stopped."""
        if self.state in {FAILED, STOPPED}:
            raise UnavailableError(f"the service is {self.state}")

    def require(self, session: int) -> None:
        """Let work on what a session holds already go on.

        Raises UnavailableError where the service has failed or stopped, StaleError for a session that is not open.
        """
        self.alive()
        if session not in self._sessions:
            raise StaleError(f"session {session} is not open", hint="attach again")
