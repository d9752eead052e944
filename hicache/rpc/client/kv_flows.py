"""Paged KV as steps: register it, load leased pages into it, store reserved pages out of it.

A transfer is *prepared* in its caller's time (the region is registered, a counter taken), and then runs by itself.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

from hicache.device.kv import PagedKv, SharedMemory
from hicache.errors import (
    ExhaustedError,
    HicacheError,
    NotFoundError,
    StaleError,
    UnavailableError,
    UnsupportedError,
)
from hicache.rpc.client import calls, kv_calls
from hicache.rpc.client.core import Attempt, Budget, Core, Reply, invoke
from hicache.rpc.client.kv import COUNTER_BYTES, COUNTERS, Counter, KvState, Loaded, Progress, Timeline
from hicache.rpc.client.kv_calls import LoadAsk, Route, StoreAsk
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.client.region import Registration
from hicache.rpc.client.reservation import ReservationState
from hicache.rpc.client.results import CommitResult
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import Call, Sleep, Step, Steps, T, Work
from hicache.rpc.common import fdproto
from hicache.rpc.pb import region_pb2

#: How soon to look again whether another thread is done with registering.
GATE_PAUSE_S = 0.002
#: How long closing waits for a sidecar that is out of reach.
PARTING_S = 1.0


# --- regions


def register(core: Core, state: KvState, budget: Budget) -> Steps[int]:
    """Have the sidecar map an engine's KV; its region's id."""

    def step(attempt: Attempt) -> Steps[Step]:
        region_id = yield from registered(core, state, attempt)
        return Work(lambda: region_id, 0)

    reply = yield from invoke(core, step, budget)
    region_id: int = reply.message
    return region_id


def unregister(core: Core, state: KvState, timeout_s: float) -> Steps[bool]:
    """Have the sidecar let go of it; answers when nothing is copied to or from it any more.

    False where that is not known: the sidecar is out of reach, or took longer. A session that is gone let go of it.
    """
    held = state.registration
    if held is None or held.incarnation != core.session.incarnation:
        return True
    state.registration = None  # what comes next registers it again
    budget = Budget(timeout_s if core.session.alive else PARTING_S, incarnation=held.incarnation, retry=False)

    def step(attempt: Attempt) -> Steps[Step]:
        yield from ()
        request = region_pb2.UnregisterRequest(session_id=attempt.link.session_id, region_id=held.region_id)
        return Call("Unregister", request, attempt.left_s)

    try:
        yield from invoke(core, step, budget)
    except UnavailableError:
        return False
    except (StaleError, NotFoundError):
        return True
    return True


def registered(core: Core, state: KvState, attempt: Attempt) -> Steps[int]:
    """A KV region's id in this session: registered once, whoever comes first."""

    def known() -> int | None:
        held = state.registration
        return held.region_id if held is not None and held.incarnation == attempt.link.incarnation else None

    if state.closed:
        raise NotFoundError("the KV region was closed", hint="register the tensors again")
    return (
        yield from _once(core, state.gate, known, functools.partial(_register, core, state, attempt), attempt)
    )


def _once(
    core: Core,
    gate: threading.Lock,
    known: Callable[[], T | None],
    make: Callable[[], Steps[T]],
    attempt: Attempt,
) -> Steps[T]:
    """What is known, or what is made by one at a time."""
    deadline_ns = core.now_ns() + int(attempt.left_s * 1e9)
    while True:
        found = known()
        if found is not None:
            return found
        if gate.acquire(blocking=False):
            break
        if core.now_ns() >= deadline_ns:
            raise UnavailableError("another thread is registering memory, and not done in time")
        yield Sleep(GATE_PAUSE_S)
    try:
        found = known()
        return found if found is not None else (yield from make())
    finally:
        gate.release()


def _register(core: Core, state: KvState, attempt: Attempt) -> Steps[int]:
    link = attempt.link
    check_kv(link, state.kv)
    tokens: dict[int, bytes] = {}
    for at, memory in enumerate(state.kv.memories):
        if memory.fd >= 0:
            tokens[at] = yield Work(functools.partial(_put, link, memory))
    request = kv_calls.register_kv(link.session_id, core.new_id(), state.kv, tokens)
    answer: region_pb2.RegisterResponse = yield Call("Register", request, attempt.left_s)
    state.registration = Registration(link.incarnation, answer.region_id)
    return answer.region_id


def _put(link: Link, memory: SharedMemory) -> bytes:
    return exchange(link.fd_path, fdproto.Put(link.session_id), (memory.fd,)).payload


def check_kv(link: Link, kv: PagedKv) -> None:
    """Raise UnsupportedError where this sidecar cannot map that memory: says why and what to do instead."""
    capabilities = link.capabilities
    other = "read pages with Lease.copy_into, store them with Reservation.write, or let the client's copier do both"
    if not capabilities.kv_memory:
        raise UnsupportedError(
            f"the sidecar (version {capabilities.server_version}) does not copy to and from an engine's KV",
            hint=f"upgrade it; or {other}",
        )
    if not link.fd_path:
        raise UnsupportedError(
            "KV is registered over the sidecar's unix socket, with data_plane auto or shm", hint=f"or {other}"
        )
    for memory in kv.memories:
        if memory.kind not in capabilities.kv_memory:
            raise UnsupportedError(
                f"the sidecar maps {', '.join(capabilities.kv_memory)}, and not {memory.kind}",
                hint=f"run it with the device that the KV is on; or {other}",
            )
        if memory.device_uuid and memory.device_uuid not in capabilities.device_uuids:
            raise UnsupportedError(
                f"the KV is on GPU {memory.device_uuid.hex()}, which the sidecar does not have",
                hint=f"run it with that GPU visible; or {other}",
            )


# --- counters


def _counter(core: Core, attempt: Attempt) -> Steps[Counter]:
    """A free counter of this session's."""
    incarnation = attempt.link.incarnation
    return (
        yield from _once(
            core,
            core.timelines.gate,
            lambda: core.timelines.take(incarnation),
            functools.partial(_new_counter, core, attempt),
            attempt,
        )
    )


def _new_counter(core: Core, attempt: Attempt) -> Steps[Counter]:
    """A counter of a timeline that is made for it."""
    link = attempt.link
    request = kv_calls.register_timeline(link.session_id, core.new_id(), COUNTERS)
    answer: region_pb2.RegisterResponse = yield Call("Register", request, attempt.left_s)
    timeline: Timeline = yield Work(functools.partial(_map_timeline, link, answer.region_id))
    core.timelines.add(link.incarnation, timeline)
    counter = timeline.take()
    assert counter is not None, "a new timeline has free counters"
    return counter


def _map_timeline(link: Link, region_id: int) -> Timeline:
    answer = exchange(link.fd_path, fdproto.Get(link.session_id, region_id))
    try:
        if len(answer.fds) != 1:
            raise HicacheError(f"the server sent {len(answer.fds)} descriptors for timeline {region_id}")
        return map_timeline(region_id, answer.fds[0])
    finally:
        for fd in answer.fds:
            os.close(fd)


def map_timeline(region_id: int, fd: int) -> Timeline:
    """A timeline whose descriptor this is, which stays the caller's.

    Raises UnsupportedError for memory that may shrink or is too small, ExhaustedError.
    """
    size_bytes = COUNTERS * COUNTER_BYTES
    try:
        sealed = bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        sealed = False
    if not sealed or os.fstat(fd).st_size < size_bytes:
        raise UnsupportedError(
            f"timeline {region_id}: the descriptor is no sealed memory of {COUNTERS} counters"
        )
    try:
        memory = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise ExhaustedError(f"cannot map timeline {region_id}: {error}") from error
    return Timeline(region_id, np.frombuffer(memory, dtype="<u8"))


def route(core: Core, state: KvState, incarnation: int, *, counted: bool) -> Steps[Route]:
    """What a transfer of that session needs: the region, registered, and a counter where it is asked for."""

    def step(attempt: Attempt) -> Steps[Step]:
        region_id = yield from registered(core, state, attempt)
        counter = (yield from _counter(core, attempt)) if counted else None
        return Work(lambda: Route(attempt.link.session_id, region_id, counter), 0)

    reply = yield from invoke(core, step, core.budget(None, incarnation=incarnation))
    found: Route = reply.message
    return found


# --- transfers


@dataclasses.dataclass(slots=True)
class _Sending:
    """One call. ``named``: the server may have seen it."""

    request_id: bytes
    named: bool = False

    def settled(self, error: HicacheError) -> bool:
        """Whether the server does nothing of it any more."""
        return not (self.named and isinstance(error, UnavailableError | StaleError))


def load(
    core: Core, lease: LeaseState, way: Route, asked: tuple[LoadAsk, float | None], progress: Progress
) -> Steps[Loaded]:
    """Leased pages into a KV region. Ends ``progress``, whatever comes.

    Not tried again where the server is out of reach: layers are waited for, by streams perhaps.
    """
    (ask, timeout_s), sending = asked, _Sending(core.new_id())
    good = settled = False
    budget = core.budget(timeout_s, incarnation=lease.terms.incarnation)
    budget = dataclasses.replace(budget, retry=False)

    def step(attempt: Attempt) -> Steps[Step]:
        yield from ()
        request = kv_calls.load(way, sending.request_id, lease.lease, ask)
        sending.named = True
        return Call("Load", request, attempt.left_s)

    try:
        reply: Reply = yield from invoke(core, step, budget)
        loaded = kv_calls.parse_loaded(reply.message)
        good, settled = loaded.ok, True
    except HicacheError as error:
        settled = sending.settled(error)
        raise
    finally:
        progress.end(good=good, settled=settled)
    return loaded


def store(
    core: Core, state: ReservationState, way: Route, ask: StoreAsk, progress: Progress
) -> Steps[CommitResult]:
    """Reserved pages out of a KV region. Ends ``progress``, whatever comes. The pages were claimed before."""
    sending, good, settled = _Sending(core.new_id()), False, False
    wait_ms = (ask.wait_ms or state.expires_in_ms) if progress.counter is not None else 0
    budget = core.budget(None, wait_ms=wait_ms, incarnation=state.incarnation)

    def step(attempt: Attempt) -> Steps[Step]:
        yield from ()
        request = kv_calls.commit(way, sending.request_id, state.reservation, ask)
        sending.named = True
        return Call("Commit", request, attempt.left_s)

    try:
        reply: Reply = yield from invoke(core, step, budget)
        good = settled = True
    except HicacheError as error:
        settled = sending.settled(error)
        if settled:
            state.unclaim(ask.first_page, len(ask.places))
        raise
    finally:
        progress.end(good=good, settled=settled)
    if ask.last:
        state.end()
    return calls.parse_commit(reply.message)
