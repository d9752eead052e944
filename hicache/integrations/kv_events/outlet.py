"""One endpoint: a PUB socket for whoever listens, a ROUTER for whoever missed something.

Nothing here waits: a subscriber that does not read loses its own messages, beyond ``hwm`` of them, and sees the gap in
the sequence numbers. A replay is sent as fast as its asker takes it, beside everything else. One that asks for what is
not kept any more, a late comer for example, is told all anew: AllBlocksCleared, what there is, and then what is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable

import zmq

from hicache.errors import ConfigError, HicacheError
from hicache.integrations.kv_events.spec import OutletSpec

END_SEQUENCE = (-1).to_bytes(8, "big", signed=True)
SEQUENCE_BYTES = 8
#: What is kept for replay takes at most so much.
BUFFER_BYTES = 256 << 20
#: A replay ends when its asker took nothing for so long; so many go on at one time.
PATIENCE_S = 20.0
MAX_REPLAYS = 32
POLL_S = 0.02
RETRY_S = 0.005
log = logging.getLogger(__name__)

Message = tuple[bytes, bytes]  # topic, payload


async def _nothing() -> AsyncIterator[Message]:
    """Nothing to tell anew."""
    none: list[Message] = []
    for message in none:
        yield message


class Outlet:
    """Bound when made; ``first``: the first sequence number. Raises ConfigError where an address cannot be had."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], spec: OutletSpec, first: int) -> None:
        self.spec = spec
        self.retell: Callable[[], AsyncIterator[Message]] = _nothing  # what there is, as messages
        self.first = first
        self._kept: deque[tuple[int, bytes, bytes]] = deque()  # sequence, topic, payload
        self._kept_bytes = 0
        self._sequence = itertools.count(first)
        self._replays: set[asyncio.Task[None]] = set()
        self.messages = self.replayed = self.retold = self.refused = 0
        self._publish = context.socket(zmq.PUB)
        self._publish.setsockopt(zmq.SNDHWM, spec.hwm)
        self._publish.setsockopt(zmq.LINGER, 500)
        self._answer: zmq.Socket[bytes] | None = None
        try:
            (self._publish.connect if spec.connect else self._publish.bind)(spec.bind)
            if spec.replay:
                self._answer = context.socket(zmq.ROUTER)
                self._answer.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tell us when an asker is full, or gone
                self._answer.setsockopt(zmq.LINGER, 0)
                self._answer.bind(spec.replay)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind {spec.bind} {spec.replay}: {error}") from error

    @property
    def address(self) -> str:
        """Where it publishes, with the port that it got."""
        return self._publish.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay_address(self) -> str:
        """Where it answers replays; empty without."""
        return self._answer.getsockopt_string(zmq.LAST_ENDPOINT) if self._answer is not None else ""

    # --- publishing

    def beat(self, topic: bytes, payload: bytes) -> int:
        """Publish a message that says nothing: who missed the last one sees it now. It is not kept."""
        sequence = next(self._sequence)
        self._publish.send_multipart([topic, sequence.to_bytes(SEQUENCE_BYTES, "big"), payload])
        return sequence

    def send(self, topic: bytes, payload: bytes) -> int:
        """Publish a message and keep it for replay; its sequence number."""
        sequence = self.beat(topic, payload)
        self._kept.append((sequence, topic, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self.spec.buffer or (self._kept_bytes > BUFFER_BYTES and len(self._kept) > 1):
            self._kept_bytes -= len(self._kept.popleft()[2])
        self.messages += 1
        return sequence

    # --- replay

    async def answer(self) -> None:
        """Answer replays until cancelled."""
        while self._answer is not None:
            try:
                frames = self._answer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await asyncio.sleep(POLL_S)
                continue
            if len(self._replays) >= MAX_REPLAYS:
                self.refused += 1
                log.warning("a replay was refused: %d are being sent", MAX_REPLAYS)
                continue
            task = asyncio.get_running_loop().create_task(self._replay(self._answer, frames))
            self._replays.add(task)
            task.add_done_callback(self._replays.discard)

    async def _replay(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        """Everything that is kept from the wanted message on, then the end; the end alone where that is nothing."""
        *back, wanted = frames if len(frames) > 1 else [*frames, b""]  # who asks, and REQ's empty frame
        start = int.from_bytes(wanted, "big") if len(wanted) == SEQUENCE_BYTES else -1
        kept = [each for each in self._kept if 0 <= start <= each[0]]
        oldest = self._kept[0][0] if self._kept else self.first
        missed = 0 <= start < oldest and oldest > self.first
        if missed and not await self._tell_anew(socket, back, start, oldest):
            return
        for sequence, topic, payload in kept:
            if not await _send(socket, [*back, topic, sequence.to_bytes(SEQUENCE_BYTES, "big"), payload]):
                return
            self.replayed += 1
        await _send(socket, [*back, b"", END_SEQUENCE, b""])

    async def _tell_anew(self, socket: zmq.Socket[bytes], back: list[bytes], start: int, oldest: int) -> bool:
        """What there is, under the numbers of messages that are not kept any more."""
        self.retold += 1
        number = start
        try:
            async for topic, payload in self.retell():
                if not await _send(socket, [*back, topic, number.to_bytes(SEQUENCE_BYTES, "big"), payload]):
                    return False
                number = min(number + 1, oldest - 1)
        except HicacheError as error:
            log.warning("a replay has only what is kept: %s", error)
        return True

    async def stop(self) -> None:
        """End the replays, and close."""
        for task in list(self._replays):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._publish.close()
        if self._answer is not None:
            self._answer.close()
            self._answer = None


async def _send(socket: zmq.Socket[bytes], frames: list[bytes]) -> bool:
    """Send as soon as the asker has room; False where it has gone or takes nothing."""
    left_s = PATIENCE_S
    while left_s > 0:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            await asyncio.sleep(RETRY_S)
            left_s -= RETRY_S
            continue
        except zmq.ZMQError:  # nobody of this name, or closed
            return False
        return True
    return False
