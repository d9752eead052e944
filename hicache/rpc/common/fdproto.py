"""Packets of the descriptor socket: what gRPC cannot carry, one request packet and one answer packet each.

The socket is unix SOCK_SEQPACKET, so packets keep their boundaries. Every packet starts with ``HEADER``: the
magic "HCFD", the version, and an op.

    HELLO                         -> OK + 16-byte one-time token, bound to the peer's pid and uid (for Attach)
    GET  session id, region u64   -> OK, with one descriptor in SCM_RIGHTS
    PUT  session id, one fd       -> OK + 16-byte descriptor token (for Register)
    anything that fails           -> ERROR + u8 index into ERROR_CODES + UTF-8 text

Descriptors received here are close-on-exec and belong to whoever called ``receive``.
"""

from __future__ import annotations

import array
import dataclasses
import enum
import os
import socket
import struct
from collections.abc import Sequence

from hicache.errors import ERROR_BY_CODE, ErrorCode, HicacheError, InvalidArgumentError, UnavailableError

SOCKET_SUFFIX = ".fd"  # appended to the path of the gRPC socket
MAGIC = b"HCFD"
VERSION = 1
HEADER = struct.Struct("<4sBB")
SECRET_BYTES = 16  # session ids and tokens
MAX_PACKET_BYTES = 1024
MAX_PACKET_FDS = 4  # received and closed; the kernel closes what exceeds it
_GET_TAIL = struct.Struct(f"<{SECRET_BYTES}sQ")

#: Codes by their index on the wire. Append only.
ERROR_CODES: tuple[ErrorCode, ...] = (
    ErrorCode.INTERNAL,
    ErrorCode.INVALID,
    ErrorCode.NOT_FOUND,
    ErrorCode.STALE,
    ErrorCode.CONFLICT,
    ErrorCode.EXHAUSTED,
    ErrorCode.UNAVAILABLE,
    ErrorCode.CORRUPT,
    ErrorCode.DENIED,
    ErrorCode.UNAUTHENTICATED,
    ErrorCode.EXISTS,
    ErrorCode.UNSUPPORTED,
)


class Op(enum.IntEnum):
    """What a packet is."""

    HELLO = 1
    GET = 2
    PUT = 3
    OK = 128
    ERROR = 129


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """Asks for a one-time token that proves the peer's pid and uid to Attach."""


@dataclasses.dataclass(frozen=True, slots=True)
class Get:
    """Asks for the descriptor of an arena region."""

    session_id: bytes
    region_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class Put:
    """Hands over the descriptor of a client region."""

    session_id: bytes


Request = Hello | Get | Put


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    """One received packet; ``fds`` belong to the receiver. Empty data: the peer has closed the socket."""

    data: bytes
    fds: tuple[int, ...] = ()

    def close_fds(self) -> None:
        """Closes every descriptor that came along."""
        for fd in self.fds:
            os.close(fd)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer; ``fds`` belong to the receiver."""

    payload: bytes
    fds: tuple[int, ...] = ()


def encode_request(request: Request) -> bytes:
    """The packet of a request. Raises InvalidArgumentError for a session id of the wrong length."""
    if isinstance(request, Hello):
        return _header(Op.HELLO)
    if len(request.session_id) != SECRET_BYTES:
        raise InvalidArgumentError(f"a session id has {SECRET_BYTES} bytes, not {len(request.session_id)}")
    if isinstance(request, Get):
        return _header(Op.GET) + _GET_TAIL.pack(request.session_id, request.region_id)
    return _header(Op.PUT) + request.session_id


def decode_request(data: bytes) -> Request:
    """What a packet asks for. Raises InvalidArgumentError for what ``encode_request`` does not make."""
    op, tail = _split(data)
    if op == Op.HELLO and not tail:
        return Hello()
    if op == Op.GET and len(tail) == _GET_TAIL.size:
        session_id, region_id = _GET_TAIL.unpack(tail)
        return Get(session_id, region_id)
    if op == Op.PUT and len(tail) == SECRET_BYTES:
        return Put(tail)
    raise InvalidArgumentError(f"descriptor socket: no request has op {op} and {len(tail)} bytes after it")


def encode_ok(payload: bytes = b"") -> bytes:
    """The packet of a successful answer."""
    return _header(Op.OK) + payload


def encode_error(error: HicacheError) -> bytes:
    """The packet of a failure, cut to the packet size."""
    text = (f"{error.message} ({error.hint})" if error.hint else error.message).encode()
    packet = _header(Op.ERROR) + bytes([ERROR_CODES.index(error.code)]) + text
    return packet[:MAX_PACKET_BYTES]


def decode_answer(data: bytes) -> bytes:
    """The payload of an OK packet.

    Raises the HicacheError that an ERROR packet stands for, UnavailableError where the server closed the
    socket, and InvalidArgumentError for a packet that is no answer.
    """
    if not data:
        raise UnavailableError("the server closed the descriptor socket")
    op, tail = _split(data)
    if op == Op.OK:
        return tail
    if op != Op.ERROR or not tail or tail[0] >= len(ERROR_CODES):
        raise InvalidArgumentError(f"descriptor socket: op {op} is not an answer")
    raise ERROR_BY_CODE[ERROR_CODES[tail[0]]](tail[1:].decode(errors="replace"))


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Sends one packet with its descriptors, which stay the caller's. OSError as ``sendmsg`` raises it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> Packet:
    """Receives one packet and its descriptors. OSError as ``recvmsg`` raises it.

    Raises InvalidArgumentError for a packet or a set of descriptors that is too large; nothing leaks then.
    """
    room = socket.CMSG_SPACE(MAX_PACKET_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    packet = Packet(data, tuple(fds))
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        packet.close_fds()
        raise InvalidArgumentError(
            f"descriptor socket: at most {MAX_PACKET_BYTES} bytes and {MAX_PACKET_FDS} descriptors a packet"
        )
    return packet


def connect(path: str, timeout_s: float) -> socket.socket:
    """A client's connection, with a timeout on every operation. OSError where nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def transact(sock: socket.socket, request: Request, fds: Sequence[int] = ()) -> Answer:
    """A client's whole exchange on a blocking socket.

    Raises what ``decode_answer`` raises; descriptors that came with a failure are closed.
    """
    send(sock, encode_request(request), fds)
    packet = receive(sock)
    try:
        return Answer(decode_answer(packet.data), packet.fds)
    except HicacheError:
        packet.close_fds()
        raise


def _header(op: Op) -> bytes:
    return HEADER.pack(MAGIC, VERSION, op)


def _split(data: bytes) -> tuple[int, bytes]:
    if len(data) < HEADER.size:
        raise InvalidArgumentError(f"descriptor socket: a packet of {len(data)} bytes has no header")
    magic, version, op = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise InvalidArgumentError(f"descriptor socket: not a packet of version {VERSION}")
    return op, data[HEADER.size :]
