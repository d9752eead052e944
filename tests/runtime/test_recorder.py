"""What a service records: each request once, as salted ids, beside its answers and never before them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from runtime_helpers import PAGE_TOKENS, FakeClock, TestClient, namespace, prompt, running

from hicache.engine import events
from hicache.errors import ConfigError
from hicache.recording import MAGIC
from hicache.runtime import Service, ServiceOptions, recorder
from hicache.runtime.recorder import Recorder
from hicache.sim.traces import Request, open_trace
from hicache.sim.traces.facts import known_depth
from hicache.sim.traces.recording import RecordingTrace
from hicache.types import SymbolKind


def options(path: Path, **more: object) -> ServiceOptions:
    return ServiceOptions(host_bytes=16 << 20, prefault=False, record=str(path), **more)  # type: ignore[arg-type]


def run(made: ServiceOptions, test: Callable[[Service, TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(made) as service:
            await test(service, TestClient(service))

    asyncio.run(main())


def test_the_trace_has_what_was_sent_and_the_engines_hits(tmp_path: Path) -> None:
    """Multi-turn prompts: fetch, then store; the trace of an infinite cache hits what the live engine hit."""
    sent: list[tuple[int, int]] = []
    hits: list[int] = []

    async def test(_service: Service, client: TestClient) -> None:
        rng = random.Random(1)
        for _ in range(60):
            salt, pages = rng.randrange(5), rng.randrange(1, 30)
            result = await client.fetch(pages, salt)
            hits.append(result.matched_pages)
            client.release(result)
            await client.store(pages, salt)
            sent.append((salt, pages))

    run(options(tmp_path / "r"), test)
    trace = open_trace(tmp_path / "r", strict=True)
    found = list(trace)
    assert trace.block_tokens == PAGE_TOKENS
    assert [len(request.blocks) for request in found] == [pages for _, pages in sent]
    assert [request.input_tokens for request in found] == [pages * PAGE_TOKENS for _, pages in sent]
    ids: dict[tuple[int, int], int] = {}
    for request, (salt, _) in zip(found, sent, strict=True):
        for depth, block in enumerate(request.blocks):
            assert ids.setdefault((salt, depth), block) == block
    assert len(set(ids.values())) == len(ids)
    assert replayed(found) == hits


def replayed(requests: list[Request]) -> list[int]:
    seen: set[int] = set()
    found = []
    for request in requests:
        found.append(known_depth(request.blocks, seen))
        seen.update(request.blocks)
    return found


@pytest.mark.parametrize("hashes", [False, True])
def test_calls_of_one_request_come_out_as_one(tmp_path: Path, hashes: bool) -> None:
    """Two requests at one time; the answers' pages are stored with the prompt."""
    spec = namespace(symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=16) if hashes else namespace()

    async def test(service: Service, client: TestClient) -> None:
        mine = TestClient(service, spec=spec, tenant=client.spec.tenant)
        await mine.store(2)
        service.match(mine.namespace, prompt(3), touch=True)
        for salt in (0, 7):
            mine.release(await mine.fetch(3, salt))
        await mine.store(5, 7)
        await mine.store(3)
        other = TestClient(service, spec=spec)
        await other.store(4, 9)
        mine.release(await mine.fetch(30, 7, max_pages=2))

    run(options(tmp_path / "r"), test)
    found = list(open_trace(tmp_path / "r", strict=True))
    assert [(len(r.blocks), r.input_tokens, r.output_tokens) for r in found] == [
        (2, 0, 8),
        (3, 12, 0),
        (5, 12, 8),
        (4, 0, 16),
        (2, 8, 0),
    ]
    assert found[4].blocks == found[2].blocks[:2]
    assert found[1].blocks[:2] == found[0].blocks


def test_namespaces_do_not_meet_and_no_prompt_is_in_the_file(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        other = TestClient(service, spec=namespace(model="another"))
        for who in (client, other):
            who.release(await who.fetch(4))

    run(options(tmp_path / "r"), test)
    one, two = open_trace(tmp_path / "r")
    assert not set(one.blocks) & set(two.blocks)
    assert b"another" not in (tmp_path / "r").read_bytes()
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o600


def test_salts_differ_and_are_told_only_when_asked(tmp_path: Path) -> None:
    async def test(_service: Service, client: TestClient) -> None:
        client.release(await client.fetch(4))

    blocks = []
    for name, told in (("a", False), ("b", True)):
        run(options(tmp_path / name, record_salt=told), test)
        trace = open_trace(tmp_path / name)
        assert isinstance(trace, RecordingTrace)
        assert ("salt" in trace.info()) == told
        blocks.append(next(iter(trace)).blocks)
    assert blocks[0] != blocks[1]


def rig(path: Path, **more: object) -> Recorder:
    given: dict[str, object] = {"rotate_bytes": 1 << 20, "files": 3, "show_salt": False, "clock": FakeClock()}
    return Recorder(path, namespace=lambda _number: (namespace(), bytes(32)), **(given | more))  # type: ignore[arg-type]


def test_files_move_on_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(b"from before")
    made = rig(path, rotate_bytes=100_000)
    rng = random.Random(2)
    for number in range(12_000):
        made.see(events.Fetch(number, 1, 1, rng.randbytes(16 * 8)))
        while len(made._queue) > 1000:
            pass
    made.close()
    made.close()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["r", "r.1", "r.2"]
    counts = [len(list(open_trace(tmp_path / name, strict=True))) for name in ("r.2", "r.1")]
    assert counts[0] >= 2048
    assert counts[1] > 0
    assert path.read_bytes().startswith(MAGIC)
    assert made.recorded == 12_000


def test_what_does_not_fit_the_queue_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "QUEUED_EVENTS", 10)
    monkeypatch.setattr(recorder, "QUEUED_BYTES", 1000)
    monkeypatch.setattr(recorder, "REST_S", 60.0)
    made = rig(tmp_path / "r")
    for _ in range(30):
        made.see(events.Fetch(1, 1, 1, bytes(16)))
    made.see(events.SessionResumed(1))
    assert made.dropped == 20
    made.close()
    assert len(list(open_trace(tmp_path / "r"))) == 10
    second = rig(tmp_path / "s")
    for _ in range(3):
        second.see(events.Fetch(1, 1, 1, bytes(480)))
    assert second.dropped == 1
    second.close()


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = rig(tmp_path / "r")

    class Full:
        def write(self, _data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    made._file.close()
    made._file = Full()  # type: ignore[assignment]
    made.see(events.Fetch(1, 1, 1, bytes(16)))
    made.close()
    assert "recording ends" in caplog.text
    made.see(events.Fetch(1, 1, 1, bytes(16)))
    assert made.dropped == 1


def test_a_file_that_cannot_be_made_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    async def main() -> None:
        service = Service(options(tmp_path / "no" / "r"))
        with pytest.raises(ConfigError, match="--record: cannot write"):
            await service.start()
        assert service.state != "serving"

    asyncio.run(main())


def test_counters_tell_of_it(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        client.release(await client.fetch(4))
        await asyncio.sleep(3 * recorder.REST_S)
        assert service.stats().counters["recorded_entries"] == 1
        assert service.stats().counters["unrecorded_entries"] == 0

    run(options(tmp_path / "r"), test)


def test_a_killed_recording_is_readable_up_to_its_last_second(tmp_path: Path) -> None:
    """What the file holds at any moment can be read: blocks are flushed whole."""
    clock = FakeClock()
    made = rig(tmp_path / "r", clock=clock)
    for number in itertools.count():
        made.see(events.Fetch(number, 1, 1, prompt(4, number % 100)))
        clock.time_ms += 200
        if (tmp_path / "r").stat().st_size > 4000:
            break
    raw = (tmp_path / "r").read_bytes()
    (tmp_path / "copy").write_bytes(raw)
    alive = list(open_trace(tmp_path / "copy"))
    assert 0 < len(alive) <= number + 1
    made.close()
    assert list(open_trace(tmp_path / "r"))[: len(alive)] == alive


def test_uses_are_recorded_where_events_carry_them(tmp_path: Path) -> None:
    if "use" not in {field.name for field in dataclasses.fields(events.Fetch)}:
        pytest.skip("events carry no use yet")
    from hicache.types import Use

    made = rig(tmp_path / "r")
    made.see(events.Fetch(1, 1, 1, prompt(4), use=Use("chat", 3)))  # type: ignore[call-arg]
    made.close()
    (found,) = open_trace(tmp_path / "r")
    assert (found.cls, found.turn) == ("chat", 3)
