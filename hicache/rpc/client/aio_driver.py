"""Runs the client's steps on an event loop: grpc.aio calls, one task for the life line, copies in threads."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import grpc

from hicache import heap
from hicache.errors import HicacheError, UnavailableError
from hicache.rpc.client import calls, channel
from hicache.rpc.client.core import Core
from hicache.rpc.client.driver import (
    GOODBYE_S,
    PAUSE_FIRST_S,
    PAUSE_MOST_S,
    SILENT_KEEP_ALIVES,
    new_request_id,
)
from hicache.rpc.client.lifeline import live
from hicache.rpc.client.options import ClientOptions
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import (
    SMALL_WORK_BYTES,
    Call,
    Download,
    EndWatch,
    NeedLink,
    NextEvents,
    NextMessage,
    OpenStream,
    OpenWatch,
    Send,
    Sleep,
    Step,
    Steps,
    T,
    Upload,
    WatchStep,
    Work,
)
from hicache.rpc.pb import session_pb2
from hicache.runtime.clock import Clock

log = logging.getLogger(__name__)


class _Stream:
    """One Attach stream, and the task that keeps the session alive."""

    def __init__(self, call: Any, core: Core) -> None:
        self._call = call
        self._core = core
        self._writing = asyncio.Lock()
        self._heard_ns = core.now_ns()
        self._beat: asyncio.Task[None] | None = None

    async def say(self, *messages: session_pb2.AttachRequest) -> None:
        """Send messages. Raises what ended the stream."""
        try:
            async with self._writing:
                for message in messages:
                    await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise channel.error_of(error) from None
        except asyncio.InvalidStateError as error:
            raise UnavailableError(f"the life line has ended: {error}") from None

    async def next(self) -> session_pb2.AttachResponse | None:
        """The next message; None at the end. Raises what ended the stream."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise channel.error_of(error) from None
        except asyncio.CancelledError:
            if not self._call.cancelled() or _cancelling():
                raise
            raise UnavailableError("the server has been silent for too long") from None
        self._heard_ns = self._core.now_ns()
        return None if message is grpc.aio.EOF else message

    def keep_alive(self) -> None:
        """From now on in the server's rhythm."""
        self._beat = asyncio.create_task(self._keep_alive(), name="hicache-keep-alive")

    async def end(self) -> None:
        """End it at once."""
        self._call.cancel()
        if self._beat is not None:
            self._beat.cancel()
            await asyncio.wait([self._beat])

    async def _keep_alive(self) -> None:
        try:
            while True:
                await self.say(*self._core.outgoing(), calls.keep_alive())
                keep_alive_s = self._core.session.keep_alive_ms / 1000
                await asyncio.sleep(keep_alive_s / 2)
                if self._core.now_ns() - self._heard_ns > SILENT_KEEP_ALIVES * keep_alive_s * 1e9:
                    self._call.cancel()
                    return
        except HicacheError:
            return  # the life line sees it too


def _cancelling() -> bool:
    """Whether this task itself is being cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Driver:
    """Belongs to the event loop it is first used on."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        self._address, self._secret = channel.address(target, options), channel.credentials(options)
        self._options = options
        self._ready = asyncio.Event()
        if options.keep_message_memory:
            heap.keep_freed(heap.MESSAGE_BYTES)
        self.core = Core(target, options, now_ns=Clock().now_ns, new_id=new_request_id, signal=self._signal)
        self._metadata = channel.metadata(options)
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._stream: _Stream | None = None
        self._undoing: set[asyncio.Task[None]] = set()
        self._transfers: set[asyncio.Task[Any]] = set()
        self._process = os.getpid()

    # --- steps

    async def run(self, steps: Steps[T]) -> T:
        """Run an operation to its end."""
        self.core.check_process()
        self._start()
        return await self._drive(steps)

    def start(self, steps: Steps[T]) -> asyncio.Task[T]:
        """Run an operation in a task of its own."""
        self.core.check_process()
        self._start()
        task = asyncio.create_task(self._drive(steps), name="hicache-transfer")
        self._transfers.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._transfers.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asks for the result is told; nobody need ask

    async def run_or_undo(self, steps: Steps[T], undo: Callable[[T], Steps[None]]) -> T:
        """As ``run``. A caller that is cancelled leaves it to end by itself, and then to be undone."""
        task = asyncio.create_task(self.run(steps))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            undoing = asyncio.create_task(self._undo(task, undo))
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            raise

    async def _undo(self, task: asyncio.Task[T], undo: Callable[[T], Steps[None]]) -> None:
        try:
            await self.run(undo(await task))
        except HicacheError as error:  # nothing was done, or it ends with the session
            log.debug("a call that was cancelled, of %s: %s", self.core.target, error)

    async def _drive(self, steps: Steps[T]) -> T:
        answer: Any = None
        error: HicacheError | None = None
        try:
            while True:
                try:
                    step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                answer, error = None, None
                try:
                    answer = await self._do(step)
                except HicacheError as failure:
                    error = failure
        finally:
            steps.close()

    async def _do(self, step: Step) -> Any:
        match step:
            case Call():
                return await self._call(step)
            case Work():
                return await _work(step)
            case NeedLink():
                return await self._wait_link(step.deadline_ns)
            case Sleep():
                return await asyncio.sleep(step.seconds)
            case Download():
                return await self._download(step)
            case Upload():
                return await self._upload(step)
            case OpenWatch() | NextEvents() | EndWatch():
                return await self._watch(step)
            case _:
                return await self._life(step)

    async def _watch(self, step: WatchStep) -> Any:
        try:
            match step:
                case OpenWatch():
                    return self._methods["WatchEvents"](step.request, metadata=self._metadata)
                case NextEvents():
                    message = await step.stream.read()
                    return None if message is grpc.aio.EOF else message
                case EndWatch():
                    return step.stream.cancel()
        except grpc.aio.AioRpcError as error:
            raise channel.error_of(error) from None
        except grpc.aio.UsageError as error:
            raise UnavailableError(f"the client is closed: {error}") from None
        except asyncio.CancelledError:
            if _cancelling():
                raise
            raise UnavailableError("the stream of events was cancelled") from None

    async def _call(self, step: Call) -> Any:
        try:
            return await self._methods[step.method](
                step.request, timeout=step.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise channel.error_of(error) from None
        except grpc.aio.UsageError as error:
            raise UnavailableError(f"the client is closed: {error}") from None

    async def _download(self, step: Download) -> None:
        call = self._methods["ReadPages"](step.request, timeout=step.timeout_s, metadata=self._metadata)
        try:
            async for chunk in call:
                step.take(chunk)
        except grpc.aio.AioRpcError as error:
            raise channel.error_of(error) from None
        finally:
            call.cancel()

    async def _upload(self, step: Upload) -> Any:
        try:
            return await self._methods["WritePages"](
                step.requests(), timeout=step.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise channel.error_of(error) from None

    async def _wait_link(self, deadline_ns: int) -> Link:
        while True:
            link = self.core.session.current()
            if link is not None:
                return link
            left_ns = deadline_ns - self.core.now_ns()
            if left_ns <= 0:
                raise self.core.session.why_not()
            try:
                async with asyncio.timeout(left_ns / 1e9):
                    await self._ready.wait()
            except TimeoutError:
                continue

    # --- the life line

    def _signal(self, *, ready: bool) -> None:
        if ready:
            self._ready.set()
        else:
            self._ready.clear()

    def _start(self) -> None:
        if self._task is not None or self.core.session.closed:
            return
        settings = channel.settings(self._options)
        self._channel = (
            grpc.aio.insecure_channel(self._address, settings)
            if self._secret is None
            else grpc.aio.secure_channel(self._address, self._secret, settings)
        )
        self._methods = channel.methods(self._channel)
        self._task = asyncio.create_task(self._keep_attached(), name="hicache-lifeline")

    async def _keep_attached(self) -> None:
        session, pause_s = self.core.session, PAUSE_FIRST_S
        while not session.closed:
            attachments = session.attachments
            try:
                await self._drive(live(self.core))
                session.detached()
            except HicacheError as error:
                log.debug("life line of %s: %s", self.core.target, error)
                session.failed(error)
            finally:
                if self._stream is not None:
                    await self._stream.end()
                    self._stream = None
            pause_s = PAUSE_FIRST_S if session.attachments > attachments else min(2 * pause_s, PAUSE_MOST_S)
            await asyncio.sleep(pause_s)

    async def _life(self, step: Step) -> Any:
        if isinstance(step, OpenStream):
            return await self._open(step)
        assert self._stream is not None, "the stream was opened"
        if isinstance(step, NextMessage):
            return await self._stream.next()
        assert isinstance(step, Send), f"no such step: {step}"
        return await self._stream.say(*step.messages)

    async def _open(self, step: OpenStream) -> session_pb2.AttachResponse:
        stream = self._stream = _Stream(self._methods["Attach"](metadata=self._metadata), self.core)
        try:
            async with asyncio.timeout(step.timeout_s):
                await stream.say(step.hello)
                first = await stream.next()
        except TimeoutError:
            raise UnavailableError("the server did not answer Hello in time") from None
        if first is None:
            raise UnavailableError("the server ended the life line before it began")
        stream.keep_alive()
        return first

    async def close(self) -> None:
        """Say goodbye and end the task and the channel. Idempotent; in a forked child it does nothing."""
        if os.getpid() != self._process or self.core.session.closed:
            return
        self.core.session.close()
        if self._task is not None and self._channel is not None:
            await self._say_goodbye()
            self._task.cancel()
            await asyncio.wait([self._task])
            await self._channel.close()
        for task in self._transfers:
            task.cancel()
        if self._undoing or self._transfers:
            await asyncio.wait([*self._undoing, *self._transfers])
        self.core.memory.close()
        self.core.arena.clear()

    async def _say_goodbye(self) -> None:
        """Wait for the server to end the stream, for a moment."""
        if self._stream is None or self._task is None:
            return
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._stream.say(calls.goodbye())
                await asyncio.wait([self._task])
        except (TimeoutError, UnavailableError):
            return


async def _work(step: Work) -> Any:
    """In a thread, unless it is little. A cancelled caller waits for it: it may be writing to the caller's memory."""
    if step.moved_bytes < SMALL_WORK_BYTES:
        return step.run()
    future = asyncio.get_running_loop().run_in_executor(None, step.run)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise
