"""Pages meet only where everything agrees: model, revision, adapter, layout, salt, and the tenant behind the call."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_actor import PAGE_BYTES, PAGE_TOKENS, SHARED_PAGES, Actor, prompt
from e2e_kit import WorkerProcess, assert_idle, free_port, serving, tiers, wait_recovered

from hicache.errors import (
    DeniedError,
    HicacheError,
    NotFoundError,
    StaleError,
    UnauthenticatedError,
)
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.client.session import Link
from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2

PAGES = 8
BASE: dict[str, Any] = {"revision": "r1", "adapter": "", "kv_dtype": "bfloat16", "layout": "NHD"}
OTHERS: list[dict[str, Any]] = [
    {"model": "e2e2"},
    {"revision": "r2"},
    {"revision": ""},
    {"adapter": "lora-a"},
    {"adapter": "lora-b"},
    {"kv_dtype": "float16"},
    {"layout": "HND"},
    {"salt": "other"},
    {"layers": 32},
    {"kv_heads": 8},
    {"head_size": 128},
    {"engine_version": "0.9"},
    {"page_tokens": 2 * PAGE_TOKENS},
    {"page_tokens": PAGE_TOKENS // 2},
    {"page_bytes": 2 * PAGE_BYTES},
    {"extra_key_bytes": 8},
    {"symbol_kind": "hashes", "symbol_hash_bytes": 4 * PAGE_TOKENS},
]


def link_of(actor: Actor) -> Link:
    link = actor.client.core.session.current()
    assert link is not None
    return link


def matched(actor: Actor, fields: dict[str, Any]) -> int:
    """How much a namespace with these fields finds for the tokens of talk 0."""
    named = {
        "model": "e2e",
        "salt": "e2e",
        "page_tokens": PAGE_TOKENS,
        "page_bytes": PAGE_BYTES,
        **BASE,
        **fields,
    }
    namespace = actor.client.namespace(**named)
    tokens = prompt(0, PAGES)
    keys = None
    if fields.get("extra_key_bytes"):
        keys = [b"\0" * 8] * PAGES
    with namespace.fetch(tokens, wait_ms=2_000, extra_keys=keys) as lease:
        assert (
            namespace.match(tokens, extra_keys=keys).matched_pages
            == lease.matched_pages
            == lease.granted_pages
        )
        return lease.granted_pages


def test_no_namespace_gets_the_pages_of_another(tmp_path: Path) -> None:
    """Neither while they are in memory, nor when they come back from the disk after a restart."""
    with serving(tmp_path, *tiers(tmp_path)) as sidecar:
        with Actor(sidecar.target, fields=BASE) as owner:
            owner.store(0, PAGES, durable=True)
            for fields in OTHERS:
                assert matched(owner, fields) == 0, fields
            assert matched(owner, {}) == PAGES
        assert sidecar.stop() == 0
        sidecar.start()
        with Actor(sidecar.target, fields=BASE) as owner:
            wait_recovered(owner.client)
            for fields in OTHERS:
                assert matched(owner, fields) == 0, fields
            assert owner.read(0, PAGES).granted == PAGES
            assert owner.read(0, PAGES).wrong_bytes == 0
            assert_idle(owner.client)


def test_namespaces_that_hold_the_same_tokens_keep_their_own_bytes(tmp_path: Path) -> None:
    """Seven namespaces, one prompt, small tiers, pages of two sizes: everyone reads what it wrote itself."""
    with serving(tmp_path, *tiers(tmp_path, "4MiB", "128MiB")) as sidecar:
        variants: list[dict[str, Any]] = [{"revision": f"r{n}"} for n in range(5)] + [{"adapter": "x"}]
        actors = [Actor(sidecar.target, salt=f"salt-{n}", fields=f) for n, f in enumerate(variants)]
        actors.append(
            Actor(sidecar.target, salt="large", page_bytes=2 * PAGE_BYTES, fields={"revision": "r0"})
        )
        for talk in range(16):
            for actor in actors:
                actor.store(talk, PAGES)
        for talk in range(16):
            for actor in actors:
                seen = actor.read(talk, PAGES)
                assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (PAGES, 0, False)
        stats = assert_idle(actors[0].client)
        assert all(tier.pages for tier in stats.tiers)
        for actor in actors:
            actor.client.close()


# --- tenants over TCP


TOKENS = {"red": secrets.token_hex(12), "blue": secrets.token_hex(12), "root": secrets.token_hex(12)}


def tcp_flags(folder: Path, port: int) -> tuple[str, ...]:
    lines = [f"red {TOKENS['red']}", f"blue {TOKENS['blue']}", f"root {TOKENS['root']} admin"]
    (folder / "tokens").write_text("\n".join(lines) + "\n")
    (folder / "tokens").chmod(0o600)
    address = ("--tcp-address", f"127.0.0.1:{port}", "--allow-plain-tcp")
    return (*address, "--token-file", str(folder / "tokens"))


def test_tenants_never_see_each_other(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, *tiers(tmp_path, "16MiB"), *tcp_flags(tmp_path, port)) as sidecar:
        target = f"127.0.0.1:{port}"
        with (
            Actor(target, salt="red", token=TOKENS["red"], fields={"salt": "same"}) as red,
            Actor(target, salt="blue", token=TOKENS["blue"], fields={"salt": "same"}) as blue,
            Actor(sidecar.target, salt="local", fields={"salt": "same"}) as local,
        ):
            assert (link_of(red).tenant, link_of(blue).tenant, link_of(local).tenant) == (
                "red",
                "blue",
                "default",
            )
            red.store(0, PAGES, durable=True)
            assert red.read(0, PAGES).granted == PAGES
            for other in (blue, local):
                assert other.matched(0, PAGES) == 0
                assert other.read(0, PAGES).granted == 0
                assert other.store(0, PAGES).stored == PAGES, "nothing of red's is there for it"
            for actor in (red, blue, local):
                seen = actor.read(0, PAGES)
                assert (seen.granted, seen.wrong_bytes) == (PAGES, 0)
            assert red.ns.fingerprint != blue.ns.fingerprint != local.ns.fingerprint
            _assert_ids_open_nothing(red, blue)
            _assert_arenas_stay_apart(red, local)
            with pytest.raises(DeniedError):
                blue.client.admin.stats()
            with pytest.raises(DeniedError):
                blue.client.admin.clear()
            assert_idle(local.client)
        for token in ("", "0123456789abcdef"):
            stranger = Actor(target, token=token, connect_timeout_s=5.0)
            with pytest.raises(UnauthenticatedError):
                stranger.client.connect()
            stranger.client.close()
        assert sidecar.stop() == 0
        sidecar.start()
        with Actor(target, salt="blue", token=TOKENS["blue"], fields={"salt": "same"}) as blue:
            assert blue.read(0, PAGES).wrong_bytes == 0
        with Actor(target, salt="red", token=TOKENS["red"], fields={"salt": "same"}) as red:
            assert red.read(0, PAGES).wrong_bytes == 0


def _assert_ids_open_nothing(owner: Actor, thief: Actor) -> None:
    """Another tenant's lease, namespace and even session are of no use to a thief who knows their numbers."""
    call = thief.client._driver._call
    mine, theirs = link_of(thief), link_of(owner)
    from hicache.rpc.client.steps import Call

    number = owner.ns._state.number
    with owner.ns.fetch(prompt(0, PAGES)) as lease:
        read = cache_pb2.ReadPagesRequest(session_id=mine.session_id, lease_id=lease.lease_id, pages=1)
        with pytest.raises(NotFoundError):
            thief.client._driver._download(_download(read))
        match = cache_pb2.MatchRequest(
            session_id=mine.session_id, namespace_id=number, prompt=prompt(0, PAGES)
        )
        with pytest.raises(NotFoundError):
            call(Call("Match", match, 5.0))
        stolen = cache_pb2.MatchRequest(
            session_id=theirs.session_id, namespace_id=number, prompt=prompt(0, PAGES)
        )
        with pytest.raises((DeniedError, UnauthenticatedError)):
            call(Call("Match", stolen, 5.0))
        release = cache_pb2.ReleaseLeasesRequest(session_id=mine.session_id, lease_ids=[lease.lease_id])
        call(Call("ReleaseLeases", release, 5.0))
        renew = cache_pb2.RenewLeasesRequest(session_id=mine.session_id, lease_ids=[lease.lease_id])
        assert list(call(Call("RenewLeases", renew, 5.0)).lost_lease_ids) == [lease.lease_id]
        assert owner.look(lease, 0).wrong_bytes == 0
        lease.renew(10_000)
        assert lease.still_valid()


def _download(request: cache_pb2.ReadPagesRequest) -> Any:
    from hicache.rpc.client.steps import Download

    return Download(request, 5.0, lambda _: None)


def _assert_arenas_stay_apart(remote: Actor, local: Actor) -> None:
    """The descriptor socket gives a session the arenas of its own tenant, whatever number it asks for."""
    from hicache.rpc.client.steps import Call

    link = link_of(local)
    listed = local.client._driver._call(
        Call("ListRegions", region_pb2.ListRegionsRequest(session_id=link.session_id), 5.0)
    )
    mine = {region.region_id for region in listed.regions if region.kind == region_pb2.Region.ARENA}
    assert mine
    given = set()
    for region_id in [*range(64), 1 << 32, (1 << 64) - 1]:
        try:
            answer = exchange(link.fd_path, fdproto.Get(link.session_id, region_id))
        except NotFoundError:
            continue
        for fd in answer.fds:
            os.close(fd)
        given.add(region_id)
    assert given == mine
    for session_id, refusal in (
        (secrets.token_bytes(16), StaleError),
        (bytes(16), StaleError),
        (link_of(remote).session_id, DeniedError),
    ):
        with pytest.raises(refusal):
            exchange(link.fd_path, fdproto.Get(session_id, next(iter(mine))))


def test_another_process_of_the_same_user_cannot_use_a_session_over_the_descriptor_socket(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, *tiers(tmp_path)) as sidecar, Actor(sidecar.target) as actor:
        actor.store(0, PAGES)
        link = link_of(actor)
        thief = subprocess.run(
            [sys.executable, "-c", THIEF, link.fd_path, link.session_id.hex()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert thief.stdout.split() == ["DeniedError", "DeniedError"], thief.stderr
        assert actor.read(0, PAGES).wrong_bytes == 0


THIEF = """
import os, sys
from hicache.errors import HicacheError
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.common import fdproto
session = bytes.fromhex(sys.argv[2])
fd = os.memfd_create("x")
for request, fds in ((fdproto.Get(session, 1), ()), (fdproto.Put(session), (fd,))):
    try:
        print("given", exchange(sys.argv[1], request, fds))
    except HicacheError as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_two_users_of_one_machine_are_two_tenants(tmp_path: Path) -> None:
    """Over the unix socket the tenant is the peer's uid, whatever the peer says."""
    home = Path("/tmp") / f"hicache-e2e-{secrets.token_hex(4)}"
    home.mkdir(mode=0o755)
    flags = (
        "--host-bytes",
        "16MiB",
        "--no-prefault",
        "--socket-mode",
        "666",
        "--tenants",
        "0=red,65534=blue",
    )
    try:
        with serving(home, *flags) as sidecar, Actor(sidecar.target) as red:
            red.store(0, PAGES)
            blue = subprocess.run(
                [sys.executable, "-c", BLUE, sidecar.target, link_of(red).session_id.hex()],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={
                    **os.environ,
                    "HOME": "/",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "E2E": str(Path(__file__).parent),
                },
            )
            if "PermissionError" in blue.stderr or "ModuleNotFoundError" in blue.stderr:
                pytest.skip("the other user cannot read this checkout")
            assert blue.returncode == 0, blue.stderr
            found = json.loads(blue.stdout)
            assert found["tenant"] == "blue"
            assert found["matched"] == 0
            assert found["stored"] == PAGES
            assert found["wrong"] == 0
            assert found["admin"] == "DeniedError"
            assert found["stolen_fd"] == "DeniedError"
            assert set(found["arenas"].values()) <= {"NotFoundError", "given"}
            assert sorted(found["arenas"].values()).count("given") == found["own_arenas"]
            assert red.read(0, PAGES).wrong_bytes == 0
            assert red.client.admin.check().ok
    finally:
        for path in home.iterdir():
            path.unlink()
        home.rmdir()


BLUE = """
import json, os, sys
sys.path.insert(0, os.environ["E2E"])
from e2e_actor import Actor, prompt
from hicache.errors import HicacheError
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.client.steps import Call
from hicache.rpc.common import fdproto
from hicache.rpc.pb import region_pb2

Actor("unix:///nowhere").client.close()  # all that is imported lazily, too: the other user may not read it
os.setgid(65534); os.setuid(65534)

def said(call):
    try:
        answer = call()
        for fd in getattr(answer, "fds", ()):
            os.close(fd)
        return "given"
    except HicacheError as error:
        return type(error).__name__

with Actor(sys.argv[1], salt="blue", fields={"salt": "e2e"}) as blue:
    link = blue.client.core.session.current()
    found = {"tenant": link.tenant, "matched": blue.matched(0, 8), "stored": blue.store(0, 8).stored}
    found["wrong"] = blue.read(0, 8).wrong_bytes
    found["admin"] = said(blue.client.admin.stats)
    found["stolen_fd"] = said(lambda: exchange(link.fd_path, fdproto.Get(bytes.fromhex(sys.argv[2]), 1)))
    found["arenas"] = {n: said(lambda: exchange(link.fd_path, fdproto.Get(link.session_id, n))) for n in range(32)}
    request = region_pb2.ListRegionsRequest(session_id=link.session_id)
    listed = blue.client._driver._call(Call("ListRegions", request, 5.0)).regions
    found["own_arenas"] = sum(region.kind == region_pb2.Region.ARENA for region in listed)
    print(json.dumps(found))
"""


def test_a_client_cannot_end_or_take_over_what_another_holds(tmp_path: Path) -> None:
    """Leases and reservations are named by numbers that anyone can guess: they belong to their session alone."""
    with serving(tmp_path, *tiers(tmp_path, "8MiB")) as sidecar, Actor(sidecar.target) as one:
        with WorkerProcess(sidecar.target) as other, Actor(sidecar.target) as two:
            one.store(0, PAGES)
            lease = one.ns.fetch(prompt(0, PAGES), ttl_ms=30_000)
            room = one.ns.reserve(prompt(5, PAGES), ttl_ms=30_000)
            assert room.missing_pages == PAGES - SHARED_PAGES
            from hicache.rpc.client.steps import Call

            mine, call = link_of(two), two.client._driver._call
            release = cache_pb2.ReleaseLeasesRequest(session_id=mine.session_id, lease_ids=list(range(1, 64)))
            call(Call("ReleaseLeases", release, 5.0))
            for number in range(1, 64):
                call(
                    Call(
                        "Abort",
                        cache_pb2.AbortRequest(session_id=mine.session_id, reservation_id=number),
                        5.0,
                    )
                )
                with pytest.raises(HicacheError):
                    commit = cache_pb2.CommitRequest(
                        session_id=mine.session_id, reservation_id=number, last=True
                    )
                    call(Call("Commit", commit, 5.0))
            other.ask("flood", first_talk=100, talks=80, pages=PAGES, wait_ms=10_000)
            seen = one.look(lease, 0)
            assert (seen.granted, seen.wrong_bytes) == (PAGES, 0)
            made = one.maker.make(one.seeds(prompt(5, PAGES)))
            for page in room.missing:
                room.write(page, made[page])
            assert room.commit().stored_pages == PAGES - SHARED_PAGES
            assert one.read(5, PAGES).wrong_bytes == 0
            lease.release()
        assert_idle(one.client)
