"""The client without I/O: operations are generators that yield steps and are sent their answers.

An operation (``Steps[T]``) is written once; the synchronous and the asyncio client each drive it, doing what every
step asks and throwing what fails (always a HicacheError) back into it. Operations hold no locks while they yield.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from hicache.rpc.pb import cache_pb2, events_pb2, session_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One unary call. Answer: the response message."""

    method: str
    request: Message
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Download:
    """ReadPages. ``take`` is given each chunk; what it raises ends the stream and comes back. Answer: None."""

    request: cache_pb2.ReadPagesRequest
    timeout_s: float
    take: Callable[[cache_pb2.PageChunk], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Upload:
    """WritePages. Answer: the response message."""

    requests: Callable[[], Iterator[cache_pb2.WritePagesRequest]]
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Something that blocks or copies: off the event loop where there is one. Answer: what ``run`` returns."""

    run: Callable[[], Any]
    moved_bytes: int = 1 << 30  # little work is not worth a thread


@dataclasses.dataclass(frozen=True, slots=True)
class NeedLink:
    """Wait until the client is attached. Answer: the Link. Raises what kept it from attaching at the deadline."""

    deadline_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sleep:
    """Answer: None."""

    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class OpenStream:
    """Open the life line with this first message. Answer: the server's first message."""

    hello: session_pb2.AttachRequest
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class NextMessage:
    """Answer: the life line's next message, or None at its end."""


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Send over the life line. Answer: None."""

    messages: Sequence[session_pb2.AttachRequest]


@dataclasses.dataclass(frozen=True, slots=True)
class OpenWatch:
    """Begin a stream of events. Answer: the stream, for the two steps below."""

    request: events_pb2.WatchEventsRequest


@dataclasses.dataclass(frozen=True, slots=True)
class NextEvents:
    """Answer: the stream's next message, or None at its end."""

    stream: Any


@dataclasses.dataclass(frozen=True, slots=True)
class EndWatch:
    """End the stream. Answer: None."""

    stream: Any


WatchStep: TypeAlias = OpenWatch | NextEvents | EndWatch
Step: TypeAlias = (
    Call | Download | Upload | Work | NeedLink | Sleep | OpenStream | NextMessage | Send | WatchStep
)
T = TypeVar("T")
Steps: TypeAlias = Generator[Step, Any, T]

#: Copies smaller than this are done where they are asked for.
SMALL_WORK_BYTES = 256 * 1024
