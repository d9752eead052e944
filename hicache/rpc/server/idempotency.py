"""What makes a retried call answer as it did the first time.

Scope: one session. The same request id with the same payload gets the first answer again, and waits for it
while the first call still runs; with another payload it is refused. Kept are the last ``entries`` answers,
each for ``ttl_s``; calls that failed are not kept. An empty request id switches all this off. (The wire's
words: session.proto.)

The work of a call with a request id runs in a task of its own: a caller that hangs up does not undo it, so
that its retry finds the answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import xxhash
from google.protobuf.message import Message

from hicache.errors import ExistsError, InvalidArgumentError, StaleError
from hicache.runtime import log

MAX_REQUEST_ID_BYTES = 64


def payload_digest(request: Message, prompt: bytes = b"") -> bytes:
    """A digest of a whole request.

    A prompt that was already taken out of the message is given, and removed from the message, so that it is
    not copied again. xxh3 is enough: a client that forges a collision deceives only its own session.
    """
    digest = xxhash.xxh3_128(type(request).__name__.encode())
    if prompt:
        digest.update(prompt)
        request.ClearField("prompt")
    digest.update(request.SerializeToString())
    return digest.digest()


def check_request_id(request_id: bytes) -> None:
    """Raise InvalidArgumentError for a request id that is too long, and note it for log lines."""
    if len(request_id) > MAX_REQUEST_ID_BYTES:
        raise InvalidArgumentError(f"request_id has {len(request_id)} bytes, at most {MAX_REQUEST_ID_BYTES}")
    if request_id:
        log.request_id.set(request_id.hex())


@dataclasses.dataclass(slots=True)
class _Entry:
    digest: bytes
    answer: asyncio.Future[Any]  # a task that makes the answer, or a future that a stream's call fills
    expires_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class StreamAnswer:
    """What a call with a streamed payload answered, and the digest of that payload."""

    digest: bytes
    response: Any


class Claim:
    """The first call's hold on a request id; ends with ``finish`` or ``fail``."""

    def __init__(self, future: asyncio.Future[Any], forget: Callable[[], object]) -> None:
        self._future = future
        self._forget = forget

    def finish(self, answer: StreamAnswer) -> None:
        """Remember the answer and give it to calls that wait for it."""
        if not self._future.done():
            self._future.set_result(answer)

    def fail(self) -> None:
        """The call failed: a retry starts afresh."""
        if not self._future.done():
            self._forget()
            self._future.set_result(None)


class AnswerBook:
    """The remembered answers of one session.

    ``abandoned`` counts the running calls whose caller hung up: they still count against the session's bound.
    """

    def __init__(self, *, entries: int, ttl_s: float, now: Callable[[], float]) -> None:
        self._capacity = entries
        self._ttl_s = ttl_s
        self._now = now
        self.abandoned = 0
        self._entries: dict[bytes, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, request_id: bytes) -> Claim | asyncio.Future[Any] | None:
        """For a call whose payload is a stream, so that its digest is known only at its end.

        A Claim: this call is the first, and must end the claim. A future: await it for the first call's
        ``StreamAnswer``, or for None where the first call failed (then claim again). None: no request id.
        """
        if not request_id:
            return None
        check_request_id(request_id)
        entry = self._find(request_id)
        if entry is not None:
            return entry.answer
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._keep(request_id, b"", future)
        return Claim(future, lambda: self._entries.pop(request_id, None))

    def close(self) -> None:
        """The session ended: stop what is still running."""
        for entry in list(self._entries.values()):
            if isinstance(entry.answer, asyncio.Task):
                entry.answer.cancel()

    async def answer(
        self, request_id: bytes, digest: Callable[[], bytes], work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        """The answer of ``work``, run once for each request id.

        Raises what the work raises, and ExistsError for a request id that was used with another payload.
        """
        if not request_id:
            return await work()
        check_request_id(request_id)
        entry = self._find(request_id)
        if entry is None:
            entry = self._begin(request_id, digest(), work)
        elif entry.digest != digest():
            raise ExistsError(
                f"request id {request_id.hex()} was used with another payload",
                hint="choose a fresh id for each call",
            )
        try:
            return await asyncio.shield(entry.answer)
        except asyncio.CancelledError as error:
            if entry.answer.cancelled():
                raise StaleError("the session ended", hint="attach again") from error
            if not entry.answer.done():
                self._abandon(entry.answer)
            raise

    def _abandon(self, answer: asyncio.Future[Any]) -> None:
        self.abandoned += 1
        answer.add_done_callback(self._abandoned_done)

    def _abandoned_done(self, _: asyncio.Future[Any]) -> None:
        self.abandoned -= 1

    def _find(self, request_id: bytes) -> _Entry | None:
        entry = self._entries.pop(request_id, None)
        if entry is None or (entry.answer.done() and entry.expires_s <= self._now()):
            return None
        self._entries[request_id] = entry  # the most recently asked for goes last
        return entry

    def _begin(
        self, request_id: bytes, digest: bytes, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> _Entry:
        return self._keep(request_id, digest, asyncio.get_running_loop().create_task(work()))

    def _keep(self, request_id: bytes, digest: bytes, answer: asyncio.Future[Any]) -> _Entry:
        entry = self._entries[request_id] = _Entry(digest, answer, self._now() + self._ttl_s)
        answer.add_done_callback(lambda _: self._finished(request_id, entry))
        self._trim()
        return entry

    def _finished(self, request_id: bytes, entry: _Entry) -> None:
        entry.expires_s = self._now() + self._ttl_s
        failed = entry.answer.cancelled() or entry.answer.exception() is not None
        if failed and self._entries.get(request_id) is entry:
            del self._entries[request_id]

    def _trim(self) -> None:
        now = self._now()
        for request_id, entry in list(self._entries.items()):
            expired = entry.expires_s <= now
            if not expired and len(self._entries) <= self._capacity:
                return
            if entry.answer.done():  # a running call is bounded by the session's in-flight limit, not by this
                del self._entries[request_id]
