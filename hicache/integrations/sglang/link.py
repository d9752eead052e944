"""The backend's connection: it never makes SGLang wait for longer than the deadline, and comes back by itself.

A call starts only while there is a session and no pause is on. A call that runs out of time begins a pause, in which
all calls are answered as misses at once; so a sidecar that hangs costs one deadline a pause, not one a call.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hicache.errors import HicacheError, UnavailableError
from hicache.integrations.sglang.settings import SglangSettings
from hicache.rpc.client import Client, Lease
from hicache.rpc.client.batching import Batches
from hicache.rpc.client.many import FetchQuery

log = logging.getLogger(__name__)

NS_PER_MS = 1_000_000
#: What is left to a call for its answer, after all waiting that it asked for.
MARGIN_MS = 50
#: Threads that copy and verify pages of one load together, the caller's among them.
COPY_LANES = min(4, os.cpu_count() or 1)


class Absent(Exception):  # no error: the answer is a miss
    """There is no sidecar to ask, or no time left."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deadline:
    """When a call of SGLang's must be answered."""

    link: Link
    at_ns: int

    def left_ms(self, most_ms: int | None = None) -> int:
        """What is left, at most so much. Raises Absent where nothing is."""
        left_ms = (self.at_ns - self.link.now_ns()) // NS_PER_MS - MARGIN_MS
        if left_ms <= 0:
            raise Absent
        return left_ms if most_ms is None else min(left_ms, most_ms)

    def left_s(self) -> float:
        """What is left, in seconds. Raises Absent."""
        return self.left_ms() / 1000


class Link:
    """One connection to the sidecar. Any thread may call it."""

    def __init__(self, settings: SglangSettings, name: str) -> None:
        """Begins to attach, and waits for it up to ``attach_wait_ms``; raises ConfigError for a bad endpoint."""
        self.settings = settings
        self.client = Client(
            settings.endpoint,
            name=name,
            timeout_s=settings.deadline_s,
            connect_timeout_s=max(settings.attach_wait_ms, 1) / 1000,
            write_limit_bytes=settings.write_limit_bytes,
            data_plane="shm",
            verify="always",
        )
        self.now_ns = self.client.core.now_ns
        self.copiers = ThreadPoolExecutor(max(1, COPY_LANES - 1), thread_name_prefix="hicache-copy")
        self._paused_until_ns = 0
        self._told = False
        self.failures = 0  # calls that a failing sidecar spoiled
        attaching = threading.Thread(target=self._attach, name="hicache-attach", daemon=True)
        attaching.start()
        attaching.join(settings.attach_wait_ms / 1000)

    def close(self) -> None:
        """End the session. Idempotent."""
        self.copiers.shutdown()
        self.client.close()

    @contextmanager
    def call(self) -> Iterator[Deadline]:
        """One call of SGLang's. What fails inside is logged and leaves the block; the caller answers a miss.

        Where nobody can be asked the deadline is over already: the first look at it leaves the block.
        """
        now_ns = self.now_ns()
        absent = not self.client.attached or now_ns < self._paused_until_ns
        try:
            yield Deadline(self, now_ns + (0 if absent else self.settings.deadline_ms) * NS_PER_MS)
            self._told = False
        except Absent:
            return
        except HicacheError as error:
            self.failures += 1
            if isinstance(error, UnavailableError):
                self._paused_until_ns = self.now_ns() + self.settings.retry_ms * NS_PER_MS
            if not self._told:  # once, until a call goes well again
                self._told = True
                log.warning("hicache answers as if nothing were cached: %s", error)

    def fetch(
        self, pages: Batches, prompts: Sequence[bytes], deadline: Deadline
    ) -> list[Lease | HicacheError]:
        """A lease for each prompt, or why there is none."""
        queries = [FetchQuery(pages.handle, prompt) for prompt in prompts]
        left_ms = deadline.left_ms()
        wait_ms = min(self.settings.load_wait_ms, left_ms * 3 // 4)
        return self.client.fetch_many(queries, wait_ms=wait_ms, timeout_s=(left_ms - wait_ms) / 1000)

    def _attach(self) -> None:
        try:
            self.client.connect()
        except HicacheError as error:
            log.warning("hicache's sidecar is not there yet, it is used as soon as it is: %s", error)
