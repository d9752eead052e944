"""SGLang's own storage factory, host pools and cache controller around our backend (see ``sglang_driver.py``)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import lmdb
import pytest
from engines_kit import ROOT, SidecarBox, environment, wait_until
from engines_rot import flip_in_memory, flip_on_disk

Sidecars = Callable[..., SidecarBox]
PAGE_TOKENS = 32
#: Importing SGLang, and compiling its hash function the first time.
START_S, ANSWER_S = 180.0, 90.0


class SglangProcess:
    """A process of SGLang's around our backend; attributes are its methods."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("sglang_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.seconds = 0.0  # that the last call took

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        if kind is not None:
            print(f"SGLang's log ends with:\n{Path(self._log.name).read_text()[-3000:]}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
            watchdog = threading.Timer(START_S if name == "start" else ANSWER_S, self._process.kill)
            watchdog.start()
            line = self._process.stdout.readline()
            watchdog.cancel()
            assert line, f"SGLang answered nothing to {name}"
            reply = json.loads(line)
            if "error" in reply:
                raise AssertionError(reply["error"])
            self.seconds = reply["seconds"]
            return reply["answer"]

        return call


Start = Callable[..., SglangProcess]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SglangProcess]]:
    """Two processes that have imported SGLang, which takes long; each holds one engine at a time."""
    python, logs = environment("sglang"), tmp_path_factory.mktemp("sglang")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(SglangProcess(python, logs / f"sglang-{number}.log")) for number in range(2)
        ]


@pytest.fixture
def start(processes: list[SglangProcess]) -> Iterator[Start]:
    """Starts engines: ``start(target, layout=..., key of the JSON=value)``, two of them at most."""
    left = list(processes)

    def make(
        target: str, *, pool: str = "mha", layout: str = "page_first", allocator: str = "shm", **more: Any
    ) -> SglangProcess:
        ranks = {key: more.pop(key) for key in ("rank", "ranks") if key in more}
        engine = left.pop(0)
        extra = {
            "backend_name": "hicache",
            "module_path": "hicache.integrations.sglang",
            "class_name": "HiCacheStorageBackend",
            "interface_v1": 1,
            "allocator": allocator,
            "endpoint": target,
            **more,
        }
        spec = {
            "pool": pool,
            "layout": layout,
            "allocator": allocator,
            "page_size": PAGE_TOKENS,
            "tokens": 64 * PAGE_TOKENS,
            "backend": "dynamic",
            "model": "local/model",
            "extra": extra,
            **ranks,
        }
        assert engine.start(spec) == "hicache.integrations.sglang.backend"
        return engine

    yield make
    for process in processes:
        process.close()


def prompt(pages: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(100_000), k=pages * PAGE_TOKENS)


@pytest.mark.parametrize(
    ("pool", "layout", "allocator", "interface_v1"),
    [
        ("mha", "page_first", "shm", 1),
        ("mha", "page_first_direct", "shm", 1),
        ("mha", "layer_first", "shm", 1),
        ("mha", "page_first", "default", 1),
        ("mha", "layer_first", "default", 0),
        ("mha", "page_first", "shm", 0),
        ("mla", "page_first", "shm", 1),
        ("mla", "layer_first", "default", 0),
    ],
)
def test_backup_and_prefetch_by_the_controller(
    sidecar: Sidecars, start: Start, pool: str, layout: str, allocator: str, interface_v1: int
) -> None:
    box = sidecar()
    engine = start(box.target, pool=pool, layout=layout, allocator=allocator, interface_v1=interface_v1)
    tokens, pages, into = prompt(20), list(range(20)), list(range(30, 50))
    stored = engine.fill(pages, 1)
    assert engine.in_place() == (allocator == "shm" and layout != "layer_first")
    assert engine.prefetch(tokens, into) == [0, 0]
    assert engine.backup(tokens, pages) == len(tokens)
    assert engine.prefetch(tokens, into) == [len(tokens), len(tokens)]
    assert engine.digests(into) == stored
    assert engine.prefetch(tokens[: 5 * PAGE_TOKENS] + prompt(5, 9), into)[0] == 5 * PAGE_TOKENS
    assert engine.stats() == {"loads": [20, 5], "stores": [20]}
    box.wait_idle()


def test_a_second_process_finds_what_the_first_stored_whoever_knows_the_prefix(
    sidecar: Sidecars, start: Start
) -> None:
    box = sidecar()
    first = start(box.target, layout="page_first")
    second = start(box.target, layout="page_first", allocator="default")
    tokens = prompt(12)
    keys = first.hashes(tokens)
    stored = first.fill(list(range(12)), 1)
    # As SGLang backs up two nodes of its tree, with prefix keys and without.
    assert first.backup(tokens[: 8 * PAGE_TOKENS], list(range(8)), []) == 8 * PAGE_TOKENS
    assert first.set_v1(keys[8:], list(range(8, 12))) == [True] * 4
    first.close()
    assert second.prefetch(tokens, list(range(20, 32)), None) == [len(tokens)] * 2
    assert second.digests(list(range(20, 32))) == stored
    assert second.exists(keys[6:], keys[:6]) == second.exists(keys[6:], None) == 6
    assert second.get_v1([keys[11], keys[3]], [40, 41]) == [True, True]
    assert second.digests([40, 41]) == [stored[11], stored[3]]
    assert all(second.get_flat(keys))


def test_side_pools_threads_and_clear(sidecar: Sidecars, start: Start) -> None:
    box = sidecar()
    engine = start(box.target)
    other = start(box.target, salt="other")
    keys, pages = engine.hashes(prompt(6)), list(range(6))
    engine.fill(pages, 1)
    for each in (engine, other):
        assert all(each.set_v1(keys, pages))
    side = engine.side_pool(keys, pages)
    assert side == {"stored": [True], "loaded": [True], "hit": 6, "restorable": [6], "same": True}
    assert engine.crowd(keys, pages, list(range(20, 26)), 30) == []
    assert engine.clear()
    assert (engine.exists(keys), other.exists(keys)) == (0, 6)


@pytest.mark.parametrize(("pool", "expected"), [("mha", 0), ("mla", 3)])
def test_ranks_of_mha_keep_apart_and_those_of_mla_share(
    sidecar: Sidecars, start: Start, pool: str, expected: int
) -> None:
    box = sidecar()
    keys, pages = [f"{number:064x}" for number in range(3)], [0, 1, 2]
    writer = start(box.target, pool=pool, rank=0, ranks=2)
    reader = start(box.target, pool=pool, rank=1, ranks=2)
    writer.fill(pages, 1)
    assert all(writer.set_v1(keys, pages))
    assert reader.exists(keys) == expected


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_a_page_flipped_in_memory_is_a_miss_and_is_stored_again(
    sidecar: Sidecars, start: Start, layout: str
) -> None:
    box = sidecar()
    engine = start(box.target, layout=layout)
    keys, pages, into = engine.hashes(prompt(10)), list(range(10)), list(range(20, 30))
    stored = engine.fill(pages, 1)
    assert all(engine.set_v1(keys, pages))
    flip_in_memory(box.pid, random.Random(3))
    loaded = engine.get_v1(keys, into)
    assert loaded.count(False) == 1
    bad = loaded.index(False)
    got = engine.digests(into)
    assert [got[page] for page in pages if page != bad] == [stored[page] for page in pages if page != bad]
    assert engine.counts()["corrupt_pages"] == 1
    assert engine.exists(keys) == bad
    assert all(engine.set_v1(keys, pages))
    assert engine.get_v1(keys, into) == [True] * 10
    assert engine.digests(into) == stored


@pytest.mark.parametrize("harm", ["flipped", "cut"])
def test_a_record_harmed_on_disk_is_a_miss_and_is_stored_again(
    sidecar: Sidecars, start: Start, harm: str
) -> None:
    box = sidecar(disk="256MiB")
    engine = start(box.target, ack="durable")
    keys, pages, into = engine.hashes(prompt(10)), list(range(10)), list(range(20, 30))
    stored = engine.fill(pages, 1)
    assert all(engine.set_v1(keys, pages))
    box.process.kill()
    if harm == "flipped":
        flip_on_disk(box.disk, random.Random(3))
    else:
        cut_one_record(box.disk)
    box.process.start()
    box.wait_recovered()
    wait_until("the engine is attached again", lambda: engine.exists(keys[:1]) or engine.exists(keys[1:2]))
    loaded = engine.get_v1(keys, into)
    assert loaded.count(False) == 1
    assert all(engine.set_v1(keys, pages))
    assert engine.get_v1(keys, into) == [True] * 10
    assert engine.digests(into) == stored


def cut_one_record(folder: Path) -> None:
    """The longest record loses its end."""
    for data in sorted(folder.glob("shards/*/data.mdb")):
        with lmdb.open(str(data.parent), max_dbs=16, map_size=1 << 30) as env:
            pages = env.open_db(b"pages", create=False)
            with env.begin(db=pages, write=True) as txn:
                found = max(((len(value), key) for key, value in txn.cursor()), default=(0, b""))
                if found[0] > 1000:
                    txn.put(found[1], txn.get(found[1])[:-500])
                    return
    raise AssertionError("there are no records")


def test_the_engine_is_never_kept_waiting_and_picks_the_sidecar_up_again(
    sidecar: Sidecars, start: Start
) -> None:
    box = sidecar(start=False)
    engine = start(box.target, deadline_ms=1000, load_wait_ms=500, attach_wait_ms=100)
    tokens, pages, into = prompt(10), list(range(10)), list(range(20, 30))
    stored = engine.fill(pages, 1)
    assert engine.backup(tokens, pages) == 0
    assert engine.prefetch(tokens, into) == [0, 0]
    assert engine.seconds < 1
    box.process.start()
    keys = engine.hashes(tokens)
    for _ in range(2):
        wait_until("pages are stored", lambda: all(engine.set_v1(keys, pages)))
        assert engine.prefetch(tokens, into) == [len(tokens)] * 2
        assert engine.digests(into) == stored
        killer = threading.Timer(0.2, box.process.kill)
        killer.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # kill -9 in the middle of loads and stores
            engine.get_v1(keys, into)
            assert engine.seconds < 3
            engine.set_v1(keys, pages)
            assert engine.seconds < 3
        killer.join()
        assert engine.exists(keys) == 0
        box.process.start()


def test_wrong_json_stops_the_start_and_names_the_key(sidecar: Sidecars, start: Start) -> None:
    box = sidecar()
    with pytest.raises(AssertionError, match=r"deadline_sm is unknown.*deadline_ms"):
        start(box.target, deadline_sm=5)
