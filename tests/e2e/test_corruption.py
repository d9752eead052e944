"""Bytes that rot, on disk and in memory: a page is right, or it is a miss; it is counted, and can be stored again."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from e2e_actor import PAGE_BYTES, SHARED_PAGES, Actor, prompt
from e2e_kit import assert_idle, data_file, free_port, metric, serving, tiers, wait_recovered
from sidecars import Sidecar

from hicache.errors import CorruptError

TALKS, PAGES = 24, 10


def corrupt_pages(port: int, tier: str) -> float:
    return metric(port, "hicache_tier_corrupt_pages_total", tier=tier)


def read_all(actor: Actor) -> int:
    """Read every talk; answers how many pages could be read. Nothing is ever wrong."""
    readable = 0
    for talk in range(TALKS):
        seen = actor.read(talk, PAGES)
        assert seen.wrong_bytes == 0
        readable += 0 if seen.corrupt else seen.granted
    return readable


def heal(actor: Actor) -> None:
    """What was lost is stored again, and then everything is right. Rot that lay behind rot is found in its turn."""
    for talk in range(TALKS):
        for _ in range(PAGES + 1):
            actor.store(talk, PAGES)
            seen = actor.read(talk, PAGES)
            assert seen.wrong_bytes == 0
            if seen.granted == PAGES:
                break
        assert (seen.granted, seen.corrupt) == (PAGES, False), f"talk {talk}"


def stored(folder: Path, *flags: str) -> Sidecar:
    """A sidecar that has saved everything and ended."""
    sidecar = Sidecar(folder, flags).start()
    with Actor(sidecar.target) as actor:
        for talk in range(TALKS):
            actor.store(talk, PAGES, durable=True)
    assert sidecar.stop() == 0
    return sidecar


@contextmanager
def restarted(sidecar: Sidecar) -> Iterator[Actor]:
    sidecar.start()
    try:
        with Actor(sidecar.target) as actor:
            wait_recovered(actor.client)
            yield actor
    finally:
        sidecar.kill()


def rest_of(page: np.ndarray) -> bytes:
    """Signs and mantissas of a bfloat16 page: they stand in the file as they are."""
    return (page[0::2] & 127 | page[1::2] & 128).tobytes()


def flip_eight_pages(folder: Path, target: str, rng: random.Random) -> None:
    """Flip a bit in a page of eight talks. Where pages lie is known by their signs and mantissas."""
    data = data_file(folder / "disk")
    raw = bytearray(data.read_bytes())
    actor = Actor(target)
    hit = 0
    for talk in rng.sample(range(TALKS), 8):
        page = rng.randrange(SHARED_PAGES, PAGES)
        low = rest_of(actor.maker.make(actor.seeds(prompt(talk, PAGES)))[page])
        at = raw.find(low[1000:1200])
        while at >= 0:  # a page may stand there twice: freed disk pages keep what they held
            raw[at + rng.randrange(200)] ^= 1 << rng.randrange(8)
            hit += 1
            at = raw.find(low[1000:1200])
    actor.client.close()
    assert hit >= 8, "the pages were found in the file"
    data.write_bytes(raw)


def test_flipped_bytes_of_records_on_disk_are_misses(tmp_path: Path, rng: random.Random) -> None:
    port = free_port()
    flags = ["--metrics-port", str(port), "--scrub-bytes-per-s", "0"]
    sidecar = stored(tmp_path, *tiers(tmp_path, "32MiB", "64MiB", *flags))
    flip_eight_pages(tmp_path, sidecar.target, rng)
    with restarted(sidecar) as actor:
        readable = read_all(actor)
        assert TALKS * PAGES * 0.3 < readable < TALKS * PAGES
        assert corrupt_pages(port, "disk") == 8
        heal(actor)
        assert_idle(actor.client)


def test_the_scrubber_finds_flipped_bytes_before_anybody_asks(tmp_path: Path, rng: random.Random) -> None:
    """The engine hears of it: what is lost is no longer offered, and stored again when it is offered anew."""
    port = free_port()
    flags = ["--metrics-port", str(port), "--scrub-bytes-per-s", "1GiB"]
    sidecar = stored(tmp_path, *tiers(tmp_path, "32MiB", "64MiB", *flags))
    flip_eight_pages(tmp_path, sidecar.target, rng)
    with restarted(sidecar) as actor:
        end = time.monotonic() + 30
        while metric(port, "hicache_scrub_corrupt_pages_total") < 8 and time.monotonic() < end:
            time.sleep(0.1)
        assert metric(port, "hicache_scrub_corrupt_pages_total") == 8
        for talk in range(TALKS):
            offered = actor.matched(talk, PAGES)
            assert actor.read(talk, PAGES).granted == offered
        heal(actor)
        assert_idle(actor.client)


def test_a_lost_page_above_pages_that_stayed_on_disk_can_be_stored_again(tmp_path: Path) -> None:
    """Pages below a hole stay where they are; when the hole is filled again, nothing claims more than is on disk."""
    sidecar = stored(tmp_path, *tiers(tmp_path, "32MiB", "64MiB"))
    data = data_file(tmp_path / "disk")
    raw = bytearray(data.read_bytes())
    actor = Actor(sidecar.target)
    for talk in range(6, 12):  # one page in the middle of each
        low = rest_of(actor.maker.make(actor.seeds(prompt(talk, PAGES)))[5])
        at = raw.find(low[1000:1200])
        assert at >= 0
        while at >= 0:
            raw[at] ^= 1
            at = raw.find(low[1000:1200])
    actor.client.close()
    data.write_bytes(raw)
    with restarted(sidecar) as actor:
        for talk in range(6, 12):
            seen = actor.read(talk, PAGES)
            assert (seen.granted, seen.wrong_bytes) == (5, 0)
            durable = actor.store(talk, PAGES, durable=talk % 2 == 0).durable
            assert actor.client.admin.check().ok, actor.client.admin.check().problem
            seen = actor.read(talk, PAGES)
            assert (seen.granted, seen.wrong_bytes) == (PAGES, 0)
            assert durable in {0, 6, PAGES}
        assert_idle(actor.client)
        sidecar.kill()
        sidecar.start()
        wait_recovered(actor.client)
        for talk in range(6, 12):
            seen = actor.read(talk, PAGES)
            assert seen.wrong_bytes == 0
            assert talk % 2 or seen.granted == PAGES, "acknowledged as durable"


@pytest.mark.parametrize("how_many", [20, 400])
def test_random_rot_anywhere_in_the_data_file(tmp_path: Path, rng: random.Random, how_many: int) -> None:
    """LMDB's own pages may be hit: then the folder may start empty, or lose pages; nothing worse."""
    sidecar = stored(tmp_path, *tiers(tmp_path, "32MiB", "64MiB"))
    data = data_file(tmp_path / "disk")
    raw = bytearray(data.read_bytes())
    for _ in range(how_many):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    data.write_bytes(raw)
    with restarted(sidecar) as actor:
        readable = read_all(actor)
        heal(actor)
        assert_idle(actor.client)
    assert sidecar.stop() == 0
    print(f"{how_many} bits flipped: {readable} of {TALKS * PAGES} pages readable")


def test_a_truncated_or_foreign_data_file_is_a_cold_start(tmp_path: Path) -> None:
    sidecar = stored(tmp_path, *tiers(tmp_path, "32MiB", "64MiB"))
    whole = data_file(tmp_path / "disk").read_bytes()
    for broken in (whole[: len(whole) // 2], os.urandom(len(whole)), b""):
        data_file(tmp_path / "disk").write_bytes(broken)
        with restarted(sidecar) as actor:
            read_all(actor)
            heal(actor)
            assert_idle(actor.client)
            assert sidecar.stop() == 0


def test_two_records_that_change_places_are_misses(tmp_path: Path) -> None:
    """Every record echoes its key: a sound record in another's place is not taken for it."""
    lmdb = pytest.importorskip("lmdb")
    sidecar = stored(tmp_path, *tiers(tmp_path, "32MiB", "64MiB"))
    with lmdb.open(str(data_file(tmp_path / "disk").parent), max_dbs=4, map_size=1 << 28) as env:
        pages = env.open_db(b"pages", create=False)
        with env.begin(db=pages, write=True) as txn:
            rows = list(txn.cursor())
            for (key, _), (_, value) in zip(rows, rows[1:] + rows[:1], strict=True):
                txn.put(key, value)
    with restarted(sidecar) as actor:
        assert read_all(actor) == 0
        heal(actor)
        assert_idle(actor.client)


# --- in memory


def flip_in_arena(pid: int, needle: bytes, count: int = 1) -> int:
    """Flip bits where a page lies in a sidecar's arena, through its own writable mapping. Skips where forbidden."""
    flipped = 0
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            for begin, end, name in re.findall(r"^(\w+)-(\w+) rw-s \S+ \S+ \S+ +(.*)$", maps, re.MULTILINE):
                if "memfd" not in name:
                    continue
                start, stop = int(begin, 16), int(end, 16)
                memory.seek(start)
                held = memory.read(stop - start)
                at = held.find(needle)
                while at >= 0 and flipped < count:
                    memory.seek(start + at)
                    memory.write(bytes([held[at] ^ 0x10]))
                    flipped += 1
                    at = held.find(needle, at + 1)
    except PermissionError:
        pytest.skip("this kernel does not let us write another process's memory")
    return flipped


def test_rot_in_host_memory_is_refused_and_never_saved(tmp_path: Path) -> None:
    port = free_port()
    flags = tiers(tmp_path, "4MiB", "64MiB", "--metrics-port", str(port))
    with serving(tmp_path, *flags) as sidecar, Actor(sidecar.target) as actor:
        actor.store(0, PAGES)
        page = SHARED_PAGES + 2
        good = actor.maker.make(actor.seeds(prompt(0, PAGES)))[page].tobytes()
        assert flip_in_arena(sidecar.pid, good[: 4 << 10]) == 1
        found = np.zeros((PAGES, PAGE_BYTES), np.uint8)
        with actor.ns.fetch(prompt(0, PAGES)) as lease:
            assert lease.granted_pages == PAGES
            with pytest.raises(CorruptError):
                lease.copy_into(found)
            assert lease.copy_into(found, 0, page) == page, "the pages before it are sound"
            assert actor.wrong(0, found[:page]) == 0
            with pytest.raises(CorruptError):
                lease.copy_into(found[page:], page, 1)
        with Actor(sidecar.target, data_plane="stream") as far:
            assert far.read(0, PAGES).corrupt or far.read(0, PAGES).granted <= page
        for talk in range(100, 150):  # push it out: its checksum goes along, so that the disk refuses it
            actor.store(talk, PAGES)
        seen = actor.read(0, PAGES)
        assert seen.wrong_bytes == 0
        assert seen.granted <= page, "the page is gone, not laundered"
        assert corrupt_pages(port, "host") >= 1
        actor.store(0, PAGES)
        seen = actor.read(0, PAGES)
        assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (PAGES, 0, False)
        assert_idle(actor.client)


@pytest.mark.parametrize("durable", [True, False])
def test_rot_that_a_reader_reports_is_gone_and_is_stored_or_found_again(
    tmp_path: Path, durable: bool
) -> None:
    """The reader has a ticket and finds the page unsound; the lease's owner reports it."""
    port = free_port()
    flags = tiers(tmp_path, "4MiB", "64MiB", "--metrics-port", str(port))
    with serving(tmp_path, *flags) as sidecar, Actor(sidecar.target) as actor, Actor(sidecar.target) as far:
        actor.store(0, PAGES, durable=durable)
        page = SHARED_PAGES + 2
        good = actor.maker.make(actor.seeds(prompt(0, PAGES)))[page].tobytes()
        assert flip_in_arena(sidecar.pid, good[: 4 << 10]) == 1
        with actor.ns.fetch(prompt(0, PAGES)) as lease:
            reader = far.client.reader(lease.ticket())
            assert reader.unsound(0, PAGES) == [page]
            assert reader.still_valid()
            assert lease.report_corrupt([0, 1]) == 0
            assert corrupt_pages(port, "host") == 0
            assert lease.report_corrupt(range(PAGES)) == 1
            assert lease.report_corrupt([page]) == 0, "it is known by now"
            with actor.ns.fetch(prompt(0, PAGES)) as again:
                assert again.granted_pages == page
        assert corrupt_pages(port, "host") == 1
        assert corrupt_pages(port, "disk") == 0
        assert not reader.still_valid()
        seen = actor.read(0, PAGES)
        assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (PAGES if durable else page, 0, False)
        actor.store(0, PAGES)
        seen = far.read(0, PAGES)
        assert (seen.granted, seen.wrong_bytes, seen.corrupt) == (PAGES, 0, False)
        assert actor.client.admin.check().ok
        assert_idle(actor.client)


def test_the_arena_cannot_be_written_by_a_client(tmp_path: Path) -> None:
    import fcntl
    import mmap

    from hicache.rpc.client.lifeline import exchange
    from hicache.rpc.common import fdproto

    with serving(tmp_path, *tiers(tmp_path, disk="")) as sidecar, Actor(sidecar.target) as actor:
        actor.store(0, PAGES)
        with actor.ns.fetch(prompt(0, PAGES)) as lease:
            link = actor.client.core.session.current()
            assert link is not None
            region = lease._state.runs[0].region.info
            answer = exchange(link.fd_path, fdproto.Get(link.session_id, region.region_id))
            (fd,) = answer.fds
            try:
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, region.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                for change in (
                    lambda: os.pwrite(fd, b"x", region.first_slot_offset),
                    lambda: os.ftruncate(fd, 0),
                ):
                    with pytest.raises(OSError):  # EPERM or EBADF, as the kernel likes
                        change()
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                try:
                    with pytest.raises(PermissionError):
                        os.pwrite(again, b"x", region.first_slot_offset)
                finally:
                    os.close(again)
                with pytest.raises(PermissionError):
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            finally:
                os.close(fd)
            assert actor.look(lease, 0).wrong_bytes == 0
        assert_idle(actor.client)
