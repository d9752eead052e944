"""Who is calling: a local process known by its socket, or a remote one known by its token or certificate.

A tenant always comes from here, never from a field that the caller fills in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from hicache.errors import ConfigError, DeniedError, UnauthenticatedError
from hicache.rpc.server.options import ServerOptions

log = logging.getLogger(__name__)

MIN_TOKEN_CHARS = 16
Context = grpc.aio.ServicerContext[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """An authenticated caller. ``pid`` 0: not a process that this host can watch; ``uid`` -1: not local."""

    tenant: str
    admin: bool
    pid: int = 0
    uid: int = -1

    def may_resume(self, other: Peer) -> bool:
        """Whether a session of ``other`` may be taken up by this peer."""
        return (self.uid, self.tenant) == (other.uid, other.tenant)


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """The two numbers that the kernel vouches for on a unix socket."""

    pid: int
    uid: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Token:
    digest: bytes  # sha256 of the token: the table does not keep what it compares with
    peer: Peer


def local_peer(options: ServerOptions, credentials: Credentials) -> Peer:
    """The peer behind a unix socket.

    Raises DeniedError for a uid that has no tenant. The server's own user and root are administrators and
    never locked out.
    """
    admin = credentials.uid in {0, os.geteuid()}
    tenant = options.tenants.get(credentials.uid, "")
    if not tenant:
        if options.tenants and not admin:
            raise DeniedError(f"uid {credentials.uid} has no tenant", hint="add it to the server's tenants")
        tenant = options.default_tenant
    return Peer(tenant, admin, credentials.pid, credentials.uid)


def read_tokens(path: str) -> list[tuple[str, Peer]]:
    """The tokens of a file of lines ``tenant token [admin]``. Raises ConfigError naming the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        mode = Path(path).stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file: cannot read {path}: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("token_file %s can be read by other users: chmod it to 600", path)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) not in {2, 3} or words[2:] not in ([], ["admin"]):
            raise ConfigError(f"token_file: {path}:{number} is not `tenant token [admin]`")
        if len(words[1]) < MIN_TOKEN_CHARS:
            raise ConfigError(
                f"token_file: {path}:{number}: a token has at least {MIN_TOKEN_CHARS} characters"
            )
        found.append((words[1], Peer(words[0], admin=len(words) == 3)))
    if not found:
        raise ConfigError(f"token_file: {path} names no token")
    return found


class Authenticator:
    """Tells who makes a gRPC call that came over TCP."""

    def __init__(self, options: ServerOptions) -> None:
        tokens = read_tokens(options.token_file) if options.token_file else []
        self._tokens = [_Token(hashlib.sha256(token.encode()).digest(), peer) for token, peer in tokens]
        self._certificates = bool(options.tls_client_ca)
        self.over_tcp = bool(options.tcp_address)

    def is_local(self, context: Context) -> bool:
        """Whether a call came over the unix socket, where the descriptor socket says who is calling."""
        return not self.over_tcp or context.peer().startswith("unix:")

    def remote_peer(self, context: Context) -> Peer:
        """The peer behind a TCP call. Raises UnauthenticatedError."""
        token = self._bearer(context)
        if token:
            return self._by_token(token)
        if self._certificates:
            name = certificate_name(context.auth_context())
            if name:
                return Peer(name, admin=False)
        raise UnauthenticatedError(
            "the call carries no credentials", hint="send `authorization: Bearer TOKEN`"
        )

    def require(self, context: Context) -> None:
        """Raise UnauthenticatedError for a call over TCP that says nothing of its caller."""
        if not self.is_local(context):
            self.remote_peer(context)

    def require_same(self, context: Context, peer: Peer) -> None:
        """Raise UnauthenticatedError or DeniedError where a TCP call is not from the peer of its session."""
        if not self.is_local(context) and self.remote_peer(context) != peer:
            raise DeniedError("the session belongs to another caller")

    def _by_token(self, token: str) -> Peer:
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known in self._tokens:  # all of them, so that the time does not tell which one matched
            if hmac.compare_digest(digest, known.digest):
                found = known.peer
        if found is None:
            raise UnauthenticatedError("the bearer token is not known here")
        return found

    @staticmethod
    def _bearer(context: Context) -> str:
        for key, value in context.invocation_metadata() or ():
            if key == "authorization" and isinstance(value, str):
                scheme, _, token = value.partition(" ")
                return token.strip() if scheme.lower() == "bearer" else ""
        return ""


def certificate_name(auth: Mapping[str, Any]) -> str:
    """The name in a verified client certificate: its common name, else its first subject alternative name."""
    if auth.get("transport_security_type") not in ([b"ssl"], (b"ssl",)):
        return ""
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for name in auth.get(key, ()):
            if name:
                return bytes(name).decode(errors="replace")
    return ""
