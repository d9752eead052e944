"""Rotten pages, cut pages, memory that changes meanwhile; a sidecar that is absent, hangs, dies and comes back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang_kit import HostPool, StatePool, Transfer, keys_of
from sidecars import BareSidecar

from hicache.errors import ConfigError
from hicache.integrations.sglang.pools import leading
from hicache.integrations.sglang.settings import read_settings
from hicache.rpc.client import batching


def flip(sidecar: BareSidecar, needle: bytes) -> int:
    """Change one byte of every copy of ``needle`` in the sidecar's shared memory; answers how many."""
    assert sidecar.process is not None
    home, flipped = Path(f"/proc/{sidecar.process.pid}"), 0
    with (home / "mem").open("r+b", buffering=0) as memory:
        for line in (home / "maps").read_text().splitlines():
            span, _, *rest = line.split(maxsplit=5)
            if "memfd:" not in rest[-1] or "pool" in rest[-1]:
                continue
            begin, end = (int(part, 16) for part in span.split("-"))
            memory.seek(begin)
            at = memory.read(end - begin).find(needle)
            if at >= 0:
                memory.seek(begin + at + len(needle) // 2)
                memory.write(bytes([needle[len(needle) // 2] ^ 0x10]))
                flipped += 1
    return flipped


def eventually(ask: Callable[[], bool], timeout_s: float = 40) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if ask():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_a_flipped_byte_is_a_miss_that_can_be_stored_again(
    make_backend: Any, own_sidecar: BareSidecar, layout: str
) -> None:
    pool = HostPool(layout)
    backend = make_backend(pool, endpoint=own_sidecar.target)
    keys, stored = keys_of(1, 2, 3), pool.fill(0, 1, 2)
    assert backend.batch_set_v1(keys, pool.indices(0, 1, 2)) == [True] * 3
    assert flip(own_sidecar, stored[1][: len(stored[1]) // 4]) == 1
    assert backend.batch_get_v1(keys, pool.indices(8, 9, 10)) == [True, False, True]
    assert backend.counts["kv"].corrupt_pages == 1
    assert backend.batch_exists(keys) == 1
    assert backend.batch_set_v1(keys, pool.indices(0, 1, 2)) == [True] * 3
    assert backend.batch_get_v1(keys, pool.indices(8, 9, 10)) == [True] * 3
    assert pool.read(8, 9, 10) == stored


def test_memory_that_changes_after_its_checksum_is_not_stored(
    make_backend: Any, own_sidecar: BareSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = HostPool()
    backend = make_backend(pool, endpoint=own_sidecar.target)
    pool.fill(0, 1)
    store_many = batching.store_many

    def change_first(*args: Any) -> Any:
        pool.kv_buffer.view(-1)[5] += 1
        return store_many(*args)

    monkeypatch.setattr(batching, "store_many", change_first)
    assert backend.batch_set_v1(keys_of(1, 2), pool.indices(0, 1)) == [False, True]
    monkeypatch.undo()
    assert backend.batch_exists(keys_of(1)) == 0
    assert backend.batch_set_v1(keys_of(1), pool.indices(0)) == [True]


def test_values_of_another_size_and_wrong_calls_are_refused(
    make_backend: Any, own_sidecar: BareSidecar
) -> None:
    pool = HostPool()
    backend = make_backend(None, endpoint=own_sidecar.target)
    assert not backend.set("any", pool.get_dummy_flat_data_page())  # no pool yet: nothing is known of pages
    assert backend.batch_exists(keys_of(1)) == 0
    backend.register_mem_pool_host(pool)
    cut = pool.get_dummy_flat_data_page()[:-1]
    assert not backend.set("any", cut)
    assert not backend.exists("any")
    assert backend.set("any", pool.get_dummy_flat_data_page())
    assert backend.get("any", cut) is None
    assert backend.get("any") is None
    assert backend.batch_set_v1(keys_of(1, 2), pool.indices(0)) == [False, False]
    assert backend.batch_get_v1(keys_of(1), None) == [False]
    assert backend.batch_get_v1([], pool.indices()) == []


def test_an_absent_sidecar_costs_nothing_and_is_used_as_soon_as_it_is_there(
    make_backend: Any, own_sidecar: BareSidecar
) -> None:
    own_sidecar.kill()
    pool = HostPool()
    stored = pool.fill(0)
    began = time.monotonic()
    backend = make_backend(pool, endpoint=own_sidecar.target, attach_wait_ms=100)
    backend.register_mem_host_pool_v2(StatePool(), "mamba")
    assert backend.batch_exists(keys_of(1)) == 0
    assert backend.batch_set_v1(keys_of(1), pool.indices(0)) == [False]
    assert backend.batch_get_v1(keys_of(1), pool.indices(0)) == [False]
    assert backend.batch_exists_v2(keys_of(1), [Transfer("mamba")]).kv_hit_pages == 0
    assert not backend.clear()
    assert time.monotonic() - began < 2
    own_sidecar.start()
    assert eventually(lambda: backend.batch_set_v1(keys_of(1), pool.indices(0)) == [True])
    pool.wipe()
    assert backend.batch_get_v1(keys_of(1), pool.indices(3)) == [True]
    assert pool.read(3) == stored


def test_a_killed_sidecar_is_picked_up_again_after_its_restart(
    make_backend: Any, own_sidecar: BareSidecar
) -> None:
    pool = HostPool()
    backend = make_backend(pool, endpoint=own_sidecar.target, deadline_ms=1000, load_wait_ms=500)
    stored = pool.fill(*range(8))
    keys, slowest_s, stop = keys_of(*range(8)), [0.0], threading.Event()

    def work() -> None:
        while not stop.is_set():
            began = time.monotonic()
            backend.batch_set_v1(keys, pool.indices(*range(8)))
            backend.batch_get_v1(keys, pool.indices(*range(8, 16)))
            slowest_s[0] = max(slowest_s[0], time.monotonic() - began)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(2):
        assert eventually(lambda: backend.batch_exists(keys) == 8)
        own_sidecar.kill()
        time.sleep(0.3)
        own_sidecar.start()
    assert eventually(lambda: backend.batch_exists(keys) == 8)
    stop.set()
    worker.join(20)
    assert slowest_s[0] < 2 * 1.0 + 8.0  # two calls of a deadline each, and a busy machine
    assert backend.batch_get_v1(keys, pool.indices(*range(8, 16))) == [True] * 8
    assert pool.read(*range(8, 16)) == stored


def test_a_sidecar_that_hangs_costs_one_deadline_a_pause(make_backend: Any, own_sidecar: BareSidecar) -> None:
    pool = HostPool()
    given = {"deadline_ms": 500, "load_wait_ms": 200, "store_wait_ms": 200, "retry_ms": 5000}
    backend = make_backend(pool, endpoint=own_sidecar.target, **given)
    pool.fill(0)
    assert backend.batch_set_v1(keys_of(1), pool.indices(0)) == [True]
    own_sidecar.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for _ in range(20):
        assert backend.batch_exists(keys_of(1)) == 0
        assert backend.batch_get_v1(keys_of(1), pool.indices(0)) == [False]
    assert time.monotonic() - began < 2.5
    own_sidecar.send_signal(signal.SIGCONT)
    assert eventually(lambda: backend.batch_exists(keys_of(1)) == 1)


def test_more_than_there_is_room_for_drops_the_ends_of_prompts_first(
    make_backend: Any, own_sidecar: BareSidecar
) -> None:
    pool = HostPool()
    own_sidecar.kill()
    own_sidecar.service = {"host_bytes": 2 << 20, "host_segment_bytes": 1 << 20, "policy": "lru"}
    own_sidecar.start()
    backend = make_backend(pool, endpoint=own_sidecar.target)
    pages = range(pool.pages)
    pool.fill(*pages)
    assert pool.pages * pool.page_bytes * 5 > 2 << 20, "five prompts do not fit"
    for prompt in range(5):
        keys = keys_of(*(1000 * prompt + page for page in pages))
        assert backend.batch_set_v1(keys, pool.indices(*pages)) == [True] * len(keys)
    last = keys_of(*(4000 + page for page in pages))
    assert backend.batch_exists(last) == len(last)
    kept = [backend._pools.kv.exist(keys_of(*(1000 * p + page for page in pages))) for p in range(4)]
    usable = sum(leading(flags) for flags in kept)
    assert 0 < sum(map(sum, kept)) < 4 * pool.pages
    assert usable >= sum(map(sum, kept)) - 3, "what is left of a prompt is its beginning, but for a few"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "endpoint is missing"),
        ({"endpoint": "localhost:50051"}, "endpoint .* not a unix socket"),
        ({"endpoint": "unix:///x", "ack": "soon"}, "ack is visible or durable"),
        ({"endpoint": "unix:///x", "deadline_ms": 0}, "deadline_ms must be at least 1"),
        ({"endpoint": "unix:///x", "deadline_ms": True}, "deadline_ms must be a whole number"),
        ({"endpoint": "unix:///x", "deadline_ms": 900_000}, "deadline_ms must be at most"),
        ({"endpoint": "unix:///x", "deadline_ms": 100, "load_wait_ms": 200}, "load_wait_ms must not exceed"),
        ({"endpoint": "unix:///x", "salt": 5}, "salt must be a string"),
        ({"endpoint": "unix:///x", "write_limit_bytes": 5}, "write_limit_bytes"),
        ({"endpoint": "unix:///x", "dead_line_ms": 5}, "dead_line_ms is unknown.*deadline_ms"),
        ({"endpoint": "unix:///x", "tp_lcm_size": 8}, "tp_lcm_size is not supported"),
    ],
)
def test_wrong_settings_name_their_key(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(given)


def test_what_cannot_be_served_is_refused_at_the_start(make_backend: Any, own_sidecar: BareSidecar) -> None:
    endpoint = own_sidecar.target
    with pytest.raises(ConfigError, match="model is missing"):
        make_backend(HostPool(), endpoint=endpoint, config={"model_name": None})
    with pytest.raises(ConfigError, match="kv_cache_dtype is missing"):
        make_backend(HostPool(dtype="uint8"), endpoint=endpoint)
    with pytest.raises(ConfigError, match="split by heads"):
        make_backend(HostPool(), endpoint=endpoint, config={"should_split_heads": True})

    class Unified(StatePool):
        def get_dummy_flat_data_page(self) -> Any:
            raise ValueError("Unsupported layout")

    with pytest.raises(ConfigError, match="does not hand out its pages in layout page_first"):
        make_backend(Unified(), endpoint=endpoint)
    make_backend(HostPool(dtype="uint8"), endpoint=endpoint, kv_cache_dtype="fp8_e4m3")
