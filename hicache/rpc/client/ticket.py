"""Tickets: where leased pages lie, for another process of the same user to read them.

The lease stays with whoever fetched it: who renews and releases it. A ticket is plain data and can be sent anywhere;
it is good until the deadline that the lease had when it was made, in a process of the same host whose own client is
attached to the same run of the sidecar as the same tenant. Nothing is asked of the sidecar to read, beyond the first
time that a region is met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from hicache.errors import InvalidArgumentError, NotFoundError, StaleError, UnsupportedError
from hicache.rpc.client import flows
from hicache.rpc.client.arena import ArenaRegion
from hicache.rpc.client.buffers import Bytes
from hicache.rpc.client.core import Core, linked
from hicache.rpc.client.lease import LeaseState, MappedRun
from hicache.rpc.client.steps import Steps


@dataclasses.dataclass(frozen=True, slots=True)
class TicketRun:
    """Consecutive pages in consecutive slots of one arena region."""

    region_id: int
    first_slot: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseTicket:
    """Leased pages as plain data. ``deadline_ns`` is of CLOCK_MONOTONIC, which all processes of a host share.

    ``epoch`` names the run of the sidecar: region numbers mean something else in another. ``checksums`` and
    ``generations``: little-endian u64, one a page.
    """

    epoch: bytes
    lease_id: int
    page_bytes: int
    deadline_ns: int
    runs: tuple[TicketRun, ...]
    checksums: bytes
    generations: bytes

    @property
    def pages(self) -> int:
        """How many pages it is for."""
        return sum(run.pages for run in self.runs)


def issue(core: Core, lease: LeaseState) -> LeaseTicket:
    """The ticket of a lease as it stands. Raises as ``check`` does, and UnsupportedError for streamed pages."""
    lease.check()
    if lease.granted_pages and lease.streamed:
        raise UnsupportedError(
            "a ticket is for pages in shared memory; these come as a stream",
            hint="connect to the sidecar's unix socket, on its host",
        )
    runs = tuple(TicketRun(run.region.info.region_id, run.first_slot, run.pages) for run in lease.runs)
    epoch = core.session.epoch
    if core.session.incarnation != lease.terms.incarnation:
        raise StaleError("the lease was lost with its session: the sidecar restarted", hint="fetch again")
    return LeaseTicket(
        epoch,
        lease.lease,
        lease.terms.page_bytes,
        lease.deadline_ns,
        runs,
        lease.checksums.astype("<u8").tobytes(),
        lease.generations.astype("<u8").tobytes(),
    )


class TicketReader:
    """Reads the pages of one ticket in place. Any thread may use it.

    What it hands out is good only if ``still_valid()`` holds *after* it was read. It keeps the memory that it reads
    mapped: drop it, or ``close()`` it, when done; arrays that are still there keep it mapped themselves.
    """

    def __init__(self, state: LeaseState) -> None:
        self._state = state

    def __len__(self) -> int:
        return self._state.granted_pages

    def __bool__(self) -> bool:
        return True  # a ticket for no pages is a ticket: test len()

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.terms.page_bytes

    def still_valid(self) -> bool:
        """Whether the deadline has not passed, no slot was reused, and the session is the same."""
        return self._state.still_valid()

    def check(self) -> None:
        """As ``still_valid``, but raises NotFoundError or StaleError, which say why not."""
        self._state.check()

    def rows(self, page: int) -> Bytes:
        """One page, in place: a read-only array. Raises as ``spans`` does."""
        ((_, rows),) = self.spans(page, 1)
        row: Bytes = rows[0]
        return row

    def spans(self, first: int, count: int) -> Iterator[tuple[int, Bytes]]:
        """Pages [first, first + count) in place: (number of its first page, read-only array of rows) a span.

        Raises InvalidArgumentError for pages that the ticket is not for, NotFoundError or StaleError where it is over.
        """
        state = self._state
        state.pages_from(first, count)
        if state.over or state.expired:
            state.check()
        for run, page, pages in state.spans(first, count, verify=False):
            yield page, run.region.rows(run.first_slot + page - run.first_page, pages)

    def unsound(self, first: int, count: int) -> list[int]:
        """Which of these pages are not what their checksums say. Means nothing unless ``still_valid()`` afterwards."""
        bad: list[int] = []
        for page, rows in self.spans(first, count):
            bad += [page + at for at, row in enumerate(rows) if not self._state.sound(page + at, row)]
        return bad

    def close(self) -> None:
        """Let go of the mapped memory. Idempotent."""
        self._state.end(NotFoundError("the ticket's reader was closed"))


def reader(core: Core, ticket: LeaseTicket) -> Steps[LeaseState]:
    """What a TicketReader reads: the ticket's regions mapped.

    Raises StaleError for a ticket of another run of the sidecar, NotFoundError for one whose time or memory is over,
    UnsupportedError where this client does not share memory with the sidecar.
    """
    _check(ticket)
    now_ns = core.now_ns()
    _refuse_late(ticket, now_ns)
    link = yield from linked(core, now_ns + int(core.options.timeout_s * 1e9), 0)
    if link.epoch != ticket.epoch:
        raise StaleError("the ticket is of another run of the sidecar", hint="fetch again")
    if not link.mapped:
        raise UnsupportedError(
            "this client reads pages as streams, and cannot use a ticket",
            hint="connect to the sidecar's unix socket, on its host",
        )
    wanted = {run.region_id for run in ticket.runs}
    unknown = core.arena.unknown(wanted)
    if unknown:
        yield from flows.map_regions(core, link, unknown)
    regions = {region_id: core.arena.find(region_id) for region_id in wanted}
    state = core.new_lease(link, ticket.page_bytes)
    _borrow(state, ticket, {number: region for number, region in regions.items() if region is not None})
    state.check()  # of the session that its regions were found in, and in time
    return state


def _borrow(state: LeaseState, ticket: LeaseTicket, regions: dict[int, ArenaRegion]) -> None:
    runs, page = [], 0
    for run in ticket.runs:
        region = regions.get(run.region_id)
        if region is None:
            raise NotFoundError(f"arena region {run.region_id} of the ticket is gone", hint="fetch again")
        if region.info.page_bytes != ticket.page_bytes or run.first_slot + run.pages > region.info.slots:
            raise InvalidArgumentError(f"the ticket's pages do not lie in region {run.region_id}")
        runs.append(MappedRun(region, page, run.pages, run.first_slot))
        page += run.pages
    state.lease, state.deadline_ns = ticket.lease_id, ticket.deadline_ns
    state.matched_pages = state.granted_pages = page
    state.runs = tuple(runs)
    state.checksums = np.frombuffer(ticket.checksums, "<u8").astype(np.uint64)
    state.generations = np.frombuffer(ticket.generations, "<u8").astype(np.uint64)


def _check(ticket: LeaseTicket) -> None:
    """Refuse what no lease makes."""
    pages = ticket.pages
    if not len(ticket.checksums) == len(ticket.generations) == 8 * pages:
        raise InvalidArgumentError(f"the ticket has no checksum and generation for each of its {pages} pages")
    if any(run.pages < 1 or run.first_slot < 0 for run in ticket.runs) or ticket.lease_id < 0:
        raise InvalidArgumentError("the ticket names slots that there cannot be")


def _refuse_late(ticket: LeaseTicket, now_ns: int) -> None:
    if ticket.pages and now_ns >= ticket.deadline_ns:
        raise NotFoundError(
            f"the ticket for lease {ticket.lease_id} has expired",
            hint="renew the lease and make another ticket",
        )
