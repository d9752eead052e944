"""The session as the client knows it, without I/O.

    detached --Welcome--> attached --(stream ends)--> detached        any --close--> closed

``incarnation`` counts sessions: it stays when a session is resumed and moves on with every new one. Leases,
reservations and namespace ids belong to an incarnation, and are lost with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from hicache.errors import ErrorCode, HicacheError, UnavailableError
from hicache.rpc.client.results import Capabilities, Welcome

#: Failures to attach that waiting does not cure.
LASTING = frozenset({ErrorCode.INVALID, ErrorCode.DENIED, ErrorCode.UNAUTHENTICATED, ErrorCode.UNSUPPORTED})


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """An attached session. ``fd_path`` is empty where no memory is shared; ``epoch`` names the server's run."""

    incarnation: int
    session_id: bytes
    fd_path: str
    capabilities: Capabilities
    tenant: str
    epoch: bytes = b""

    @property
    def mapped(self) -> bool:
        """Whether pages travel through shared memory."""
        return bool(self.fd_path) and any(tier.client_readable for tier in self.capabilities.tiers)

    @property
    def finds_regions(self) -> bool:
        """Whether regions that leases point to can be mapped: arenas, or segments of a device's pool."""
        return self.mapped or (bool(self.fd_path) and self.capabilities.pool_shared)


class Signal(Protocol):
    """Tells waiting callers whether ``Session.current`` has something to say."""

    def __call__(self, *, ready: bool) -> None:
        """Called by the life line, at every change."""


class Session:
    """Who we are to the server. Written by the life line only; read from any thread.

    ``signal`` is called with ``ready`` when waiting for ``current`` has become pointless, and without when it makes
    sense again.
    """

    def __init__(self, target: str, signal: Signal) -> None:
        self._target = target
        self._signal = signal
        self._link: Link | None = None
        self._failure: HicacheError | None = None
        self._last: Link | None = None  # the session that may be resumed
        self.incarnation = 0
        self.attachments = 0
        self.epoch = b""
        self.draining = False
        self.keep_alive_ms = 5_000
        self.closed = False

    @property
    def resume_session_id(self) -> bytes:
        """What Hello asks to resume; empty for a new session."""
        return self._last.session_id if self._last is not None else b""

    @property
    def alive(self) -> bool:
        """Whether there is an attached session, this moment."""
        return self._link is not None and not self.closed

    def current(self) -> Link | None:
        """The attached session; None while there is hope for one.

        Raises UnavailableError when closed, and the failure where the server will not have us.
        """
        if self.closed:
            raise UnavailableError("the client is closed", hint="make a new one")
        if self._link is None and self._failure is not None and self._failure.code in LASTING:
            raise self._failure
        return self._link

    def why_not(self) -> HicacheError:
        """What to say to a caller who waited in vain."""
        if self._failure is None:
            return UnavailableError(f"not attached to {self._target}: no answer in time")
        return UnavailableError(
            f"not attached to {self._target}: {_short(self._failure.message)}",
            hint="is the sidecar running, and is this its address?",
        )

    def attached(
        self,
        welcome: Welcome,
        capabilities: Capabilities,
        fd_path: str,
        *,
        begin: Callable[[int], object] = lambda _: None,
    ) -> bool:
        """The server welcomed us. Says whether this is a new session.

        ``begin`` is told a new session's incarnation before anybody can use it.
        """
        resumed = (
            welcome.resumed and welcome.session_id == self.resume_session_id and welcome.epoch == self.epoch
        )
        self.attachments += 1
        if not resumed:
            self.incarnation += 1
            begin(self.incarnation)
        self.epoch = welcome.epoch
        self.keep_alive_ms = welcome.keep_alive_ms or self.keep_alive_ms
        self.draining = False
        link = Link(
            self.incarnation, welcome.session_id, fd_path, capabilities, welcome.tenant, welcome.epoch
        )
        self._link, self._last, self._failure = link, link, None
        self._signal(ready=True)
        return not resumed

    def detached(self) -> None:
        """The life line ended; the session may be resumed."""
        self._link = None
        self._signal(ready=self.closed or self._failed_for_good())

    def failed(self, error: HicacheError) -> None:
        """Attaching failed, or the life line broke."""
        self._failure = error
        self.detached()

    def forget(self) -> None:
        """The session cannot be resumed."""
        self._last = None

    def close(self) -> None:
        """No more calls."""
        self.closed = True
        self._signal(ready=True)

    def _failed_for_good(self) -> bool:
        return self._failure is not None and self._failure.code in LASTING


def _short(message: str) -> str:
    """What the connection failed of, without gRPC's account of how it tried."""
    before, found, reason = message.rpartition(" error: ")
    return reason if found and "connect failed" in before else message
