"""The sessions of this server: who they are, what they hold at this edge, and how they begin and end.

    attached --(stream ends without Goodbye)--> suspended --(resumed in time)--> attached
    attached --(Goodbye)--> ended        any --(the peer process dies)--> ended at once
    suspended --(the resume window passes)--> ended

A session's id is a secret: to know it is to be the session, so that ids never appear in logs. What a session
holds in the engine (leases, reservations) is released by ``service.end_session``; what it holds here, by
``Sessions.end``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from hicache.errors import (
    DeniedError,
    ExhaustedError,
    HicacheError,
    StaleError,
    UnauthenticatedError,
    UnavailableError,
)
from hicache.rpc.common import fdproto
from hicache.rpc.pb import session_pb2
from hicache.rpc.server.idempotency import AnswerBook
from hicache.rpc.server.identity import Peer
from hicache.rpc.server.options import ServerOptions
from hicache.runtime.service import Service
from hicache.types import Namespace

log = logging.getLogger(__name__)

#: The engine ends a suspended session by itself too; it waits this much longer, so that the edge is first.
ENGINE_WINDOW_MARGIN_MS = 1_000
MAX_OUTBOX = 1024
INFLIGHT_RETRY_MS = 10


class Outbox:
    """What waits to be sent on one Attach stream; closed when the stream is to end."""

    def __init__(self) -> None:
        self._messages: deque[session_pb2.AttachResponse] = deque()
        self._wake = asyncio.Event()
        self.closed = False

    def put(self, message: session_pb2.AttachResponse) -> None:
        """Queue a message. A client that does not read loses its stream, and resumes."""
        if len(self._messages) >= MAX_OUTBOX:
            self.close()
            return
        self._messages.append(message)
        self._wake.set()

    def close(self) -> None:
        """End the stream after what is queued."""
        self.closed = True
        self._wake.set()

    async def get(self) -> session_pb2.AttachResponse | None:
        """The next message; None when the stream is to end."""
        while not self._messages:
            if self.closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._messages.popleft()


@dataclasses.dataclass(slots=True, eq=False)
class Session:
    """One attached client. ``number`` is its name in the engine, ``id`` its secret name on the wire."""

    id: bytes
    number: int
    name: str
    peer: Peer
    answers: AnswerBook
    namespaces: dict[int, Namespace]  # opened by its tenant, shared between the tenant's sessions
    inflight: int = 0
    registering: int = 0  # regions that are being made
    regions: dict[int, Any] = dataclasses.field(default_factory=dict)  # its own, by id: what register() gave
    mapped: set[int] = dataclasses.field(default_factory=set)  # arenas whose descriptor it was given
    retired: set[int] = dataclasses.field(default_factory=set)  # of those: to be confirmed as unmapped
    outbox: Outbox | None = None  # None: suspended
    window: asyncio.TimerHandle | None = None
    pidfd: int = -1


class Sessions:
    """All sessions, by secret id. Lives on the service's event loop."""

    def __init__(self, service: Service, options: ServerOptions) -> None:
        self._service = service
        self._options = options
        self._by_id: dict[bytes, Session] = {}
        self._namespaces: dict[str, dict[int, Namespace]] = {}
        self._loop = asyncio.get_running_loop()
        self.draining = False
        self.on_end: Callable[[int], object] = lambda number: None  # told the number of a session that ended

    def __len__(self) -> int:
        return len(self._by_id)

    # --- look-up

    def find(self, session_id: bytes) -> Session:
        """The session with this id. Raises UnauthenticatedError for no id, StaleError for an unknown one."""
        session = self._by_id.get(session_id)
        if session is not None:
            return session
        if not session_id:
            raise UnauthenticatedError("the call names no session", hint="attach first")
        raise StaleError("the session is unknown: it ended, or the server restarted", hint="attach again")

    def enter(self, session_id: bytes) -> Session:
        """Admit one call; the caller takes 1 off ``inflight`` when it is done.

        Raises as ``find`` does, and ExhaustedError at the session's bound.
        """
        session = self.find(session_id)
        inflight = session.inflight + session.answers.abandoned
        if inflight >= self._options.max_inflight_per_session:
            raise ExhaustedError(
                f"the session has {inflight} calls in flight",
                hint="wait for some of them",
                retry_after_ms=INFLIGHT_RETRY_MS,
            )
        session.inflight += 1
        return session

    def knows_namespace(self, namespace_id: int) -> bool:
        """Whether a session of any tenant has opened this namespace."""
        return any(namespace_id in opened for opened in self._namespaces.values())

    # --- beginnings

    def open(self, peer: Peer, name: str) -> Session:
        """A new session for a peer. Raises UnavailableError while draining, ExhaustedError at the bound."""
        if self.draining:
            raise UnavailableError("the server is draining", retry_after_ms=1_000)
        if len(self._by_id) >= self._options.max_sessions:
            raise ExhaustedError(f"{len(self._by_id)} sessions are attached", retry_after_ms=1_000)
        pidfd = _open_pidfd(peer.pid)
        try:
            number = self._service.open_session(peer.tenant, name)
        except HicacheError:
            _close(pidfd)
            raise
        session = Session(
            id=secrets.token_bytes(fdproto.SECRET_BYTES),
            number=number,
            name=name,
            peer=peer,
            answers=AnswerBook(
                entries=self._options.idempotency_entries,
                ttl_s=self._options.idempotency_ttl_ms / 1000,
                now=self._loop.time,
            ),
            namespaces=self._namespaces.setdefault(peer.tenant, {}),
        )
        self._by_id[session.id] = session
        self._watch(session, pidfd)
        log.info("session %d of %s (%s) attached, pid %d", number, peer.tenant, name, peer.pid)
        return session

    def resume(self, session_id: bytes, peer: Peer) -> Session | None:
        """The session that a peer takes up again; None where it is gone. Raises DeniedError for another's."""
        session = self._by_id.get(session_id)
        if session is None:
            return None
        if not peer.may_resume(session.peer):
            raise DeniedError("the session belongs to another user")
        if peer.pid != session.peer.pid:
            pidfd = _open_pidfd(peer.pid)
            self._unwatch(session)
            session.peer = peer
            self._watch(session, pidfd)
        return session

    def connect(self, session: Session) -> Outbox:
        """Give a session its stream, in place of one it may still have."""
        if session.outbox is not None:
            session.outbox.close()
        if session.window is not None:
            self._service.resume_session(session.number)
            session.window.cancel()
            session.window = None
        outbox = session.outbox = Outbox()
        for region_id in sorted(session.retired):
            outbox.put(_region_retired(region_id))
        return outbox

    # --- ends

    def disconnect(self, session: Session, outbox: Outbox) -> None:
        """The stream ended without Goodbye: suspend, unless the session ended or has another stream."""
        if session.outbox is not outbox or session.id not in self._by_id:
            return
        session.outbox = None
        window_ms = self._options.resume_window_ms
        log.info(
            "session %d (%s) lost its stream, may resume within %d ms",
            session.number,
            session.name,
            window_ms,
        )
        with contextlib.suppress(UnavailableError):  # a service that failed or stopped holds nothing any more
            self._service.suspend_session(session.number, window_ms + ENGINE_WINDOW_MARGIN_MS)
        session.window = self._loop.call_later(window_ms / 1000, self._window_passed, session)

    def end(self, session: Session, *, dead: bool, why: str) -> None:
        """End a session and release all that it holds. Idempotent."""
        if self._by_id.pop(session.id, None) is None:
            return
        if session.outbox is not None:
            session.outbox.close()
        if session.window is not None:
            session.window.cancel()
        self._unwatch(session)
        log.info("session %d (%s) ended: %s", session.number, session.name, why)
        self.on_end(session.number)
        if not dead:
            self._service.regions.may_stay_mapped(session.mapped | session.retired)
        self._service.end_session(session.number, dead=dead)
        session.answers.close()

    def close_streams(self) -> None:
        """End every Attach stream, after what waits to be sent on it."""
        for session in self._by_id.values():
            if session.outbox is not None:
                session.outbox.close()

    def end_all(self, why: str) -> None:
        """End every session."""
        for session in list(self._by_id.values()):
            self.end(session, dead=False, why=why)

    def _window_passed(self, session: Session) -> None:
        session.window = None
        self.end(session, dead=False, why="not resumed in time")

    # --- the peer's life

    def _watch(self, session: Session, pidfd: int) -> None:
        session.pidfd = pidfd
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._died, session)

    def _unwatch(self, session: Session) -> None:
        if session.pidfd >= 0:
            self._loop.remove_reader(session.pidfd)
            _close(session.pidfd)
            session.pidfd = -1

    def _died(self, session: Session) -> None:
        self.end(session, dead=True, why=f"process {session.peer.pid} died")

    # --- what the service tells sessions

    def drain(self, grace_ms: int) -> None:
        """No new sessions from now on; tell those there are."""
        self.draining = True
        for session in self._by_id.values():
            if session.outbox is not None:
                draining = session_pb2.Draining(grace_ms=grace_ms)
                session.outbox.put(session_pb2.AttachResponse(draining=draining))

    def retire_region(self, tenant: str, region_id: int) -> set[int]:
        """Ask the sessions that were given an arena region to unmap it; answers their numbers."""
        asked = set()
        for session in self._by_id.values():
            if session.peer.tenant == tenant and region_id in session.mapped:
                session.mapped.discard(region_id)
                session.retired.add(region_id)
                asked.add(session.number)
                if session.outbox is not None:
                    session.outbox.put(_region_retired(region_id))
        return asked

    def region_released(self, session: Session, region_id: int) -> None:
        """A session has unmapped a retired region; anything else it may say is ignored."""
        if region_id in session.retired:
            session.retired.discard(region_id)
            self._service.regions.released(session.number, region_id)


def _region_retired(region_id: int) -> session_pb2.AttachResponse:
    return session_pb2.AttachResponse(region_retired=session_pb2.RegionRetired(region_id=region_id))


def _open_pidfd(pid: int) -> int:
    """A descriptor that becomes readable when the process dies; -1 for no process of this host.

    Raises UnavailableError for a process that is dead already.
    """
    if pid <= 0:
        return -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise UnavailableError(f"process {pid} is gone") from error
    except OSError as error:  # a sandbox, or a seccomp profile that does not know the call
        log.warning("deaths of processes are noticed by their streams only: pidfd_open: %s", error.strerror)
        return -1


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
