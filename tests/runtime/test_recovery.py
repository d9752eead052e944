"""A restart on the same folder: what was durable is matched again, while serving goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import TestClient, prompt, running, settle

from hicache.engine.events import Recovered, Recovering
from hicache.runtime import ServiceOptions
from hicache.runtime.ports import TierPort
from hicache.runtime.recovery import PAGES_PER_EVENT, Recoverer, parts
from hicache.tier.recovery import RecoveredChain
from hicache.types import Ack, Batch, Completion, Op, TierKind, TierSpec


def options(tmp_path: Path) -> ServiceOptions:
    return ServiceOptions(
        host_bytes=8 << 20, disk_path=str(tmp_path / "disk"), disk_bytes=64 << 20, prefault=False
    )


def test_what_was_drained_is_there_after_a_restart(tmp_path: Path) -> None:
    async def first() -> None:
        async with running(options(tmp_path)) as service:
            red, blue = TestClient(service), TestClient(service, tenant="blue")
            for salt in range(5):
                await red.store(30 + salt, salt)
            await blue.store(700)  # one chain of more pages than an event takes
            assert (await service.drain(10_000)).unsaved_pages == 0

    async def second() -> None:
        async with running(options(tmp_path)) as service:
            report = await service.recovered()
            assert (report.pages, report.orphan_pages, report.error) == (700 + sum(range(30, 35)), 0, "")
            red, blue = TestClient(service), TestClient(service, tenant="blue")
            for salt in range(5):
                assert red.match(40, salt) == 30 + salt
                result = await red.fetch(40, salt)
                assert await red.read(result, salt) == 30 + salt
                red.release(result)
            assert blue.match(900) == 700
            assert await blue.read(await blue.fetch(700)) == 700
            assert service.stats().engine.counters.recovered_pages == report.pages

    asyncio.run(first())
    asyncio.run(second())
    asyncio.run(second())


def test_durable_commits_need_no_drain(tmp_path: Path) -> None:
    async def first() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            assert (await client.store(10, ack=Ack.DURABLE)).durable_pages == 10
            await client.store(10, 1)

    async def second() -> None:
        async with running(options(tmp_path)) as service:
            await service.recovered()
            client = TestClient(service)
            assert (client.match(10), client.match(10, 1)) == (10, 0)

    asyncio.run(first())
    asyncio.run(second())


def test_serving_goes_on_while_the_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores and fetches work; writes to the disk wait; pages stored anew meanwhile stay what they are."""
    go_on = threading.Event()

    async def first() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            await client.store(600, 1)
            await client.store(40, 2)
            await service.drain(10_000)

    async def second() -> None:
        from hicache.tier.recovery import Recovery

        whole = Recovery.__iter__

        def slow(self: Recovery) -> Iterator[RecoveredChain]:
            for chain in whole(self):
                assert go_on.wait(20)
                yield chain

        monkeypatch.setattr(Recovery, "__iter__", slow)
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            await client.store(40, 2)  # also on the disk, which nobody knows yet
            await client.store(20, 3)
            result = await client.fetch(20, 3)
            assert await client.read(result, 3) == 20
            durable = asyncio.ensure_future(client.store(10, 4, ack=Ack.DURABLE))
            await asyncio.sleep(0.05)
            assert not durable.done()
            assert service.stats().counters["recovering"] == 1
            go_on.set()
            assert (await durable).durable_pages == 10
            assert (await service.recovered()).done
            service.check()
            for pages, salt in ((600, 1), (40, 2), (20, 3), (10, 4)):
                assert client.match(pages, salt) == pages
                result = await client.fetch(pages, salt)
                assert await client.read(result, salt) == pages
                client.release(result)

    asyncio.run(first())
    asyncio.run(second())


def test_clear_holds_for_what_has_not_been_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first chain is there, too; and stats say how far it is."""
    go_on = threading.Event()

    async def first() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            for salt in range(3):
                await client.store(20, salt)
            await service.drain(10_000)

    async def second() -> None:
        from hicache.tier.recovery import Recovery

        whole = Recovery.__iter__

        def slow(self: Recovery) -> Iterator[RecoveredChain]:
            for chain in whole(self):
                assert go_on.wait(20)
                yield chain

        monkeypatch.setattr(Recovery, "__iter__", slow)
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            await settle(lambda: service.stats().counters["recovery_read_pages"] == 60)
            assert service.stats().counters["recovery_total_pages"] == 60
            await service.clear()
            await client.store(20, 1)
            go_on.set()
            assert (await service.recovered()).done
            service.check()
            assert [client.match(20, salt) for salt in range(3)] == [0, 20, 0]
            await service.drain(10_000)

    async def third() -> None:
        async with running(options(tmp_path)) as service:
            await service.recovered()
            client = TestClient(service)
            assert [client.match(20, salt) for salt in range(3)] == [0, 20, 0]

    asyncio.run(first())
    asyncio.run(second())
    monkeypatch.undo()
    asyncio.run(third())


def test_closing_in_the_middle_of_recovery(tmp_path: Path) -> None:
    async def first() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            await client.store(1500)
            await service.drain(10_000)

    async def second() -> None:
        async with running(options(tmp_path)):
            pass

    async def third() -> None:
        async with running(options(tmp_path)) as service:
            await service.recovered()
            assert TestClient(service).match(1500) == 1500

    asyncio.run(first())
    asyncio.run(second())
    asyncio.run(third())


# --- the parts


def chain(fingerprint: bytes, parent: int, first: int, pages: int) -> RecoveredChain:
    keys = [number.to_bytes(32, "big") for number in range(first, first + pages)]
    symbols = b"".join(number.to_bytes(4, "big") for number in range(first, first + pages))
    return RecoveredChain(fingerprint, parent, symbols, keys, [4096] * pages)


def test_long_chains_are_cut_and_numbered_anew() -> None:
    size = PAGES_PER_EVENT
    chains = [
        chain(b"a", -1, 0, 2 * size + 5),
        chain(b"a", 0, 5000, 3),
        chain(b"a", 0, 6000, 4),
        chain(b"b", -1, 0, 2),
    ]
    found = list(parts(iter(chains)))
    of_a = [part for part in found if part.fingerprint == b"a"]
    assert [part.last for part in of_a] == [False] * (len(of_a) - 1) + [True]
    assert max(part.pages for part in found) <= size + 5
    parents = [parent for part in of_a for parent in part.parents]
    lengths = [len(keys) for part in of_a for keys in part.keys]
    assert lengths == [size, size, 5, 3, 4]
    assert parents == [-1, 0, 1, 2, 2]
    assert (
        b"".join(symbols for part in of_a for symbols in part.symbols[: 3 if part is of_a[0] else None])
        != b""
    )
    assert found[-1].fingerprint == b"b"
    assert (found[-1].parents, found[-1].last) == ([-1], True)


class Quiet:
    """A store that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        self.batches.append(batch)

    def poll(self) -> list[Completion]:
        return []

    def close(self) -> None:
        pass


@dataclasses.dataclass
class Found:
    chains: list[RecoveredChain]
    orphans: list[bytes]
    error: Exception | None = None

    def __iter__(self) -> Iterator[RecoveredChain]:
        yield from self.chains
        if self.error is not None:
            raise self.error


def recover(found: Found, *, stop: bool = False) -> tuple[Recoverer, list[Recovered], Quiet]:
    store = Quiet()
    port = TierPort(0, TierSpec("disk", TierKind.DISK, 1 << 20, keyed=True, durable=True), store)
    handed: list[Recovered] = []
    going: list[bool] = []

    def handle(event: Recovered | Recovering) -> None:
        if isinstance(event, Recovering):
            going.append(event.going)
        else:
            handed.append(event)

    async def main() -> Recoverer:
        recoverer = Recoverer(lambda: found, port, namespace=lambda _: 3, handle=handle)
        port.hold_writes()
        port.submit(Op.PUT, lambda _: None, keys=[b"o" * 32])
        if stop:
            recoverer.stop()
        await recoverer.run()
        return recoverer

    recoverer = asyncio.run(main())
    assert going == [True, False]  # whatever happens
    return recoverer, handed, store


def test_orphans_are_deleted_before_the_writes_that_waited() -> None:
    recoverer, handed, store = recover(Found([chain(b"a", -1, 0, 2)], [b"o" * 32, b"p" * 32]))
    assert [(event.namespace, event.parents, event.done) for event in handed] == [(3, [-1], True)]
    assert [(batch.op, len(batch.keys)) for batch in store.batches] == [(Op.DELETE, 2), (Op.PUT, 1)]
    assert recoverer.report.orphan_pages == 2


def test_a_store_that_fails_keeps_what_was_not_read(caplog: pytest.LogCaptureFixture) -> None:
    chains = [chain(b"a", -1, 0, PAGES_PER_EVENT), chain(b"a", -1, 5000, 2)]
    recoverer, handed, store = recover(Found(chains, [b"o" * 32], RuntimeError("the medium")))
    assert [len(event.parents) for event in handed] == [1, 0]
    assert [event.done for event in handed] == [False, True]
    assert [batch.op for batch in store.batches] == [Op.PUT]
    assert recoverer.report.done
    assert "the medium" in recoverer.report.error
    assert "the medium" in caplog.text


def test_a_stopped_recovery_lets_writes_through() -> None:
    recoverer, handed, store = recover(Found([chain(b"a", -1, 0, 2)], [b"o" * 32]), stop=True)
    assert (handed, recoverer.report.done) == ([], True)
    assert [batch.op for batch in store.batches] == [Op.PUT]


def test_a_kill_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    """The process dies without closing anything; the folder opens and matches."""
    script = f"""
import asyncio, os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from runtime_helpers import TestClient
from hicache.runtime import Service, ServiceOptions
from hicache.types import Ack
async def main():
    service = Service(ServiceOptions(host_bytes=8 << 20, disk_path={str(tmp_path / "disk")!r}, disk_bytes=64 << 20))
    await service.start()
    await TestClient(service).store(50, ack=Ack.DURABLE)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    died = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL

    async def after() -> None:
        async with running(options(tmp_path)) as service:
            await service.recovered()
            client = TestClient(service)
            assert client.match(50) == 50
            assert await client.read(await client.fetch(50)) == 50
            await settle(lambda: service.stats().counters["copies_in_flight"] == 0)
            assert service.match(client.namespace, prompt(50), touch=False).run_tier[0] == 0

    asyncio.run(after())
