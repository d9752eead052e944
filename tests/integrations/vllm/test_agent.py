"""The agent against a real sidecar: what the toy engine stores is what it loads, whatever becomes of the sidecar."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_engine
from sidecars import Sidecar
from toy_engine import LOADING, Access, ToyEngine, ToyRequest, truth

from hicache import Client
from hicache.integrations.vllm.agent import Agent
from hicache.integrations.vllm.requests import Adapter, Identity, Shape
from hicache.integrations.vllm.scheduler import Scheduler
from hicache.integrations.vllm.settings import AckAt, VllmSettings
from hicache.integrations.vllm.staging import StagingMaps
from hicache.rpc.client.arguments import NamespaceFields
from hicache.runtime.clock import Clock

BLOCK, PAGE = 4, 8
PAGE_BYTES = PAGE * toy_engine.SLOT_BYTES


def fields_of(adapter: str, salt: str) -> NamespaceFields:
    return NamespaceFields(model="toy", page_bytes=PAGE_BYTES, page_tokens=PAGE, adapter=adapter, salt=salt)


class Rig:
    """A toy engine with the real agent."""

    def __init__(self, target: str, **fields: Any) -> None:
        engine = {name: fields.pop(name) for name in ("ahead", "budget", "load_steps") if name in fields}
        settings = VllmSettings(endpoint=target, **fields)
        self.agent = Agent(settings, fields_of, PAGE_BYTES)
        self.agent.start()
        self.scheduler = Scheduler(settings, Shape(BLOCK, PAGE, PAGE_BYTES), self.agent, Clock().now_ns)
        self.client = Client(target)
        self.maps = StagingMaps()
        access = Access(
            read=lambda ticket, page: self.client.reader(ticket).rows(page).tobytes(),
            rows=lambda run: self.maps.rows(run, PAGE_BYTES),
            valid=lambda ticket: self.client.reader(ticket).still_valid(),
        )
        self.engine = ToyEngine(self.scheduler, access, **engine)
        self.requests = 0

    def request(self, prompt: list[int], **extra: Any) -> ToyRequest:
        self.requests += 1
        return self.engine.add(ToyRequest(f"r{self.requests}", prompt, **extra))

    def run(self, *requests: ToyRequest, outputs: int = 0) -> float:
        began = time.monotonic()
        self.engine.run(*requests, outputs=outputs, steps=5000)
        took_s = time.monotonic() - began
        self.engine.drain()
        return took_s

    def settle(self) -> None:
        wait_until(lambda: self.engine.step() or not self.scheduler.saves._committing)  # type: ignore[func-returns-value]
        wait_until(lambda: self.agent.gauges()["leases"] == self.agent.gauges()["staged_bytes"] == 0)

    def close(self) -> None:
        self.agent.close()
        self.client.close()
        self.maps.close()


def wait_until(is_true: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def prompt(count: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + n * 104729) % 1009 for n in range(count)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("s"), ("--host-bytes", "64MiB", "--no-prefault")) as sidecar:
        yield sidecar


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path, ("--host-bytes", "64MiB", "--no-prefault")) as sidecar:
        yield sidecar


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    with ExitStack() as stack:

        def make(sidecar: Sidecar, **fields: Any) -> Rig:
            rig = Rig(sidecar.target, **fields)
            stack.callback(rig.close)
            return rig

        yield make


@pytest.mark.parametrize(("load_async", "ahead"), [(True, 0), (False, 0), (True, 1), (False, 1)])
def test_one_engine_stores_and_another_loads(
    shared: Sidecar, rigs: Callable[..., Rig], load_async: bool, ahead: int
) -> None:
    tokens = prompt(100, seed=10 + 2 * ahead + load_async)
    first = rigs(shared, load_async=load_async, ahead=ahead, budget=24)
    first.run(first.request(tokens))
    first.settle()
    second = rigs(shared, load_async=load_async, ahead=ahead, budget=24)
    request = second.request(tokens)
    wait_until(lambda: second.engine.step() or request.status not in {"waiting", LOADING})  # type: ignore[func-returns-value]
    assert second.engine.hit_tokens == 96
    table = list(request.blocks)
    second.run(request)
    held = b"".join(second.engine.memory[block].tobytes() for block in table[:24])
    assert held == truth(tokens)[: len(held)]
    second.settle()


def test_what_is_queued_is_stored_before_the_engine_ends(shared: Sidecar, rigs: Callable[..., Rig]) -> None:
    tokens = prompt(64, seed=20)
    first = rigs(shared)
    first.run(first.request(tokens))
    first.close()
    second = rigs(shared)
    second.run(second.request(tokens))
    assert second.engine.hit_tokens == 56


def test_a_lost_sidecar_costs_no_waiting_and_is_used_again_when_it_is_back(
    own: Sidecar, rigs: Callable[..., Rig]
) -> None:
    rig = rigs(own, reconnect_ms=50)
    rig.run(rig.request(prompt(64)))
    rig.settle()
    own.kill()
    wait_until(lambda: not rig.agent.online)
    assert rig.run(rig.request(prompt(64, seed=2))) < 0.5
    assert rig.engine.hit_tokens == 0
    own.start()
    wait_until(lambda: rig.agent.online)
    rig.run(rig.request(prompt(64, seed=3)))
    rig.settle()
    rig.engine.cached.clear()
    rig.run(rig.request(prompt(64, seed=3)))
    assert rig.engine.hit_tokens == 56
    rig.settle()


def test_the_log_tells_once_which_sidecar_is_used_and_when_it_is_lost(
    own: Sidecar, rigs: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="hicache.integrations.vllm")

    def said() -> list[str]:
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    rigs(own, reconnect_ms=50)
    wait_until(lambda: len(said()) == 1)
    own.kill()
    wait_until(lambda: len(said()) == 2)
    own.start()
    wait_until(lambda: len(said()) == 3)
    found, lost, again = said()
    assert found == again
    assert found.startswith(
        f"INFO hicache: uses the sidecar at {own.target} (host 0.06 GiB), pages of {PAGE} "
    )
    assert lost.startswith(f"WARNING hicache: the sidecar at {own.target} is lost")


def test_a_silent_sidecar_is_waited_for_once(own: Sidecar, rigs: Callable[..., Rig]) -> None:
    rig = rigs(own, lookup_timeout_ms=300, load_wait_ms=100, rpc_timeout_ms=500, reconnect_ms=50)
    rig.run(rig.request(prompt(64)))
    rig.settle()
    os.kill(own.pid, signal.SIGSTOP)
    try:
        first_s = rig.run(rig.request(prompt(64, seed=2)))
        assert 0.25 < first_s < 5
        assert not rig.agent.online
        assert rig.run(rig.request(prompt(64, seed=3))) < 0.25
    finally:
        os.kill(own.pid, signal.SIGCONT)
    wait_until(lambda: rig.agent.online)
    rig.engine.cached.clear()
    rig.run(rig.request(prompt(64)))
    assert rig.engine.hit_tokens == 56
    rig.settle()


def test_an_engine_may_start_before_its_sidecar(tmp_path: Path, rigs: Callable[..., Rig]) -> None:
    sidecar = Sidecar(tmp_path, ("--host-bytes", "64MiB", "--no-prefault"))
    rig = rigs(sidecar, reconnect_ms=50)
    assert not rig.agent.online
    assert rig.run(rig.request(prompt(64))) < 0.5
    with sidecar:
        wait_until(lambda: rig.agent.online)
        rig.run(rig.request(prompt(64)))
        rig.settle()
        with Client(sidecar.target) as client:
            assert client.namespace(**fields_of("", "")).match(prompt(64)).matched_pages == 8


def test_leases_are_renewed_while_their_requests_wait(shared: Sidecar, rigs: Callable[..., Rig]) -> None:
    tokens = prompt(64, seed=30)
    rig = rigs(shared, lease_ttl_ms=1500, load_timeout_ms=700)
    rig.run(rig.request(tokens))
    rig.settle()
    rig.engine.cached.clear()
    request = rig.request(tokens)
    wait_until(lambda: rig.scheduler.matched_tokens(request, 0)[0] is not None)
    asks = rig.scheduler._states[request.request_id].asks
    time.sleep(2.2)
    assert rig.scheduler.matched_tokens(request, 0) == (56, True)
    assert rig.scheduler._states[request.request_id].asks == asks, "the same lease still"
    rig.run(request)
    rig.settle()


def test_adapters_are_told_apart_by_their_files_and_changed_ones_are_left_alone(
    shared: Sidecar, rigs: Callable[..., Rig], tmp_path: Path
) -> None:
    def adapter(folder: str, weights: bytes) -> Any:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text("{}")
        (path / "adapter_model.safetensors").write_bytes(weights)
        return SimpleNamespace(lora_name="same name", lora_path=str(path), lora_int_id=1, load_inplace=False)

    tokens = prompt(64, seed=40)
    rig = rigs(shared)

    def hit(lora: Any) -> int:
        before = rig.engine.hit_tokens
        rig.engine.cached.clear()
        rig.run(rig.request(tokens, lora_request=lora))
        rig.settle()
        return rig.engine.hit_tokens - before

    one, copy, other = adapter("one", b"1" * 99), adapter("copy", b"1" * 99), adapter("other", b"2" * 99)
    assert [hit(one), hit(one), hit(copy), hit(other), hit(other)] == [0, 56, 56, 0, 56]
    adapter("one", b"3" * 99)
    assert [hit(one), hit(one)] == [0, 0], "the engine may still compute with what it was before"


def test_clearing_empties_the_sidecar_and_separates_what_comes_after(
    own: Sidecar, rigs: Callable[..., Rig]
) -> None:
    rig = rigs(own)
    rig.run(rig.request(prompt(64), cache_salt="s"), rig.request(prompt(64)))
    rig.settle()
    assert rig.scheduler.reset()
    with Client(own.target) as client:
        for salt in ("", "s"):
            assert client.namespace(**fields_of("", salt)).match(prompt(64)).matched_pages == 0
    for hits in (0, 56):
        rig.engine.cached.clear()
        rig.run(rig.request(prompt(64)))
        rig.settle()
        assert rig.engine.hit_tokens == hits
    other = rigs(own)
    other.run(other.request(prompt(64)))
    assert other.engine.hit_tokens == 0, "its weights may have been changed; theirs were not"


def test_durable_commits_are_acknowledged_when_they_are_durable(
    tmp_path: Path, rigs: Callable[..., Rig]
) -> None:
    disk = ("--disk-path", str(tmp_path / "disk"), "--disk-bytes", "64MiB")
    with Sidecar(tmp_path, ("--host-bytes", "64MiB", "--no-prefault", *disk)) as sidecar:
        rig = rigs(sidecar, ack=AckAt.DURABLE)
        rig.run(rig.request(prompt(64)))
        rig.settle()
        sidecar.kill()
        wait_until(lambda: not rig.agent.online)  # else the next wait may be over before the loss is noticed
        sidecar.start()
        wait_until(lambda: rig.agent.online)
        with Client(sidecar.target) as client:
            wait_until(lambda: not client.admin.stats().counters["recovering"])
        rig.engine.cached.clear()
        rig.run(request := rig.request(prompt(64)))
        assert rig.engine.hit_tokens == 56
        assert request.num_tokens >= 64
        rig.settle()


def test_an_identity_that_cannot_be_told_is_not_cached(shared: Sidecar, rigs: Callable[..., Rig]) -> None:
    rig = rigs(shared)
    gone = SimpleNamespace(lora_name="x", lora_path="/nowhere/at/all", lora_int_id=3, load_inplace=False)
    for _ in range(2):
        rig.engine.cached.clear()
        rig.run(rig.request(prompt(64, seed=50), lora_request=gone))
        rig.settle()
    assert rig.engine.hit_tokens == 0
    assert rig.agent.online
    assert Identity(Adapter("x", "/nowhere/at/all", 3)) not in rig.agent._namespaces._handles
