"""The life of one Attach stream: prove who we are, attach or resume, then listen until it ends."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from hicache.errors import (
    DeniedError,
    HicacheError,
    NotFoundError,
    StaleError,
    UnavailableError,
    UnsupportedError,
)
from hicache.rpc.client import calls
from hicache.rpc.client.core import Core
from hicache.rpc.client.options import DataPlane
from hicache.rpc.client.results import Capabilities
from hicache.rpc.client.steps import Call, NextMessage, OpenStream, Send, Steps, Work
from hicache.rpc.common import fdproto
from hicache.rpc.pb import session_pb2

FD_TIMEOUT_S = 5.0
UNIX = "unix:"


def exchange(path: str, request: fdproto.Request, fds: Sequence[int] = ()) -> fdproto.Answer:
    """One exchange over the descriptor socket. Raises the server's error, or UnavailableError."""
    try:
        with fdproto.connect(path, FD_TIMEOUT_S) as sock:
            return fdproto.transact(sock, request, fds)
    except OSError as error:
        raise UnavailableError(f"descriptor socket {path}: {error}") from error


def live(core: Core) -> Steps[None]:
    """Attach, and listen until the stream ends. Raises what kept it from attaching."""
    answer: session_pb2.GetCapabilitiesResponse = yield Call(
        "GetCapabilities", session_pb2.GetCapabilitiesRequest(), core.options.connect_timeout_s
    )
    capabilities = calls.parse_capabilities(answer)
    if core.session.epoch != capabilities.epoch:
        core.session.forget()
    fd_path, token = yield from _prove(core, capabilities)
    resume = core.session.resume_session_id
    hello = calls.hello(core.options.name, token, resume)
    try:
        first: session_pb2.AttachResponse = yield OpenStream(hello, core.options.connect_timeout_s)
    except (StaleError, NotFoundError, DeniedError):
        core.session.forget()
        if not resume:
            raise
        return  # at once again, as a new session
    core.attached(calls.parse_welcome(first), capabilities, fd_path)
    while True:
        message: session_pb2.AttachResponse | None = yield NextMessage()
        if message is None:
            return
        core.on_message(message)
        due = core.outgoing()
        if due:
            yield Send(due)


def _prove(core: Core, capabilities: Capabilities) -> Steps[tuple[str, bytes]]:
    """The descriptor socket to share memory over ("": none is shared), and the token for Hello.

    Raises UnsupportedError where shared memory was asked for and cannot be had, UnavailableError where the socket
    that the server names does not answer.
    """
    plane = core.options.data_plane
    readable = any(tier.client_readable for tier in capabilities.tiers)
    if plane is DataPlane.SHM and not (capabilities.fd_socket and readable):
        why = (
            "no tier of the sidecar can be mapped"
            if capabilities.fd_socket
            else "the target is not a unix socket"
        )
        raise UnsupportedError(
            f"data_plane shm: {why}", hint="use data_plane auto, or the sidecar's unix socket"
        )
    if not capabilities.fd_socket:
        return "", b""
    path, token = yield from _hello(_fd_paths(core.target, capabilities.fd_socket))
    return ("" if plane is DataPlane.STREAM else path), token


def _hello(paths: Sequence[str]) -> Steps[tuple[str, bytes]]:
    """The first descriptor socket that answers, and its token."""
    failure: HicacheError | None = None
    for path in paths:
        try:
            answer: fdproto.Answer = yield Work(functools.partial(exchange, path, fdproto.Hello()))
        except UnavailableError as error:
            failure = failure or error
            continue
        return path, answer.payload
    assert failure is not None, "there is at least one path"
    raise failure


def _fd_paths(target: str, announced: str) -> list[str]:
    """Where the descriptor socket may be: where the server says, else beside the socket we know it by."""
    paths = [announced]
    if target.startswith(UNIX):
        own = target.removeprefix(UNIX)
        beside = (own[2:] if own.startswith("//") else own) + fdproto.SOCKET_SUFFIX
        if beside != announced:
            paths.append(beside)
    return paths
