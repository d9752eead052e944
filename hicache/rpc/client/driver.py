"""Runs the client's steps with blocking gRPC calls and one daemon thread for the life line."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import queue
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from hicache import heap
from hicache.errors import HicacheError, UnavailableError
from hicache.rpc.client import calls, channel
from hicache.rpc.client.core import Core
from hicache.rpc.client.lifeline import live
from hicache.rpc.client.options import ClientOptions
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import (
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

REQUEST_ID_BYTES = 16
PAUSE_FIRST_S = 0.05
PAUSE_MOST_S = 0.5
GOODBYE_S = 1.0
#: The life line is given up when the server has been silent for so many keep-alives.
SILENT_KEEP_ALIVES = 3


def new_request_id() -> bytes:
    """Sixteen random bytes."""
    return secrets.token_bytes(REQUEST_ID_BYTES)


class _Stream:
    """One Attach stream. gRPC reads our messages in a thread of its own, which also keeps the session alive."""

    def __init__(self, method: Any, hello: session_pb2.AttachRequest, metadata: Any, core: Core) -> None:
        self._core = core
        self._outgoing: queue.SimpleQueue[session_pb2.AttachRequest | None] = queue.SimpleQueue()
        self._outgoing.put(hello)
        self._heard_ns = core.now_ns()
        self._call = method(self._requests(), metadata=metadata)

    def say(self, *messages: session_pb2.AttachRequest | None) -> None:
        """Send messages; None ends our side."""
        for message in messages:
            self._outgoing.put(message)

    def next(self) -> session_pb2.AttachResponse | None:
        """The next message; None at the end. Raises what ended the stream."""
        try:
            message: session_pb2.AttachResponse | None = next(self._call, None)
        except grpc.RpcError as error:
            raise channel.error_of(error) from None
        self._heard_ns = self._core.now_ns()
        return message

    def cancel(self) -> None:
        """End it at once."""
        self._call.cancel()
        self._outgoing.put(None)

    def _requests(self) -> Iterator[session_pb2.AttachRequest]:
        while True:
            keep_alive_s = self._core.session.keep_alive_ms / 1000
            try:
                message = self._outgoing.get(timeout=keep_alive_s / 2)
            except queue.Empty:
                if self._core.now_ns() - self._heard_ns > SILENT_KEEP_ALIVES * keep_alive_s * 1e9:
                    self._call.cancel()
                    return
                yield from self._core.outgoing()
                yield calls.keep_alive()
                continue
            if message is None:
                return
            yield message


class Driver:
    """Any thread may run steps; the life line has its own."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_attached, name="hicache-lifeline", daemon=True)
        self._started = False
        self._stream: _Stream | None = None
        self._process = os.getpid()
        address, secret = channel.address(target, options), channel.credentials(options)
        if options.keep_message_memory:
            heap.keep_freed(heap.MESSAGE_BYTES)
        self.core = Core(target, options, now_ns=Clock().now_ns, new_id=new_request_id, signal=self._signal)
        self._metadata = channel.metadata(options)
        self._channel = (
            grpc.insecure_channel(address, channel.settings(options))
            if secret is None
            else grpc.secure_channel(address, secret, channel.settings(options))
        )
        self._methods = channel.methods(self._channel)

    # --- steps

    def run(self, steps: Steps[T]) -> T:
        """Run an operation to its end."""
        self.core.check_process()
        if not self._started:
            self._start()
        return self._drive(steps)

    def start(self, steps: Steps[T]) -> concurrent.futures.Future[T]:
        """Run an operation in a thread of its own."""
        self.core.check_process()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        thread = threading.Thread(
            target=self._run_into, args=(future, steps), name="hicache-transfer", daemon=True
        )
        thread.start()
        return future

    def _run_into(self, future: concurrent.futures.Future[T], steps: Steps[T]) -> None:
        try:
            future.set_result(self._drive(steps))
        except HicacheError as error:
            future.set_exception(error)
        finally:
            if not future.done():  # a bug, which the thread's end reports
                future.set_exception(HicacheError("the transfer broke off: see the log"))

    def _drive(self, steps: Steps[T]) -> T:
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
                    answer = self._do(step)
                except HicacheError as failure:
                    error = failure
        finally:
            steps.close()

    def _do(self, step: Step) -> Any:
        match step:
            case Call():
                return self._call(step)
            case Work():
                return step.run()
            case NeedLink():
                return self._wait_link(step.deadline_ns)
            case Sleep():
                return self._closing.wait(step.seconds)
            case Download():
                return self._download(step)
            case Upload():
                return self._upload(step)
            case OpenWatch() | NextEvents() | EndWatch():
                return self._watch(step)
            case _:
                return self._life(step)

    def _watch(self, step: WatchStep) -> Any:
        try:
            match step:
                case OpenWatch():
                    return self._methods["WatchEvents"](step.request, metadata=self._metadata)
                case NextEvents():
                    return next(step.stream, None)
                case EndWatch():
                    return step.stream.cancel()
        except grpc.RpcError as error:
            raise channel.error_of(error) from None
        except ValueError as error:
            raise UnavailableError(f"the client is closed: {error}") from None

    def _call(self, step: Call) -> Any:
        try:
            return self._methods[step.method](step.request, timeout=step.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise channel.error_of(error) from None
        except ValueError as error:
            raise UnavailableError(f"the client is closed: {error}") from None

    def _download(self, step: Download) -> None:
        call = self._methods["ReadPages"](step.request, timeout=step.timeout_s, metadata=self._metadata)
        try:
            for chunk in call:
                step.take(chunk)
        except grpc.RpcError as error:
            raise channel.error_of(error) from None
        finally:
            call.cancel()

    def _upload(self, step: Upload) -> Any:
        try:
            return self._methods["WritePages"](
                step.requests(), timeout=step.timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise channel.error_of(error) from None

    def _wait_link(self, deadline_ns: int) -> Link:
        while True:
            link = self.core.session.current()
            if link is not None:
                return link
            left_ns = deadline_ns - self.core.now_ns()
            if left_ns <= 0:
                raise self.core.session.why_not()
            self._ready.wait(left_ns / 1e9)

    # --- the life line

    def _signal(self, *, ready: bool) -> None:
        if ready:
            self._ready.set()
        else:
            self._ready.clear()

    def _start(self) -> None:
        with self._lock:
            if self._started or self._closing.is_set():
                return
            self._started = True
            self._thread.start()

    def _keep_attached(self) -> None:
        session, pause_s = self.core.session, PAUSE_FIRST_S
        while not self._closing.is_set():
            attachments = session.attachments
            try:
                self._drive(live(self.core))
                session.detached()
            except HicacheError as error:
                log.debug("life line of %s: %s", self.core.target, error)
                session.failed(error)
            finally:
                if self._stream is not None:
                    self._stream.cancel()
                    self._stream = None
            pause_s = PAUSE_FIRST_S if session.attachments > attachments else min(2 * pause_s, PAUSE_MOST_S)
            self._closing.wait(pause_s)

    def _life(self, step: Step) -> Any:
        match step:
            case OpenStream():
                return self._open(step)
            case NextMessage():
                assert self._stream is not None, "the stream was opened"
                return self._stream.next()
            case Send():
                assert self._stream is not None, "the stream was opened"
                return self._stream.say(*step.messages)
        raise AssertionError(f"no such step: {step}")

    def _open(self, step: OpenStream) -> session_pb2.AttachResponse:
        stream = self._stream = _Stream(self._methods["Attach"], step.hello, self._metadata, self.core)
        impatience = threading.Timer(step.timeout_s, stream.cancel)
        impatience.daemon = True
        impatience.start()
        try:
            first = stream.next()
        finally:
            impatience.cancel()
        if first is None:
            raise UnavailableError("the server ended the life line before it began")
        stream.say(calls.keep_alive())  # from now on in the server's rhythm
        return first

    def close(self) -> None:
        """Say goodbye and end the thread and the channel. Idempotent; in a forked child it does nothing."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._closing.is_set():
                return
            self.core.session.close()
            self._closing.set()
        stream = self._stream
        if stream is not None:
            stream.say(calls.goodbye(), None)
        if self._started:
            self._thread.join(GOODBYE_S)
        self._channel.close()
        if self._started:
            self._thread.join(GOODBYE_S)
        self.core.memory.close()
        self.core.arena.clear()
