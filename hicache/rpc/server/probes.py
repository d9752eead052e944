"""Health and reflection, which operators' tools ask for. A machine without their packages serves without them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from hicache.errors import HicacheError
from hicache.rpc.server.edge import refuse
from hicache.rpc.server.identity import Authenticator, Context

try:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
except ModuleNotFoundError as _error:
    MISSING = str(_error)
else:
    MISSING = ""

log = logging.getLogger(__name__)


class Probes:
    """The health and reflection services of one server."""

    def __init__(self) -> None:
        self._health = None if MISSING else health.aio.HealthServicer()
        if MISSING:
            log.warning(
                "no health checks and no reflection: %s"
                " (pip install grpcio-health-checking grpcio-reflection)",
                MISSING,
            )

    def register(self, server: Any, services: tuple[str, ...], authenticator: Authenticator) -> None:
        """Health is open to all: probes carry no credentials, and it says one word."""
        if MISSING:
            return
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_reflection(names, authenticator), server)

    async def tell(self, name: str, *, well: bool) -> None:
        """What health checks of a service are answered."""
        if self._health is not None:
            status = health_pb2.HealthCheckResponse
            await self._health.set(name, status.SERVING if well else status.NOT_SERVING)

    async def end(self) -> None:
        """All services look unwell from now on."""
        if self._health is not None:
            await self._health.enter_graceful_shutdown()


def _reflection(names: tuple[str, ...], authenticator: Authenticator) -> Any:
    """Reflection for callers that say who they are."""

    class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # the package ships no types
        async def ServerReflectionInfo(self, request_iterator: Any, context: Context) -> AsyncIterator[Any]:
            """Answer reflection requests."""
            try:
                authenticator.require(context)
            except HicacheError as error:
                await refuse(context, error)
            async for answer in super().ServerReflectionInfo(request_iterator, context):
                yield answer

    return Reflection(names)
