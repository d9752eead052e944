"""What one client is, without I/O: its session, its view of the arena, its own memory; and how calls are retried.

A call that fails with UNAVAILABLE is tried again until its time is up, with the same request id, so that the server
does nothing twice. A call that finds its session gone waits for the next one, unless it is bound to the old one (it
names a lease or a reservation): then it raises StaleError.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hicache.errors import (
    ExhaustedError,
    HicacheError,
    InvalidArgumentError,
    StaleError,
    UnavailableError,
    UnsupportedError,
)
from hicache.rpc.client import calls
from hicache.rpc.client.arena import Arena
from hicache.rpc.client.kv import Timelines
from hicache.rpc.client.lease import LeaseState, Terms
from hicache.rpc.client.options import ClientOptions
from hicache.rpc.client.pools import Pools
from hicache.rpc.client.region import WriteMemory
from hicache.rpc.client.results import Capabilities, Welcome
from hicache.rpc.client.session import Link, Session, Signal
from hicache.rpc.client.steps import Call, NeedLink, Sleep, Step, Steps
from hicache.rpc.pb import session_pb2
from hicache.types import Namespace

if TYPE_CHECKING:
    from hicache.device.fences import Fences

NS_PER_MS = 1_000_000
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
#: A server that asks for so short a pause has too many calls of ours in flight; nothing was done.
CROWDED_MS = 20
#: How long giving back waits for a server that is out of reach: callers leave their ``with`` blocks meanwhile.
PARTING_S = 0.1
#: How often a call may find a new session before it gives up.
STALE_MOST = 5


@dataclasses.dataclass(slots=True)
class NamespaceState:
    """A namespace, and its id in the session of that incarnation (0: not opened yet)."""

    spec: Namespace
    incarnation: int = 0
    number: int = 0
    fingerprint: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """How long a call may take, and the session it is bound to (``incarnation`` 0: any)."""

    timeout_s: float
    wait_ms: int = 0
    incarnation: int = 0
    retry: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a call."""

    link: Link
    left_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the session that it belongs to."""

    message: Any
    link: Link


class Core:
    """One client. ``now_ns`` is a monotonic clock, ``new_id`` makes request ids."""

    def __init__(
        self,
        target: str,
        options: ClientOptions,
        *,
        now_ns: Callable[[], int],
        new_id: Callable[[], bytes],
        signal: Signal,
    ) -> None:
        self.target = target
        self.options = options
        self.now_ns = now_ns
        self.new_id = new_id
        self.session = Session(target, signal)
        self.arena = Arena()
        self.memory = WriteMemory(options.write_limit_bytes, options.write_step_bytes)
        self.timelines = Timelines()
        self.pools = Pools()
        self.fences: Callable[[], Fences] = _open_fences
        self._leases: weakref.WeakSet[LeaseState] = weakref.WeakSet()
        self._process = os.getpid()

    def check_process(self) -> None:
        """Raise UnsupportedError in a forked child: threads and connections did not come along."""
        if os.getpid() != self._process:
            raise UnsupportedError(
                f"this client belongs to process {self._process}, not to its fork {os.getpid()}",
                hint="make a Client in the child; prefer spawn, or set GRPC_ENABLE_FORK_SUPPORT=1 before grpc loads",
            )

    def budget(self, timeout_s: float | None, *, wait_ms: int = 0, incarnation: int = 0) -> Budget:
        """The caller's time, or the client's own."""
        return Budget(self.options.timeout_s if timeout_s is None else timeout_s, wait_ms, incarnation)

    def parting(self, timeout_s: float, incarnation: int) -> Budget:
        """For giving something back: soon, or not at all, since it ends by itself with its time or its session."""
        most_s = min(timeout_s, self.options.timeout_s) if self.session.alive else PARTING_S
        return Budget(most_s, incarnation=incarnation, retry=False)

    def new_lease(self, link: Link, page_bytes: int) -> LeaseState:
        """An empty lease of the link's session."""
        tier_names = tuple(tier.name for tier in link.capabilities.tiers)
        terms = Terms(link.incarnation, page_bytes, tier_names, self.now_ns, lambda: self.session.incarnation)
        lease = LeaseState(terms)
        self._leases.add(lease)
        return lease

    def unmapped(self, region_ids: set[int]) -> set[int]:
        """Those that are not known yet: neither mapped, nor on a GPU."""
        return self.arena.unknown(region_ids) - self.pools.ids

    def deadline_ns(self, sent_ns: int, expires_in_ms: int) -> int:
        """When to stop using what the server lends for so long."""
        margin_ms = self.options.deadline_margin_ms + expires_in_ms // 1000  # clocks differ by far less
        return sent_ns + (expires_in_ms - margin_ms) * NS_PER_MS

    # --- the life line's events

    def attached(self, welcome: Welcome, capabilities: Capabilities, fd_path: str) -> None:
        """The server welcomed us; a new session starts without mappings."""
        self.session.attached(welcome, capabilities, fd_path, begin=self._begin)

    def _begin(self, incarnation: int) -> None:
        self.arena.begin(incarnation)
        self.pools.begin(incarnation)

    def on_message(self, message: session_pb2.AttachResponse) -> None:
        """What the server says over the life line."""
        match message.WhichOneof("event"):
            case "draining":
                self.session.draining = True
            case "region_retired":
                self._retire(message.region_retired.region_id)
                self._let_go()
            case _:
                return

    def outgoing(self) -> list[session_pb2.AttachRequest]:
        """Confirmations that are due. Called after every message, and before every keep-alive."""
        self._let_go()
        found = []
        while self.arena.unmapped:
            found.append(calls.region_released(self.arena.unmapped.popleft()))
        return found

    def _retire(self, region_id: int) -> None:
        if not self.pools.retire(region_id, then=lambda: self.arena.unmapped.append(region_id)):
            self.arena.retire(region_id)

    def _let_go(self) -> None:
        """Leases and tickets that are over do not keep retired regions mapped."""
        for lease in list(self._leases):
            if any(run.region.fate.retired for run in lease.runs) and not lease.still_valid():
                lease.end(StaleError(f"lease {lease.lease} is over, and its memory was given back"))


def _open_fences() -> Fences:
    from hicache.device.fences import open_fences  # CUDA's calls: for those who wait on streams

    return open_fences()


def invoke(core: Core, build: Callable[[Attempt], Steps[Step]], budget: Budget) -> Steps[Reply]:
    """One call, tried until it is answered or its time is up. ``build`` makes the step of each attempt."""
    core.check_process()
    deadline_ns = core.now_ns() + int(budget.timeout_s * 1e9) + budget.wait_ms * NS_PER_MS
    pause_s, stale = RETRY_FIRST_S, 0
    while True:
        link: Link | None = None
        try:
            link = yield from linked(core, deadline_ns, budget.incarnation)
            step = yield from build(Attempt(link, max(0.001, (deadline_ns - core.now_ns()) / 1e9)))
            message = yield step
            return Reply(message, link)
        except UnavailableError as error:
            pause_s = max(pause_s, error.retry_after_ms / 1000)
            if link is None or not budget.retry:
                raise
            failure: HicacheError = error
        except StaleError as error:
            stale += 1
            if budget.incarnation or stale > STALE_MOST:
                raise
            failure = error
        except ExhaustedError as error:
            if not 0 < error.retry_after_ms <= CROWDED_MS:
                raise
            failure = error
        if core.now_ns() + int(pause_s * 1e9) >= deadline_ns:
            raise failure
        yield Sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MOST_S)


def linked(core: Core, deadline_ns: int, incarnation: int) -> Steps[Link]:
    """The attached session. Raises StaleError where a bound call's session is gone."""
    link: Link | None = core.session.current()
    if link is None:
        link = yield NeedLink(deadline_ns)
    assert link is not None, "NeedLink answers with a link, or raises"
    if incarnation and link.incarnation != incarnation:
        raise StaleError("the session is gone: the sidecar restarted, or was out of reach for too long")
    return link


def simple(core: Core, method: str, build: Callable[[Link], Any], budget: Budget) -> Steps[Reply]:
    """A call whose request needs nothing but the session."""

    def step(attempt: Attempt) -> Steps[Step]:
        yield from ()
        return Call(method, build(attempt.link), attempt.left_s)

    return (yield from invoke(core, step, budget))


def named(
    core: Core,
    method: str,
    namespace: NamespaceState,
    build: Callable[[calls.Who, Link], Any],
    budget: Budget,
) -> Steps[Reply]:
    """A call in a namespace, which is opened first in every new session. One request id serves all attempts."""
    request_id = core.new_id()

    def step(attempt: Attempt) -> Steps[Step]:
        number = yield from opened(namespace, attempt)
        who = calls.Who(attempt.link.session_id, number, request_id)
        return Call(method, build(who, attempt.link), attempt.left_s)

    return (yield from invoke(core, step, budget))


def opened(namespace: NamespaceState, attempt: Attempt) -> Steps[int]:
    """The namespace's id in this session."""
    link = attempt.link
    if namespace.incarnation != link.incarnation:
        request = calls.open_namespace(link.session_id, namespace.spec)
        answer: session_pb2.OpenNamespaceResponse = yield Call("OpenNamespace", request, attempt.left_s)
        if answer.symbol_bytes != namespace.spec.symbol_bytes:
            raise HicacheError(
                f"the server takes symbols of {answer.symbol_bytes} bytes, not {namespace.spec.symbol_bytes}"
            )
        namespace.number, namespace.fingerprint = answer.namespace_id, answer.fingerprint
        namespace.incarnation = link.incarnation
    return namespace.number


def tier_index(link: Link, tier: int | str) -> int:
    """A tier's number by its name or number. Raises InvalidArgumentError."""
    names = [info.name for info in link.capabilities.tiers]
    if isinstance(tier, str) and tier in names:
        return names.index(tier)
    if isinstance(tier, int) and 0 <= tier < len(names):
        return tier
    raise InvalidArgumentError(f"no tier {tier!r}; there are {', '.join(names)}")
