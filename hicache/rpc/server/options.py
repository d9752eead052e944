"""Settings of the gRPC edge; frozen, checked when made."""

from __future__ import annotations

import dataclasses
import ipaddress
import types
from collections.abc import Mapping

from hicache.errors import ConfigError
from hicache.rpc.common import fdproto

#: A unix socket address holds 108 bytes with its final zero (``man 7 unix``).
MAX_SOCKET_PATH_BYTES = 107


@dataclasses.dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where the server listens, whom it lets in, and what one session may hold.

    ``tenants`` maps uids of local peers to tenant names; empty: all are of ``default_tenant``. Over TCP the
    tenant comes from a bearer token (``token_file``: lines ``tenant token [admin]``) or, where
    ``tls_client_ca`` is set, from the certificate's common name, else its first subject alternative name.
    """

    socket_path: str = ""
    socket_mode: int = 0o600
    tcp_address: str = ""  # host:port; empty: no TCP
    tls_cert: str = ""  # PEM files
    tls_key: str = ""
    tls_client_ca: str = ""
    token_file: str = ""
    allow_plain_tcp: bool = False  # on loopback only
    tenants: Mapping[int, str] = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))
    default_tenant: str = "default"
    keep_alive_ms: int = 5_000
    resume_window_ms: int = 10_000
    max_inflight_per_session: int = 64
    max_sessions: int = 1024
    max_message_bytes: int = 16 << 20
    max_prompt_bytes: int = 8 << 20
    max_prompt_pages: int = 1 << 18
    max_queries_per_call: int = 1024
    max_namespaces_per_tenant: int = 1024
    max_regions_per_session: int = 256
    idempotency_entries: int = 256
    idempotency_ttl_ms: int = 60_000

    def __post_init__(self) -> None:
        """Refuse settings that cannot work. Raises ConfigError."""
        if not self.socket_path and not self.tcp_address:
            raise ConfigError("the server listens nowhere", hint="set socket_path or tcp_address")
        if len(self.fd_socket_path.encode()) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"socket_path: {self.fd_socket_path!r} is longer than {MAX_SOCKET_PATH_BYTES} bytes, "
                "the most a unix socket can be named",
                hint="choose a shorter directory, such as /run/hicache",
            )
        if self.socket_mode & ~0o777:
            raise ConfigError(f"socket_mode {self.socket_mode:o} is not a file mode")
        for field in dataclasses.fields(self):
            if field.name.startswith(("max_", "idempotency_", "keep_")) and getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} must be at least 1")
        if self.resume_window_ms < 0:
            raise ConfigError("resume_window_ms must not be negative")
        if self.tcp_address:
            self._check_tcp()

    def _check_tcp(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key go together")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca needs tls_cert and tls_key")
        if not self.token_file and not self.tls_client_ca:
            raise ConfigError(
                f"tcp_address {self.tcp_address}: nothing says who the callers are",
                hint="set token_file or tls_client_ca",
            )
        if self.tls_cert:
            return
        if not self.allow_plain_tcp or not self.tcp_is_loopback:
            raise ConfigError(
                f"tcp_address {self.tcp_address}: TCP without TLS is refused",
                hint="set tls_cert and tls_key; allow_plain_tcp permits plain TCP on a loopback address only",
            )

    @property
    def fd_socket_path(self) -> str:
        """Path of the descriptor socket; empty without a unix socket."""
        return self.socket_path and self.socket_path + fdproto.SOCKET_SUFFIX

    @property
    def tcp_is_loopback(self) -> bool:
        """Whether the TCP address is one that only this host can reach."""
        host = self.tcp_address.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"
