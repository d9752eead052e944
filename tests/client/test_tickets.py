"""Tickets: leased pages read by another process, and refused wherever they might not be what was leased."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import hicache
import hicache.aio
from hicache.errors import InvalidArgumentError, NotFoundError, StaleError, UnsupportedError
from hicache.rpc.client import LeaseTicket, TicketRun

PAGE = 16 << 10
PAGES = 12
TOKENS = np.arange(64 * PAGES, dtype=np.int32)
DATA = np.random.default_rng(3).integers(0, 256, (PAGES, PAGE), dtype=np.uint8)


def store(client: Any, tokens: Any = TOKENS, data: Any = DATA) -> Any:
    cache = client.namespace(model="m", page_bytes=PAGE)
    cache.store(tokens, data)
    return cache


@pytest.fixture
def owner(sidecar: Any) -> Iterator[Any]:
    with hicache.Client(sidecar.target) as client:
        yield client


@pytest.fixture
def other(sidecar: Any) -> Iterator[Any]:
    with hicache.Client(sidecar.target) as client:
        yield client


CHILD = textwrap.dedent(
    """
    import pickle, sys
    import hicache

    target, ticket = pickle.load(sys.stdin.buffer)
    with hicache.Client(target) as client:
        reader = client.reader(ticket)
        pages = [bytes(reader.rows(page)) for page in range(len(reader))]
        assert reader.unsound(0, len(reader)) == []
        assert reader.still_valid()
        sys.stdout.buffer.write(pickle.dumps(pages))
    """
)


def test_another_process_reads_what_was_leased(sidecar: Any, owner: Any) -> None:
    with store(owner).fetch(TOKENS) as lease:
        ticket = lease.ticket()
        assert len(pickle.dumps(ticket)) < 1000
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=pickle.dumps((sidecar.target, ticket)),
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert child.returncode == 0, child.stderr.decode()
    assert pickle.loads(child.stdout) == [row.tobytes() for row in DATA]


def test_spans_cover_what_is_asked_for_in_place(owner: Any, other: Any) -> None:
    cache = store(owner)
    filler = np.arange(64 * 3, dtype=np.int32) + 10_000_000
    cache.store(filler, DATA[:3])
    longer = np.arange(64 * (PAGES + 5), dtype=np.int32)
    more = np.random.default_rng(4).integers(0, 256, (PAGES + 5, PAGE), dtype=np.uint8)
    more[:PAGES] = DATA
    cache.store(longer, more)
    lease = cache.fetch(longer)
    reader = other.reader(lease.ticket())
    assert len(reader) == PAGES + 5 and reader.page_bytes == PAGE
    assert len(lease.ticket().runs) > 1
    for first in range(PAGES + 5):
        for count in range(PAGES + 6 - first):
            found = list(reader.spans(first, count))
            assert [page for page, rows in found for page in range(page, page + len(rows))] == list(
                range(first, first + count)
            )
            for page, rows in found:
                assert not rows.flags.writeable
                assert (rows == more[page : page + len(rows)]).all()
    for bad in ((-1, 1), (0, PAGES + 6), (PAGES + 5, 1), (3, -1)):
        with pytest.raises(InvalidArgumentError):
            list(reader.spans(*bad))
    assert reader.still_valid()
    lease.release()


def test_no_more_calls_once_the_regions_are_known(owner: Any, other: Any) -> None:
    cache = store(owner)
    lease = cache.fetch(TOKENS)
    other.reader(lease.ticket())
    asked: list[str] = []
    call = other._driver._call
    other._driver._call = lambda step: (asked.append(step.method), call(step))[1]
    for _ in range(3):
        assert other.reader(lease.ticket()).unsound(0, PAGES) == []
    assert asked == []


def test_the_asyncio_client_reads_too(sidecar: Any, owner: Any) -> None:
    lease = store(owner).fetch(TOKENS)

    async def scenario() -> None:
        async with hicache.aio.Client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            async with await cache.fetch(TOKENS, max_pages=2) as mine:
                assert (await client.reader(mine.ticket())).unsound(0, 2) == []
            reader = await client.reader(lease.ticket())
            assert (reader.rows(5) == DATA[5]).all()

    asyncio.run(scenario())


def test_a_ticket_ends_at_its_deadline(owner: Any, other: Any) -> None:
    cache = store(owner)
    lease = cache.fetch(TOKENS, ttl_ms=400)
    ticket = lease.ticket()
    reader = other.reader(ticket)
    assert reader.still_valid()
    time.sleep(0.4)
    assert not reader.still_valid()
    for read in (lambda: reader.rows(0), reader.check, lambda: reader.unsound(0, 1)):
        with pytest.raises(NotFoundError, match="expired"):
            read()
    with pytest.raises(NotFoundError, match="expired"):
        other.reader(ticket)
    with pytest.raises(NotFoundError, match="expired"):
        lease.ticket()


def test_pages_that_were_dropped_are_not_valid_any_more(owner: Any, other: Any) -> None:
    cache = store(owner)
    with cache.fetch(TOKENS) as lease:
        reader = other.reader(lease.ticket())
    assert reader.still_valid(), "released, but still there"
    owner.admin.evict(cache, TOKENS)
    assert not reader.still_valid()
    with pytest.raises(NotFoundError, match="reused"):
        reader.check()


def test_a_ticket_of_another_run_reads_nothing(sidecar: Any) -> None:
    with hicache.Client(sidecar.target) as client:
        store(client)
        old = client.namespace(model="m", page_bytes=PAGE).fetch(TOKENS)
        ticket = dataclasses.replace(old.ticket(), deadline_ns=1 << 62)
        reader = client.reader(ticket)
        sidecar.restart()
        cache = client.namespace(model="m", page_bytes=PAGE)
        cache.store(TOKENS, DATA[::-1])
        again = cache.fetch(TOKENS).ticket()
        assert again.runs[0].region_id == ticket.runs[0].region_id, "region numbers begin anew"
        assert again.generations == ticket.generations, "and so do generations"
        with pytest.raises(StaleError, match="another run"):
            client.reader(ticket)
        with pytest.raises(StaleError):
            old.ticket()
        assert not reader.still_valid()
        with pytest.raises(StaleError):
            reader.check()
        assert (client.reader(again).rows(0) == DATA[-1]).all()


def test_a_region_that_is_gone_is_not_found(owner: Any, other: Any) -> None:
    lease = store(owner).fetch(TOKENS)
    ticket = lease.ticket()
    gone = dataclasses.replace(ticket, runs=(TicketRun(4711, 0, PAGES),))
    with pytest.raises(NotFoundError, match="4711"):
        other.reader(gone)


def test_forged_tickets_are_refused(owner: Any, other: Any) -> None:
    ticket = store(owner).fetch(TOKENS).ticket()
    run = ticket.runs[0]
    for changes in (
        {"checksums": b""},
        {"generations": ticket.generations[:-1]},
        {"runs": (dataclasses.replace(run, first_slot=1 << 20),)},
        {"runs": (dataclasses.replace(run, first_slot=-1),)},
        {"runs": (dataclasses.replace(run, pages=0),), "checksums": b"", "generations": b""},
        {"page_bytes": PAGE // 2},
        {"lease_id": -4},
    ):
        with pytest.raises(InvalidArgumentError):
            other.reader(dataclasses.replace(ticket, **changes))


def test_streamed_leases_have_no_tickets(sidecar: Any, owner: Any) -> None:
    ticket = store(owner).fetch(TOKENS).ticket()
    with hicache.Client(sidecar.target, data_plane="stream") as far:
        with pytest.raises(UnsupportedError, match="stream"):
            far.namespace(model="m", page_bytes=PAGE).fetch(TOKENS).ticket()
        with pytest.raises(UnsupportedError, match="streams"):
            far.reader(ticket)


def test_a_lease_of_nothing_has_an_empty_ticket(owner: Any, other: Any) -> None:
    cache = store(owner)
    ticket = cache.fetch(TOKENS + 1).ticket()
    assert ticket.pages == 0
    reader = other.reader(ticket)
    assert len(reader) == 0 and list(reader.spans(0, 0)) == [] and reader


def test_readers_let_go_of_retired_regions(idle_sidecar: Any) -> None:
    """Another page size needs the memory: it comes only when the reader's process has unmapped what it read."""
    idle_sidecar.service |= {"host_bytes": 1 << 20, "host_segment_bytes": 1 << 20}
    idle_sidecar.server["keep_alive_ms"] = 300
    sidecar = idle_sidecar.start()
    with hicache.Client(sidecar.target) as owner, hicache.Client(sidecar.target) as other:
        cache = store(owner)
        lease = cache.fetch(TOKENS)
        reader = other.reader(lease.ticket())
        assert len(other.core.arena) == 1
        lease.release()
        big = owner.namespace(model="big", page_bytes=700 << 10)
        data = np.ones((1, 700 << 10), np.uint8)
        stored = big.store(np.arange(64, dtype=np.int32), data, wait_ms=20_000)
        assert stored.committed.stored_pages == 1
        assert not reader.still_valid()
        with pytest.raises((NotFoundError, StaleError)):
            reader.rows(0)


def test_several_threads_read_with_one_client(owner: Any, other: Any) -> None:
    cache = store(owner)
    ticket = cache.fetch(TOKENS).ticket()
    wrong: list[object] = []

    def read() -> None:
        for _ in range(20):
            reader = other.reader(ticket)
            wrong.extend(reader.unsound(0, PAGES))
            if not (reader.rows(7) == DATA[7]).all():
                wrong.append("row")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(other.core.arena) == 1


def test_rot_shows_as_unsound(owner: Any, other: Any) -> None:
    ticket = store(owner).fetch(TOKENS).ticket()
    sums = np.frombuffer(ticket.checksums, "<u8").copy()
    sums[[2, 9]] ^= 1
    bent = dataclasses.replace(ticket, checksums=sums.tobytes())
    reader = other.reader(bent)
    assert reader.unsound(0, PAGES) == [2, 9]
    assert reader.unsound(3, 4) == []
    reader.close()
    reader.close()
    assert not reader.still_valid()
    with pytest.raises(NotFoundError, match="closed"):
        reader.rows(0)


def test_a_ticket_is_plain_data(owner: Any) -> None:
    ticket = store(owner).fetch(TOKENS).ticket()
    assert pickle.loads(pickle.dumps(ticket)) == ticket
    assert isinstance(ticket, LeaseTicket) and ticket.pages == PAGES
    assert len(ticket.epoch) == 16
    assert ticket.deadline_ns - time.monotonic_ns() < 31 * 10**9
