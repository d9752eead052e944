"""The descriptor socket: a unix SOCK_SEQPACKET listener beside the gRPC one, for what gRPC cannot carry.

Every exchange is one packet in and one packet out, answered at once on the event loop: a peer that does not
read its answers is cut off. What a peer sends is never believed: who it is comes from SO_PEERCRED.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import stat
import struct
from collections import Counter
from pathlib import Path

from hicache.errors import DeniedError, HicacheError, InvalidArgumentError, NotFoundError
from hicache.rpc.common import fdproto
from hicache.rpc.server.identity import Credentials
from hicache.rpc.server.kv import NVIDIA_MAJOR
from hicache.rpc.server.onetime import OneTimeTokens
from hicache.rpc.server.sessions import Session, Sessions
from hicache.runtime.service import Service

log = logging.getLogger(__name__)

BACKLOG = 128
MAX_CONNECTIONS_PER_UID = 128
IDLE_S = 60.0  # a connection without a request for this long is closed
ACCEPT_PAUSE_S = 0.5  # after the process ran out of descriptors
_PEERCRED = struct.Struct("3i")


class FdSocket:
    """Listens from ``start`` to ``stop``. Lives on the service's event loop."""

    def __init__(
        self,
        service: Service,
        sessions: Sessions,
        hellos: OneTimeTokens[Credentials],
        descriptors: OneTimeTokens[int],
    ) -> None:
        self._service = service
        self._sessions = sessions
        self._hellos = hellos
        self._descriptors = descriptors
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._path = ""
        self._open: dict[socket.socket, _Connection] = {}
        self._per_uid: Counter[int] = Counter()

    def start(self, path: str, mode: int) -> None:
        """Bind and listen. OSError where that fails; the caller holds the path's lock and set the umask."""
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            listener.bind(path)
            Path(path).chmod(mode)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._path = path
        self._loop.add_reader(listener, self._accept)

    def stop(self) -> None:
        """Close everything and remove the path. Idempotent."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        Path(self._path).unlink(missing_ok=True)
        for connection in list(self._open.values()):
            self._close(connection)

    # --- connections

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("descriptor socket: cannot accept: %s", error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)
            return
        sock.settimeout(0)
        pid, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        if self._per_uid[uid] >= MAX_CONNECTIONS_PER_UID:
            log.warning(
                "descriptor socket: uid %d has %d connections, one more refused", uid, self._per_uid[uid]
            )
            sock.close()
            return
        connection = _Connection(sock, Credentials(pid, uid))
        self._open[sock] = connection
        self._per_uid[uid] += 1
        self._loop.add_reader(sock, self._readable, connection)
        self._touch(connection)

    def _resume_accepting(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _touch(self, connection: _Connection) -> None:
        if connection.idle is not None:
            connection.idle.cancel()
        connection.idle = self._loop.call_later(IDLE_S, self._close, connection)

    def _close(self, connection: _Connection) -> None:
        if self._open.pop(connection.sock, None) is None:
            return
        if connection.idle is not None:
            connection.idle.cancel()
        self._loop.remove_reader(connection.sock)
        connection.sock.close()
        uid = connection.peer.uid
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]

    def _readable(self, connection: _Connection) -> None:
        try:
            packet = fdproto.receive(connection.sock)
            if not packet.data:
                packet.close_fds()
                self._close(connection)
                return
            answer, fds = self._answer(connection.peer, packet)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        except HicacheError as error:
            answer, fds = fdproto.encode_error(error), ()
        self._touch(connection)
        try:
            fdproto.send(connection.sock, answer, fds)
        except OSError:  # it has gone, or does not read
            self._close(connection)

    # --- requests

    def _answer(self, peer: Credentials, packet: fdproto.Packet) -> tuple[bytes, tuple[int, ...]]:
        """The answer to a packet, whose descriptors are taken over or closed here."""
        kept = -1
        try:
            request = fdproto.decode_request(packet.data)
            if isinstance(request, fdproto.Put):
                token = self._put(peer, request, packet.fds)
                kept = packet.fds[0]
                return fdproto.encode_ok(token), ()
            if isinstance(request, fdproto.Get):
                return fdproto.encode_ok(), (self._get(peer, request),)
            return fdproto.encode_ok(self._hellos.issue(peer.uid, peer)), ()
        finally:
            for fd in packet.fds:
                if fd != kept:
                    os.close(fd)

    def _get(self, peer: Credentials, request: fdproto.Get) -> int:
        session = self._session(peer, request.session_id)
        if request.region_id in session.regions:  # its own: a timeline, or nothing to be had
            return self._service.timeline_fd(session.number, request.region_id)
        if request.region_id in session.retired:
            raise NotFoundError(f"region {request.region_id} is retired")
        fd = self._service.regions.arena_fd(session.peer.tenant, request.region_id)
        session.mapped.add(request.region_id)
        return int(fd)

    def _put(self, peer: Credentials, request: fdproto.Put, fds: tuple[int, ...]) -> bytes:
        session = self._session(peer, request.session_id)
        if len(fds) != 1:
            raise InvalidArgumentError(f"PUT takes one descriptor, not {len(fds)}")
        check_descriptor(fds[0])
        return self._descriptors.issue(session.number, fds[0])

    def _session(self, peer: Credentials, session_id: bytes) -> Session:
        session = self._sessions.find(session_id)
        if (session.peer.pid, session.peer.uid) != (peer.pid, peer.uid):
            raise DeniedError("the session belongs to another process")
        return session


class _Connection:
    """One accepted peer."""

    def __init__(self, sock: socket.socket, peer: Credentials) -> None:
        self.sock = sock
        self.peer = peer
        self.idle: asyncio.TimerHandle | None = None


def check_descriptor(fd: int) -> None:
    """Raise InvalidArgumentError for a descriptor that is no readable memfd or regular file, nor CUDA memory."""
    found = os.fstat(fd)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) == NVIDIA_MAJOR:
        return  # exported CUDA memory, which only its driver can tell from anything else
    if not stat.S_ISREG(found.st_mode):
        raise InvalidArgumentError("PUT takes a memfd or a regular file", hint="make it with memfd_create")
    if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
        raise InvalidArgumentError("PUT takes a descriptor that can be read")
