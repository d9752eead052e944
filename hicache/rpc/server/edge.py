"""The edge that every call passes: admission, errors into statuses, latency.

It is a wrapper put around each method when its class is made, not an interceptor: those cost more than a
whole Match.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, Protocol, TypeVar

from hicache.errors import DeniedError, HicacheError, InvalidArgumentError, NotFoundError
from hicache.keys import whole_pages
from hicache.rpc.common import status
from hicache.rpc.server.identity import Authenticator, Context
from hicache.rpc.server.options import ServerOptions
from hicache.rpc.server.sessions import Session, Sessions
from hicache.runtime.counters import Latencies

log = logging.getLogger(__name__)

Reply = TypeVar("Reply")
#: A wait is cut to end this long before the call's deadline, so that the answer still arrives.
DEADLINE_MARGIN_MS = 20
MAX_WAIT_MS = 600_000
MAX_TTL_MS = 1 << 40  # more would overflow sums; the engine has its own, lower bound


class Edge:
    """What the servicers share. ``now`` gives seconds of a monotonic clock.

    Durations go to the service's own ``latencies``, as "rpc/" and the name of the call.
    """

    def __init__(
        self,
        sessions: Sessions,
        authenticator: Authenticator,
        options: ServerOptions,
        *,
        latencies: Latencies,
        now: Callable[[], float],
    ) -> None:
        self.sessions = sessions
        self.authenticator = authenticator
        self.options = options
        self.latencies = latencies
        self.now = now

    def enter(self, session_id: bytes, context: Context) -> Session:
        """Admit one call of a session; the caller takes 1 off ``inflight`` when it is done."""
        session = self.sessions.enter(session_id)
        if self.authenticator.over_tcp:
            try:
                self.authenticator.require_same(context, session.peer)
            except HicacheError:
                session.inflight -= 1
                raise
        return session

    async def guard(self, call: str, context: Context, work: Awaitable[Reply]) -> Reply:
        """Run a call's work; what it raises becomes the call's status."""
        began = self.now()
        try:
            return await work
        except HicacheError as error:
            await refuse(context, error)
        except Exception as error:
            log.exception("%s failed", call)
            await refuse(
                context, HicacheError(f"{call} failed: {type(error).__name__}; the server's log says more")
            )
        finally:
            self.latencies.observe("rpc/" + call, int((self.now() - began) * 1e9))

    def prompt(self, session: Session, namespace_id: int, prompt: bytes) -> bytes:
        """The whole pages of a prompt.

        Raises NotFoundError for a namespace that the session's tenant has not opened, InvalidArgumentError
        for a prompt that is too long or not made of symbols.
        """
        namespace = session.namespaces.get(namespace_id)
        if namespace is None:
            raise NotFoundError(f"namespace {namespace_id} is not open", hint="call OpenNamespace first")
        if len(prompt) > self.options.max_prompt_bytes:
            raise InvalidArgumentError(
                f"prompt has {len(prompt)} bytes, at most {self.options.max_prompt_bytes} are taken"
            )
        whole = whole_pages(namespace, prompt)
        if len(whole) > self.options.max_prompt_pages * namespace.symbol_bytes:
            raise InvalidArgumentError(
                f"prompt has {len(whole) // namespace.symbol_bytes} pages, "
                f"at most {self.options.max_prompt_pages} are taken"
            )
        return whole


class Servicer(Protocol):
    """A class whose methods ``session_call`` may wrap."""

    @property
    def edge(self) -> Edge:
        """The edge it stands at."""


S = TypeVar("S", bound=Servicer)
Body = Callable[[S, Session, Any, Context], Coroutine[Any, Any, Any]]
Handler = Callable[[S, Any, Context], Coroutine[Any, Any, Any]]


def session_call(body: Body[S]) -> Handler[S]:
    """Make a method ``(session, request, context)`` a gRPC method whose request names its session."""
    name = body.__name__

    async def admitted(self: S, request: Any, context: Context) -> Any:
        session = self.edge.enter(request.session_id, context)
        try:
            return await body(self, session, request, context)
        finally:
            session.inflight -= 1

    @functools.wraps(body)
    async def handler(self: S, request: Any, context: Context) -> Any:
        return await self.edge.guard(name, context, admitted(self, request, context))

    return handler


def admin_call(body: Body[S]) -> Handler[S]:
    """``session_call`` for administrators only."""

    @functools.wraps(body)
    async def checked(self: S, session: Session, request: Any, context: Context) -> Any:
        if not session.peer.admin:
            raise DeniedError(
                f"{body.__name__} is for administrators",
                hint="call as the server's own user, as root, or with a token marked `admin`",
            )
        return await body(self, session, request, context)

    return session_call(checked)


async def refuse(context: Context, error: HicacheError) -> NoReturn:
    """End the call with the status that stands for an error."""
    wire = status.to_wire(error)
    await context.abort(wire.code, wire.text, wire.trailing)


def wait_ms(asked_ms: int, context: Context) -> int:
    """How long a call may wait: as long as it asked, but not past its deadline."""
    if not asked_ms:
        return 0
    remaining_s: float | None = context.time_remaining()
    capped_ms = min(asked_ms, MAX_WAIT_MS)
    if remaining_s is None:
        return capped_ms
    return max(0, min(capped_ms, int(remaining_s * 1000) - DEADLINE_MARGIN_MS))


def ttl_ms(asked_ms: int) -> int:
    """A time to live that is safe to add to a clock; 0 means the default."""
    return min(asked_ms, MAX_TTL_MS)
