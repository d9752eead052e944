"""Calls, retries, sessions and deadlines as steps, with hand-made answers and a clock that stands still."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hicache.errors import (
    ConflictError,
    DeniedError,
    ExhaustedError,
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from hicache.rpc.client import LeaseTicket, TicketRun, calls, flows, lifeline, storing, ticket
from hicache.rpc.client.arguments import make_namespace
from hicache.rpc.client.core import Core
from hicache.rpc.client.options import ClientOptions, DataPlane
from hicache.rpc.client.results import Capabilities, RegionInfo, TierInfo, Welcome
from hicache.rpc.client.session import Session
from hicache.rpc.client.steps import (
    Call,
    Download,
    NeedLink,
    NextMessage,
    OpenStream,
    Send,
    Sleep,
    Steps,
    Upload,
    Work,
)
from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2, session_pb2

MS = 1_000_000
PAGE = 4096
TIERS = (TierInfo("host", "host", 1 << 20, durable=False, client_readable=True),)
PROMPT = np.arange(64 * 4, dtype="<i4").tobytes()


def capabilities(epoch: bytes = b"epoch 1", **change: Any) -> Capabilities:
    fields = {"fd_socket": "", "tiers": TIERS} | change
    return Capabilities("0", epoch, fields["tiers"], fields["fd_socket"], 1 << 24, 60_000, 1000)


class World:
    """Runs steps against a table of answers, by method; an answer may be an error, or a function of the request."""

    def __init__(self, **options: Any) -> None:
        self.now_ns = 1_000 * MS
        ids = itertools.count(1)
        self.core = Core(
            "unix:///x",
            ClientOptions(**options),
            now_ns=lambda: self.now_ns,
            new_id=lambda: next(ids).to_bytes(16),
            signal=lambda *, ready: None,
        )
        self.answers: dict[str, list[Any]] = {}
        self.always: dict[str, Any] = {
            "OpenNamespace": session_pb2.OpenNamespaceResponse(namespace_id=7, symbol_bytes=256),
            "ReleaseLeases": cache_pb2.ReleaseLeasesResponse(),
            "Abort": cache_pb2.AbortResponse(),
            "Register": region_pb2.RegisterResponse(region_id=40),
        }
        self.seen: list[tuple[str, Any]] = []
        self.slept: list[float] = []
        self.cache = make_namespace(model="m", page_bytes=PAGE)

    def attach(
        self, epoch: bytes = b"epoch 1", session_id: bytes = b"s1", fd_path: str = "", **kw: Any
    ) -> None:
        welcome = Welcome(session_id, epoch, "default", kw.pop("resumed", False), 5000)
        self.core.attached(welcome, capabilities(epoch, **kw), fd_path)

    def run(self, steps: Steps[Any]) -> Any:
        answer, error = None, None
        while True:
            try:
                step = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
            answer, error = None, None
            try:
                answer = self.do(step)
            except HicacheError as failure:
                error = failure

    def do(self, step: Any) -> Any:
        match step:
            case Call():
                return self.answer(step.method, step.request)
            case Upload():
                return self.answer("WritePages", list(step.requests()))
            case Download():
                for chunk in self.answer("ReadPages", step.request):
                    step.take(chunk)
                return None
            case Work():
                return step.run()
            case NeedLink() | Sleep():
                return self.wait(step)
        return self.live(step)

    def wait(self, step: NeedLink | Sleep) -> None:
        if isinstance(step, NeedLink):
            self.now_ns = max(self.now_ns, step.deadline_ns)
            raise self.core.session.why_not()
        self.slept.append(step.seconds)
        self.now_ns += int(step.seconds * 1e9)

    def live(self, step: Any) -> Any:
        if isinstance(step, OpenStream):
            return self.answer("Attach", step.hello)
        if isinstance(step, NextMessage):
            return self.answer("next", None)
        assert isinstance(step, Send)
        self.seen.append(("send", step.messages))
        return None

    def answer(self, method: str, request: Any) -> Any:
        self.seen.append((method, request))
        queued = self.answers.get(method)
        found = queued.pop(0) if queued else self.always[method]
        if isinstance(found, HicacheError):
            raise found
        return found(request) if isinstance(found, Callable) else found

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.seen if name == method]

    def match(self, timeout_s: float = 10) -> Any:
        budget = self.core.budget(timeout_s)
        return self.run(flows.match(self.core, self.cache, PROMPT, calls.MatchAsk(touch=False), budget))

    def fetch(self, wait_ms: int = 0) -> Any:
        ask = calls.FetchAsk(0, 0, wait_ms)
        budget = self.core.budget(None, wait_ms=wait_ms)
        return self.run(flows.fetch(self.core, self.cache, PROMPT, ask, budget))

    def reserve(self) -> Any:
        ask = calls.ReserveAsk(0, 0, drop_pressure=False)
        return self.run(storing.reserve(self.core, self.cache, PROMPT, ask, self.core.budget(None)))

    def commit(self, state: Any, pages: Any = None, **kw: Any) -> Any:
        ask = calls.CommitAsk(**({"durable": False, "last": True, "verify": True} | kw))
        budget = self.core.budget(None, incarnation=state.incarnation)
        return self.run(storing.commit(self.core, state, pages, ask, budget))


@pytest.fixture
def world() -> World:
    made = World()
    made.attach()
    return made


MATCH = cache_pb2.MatchResponse(matched_pages=3, run_pages=[2, 1], run_tier=[0, 5])
GRANT = cache_pb2.FetchResponse(lease_id=9, matched_pages=2, granted_pages=2, expires_in_ms=10_000)


# --- retries


def test_a_namespace_is_opened_once_a_session(world: World) -> None:
    world.always["Match"] = MATCH
    found = world.match()
    assert (found.matched_pages, found.matched_tokens, found.run_tiers) == (3, 192, ("host", "5"))
    world.match()
    assert len(world.requests("OpenNamespace")) == 1
    world.attach(b"epoch 2", b"s2")
    world.match()
    assert len(world.requests("OpenNamespace")) == 2
    assert {request.session_id for request in world.requests("Match")} == {b"s1", b"s2"}


def test_an_unavailable_call_is_repeated_with_its_request_id(world: World) -> None:
    world.answers["Fetch"] = [UnavailableError("a"), UnavailableError("b", retry_after_ms=700), GRANT]
    world.fetch()
    assert len({request.request_id for request in world.requests("Fetch")}) == 1
    assert len(world.requests("Fetch")) == 3
    assert world.slept[0] < world.slept[1] == 0.7
    world.always["Fetch"] = GRANT
    world.fetch()
    assert len({request.request_id for request in world.requests("Fetch")}) == 2


def test_retries_end_with_the_callers_time(world: World) -> None:
    world.always["Match"] = UnavailableError("gone")
    began = world.now_ns
    with pytest.raises(UnavailableError, match="gone"):
        world.match(timeout_s=3)
    assert 1_500 * MS < world.now_ns - began <= 3_000 * MS


@pytest.mark.parametrize("error", [InvalidArgumentError, ExhaustedError, ConflictError, NotFoundError])
def test_other_errors_are_not_repeated(world: World, error: Any) -> None:
    world.always["Match"] = error("no")
    with pytest.raises(error):
        world.match()
    assert len(world.requests("Match")) == 1


def test_a_stale_session_is_left_for_the_next(world: World) -> None:
    def restarted(_: Any) -> Any:
        world.attach(b"epoch 2", b"s2")
        raise StaleError("unknown session")

    world.answers["Match"] = [restarted, MATCH]
    assert world.match().matched_pages == 3
    assert [request.session_id for request in world.requests("Match")] == [b"s1", b"s2"]


def test_a_session_that_stays_stale_is_an_error(world: World) -> None:
    world.always["Match"] = StaleError("unknown session")
    with pytest.raises(StaleError):
        world.match(timeout_s=60)


def test_without_a_session_the_reason_is_told() -> None:
    world = World()
    with pytest.raises(UnavailableError, match="no answer in time"):
        world.match()
    world.core.session.failed(UnavailableError("connection refused"))
    with pytest.raises(UnavailableError, match=r"connection refused .*is the sidecar running"):
        world.match()
    world.core.session.failed(UnauthenticatedError("no token"))
    with pytest.raises(UnauthenticatedError, match="no token"):
        world.match()
    world.core.session.close()
    with pytest.raises(UnavailableError, match="closed"):
        world.match()


def test_other_symbols_at_the_server_are_noticed(world: World) -> None:
    world.always["OpenNamespace"] = session_pb2.OpenNamespaceResponse(namespace_id=1, symbol_bytes=16)
    with pytest.raises(HicacheError, match="symbols of 16 bytes, not 256"):
        world.match()


# --- leases


def test_a_deadline_counts_from_before_the_first_attempt(world: World) -> None:
    sent_ns = world.now_ns
    world.answers["Fetch"] = [UnavailableError("a"), UnavailableError("b"), GRANT]
    lease = world.fetch()
    assert world.now_ns > sent_ns
    margin_ms = world.core.options.deadline_margin_ms + 10
    assert lease.deadline_ns == sent_ns + (10_000 - margin_ms) * MS
    assert lease.still_valid()


def test_a_lease_whose_answer_was_slow_is_renewed(world: World) -> None:
    def slow(_: Any) -> Any:
        world.now_ns += 6_000 * MS
        return GRANT

    world.answers["Fetch"] = [slow]
    world.always["RenewLeases"] = cache_pb2.RenewLeasesResponse(expires_in_ms=10_000)
    lease = world.fetch(wait_ms=6_000)
    assert [list(request.lease_ids) for request in world.requests("RenewLeases")] == [[9]]
    assert lease.deadline_ns - world.now_ns > 9_000 * MS


def test_a_lost_lease_says_so(world: World) -> None:
    world.always["Fetch"] = GRANT
    lease, other = world.fetch(), world.fetch()
    other.lease = 10
    world.always["RenewLeases"] = cache_pb2.RenewLeasesResponse(lost_lease_ids=[10], expires_in_ms=50_000)
    lost = world.run(flows.renew(world.core, [lease, other], 0, world.core.budget(None)))
    assert lost == [other]
    assert lease.still_valid() and not other.still_valid()


@pytest.mark.parametrize("error", [UnavailableError, StaleError, NotFoundError])
def test_release_never_raises_for_a_server_that_is_gone(world: World, error: Any) -> None:
    world.always["Fetch"] = GRANT
    lease = world.fetch()
    world.always["ReleaseLeases"] = error("gone")
    world.run(flows.release(world.core, [lease]))
    world.run(flows.release(world.core, [lease]))
    assert len(world.requests("ReleaseLeases")) == 1


def test_nothing_is_released_of_an_older_session(world: World) -> None:
    world.always["Fetch"] = GRANT
    lease = world.fetch()
    world.attach(b"epoch 2", b"s2")
    world.run(flows.release(world.core, [lease]))
    assert not world.requests("ReleaseLeases")


def test_more_pages_arrive_by_waiting(world: World) -> None:
    world.always["Fetch"] = cache_pb2.FetchResponse(
        lease_id=9, matched_pages=4, granted_pages=1, expires_in_ms=10_000, operation_id=5
    )
    lease = world.fetch()
    assert (lease.granted_pages, lease.operation) == (1, 5)
    budget = world.core.budget(None, wait_ms=100)
    more = cache_pb2.FetchResponse(
        lease_id=9, matched_pages=4, granted_pages=3, expires_in_ms=8_000, operation_id=5
    )
    world.answers["WaitOperation"] = [
        cache_pb2.WaitOperationResponse(moved_pages=2, fetch=more),
        cache_pb2.WaitOperationResponse(done=True, moved_pages=2, failed_pages=1, fetch=more),
    ]
    assert not world.run(flows.wait_lease(world.core, lease, 100, budget)).done
    assert (lease.granted_pages, lease.operation) == (3, 5)
    done = world.run(flows.wait_lease(world.core, lease, 100, budget))
    assert (done.done, done.moved_pages, done.failed_pages, lease.operation) == (True, 2, 1, 0)
    assert world.run(flows.wait_lease(world.core, lease, 100, budget)).done
    assert len(world.requests("WaitOperation")) == 2


MAPPED = cache_pb2.FetchResponse(
    lease_id=9,
    matched_pages=1,
    granted_pages=1,
    expires_in_ms=10_000,
    extents=cache_pb2.Extents(
        pages=[1], region_id=[3], offset=[0], first_slot=[0], checksums=[1], generations=[1]
    ),
)


def test_pages_that_cannot_be_mapped_are_streamed(world: World) -> None:
    world.attach(b"epoch 2", b"s2", fd_path="/nowhere")
    world.always |= {"Fetch": MAPPED, "ListRegions": region_pb2.ListRegionsResponse()}
    lease = world.fetch()
    assert lease.streamed and lease.granted_pages == 1
    data = bytes(range(256)) * 16
    world.answers["ReadPages"] = [
        lambda _: [cache_pb2.PageChunk(page=0, offset=0, data=data[:1000])],  # ends early
        lambda request: [cache_pb2.PageChunk(page=request.first_page, offset=0, data=data)],
    ]
    into = np.zeros((1, PAGE), np.uint8)
    with pytest.raises(HicacheError, match="ended 1 pages early"):
        world.run(flows.copy(world.core, lease, into, 0, verify=False))
    world.run(flows.copy(world.core, lease, into, 0, verify=False))
    assert into.tobytes() == data


def test_with_shm_a_failed_mapping_releases_the_lease() -> None:
    world = World(data_plane=DataPlane.SHM)
    world.attach(fd_path="/nowhere")
    world.always |= {"Fetch": MAPPED, "ListRegions": region_pb2.ListRegionsResponse()}
    with pytest.raises(NotFoundError, match="does not list"):
        world.fetch()
    assert [list(request.lease_ids) for request in world.requests("ReleaseLeases")] == [[9]]


# --- storing

ROOM = cache_pb2.ReserveResponse(reservation_id=6, present_pages=1, missing_pages=3, expires_in_ms=1000)
STORED = cache_pb2.CommitResponse(stored_pages=3)


def prepared(world: World) -> Any:
    world.always["Reserve"] = ROOM
    state = world.reserve()
    for page in (1, 2, 3):
        state.write(page, bytes([page]) * PAGE)
    return state


def mapped_world(monkeypatch: Any) -> World:
    world = World()
    world.attach(fd_path="/fd")
    monkeypatch.setattr(storing, "exchange", lambda *_: fdproto.Answer(b"t" * 16))
    return world


def test_a_commit_registers_its_region_once(monkeypatch: Any) -> None:
    world = mapped_world(monkeypatch)
    world.always["Commit"] = STORED
    state = prepared(world)
    assert world.commit(state, [1, 2], last=False).stored_pages == 3
    world.commit(state)
    assert len(world.requests("Register")) == 1
    first, second = world.requests("Commit")
    assert (list(first.first_page), list(first.pages), list(first.region_id)) == ([1], [2], [40])
    assert len(first.checksums) == 2 and not first.last
    assert (list(second.first_page), second.last) == ([3], True)
    assert first.request_id != second.request_id
    assert state.ended and world.core.memory.used_bytes == 0


def test_an_unanswered_commit_poisons_its_region(monkeypatch: Any) -> None:
    world = mapped_world(monkeypatch)
    world.always["Commit"] = UnavailableError("the line broke")
    state = prepared(world)
    with pytest.raises(UnavailableError):
        world.commit(state, [1, 2])
    commits = world.requests("Commit")
    assert len(commits) > 1 and len({commit.request_id for commit in commits}) == 1
    region = world.core.memory._regions[0]
    assert region.poisoned and region.used_bytes == PAGE
    world.run(flows.abort(world.core, state))
    assert region.fd == -1
    world.always["Commit"] = STORED
    world.always["Unregister"] = region_pb2.UnregisterResponse()
    world.commit(prepared(world))
    assert [request.region_id for request in world.requests("Unregister")] == [40]


def test_a_cancelled_commit_poisons_its_region(monkeypatch: Any) -> None:
    world = mapped_world(monkeypatch)
    state = prepared(world)
    ask = calls.CommitAsk(durable=False, last=True, verify=False)
    steps = storing.commit(world.core, state, [1], ask, world.core.budget(None, incarnation=1))
    step = next(steps)
    while not (isinstance(step, Call) and step.method == "Commit"):
        step = steps.send(world.do(step))
    steps.close()
    assert world.core.memory._regions[0].poisoned


@pytest.mark.parametrize("error", [ConflictError, ExhaustedError, InvalidArgumentError])
def test_a_refused_commit_can_be_tried_again(monkeypatch: Any, error: Any) -> None:
    world = mapped_world(monkeypatch)
    world.answers["Commit"] = [error("no"), STORED]
    state = prepared(world)
    with pytest.raises(error):
        world.commit(state)
    assert not world.core.memory._regions[0].poisoned
    world.commit(state)
    assert [list(commit.pages) for commit in world.requests("Commit")] == [[3], [3]]
    assert world.core.memory.used_bytes == 0


def test_a_commit_that_never_left_keeps_its_pages(world: World) -> None:
    world.attach(b"epoch 2", b"s2", fd_path="/nowhere/at/all")
    world.always["Reserve"] = ROOM
    state = prepared(world)
    with pytest.raises(UnavailableError, match="descriptor socket"):
        world.commit(state)
    assert not world.core.memory._regions[0].poisoned
    assert list(state.select(None)) == [1, 2, 3]


def test_a_streamed_commit_sends_checked_chunks(world: World) -> None:
    world.always["WritePages"] = STORED
    state = prepared(world)
    world.commit(state, durable=True, verify=False)
    (messages,) = world.requests("WritePages")
    assert (messages[0].open.reservation_id, messages[0].open.durable, messages[0].open.last) == (
        6,
        True,
        True,
    )
    pages: dict[int, bytes] = {}
    for message in messages[1:]:
        pages[message.chunk.page] = pages.get(message.chunk.page, b"") + message.chunk.data
        assert len(message.chunk.data) <= 1000
        assert bool(message.chunk.checksum) == (len(pages[message.chunk.page]) == PAGE)
    assert pages == {page: bytes([page]) * PAGE for page in (1, 2, 3)}


def test_store_works_in_parts_that_fit_the_memory(monkeypatch: Any) -> None:
    world = World(write_limit_bytes=2 * PAGE, write_step_bytes=2 * PAGE)
    world.attach()
    world.always |= {"Reserve": ROOM, "WritePages": STORED}
    state = world.reserve()
    ask = calls.CommitAsk(durable=False, last=True, verify=True)
    parts = 0
    while not state.ended:
        world.run(storing.store_part(world.core, state, [bytes(PAGE)] * 4, ask))
        parts += 1
    assert parts == 2
    assert [messages[0].open.last for messages in world.requests("WritePages")] == [False, True]


def test_nothing_missing_is_nothing_to_do(world: World) -> None:
    world.always["Reserve"] = cache_pb2.ReserveResponse(present_pages=4)
    state = world.reserve()
    assert state.ended
    assert world.commit(state).stored_pages == 0
    world.run(flows.abort(world.core, state))
    assert [name for name, _ in world.seen] == ["OpenNamespace", "Reserve"]


def test_an_ended_reservation_takes_nothing(world: World) -> None:
    state = prepared(world)
    world.run(flows.abort(world.core, state))
    with pytest.raises(NotFoundError, match="has ended"):
        world.commit(state)
    assert world.core.memory.used_bytes == 0


# --- the life line


def life(world: World, **kw: Any) -> None:
    epoch = kw.get("epoch", b"epoch 1")
    tiers = [session_pb2.TierInfo(name="host", client_readable=kw.get("readable", True))]
    world.always["GetCapabilities"] = session_pb2.GetCapabilitiesResponse(
        server_epoch=epoch, tiers=tiers, fd_socket=kw.get("fd_socket", "")
    )
    welcome = session_pb2.Welcome(
        session_id=kw.get("session_id", b"s1"), server_epoch=epoch, resumed=kw.get("resumed", False)
    )
    world.always["Attach"] = session_pb2.AttachResponse(welcome=welcome)
    world.always["next"] = None
    world.run(lifeline.live(world.core))
    world.core.session.detached()


def test_a_broken_line_is_resumed() -> None:
    world = World()
    life(world)
    assert world.core.session.incarnation == 1
    life(world, resumed=True)
    assert world.core.session.incarnation == 1
    assert [hello.hello.resume_session_id for hello in world.requests("Attach")] == [b"", b"s1"]


def test_a_new_epoch_is_a_new_session() -> None:
    world = World()
    life(world)
    life(world, epoch=b"epoch 2")
    assert world.core.session.incarnation == 2
    assert [hello.hello.resume_session_id for hello in world.requests("Attach")] == [b"", b""]


def test_a_session_that_is_not_resumed_is_new() -> None:
    world = World()
    life(world)
    life(world, session_id=b"s2")
    assert world.core.session.incarnation == 2


def test_a_refused_resumption_is_followed_by_a_new_session() -> None:
    world = World()
    life(world)
    world.answers["Attach"] = [DeniedError("another's")]
    life(world)
    assert world.core.session.resume_session_id == b""
    world.answers["Attach"] = [DeniedError("you are not welcome")]
    with pytest.raises(DeniedError):
        life(world)


def test_the_fd_socket_beside_our_own_is_tried_too(monkeypatch: Any) -> None:
    world = World()
    tried: list[str] = []

    def exchange(path: str, _: Any) -> Any:
        tried.append(path)
        if path != "/x.fd":
            raise UnavailableError("no such socket")
        return fdproto.Answer(b"token")

    monkeypatch.setattr(lifeline, "exchange", exchange)
    life(world, fd_socket="/in/the/container.fd")
    assert tried == ["/in/the/container.fd", "/x.fd"]
    assert world.requests("Attach")[0].hello.token == b"token"


@pytest.mark.parametrize(
    ("plane", "kw", "outcome"),
    [
        (DataPlane.AUTO, {"fd_socket": "/fd"}, "/fd"),
        (DataPlane.AUTO, {"fd_socket": "/fd", "readable": False}, ""),
        (DataPlane.AUTO, {}, ""),
        (DataPlane.STREAM, {"fd_socket": "/fd"}, ""),
        (DataPlane.SHM, {"fd_socket": "/fd"}, "/fd"),
        (DataPlane.SHM, {"fd_socket": "/fd", "readable": False}, "no tier of the sidecar"),
        (DataPlane.SHM, {}, "not a unix socket"),
    ],
)
def test_the_data_plane_is_what_both_ends_can(monkeypatch: Any, plane: Any, kw: Any, outcome: str) -> None:
    monkeypatch.setattr(lifeline, "exchange", lambda *_: fdproto.Answer(b"token"))
    world = World(data_plane=plane)
    links: list[Any] = []
    world.answers["next"] = [lambda _: links.append(world.core.session.current())]
    if " " in outcome:
        with pytest.raises(UnsupportedError, match=outcome):
            life(world, **kw)
        return
    life(world, **kw)
    assert (links[0].fd_path if links[0].mapped else "") == outcome


def test_messages_of_the_server_are_heeded() -> None:
    world = World()
    states: list[Any] = []
    retired = session_pb2.AttachResponse(region_retired=session_pb2.RegionRetired(region_id=5))
    draining = session_pb2.AttachResponse(draining=session_pb2.Draining(grace_ms=5))
    world.answers["next"] = [
        session_pb2.AttachResponse(keep_alive=session_pb2.KeepAlive()),
        retired,
        draining,
        lambda _: states.append(world.core.session.draining),
    ]
    life(world)
    ((_, messages),) = [seen for seen in world.seen if seen[0] == "send"]
    assert [message.region_released.region_id for message in messages] == [5]
    assert states == [True]


def test_the_signal_follows_the_session() -> None:
    signals: list[bool] = []
    session = Session("unix:///x", lambda *, ready: signals.append(ready))
    welcome = Welcome(b"s", b"e", "default", resumed=False, keep_alive_ms=0)
    assert session.attached(welcome, capabilities(), "")
    session.detached()
    session.failed(UnavailableError("gone"))
    session.failed(DeniedError("not you"))
    session.close()
    assert signals == [True, False, False, True, True]
    assert not session.alive


def test_expired_leases_let_go_of_retired_memory(world: World) -> None:
    import fcntl
    import gc
    import os

    fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    world.attach(b"epoch 2", b"s2", fd_path="/fd")
    world.core.arena.add(RegionInfo(3, 2 * PAGE, PAGE, PAGE, PAGE, 1), fd, world.core.session.incarnation)
    mapped = cache_pb2.FetchResponse.FromString(MAPPED.SerializeToString())
    os.pwrite(fd, mapped.extents.generations[0].to_bytes(8, "little"), 0)
    os.close(fd)
    mapped.extents.offset[0] = PAGE
    world.always["Fetch"] = mapped
    lease = world.fetch()
    assert not lease.streamed
    world.core.on_message(session_pb2.AttachResponse(region_retired=session_pb2.RegionRetired(region_id=3)))
    assert world.core.outgoing() == [] and lease.runs
    world.now_ns += 20_000 * MS
    world.core.outgoing()
    gc.collect()
    assert [message.region_released.region_id for message in world.core.outgoing()] in ([3], [])
    assert lease.over
    with pytest.raises(StaleError, match="given back"):
        lease.check()


def test_a_ticket_is_held_against_the_run_that_welcomed_us() -> None:
    """Not against the one whose capabilities were read before: the sidecar may have restarted in between."""
    world = World()
    welcome = Welcome(b"s1", b"epoch 2", "default", False, 5000)
    world.core.attached(welcome, capabilities(b"epoch 1"), "/fd")
    one_page = {"checksums": bytes(8), "generations": bytes(8), "runs": (TicketRun(3, 0, 1),)}
    old = LeaseTicket(epoch=b"epoch 1", lease_id=1, page_bytes=PAGE, deadline_ns=1 << 62, **one_page)
    with pytest.raises(StaleError, match="another run"):
        world.run(ticket.reader(world.core, old))
    world.always["ListRegions"] = region_pb2.ListRegionsResponse()
    with pytest.raises(NotFoundError, match="gone"):
        world.run(ticket.reader(world.core, dataclasses.replace(old, epoch=b"epoch 2")))


def test_a_region_of_a_session_that_ended_is_not_mapped_into_the_next() -> None:
    import fcntl
    import os

    world = World()
    world.attach(b"epoch 1", b"s1", fd_path="/fd")
    fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    info, before = RegionInfo(3, 2 * PAGE, PAGE, PAGE, PAGE, 1), world.core.session.incarnation
    seen: list[int] = []
    begin = world.core.arena.begin
    world.core.arena.begin = lambda incarnation: (seen.append(len(world.core.arena)), begin(incarnation))  # type: ignore[assignment]
    world.core.arena.add(info, fd, before)
    world.attach(b"epoch 2", b"s2", fd_path="/fd")
    assert (seen, len(world.core.arena)) == ([1], 0)
    with pytest.raises(StaleError):
        world.core.arena.add(info, fd, before)
    os.close(fd)
    assert len(world.core.arena) == 0
