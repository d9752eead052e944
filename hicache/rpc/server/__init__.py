"""The gRPC server of one Service: ``serve(service, ServerOptions(...))``."""

from __future__ import annotations

from hicache.rpc.server.options import ServerOptions
from hicache.rpc.server.server import Server, serve

__all__ = ["Server", "ServerOptions", "serve"]
