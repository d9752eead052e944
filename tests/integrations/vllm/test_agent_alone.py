"""The agent and its lines where there is no sidecar, or where something else than the sidecar goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hicache.errors import ConfigError
from hicache.integrations.vllm import agent as agent_module
from hicache.integrations.vllm.agent import Agent
from hicache.integrations.vllm.commits import Commits, CommitTask, Outcome, Place, Settled
from hicache.integrations.vllm.namespaces import Namespaces
from hicache.integrations.vllm.requests import Identity
from hicache.integrations.vllm.settings import Save, VllmSettings
from hicache.rpc.client.arguments import NamespaceFields

PAGE_BYTES = 4096
FIELDS = NamespaceFields(model="toy", page_bytes=PAGE_BYTES, page_tokens=8)


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Agent]]:
    monkeypatch.setattr(agent_module, "GREETING_S", 0.2)  # nobody will be there
    with ExitStack() as stack:

        def made(fields_of: Any = lambda adapter, salt: FIELDS, **fields: Any) -> Agent:
            settings = VllmSettings(endpoint=f"unix:{tmp_path}/absent.sock", **fields)
            agent = Agent(settings, fields_of, PAGE_BYTES)
            stack.callback(agent.close)
            return agent

        yield made


def test_staging_memory_that_holds_no_page_is_an_error_at_start(agents: Callable[..., Agent]) -> None:
    """Later it would be one in the middle of a step."""
    with pytest.raises(ConfigError, match="staging_bytes 100 "):
        agents(staging_bytes=100)
    reader = agents(staging_bytes=100, save=Save.OFF)
    reader.start()
    assert not reader.stage(1)


def test_the_weights_are_looked_at_when_the_engine_starts_not_when_the_sidecar_does(
    agents: Callable[..., Agent],
) -> None:
    """A sidecar may come hours later, and the files may be other ones by then."""
    looked = threading.Event()

    def fields_of(adapter: str, salt: str) -> NamespaceFields:
        looked.set()
        return FIELDS

    agent = agents(fields_of)
    agent.start()
    assert looked.wait(10)


def test_clearing_after_the_end_says_so(agents: Callable[..., Agent]) -> None:
    agent = agents()
    agent.start()
    agent.close()
    assert agent.clear() == "the connector was shut down"


class _Staging:
    pages = 1

    def __init__(self) -> None:
        self.freed = False

    def free(self) -> None:
        self.freed = True


def _task(job: int, staging: _Staging) -> CommitTask:
    return CommitTask(job, "line", Identity(), b"\0" * 32, None, 0, (Place(staging, 0),))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), asyncio.CancelledError()])
def test_a_line_that_ends_badly_takes_jobs_again(error: BaseException) -> None:
    """What is put into a line that nobody works off any more would keep its staging memory for ever."""

    class Broken:
        async def get(self, identity: Identity) -> Any:
            raise error

    async def run() -> list[Settled]:
        told: list[Settled] = []
        commits = Commits(Broken(), told.append, durable=False, timeout_s=1)  # type: ignore[arg-type]
        for job in (1, 2):
            commits.add(_task(job, stagings[job - 1]))
            await asyncio.wait(list(commits._tasks), timeout=5)
            await asyncio.gather(*commits._tasks, return_exceptions=True)
        return told

    stagings = [_Staging(), _Staging()]
    told = asyncio.run(run())
    assert [(each.job, each.outcome) for each in told] == [(1, Outcome.LOST), (2, Outcome.LOST)]
    assert all(staging.freed for staging in stagings)


def test_leaving_namespaces_does_not_break_off_who_waits_for_one() -> None:
    """The circuit's probe waits there: broken off, it would never close the circuit again."""

    async def run() -> tuple[object, object]:
        client: Any = SimpleNamespace(namespace=lambda **fields: SimpleNamespace(**fields))
        begun, left = threading.Event(), threading.Event()

        def fields_of(adapter: str, salt: str) -> NamespaceFields:
            begun.set()
            left.wait(5)
            return FIELDS

        namespaces = Namespaces(client, fields_of)
        waiting = asyncio.create_task(namespaces.get(Identity()))
        await asyncio.to_thread(begun.wait, 5)
        namespaces.leave("nonce")
        left.set()
        return await asyncio.wait_for(waiting, 5), await namespaces.get(Identity())

    before, after = asyncio.run(run())
    assert not getattr(before, "revision", "") and "nonce" in getattr(after, "revision", "")
