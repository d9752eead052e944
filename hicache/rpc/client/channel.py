"""gRPC channels: addresses, settings, credentials, and the methods by name."""

from __future__ import annotations

from typing import Any

import grpc

from hicache.errors import ConfigError, HicacheError
from hicache.rpc.client.options import ClientOptions
from hicache.rpc.common import status
from hicache.rpc.pb import admin_pb2_grpc, batch_pb2_grpc, cache_pb2_grpc, region_pb2_grpc, session_pb2_grpc

#: Reconnect in a fraction of a second (by default gRPC waits one); a channel of its own for every client.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
UNIX = ("unix:", "unix-abstract:")


def address(target: str, options: ClientOptions) -> str:
    """The target as gRPC names it. Raises ConfigError for targets and settings that do not go together."""
    if not target:
        raise ConfigError("no target", hint="name one, such as unix:///run/hicache.sock or host:port")
    if target.startswith("/"):
        return f"unix://{target}"
    if target.startswith(UNIX):
        if options.tls is not None:
            raise ConfigError("tls is for TCP targets; a unix socket proves who calls by itself")
        return target
    return target.removeprefix("tcp://")


def settings(options: ClientOptions) -> list[tuple[str, Any]]:
    """The channel's settings."""
    found: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    if options.tls is not None and options.tls.server_name:
        found.append(("grpc.ssl_target_name_override", options.tls.server_name))
    return found


def credentials(options: ClientOptions) -> grpc.ChannelCredentials | None:
    """TLS, where it is asked for."""
    tls = options.tls
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def metadata(options: ClientOptions) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    return (("authorization", f"Bearer {options.token}"),) if options.token else ()


def methods(channel: Any) -> dict[str, Any]:
    """Every method of the API by its name, on a channel of either kind."""
    found: dict[str, Any] = {}
    for stub in (
        session_pb2_grpc.SessionServiceStub(channel),
        region_pb2_grpc.RegionServiceStub(channel),
        cache_pb2_grpc.CacheServiceStub(channel),
        batch_pb2_grpc.BatchServiceStub(channel),
        admin_pb2_grpc.AdminServiceStub(channel),
    ):
        found.update(vars(stub))
    return found


def error_of(error: Any) -> HicacheError:
    """What a failed call (grpc.RpcError or grpc.aio.AioRpcError) stands for."""
    return status.from_wire(error.code(), error.details(), error.trailing_metadata())
