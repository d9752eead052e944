"""The scrubber: every page once a pass, no faster than its rate, on from where it was, never in the way."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest
from crash_tasks import Shop
from crash_world import NAMESPACES, PRINTS, Name, content, key, record

from hicache.tier.disk import DiskStore, Layout
from hicache.tier.scrub import CURSOR_FILE
from hicache.types import Op, Outcome

CAPACITY_BYTES = 64 << 20
SHARD_BYTES = 4 << 20
NAMES: list[Name] = [(space, number) for space, count in ((0, 200), (1, 120)) for number in range(count)]


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shop = open_shop(tmp_path / "disk", 0)
    for space in (0, 1):
        shop.store.put_namespace(PRINTS[space], NAMESPACES[space])
        names = [name for name in NAMES if name[0] == space]
        pages = [content(name, 1) for name in names]
        shop.submit(Op.PUT, names, pages, records=[record(name) for name in names])
        (done,) = shop.done()
        assert set(done.outcomes) == {Outcome.OK}
    shop.store.close()
    return tmp_path / "disk"


def open_shop(folder: Path, rate: int) -> Shop:
    return Shop(str(folder), CAPACITY_BYTES, shard_bytes=SHARD_BYTES, scrub=rate)


@pytest.fixture
def scrubbed(folder: Path) -> Iterator[Shop]:
    shop = open_shop(folder, 1 << 30)
    yield shop
    shop.store.close()


def test_a_pass_sees_every_page_of_every_shard_once(scrubbed: Shop) -> None:
    wait_for(lambda: scrubbed.store.scrub_stats.passes == 1)
    assert scrubbed.store.scrub_stats.pages == len(NAMES)
    assert scrubbed.store.scrub_stats.corrupt_pages == 0


def test_it_stays_below_its_rate(folder: Path) -> None:
    """Pauses are never shorter than what was read asks for: a bound on the work done, not on the clock's mercy."""
    rate, began = 1 << 20, time.monotonic()
    shop = open_shop(folder, rate)
    time.sleep(1.0)
    shop.store.close()
    took_s = time.monotonic() - began
    seen = shop.store.scrub_stats
    assert 0 < seen.bytes <= rate * took_s + (1 << 20), "a step ahead at most"
    assert not seen.passes


def test_it_goes_on_where_it_was(folder: Path) -> None:
    shop = open_shop(folder, 2 << 20)
    wait_for(lambda: shop.store.scrub_stats.pages > 0)
    shop.store.close()
    first = shop.store.scrub_stats.pages
    assert 0 < first < len(NAMES)
    shop = open_shop(folder, 1 << 30)
    wait_for(lambda: shop.store.scrub_stats.passes == 1)
    shop.store.close()
    assert shop.store.scrub_stats.pages == len(NAMES) - first
    assert json.loads((folder / CURSOR_FILE).read_text()) == {"shard": 0, "key": ""}


@pytest.mark.parametrize("garbage", [b"", b"{}", b'{"shard": "x", "key": 7}', None], ids=str)
def test_a_garbage_place_is_the_beginning(folder: Path, garbage: bytes | None, rng: random.Random) -> None:
    if garbage is None:
        garbage = rng.randbytes(50)
    (folder / CURSOR_FILE).write_bytes(garbage)
    shop = open_shop(folder, 1 << 30)
    wait_for(lambda: shop.store.scrub_stats.passes == 1)
    shop.store.close()
    assert shop.store.scrub_stats.pages == len(NAMES)


def test_what_it_finds_is_gone_and_kept_aside(folder: Path) -> None:
    doomed = [(1, 5), (1, 50), (0, 7)]
    found = 0
    for shard in (folder / "shards").iterdir():
        with lmdb.open(str(shard), max_dbs=4, map_size=CAPACITY_BYTES, lock=False) as env:
            table = env.open_db(b"pages", create=False)
            with env.begin(db=table, write=True) as txn:
                for name in doomed:
                    record_bytes = bytearray(txn.get(key(name)) or b"")
                    if record_bytes:
                        record_bytes[-7] ^= 1
                        txn.put(key(name), bytes(record_bytes))
                        found += 1
    assert found == len(doomed)
    shop = open_shop(folder, 1 << 30)
    wait_for(lambda: shop.store.stats.quarantined_pages == len(doomed))
    assert shop.store.scrub_stats.corrupt_pages == len(doomed)
    for name in doomed:
        shop.submit(Op.GET, [name], [bytearray(len(content(name, 1)))])
        (done,) = shop.done()
        assert done.outcomes == (Outcome.MISS,)
    shop.store.close()
    assert len(list((folder / "quarantine").iterdir())) == len(doomed)


def test_writing_beside_it_keeps_the_bound(folder: Path) -> None:
    """No snapshot of the scrubber's lives long: overwriting everything many times does not make files grow."""
    shop = open_shop(folder, 1 << 30)
    names = [name for name in NAMES if name[0] == 1]
    for version in range(2, 30):
        pages = [content(name, version) for name in names]
        shop.submit(Op.PUT, names, pages, records=[record(name) for name in names])
        (done,) = shop.done()
        assert set(done.outcomes) == {Outcome.OK}
    shop.store.close()


def test_no_rate_no_thread(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "disk", CAPACITY_BYTES, lambda: None, layout=Layout())
    assert store.scrub_stats.pages == 0
    store.close()
    assert not (tmp_path / "disk" / CURSOR_FILE).exists()
