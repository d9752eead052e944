"""The one thread that talks to the sidecar for an engine: look-ups, leases and commits, never on the step's path.

The scheduler hands things over and takes answers up; neither ever waits for a call.

While the sidecar is absent, or did not answer in time, the circuit is open: ``online`` is False and nothing is asked.
The client attaches again by itself; after a call that went wrong a probe has to go right first.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import logging
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any

from hicache.errors import ConfigError, ExhaustedError, HicacheError
from hicache.integrations.vllm.circuit import Circuit
from hicache.integrations.vllm.commits import Commits, CommitTask, Place, Settled, free_places
from hicache.integrations.vllm.namespaces import FieldsOf, Namespaces
from hicache.integrations.vllm.requests import Identity, Question
from hicache.integrations.vllm.rounds import Failures, Rounds, waited
from hicache.integrations.vllm.settings import WHERE, AckAt, Save, VllmSettings
from hicache.rpc.client import ClientOptions, DataPlane, aio
from hicache.rpc.client.aio_held import Lease

log = logging.getLogger(__name__)

#: Leases that were given back may wait so long for company.
RELEASE_DELAY_S = 0.02
#: How often leases are looked at for renewal.
TICK_S = 0.5
#: Time to reach the sidecar at the start, before an engine's first request finds it absent.
GREETING_S = 3.0
#: Time to say goodbye. With flush_ms it stays below the 5 s after which vLLM kills its core.
CLOSE_S = 1.0


class Agent:
    """Talks to the sidecar in a thread of its own. All methods but ``start``, ``close`` and ``clear`` return at once.

    ``news`` is set whenever an answer or an outcome has come.
    """

    def __init__(self, settings: VllmSettings, fields_of: FieldsOf, page_bytes: int) -> None:
        if page_bytes > settings.staging_bytes and settings.save is not Save.OFF:
            raise ConfigError(
                f"{WHERE}: staging_bytes {settings.staging_bytes} is less than one page of {page_bytes} bytes",
                hint='raise it, or set save to "off"',
            )
        self.settings = settings
        self.news = threading.Event()
        self._page_bytes = page_bytes
        self._timeout_s = settings.rpc_timeout_ms / 1000
        options = ClientOptions(
            name="vllm",
            timeout_s=self._timeout_s,
            connect_timeout_s=self._timeout_s,
            data_plane=DataPlane.SHM,
            write_limit_bytes=settings.staging_bytes,
        )
        self._client = aio.Client(settings.endpoint, options)
        self._settled: collections.deque[Settled] = collections.deque()
        self._ending = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._greeted = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._namespaces = Namespaces(self._client, fields_of)
        self._circuit = Circuit(
            self._client,
            self._namespaces,
            self._call,
            target=settings.endpoint,
            timeout_s=self._timeout_s,
            pause_s=settings.reconnect_ms / 1000,
        )
        self._failures = Failures(self._circuit.suspect)
        self._rounds = Rounds(
            self._client,
            self._namespaces,
            settings,
            self._failures,
            spawn=self._spawn,
            told=self.news.set,
        )
        self._commits = Commits(
            self._namespaces,
            self._tell,
            durable=settings.ack is AckAt.DURABLE,
            timeout_s=self._timeout_s,
        )
        self._thread = threading.Thread(target=self._run, name="hicache-agent", daemon=True)

    def start(self) -> None:
        """Begin; waits a moment for the sidecar, so that an engine's very first request can find it."""
        self._thread.start()
        atexit.register(self.close)
        self._greeted.wait(GREETING_S)

    # --- what the scheduler calls

    @property
    def online(self) -> bool:
        """Whether it is worth asking, this moment."""
        return self._circuit.closed and not self._ending

    def gauges(self) -> dict[str, int]:
        """What is so this moment, by the names in ``stats``."""
        return {
            "online": int(self.online),
            "leases": len(self._rounds.held),
            "staged_bytes": self._client.core.memory.used_bytes,
        }

    def ask(self, question: Question) -> None:
        """Look a prompt up; the answer appears in the question."""
        self._rounds.ask(question)
        self._call(self._wake.set)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self._rounds.release(lease)
        self._call(lambda: self._loop.call_later(RELEASE_DELAY_S, self._wake.set))

    def report(self, lease: Lease, pages: Iterable[int]) -> None:
        """Have the sidecar look at pages whose checksum was wrong, then give the lease back.

        Until it has looked nothing is committed: the same pages, computed anew, would count as present.
        """
        bad = sorted(set(pages))
        self._call(lambda: self._spawn(self._report(lease, bad)))

    def stage(self, pages: int) -> list[Place]:
        """Up to so many places of a page each in staging memory; fewer, or none, where it is full."""
        places: list[Place] = []
        try:
            while len(places) < pages:
                staging = self._client.staging(self._page_bytes, pages - len(places))
                places += (Place(staging, index) for index in range(staging.pages))
        except HicacheError as error:
            if not isinstance(error, ExhaustedError):
                self._failures.complain(error, "pages cannot be staged, so they are not stored")
            return places
        return places

    def commit(self, task: CommitTask) -> None:
        """Store complete pages; the outcome comes with ``take_settled``."""
        if not self._call(lambda: self._commits.add(task)):
            self._commits.drop(task)

    def take_settled(self) -> list[Settled]:
        """Jobs whose outcome is known, each told once."""
        found = []
        while self._settled:
            found.append(self._settled.popleft())
        return found

    def suspect(self) -> None:
        """An answer did not come in time: nothing is asked until a probe went right."""
        self._circuit.suspect()

    def clear(self) -> str:
        """Drop all of this model's pages in the sidecar, and use namespaces of this process's own from now on.

        Waits for the sidecar. Answers why it could not drop them, or nothing.
        """
        cleared: Future[str] = Future()
        if not self._call(lambda: self._spawn(self._clear(cleared))):
            return "the connector was shut down"
        try:
            return cleared.result(self._timeout_s + 1)
        except TimeoutError:
            return "the sidecar did not answer in time"

    def close(self) -> None:
        """Store what is queued, for at most ``flush_ms``, then end the session. Idempotent."""
        atexit.unregister(self.close)
        self._ending = True
        if self._thread.is_alive():
            self._call(self._wake.set)
            self._thread.join(self.settings.flush_ms / 1000 + CLOSE_S)

    # --- the thread

    def _call(self, what: Callable[[], object]) -> bool:
        """Have the loop do something. False: it has ended, and with it the session and all it held."""
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            return False
        return True

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()
            self._rounds.abandon()

    async def _main(self) -> None:
        self._spawn(self._circuit.watch())
        self._spawn(_know_model(self._namespaces, self._failures))
        self._spawn(self._greet())
        self._spawn(self._circuit.tell())
        try:
            while not self._ending:
                await waited(self._wake, TICK_S)
                await self._rounds.round()
            await self._flush()
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._client.close()

    def _spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _flush(self) -> None:
        """Commits that are queued get ``flush_ms``; without a sidecar none."""
        if self._circuit.closed:
            try:
                async with asyncio.timeout(self.settings.flush_ms / 1000):
                    await self._commits.idle()
            except TimeoutError:
                log.warning("hicache: not all pages could be stored within flush_ms of the engine's end")
        await self._commits.stop()

    async def _greet(self) -> None:
        """Reach the sidecar and work out the model's identity before anybody asks."""
        try:
            await self._client.connect()
            self._greeted.set()
            await self._circuit.introduce()
            await asyncio.to_thread(
                lambda: free_places(self.stage(1))
            )  # its first region, before a step needs it
        except HicacheError as error:
            self._failures.complain(error, "the sidecar cannot be used yet; until then all is computed")
        finally:
            self._greeted.set()

    # --- the rest

    async def _report(self, lease: Lease, pages: list[int]) -> None:
        with self._commits.held_up():
            try:
                await lease.report_corrupt(pages)
            except HicacheError as error:
                log.debug("bad pages could not be reported: %s", error)
        self._rounds.release(lease)
        self._wake.set()

    def _tell(self, settled: Settled) -> None:
        self._settled.append(settled)
        self.news.set()

    async def _clear(self, cleared: Future[str]) -> None:
        """Leave the namespaces, then empty them."""
        handles = self._namespaces.all()
        self._commits.drop_all()
        self._namespaces.leave(secrets.token_hex(8))
        problem = "the connector was shut down"
        try:
            for handle in handles:
                await self._client.admin.clear(handle)
            problem = ""
        except HicacheError as error:
            problem = str(error)
        finally:
            cleared.set_result(problem)


async def _know_model(namespaces: Namespaces, failures: Failures) -> None:
    """Look at the weights' files now, also without a sidecar: later they may not be those that were loaded."""
    try:
        await namespaces.get(Identity())
    except HicacheError as error:
        failures.complain(error, "what model this is cannot be told, so nothing is cached")
