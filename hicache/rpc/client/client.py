"""The synchronous client. Its handles do nothing but arguments and steps; what happens is in ``flows``.

with hicache.Client("unix:///run/hicache.sock") as client:
    cache = client.namespace(model="llama-3.1-8b", page_bytes=2 << 20)
    with cache.fetch(tokens, wait_ms=50) as lease:
        lease.copy_into(buffer)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from hicache.rpc.client import buffers, calls, flows, storing
from hicache.rpc.client import options as settings
from hicache.rpc.client.admin import Admin
from hicache.rpc.client.core import Core, linked
from hicache.rpc.client.driver import Driver
from hicache.rpc.client.handles import (
    LeaseBase,
    NamespaceBase,
    NamespaceFields,
    OptionFields,
    ReservationBase,
    count_of,
    make_namespace,
    make_options,
    pages_of,
    refuse_torch_views,
)
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.options import ClientOptions, Verify
from hicache.rpc.client.prompt import Tokens
from hicache.rpc.client.reservation import ReservationState
from hicache.rpc.client.results import (
    Capabilities,
    CommitResult,
    MatchResult,
    OperationResult,
    PrefetchResult,
    StoreResult,
)
from hicache.rpc.client.storing import Pages


class Lease(LeaseBase):
    """Pages lent for reading; given back once, by ``release`` or at the end of a ``with``.

    What its views and arrays show is good only while ``still_valid()``; copies are checked before they are returned.
    """

    def __init__(self, driver: Driver, state: LeaseState) -> None:
        super().__init__(state)
        self._driver = driver

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def views(self) -> list[memoryview]:
        """A read-only view of each granted page, in place where it is mapped.

        Raises NotFoundError or StaleError for a lease that is over, CorruptError where ``verify`` is "always".
        """
        verify = self._driver.core.options.verify is Verify.ALWAYS
        return self._driver.run(flows.views(self._driver.core, self._state, verify=verify))

    def numpy(self, dtype: npt.DTypeLike = np.uint8) -> list[npt.NDArray[Any]]:
        """As ``views``, as read-only one-dimensional arrays."""
        return buffers.as_arrays(self.views(), dtype)

    def torch(self, dtype: Any = None, *, copy: bool = True) -> Any:
        """A checked copy of all granted pages: a CPU tensor of shape (pages, elements of a page)."""
        refuse_torch_views(copy=copy)
        tensor, rows = buffers.new_tensor(len(self), self.page_bytes, dtype)
        self.copy_into(rows)
        return tensor

    def copy_into(
        self, into: Any, first: int = 0, count: int | None = None, *, verify: Verify | str | None = None
    ) -> int:
        """Copy pages from ``first`` on into one big buffer, or one buffer a page. Answers how many.

        Raises NotFoundError (the lease expired meanwhile), StaleError (its session is gone) or CorruptError; the
        buffers then hold nothing to be used.
        """
        core = self._driver.core
        how = core.options.verify if verify is None else settings.verify(verify)
        rows = buffers.page_rows(into, self.page_bytes, self._state.pages_from(first, count))
        return self._driver.run(flows.copy(core, self._state, rows, first, verify=how is not Verify.OFF))

    def renew(self, ttl_ms: int = 0) -> None:
        """Keep it for ``ttl_ms`` from now (0: the server's default). Raises NotFoundError if it is lost."""
        self._state.check()
        core = self._driver.core
        budget = core.budget(None, incarnation=self._state.terms.incarnation)
        self._driver.run(flows.renew(core, [self._state], count_of("ttl_ms", ttl_ms), budget))
        self._state.check()

    def wait(self, wait_ms: int) -> OperationResult:
        """Wait for pages that are on their way; more of them may be granted afterwards."""
        core = self._driver.core
        wait_ms = count_of("wait_ms", wait_ms)
        budget = core.budget(None, wait_ms=wait_ms, incarnation=self._state.terms.incarnation)
        return self._driver.run(flows.wait_lease(core, self._state, wait_ms, budget))

    def release(self) -> None:
        """Give the pages back. Idempotent; never raises for a server that is gone."""
        if not self._state.over:
            self._driver.run(flows.release(self._driver.core, [self._state]))


class Reservation(ReservationBase):
    """Room for missing pages. A ``with`` aborts what was not committed."""

    def __init__(self, driver: Driver, state: ReservationState) -> None:
        super().__init__(state)
        self._driver = driver

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, page: int, data: Any) -> None:
        """Copy a page's bytes (buffer, array or CPU tensor) into its buffer."""
        self._state.write(page, data)

    def commit(
        self,
        pages: Iterable[int] | None = None,
        *,
        durable: bool = False,
        last: bool = True,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> CommitResult:
        """Make prepared pages matchable (``durable``: and safe from a crash); None: all that are prepared.

        ``last=False`` keeps the reservation for more. ``verify`` sends checksums, which the server compares with its
        own copy.
        """
        core = self._driver.core
        ask = calls.CommitAsk(durable, last, verify)
        budget = core.budget(timeout_s, incarnation=self._state.incarnation)
        return self._driver.run(storing.commit(core, self._state, pages, ask, budget))

    def abort(self) -> None:
        """Give back what was not committed. Idempotent; never raises for a server that is gone."""
        if not self._state.ended:
            self._driver.run(storing.abort(self._driver.core, self._state))


class NamespaceHandle(NamespaceBase):
    """The calls in one namespace; opened at its first use, and again after a restart of the sidecar."""

    def __init__(self, driver: Driver, fields: NamespaceFields) -> None:
        super().__init__(make_namespace(**fields))
        self._driver = driver

    def match(
        self,
        tokens: Tokens,
        *,
        extra_keys: Sequence[bytes] | None = None,
        touch: bool = False,
        timeout_s: float | None = None,
    ) -> MatchResult:
        """How much of a prompt is cached; counts as a use only with ``touch``."""
        core, prompt = self._driver.core, self._pack(tokens, extra_keys)
        steps = flows.match(core, self._state, prompt, touch=touch, budget=core.budget(timeout_s))
        return self._driver.run(steps)

    def fetch(
        self,
        tokens: Tokens,
        *,
        max_pages: int | None = None,
        ttl_ms: int = 0,
        wait_ms: int = 0,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> Lease:
        """Lease what is cached of a prompt. A miss is a lease of no pages.

        What is readable is granted at once; pages that must first be promoted are waited for up to ``wait_ms``, and
        may be waited for further with ``Lease.wait``. ``ttl_ms`` 0: the server's default.
        """
        core, prompt = self._driver.core, self._pack(tokens, extra_keys)
        ask = calls.FetchAsk(pages_of(max_pages), count_of("ttl_ms", ttl_ms), count_of("wait_ms", wait_ms))
        budget = core.budget(timeout_s, wait_ms=wait_ms)
        return Lease(self._driver, self._driver.run(flows.fetch(core, self._state, prompt, ask, budget)))

    def load(
        self,
        tokens: Tokens,
        into: Any,
        *,
        wait_ms: int = 5_000,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Copy what is cached of a prompt into a buffer, or one buffer a page; answers how many pages."""
        room = buffers.capacity_pages(into, self.page_bytes)
        if not room:
            return 0
        with self.fetch(
            tokens, max_pages=room, wait_ms=wait_ms, extra_keys=extra_keys, timeout_s=timeout_s
        ) as lease:
            return lease.copy_into(into)

    def reserve(
        self,
        tokens: Tokens,
        *,
        ttl_ms: int = 0,
        wait_ms: int = 5_000,
        drop_pressure: bool = False,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> Reservation:
        """Room for a prompt's missing pages, waited for up to ``wait_ms`` while others are moved out.

        ``drop_pressure``: drop unsaved victims instead of waiting. Raises ExhaustedError where there is no room.
        """
        core, prompt = self._driver.core, self._pack(tokens, extra_keys)
        ask = calls.ReserveAsk(count_of("ttl_ms", ttl_ms), count_of("wait_ms", wait_ms), drop_pressure)
        budget = core.budget(timeout_s, wait_ms=wait_ms)
        return Reservation(
            self._driver, self._driver.run(storing.reserve(core, self._state, prompt, ask, budget))
        )

    def store(
        self,
        tokens: Tokens,
        pages: Pages,
        *,
        durable: bool = False,
        wait_ms: int = 5_000,
        drop_pressure: bool = False,
        extra_keys: Sequence[bytes] | None = None,
    ) -> StoreResult:
        """Store a prompt's missing pages, in parts of bounded size.

        ``pages`` is a sequence with one buffer for every page of the prompt, or a function ``(page, view)`` that
        fills the view.
        """
        total, core, ask = CommitResult(), self._driver.core, calls.CommitAsk(durable, last=True, verify=True)
        with self.reserve(
            tokens, wait_ms=wait_ms, drop_pressure=drop_pressure, extra_keys=extra_keys
        ) as reservation:
            while not reservation.ended:
                total += self._driver.run(storing.store_part(core, reservation._state, pages, ask))
        return StoreResult(reservation.present_pages, total)

    def prefetch(
        self,
        tokens: Tokens,
        tier: int | str = 0,
        *,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> PrefetchResult:
        """Promote a prompt's cached pages to a tier (by number or name) without leasing them."""
        core, prompt = self._driver.core, self._pack(tokens, extra_keys)
        return self._driver.run(flows.prefetch(core, self._state, prompt, tier, core.budget(timeout_s)))


class Client:
    """A connection to one sidecar. Threads may share it; a fork may not.

    ``target``: a path or ``unix:///path`` of the sidecar's socket, or ``host:port`` with ``token`` or ``tls``. The
    keywords are the fields of ClientOptions. Raises ConfigError for settings that cannot work.
    """

    def __init__(
        self, target: str, options: ClientOptions | None = None, **fields: Unpack[OptionFields]
    ) -> None:
        self._driver = Driver(target, make_options(options, fields))
        self.admin = Admin(self._driver)

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def core(self) -> Core:
        """What the client is made of; for tests and measurements."""
        return self._driver.core

    @property
    def attached(self) -> bool:
        """Whether there is a live session, this moment."""
        session = self._driver.core.session
        return not session.closed and session.current() is not None

    @property
    def draining(self) -> bool:
        """Whether the sidecar said that it is about to stop."""
        return self._driver.core.session.draining

    def connect(self) -> Capabilities:
        """Attach, or wait until it is done. Raises UnavailableError after ``connect_timeout_s``."""
        core = self._driver.core
        deadline_ns = core.now_ns() + int(core.options.connect_timeout_s * 1e9)
        return self._driver.run(linked(core, deadline_ns, 0)).capabilities

    def close(self) -> None:
        """End the session: everything it holds is released. Idempotent."""
        self._driver.close()

    def namespace(self, **fields: Unpack[NamespaceFields]) -> NamespaceHandle:
        """A namespace: ``model`` and ``page_bytes`` at least. Raises InvalidArgumentError naming the field."""
        return NamespaceHandle(self._driver, fields)

    def renew(self, leases: Iterable[Lease], ttl_ms: int = 0) -> list[Lease]:
        """Renew many leases with one call; answers those that are lost."""
        core, held = self._driver.core, {lease._state: lease for lease in leases if lease.still_valid()}
        budget = core.budget(None, incarnation=core.session.incarnation)
        lost = self._driver.run(flows.renew(core, list(held), count_of("ttl_ms", ttl_ms), budget))
        return [held[state] for state in lost]

    def release(self, leases: Iterable[Lease]) -> None:
        """Release many leases with one call."""
        states = [lease._state for lease in leases]
        self._driver.run(flows.release(self._driver.core, states))

    def wait_operation(self, operation: int, wait_ms: int) -> OperationResult:
        """Wait for an operation, such as a prefetch."""
        core, wait_ms = self._driver.core, count_of("wait_ms", wait_ms)
        return self._driver.run(
            flows.wait_operation(core, operation, wait_ms, core.budget(None, wait_ms=wait_ms))
        )

    def cancel(self, operation: int) -> None:
        """Wait for an operation no longer; copies that others share go on."""
        core = self._driver.core
        self._driver.run(flows.cancel(core, operation, core.budget(None)))
