"""The backend against a real sidecar: what one path stored every other finds, in any order, from any process."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from sglang_kit import HitPolicy, HostPool, StatePool, Transfer, keys_of

from hicache.errors import InvalidArgumentError

LAYOUTS = ("layer_first", "page_first", "page_first_direct")


@pytest.mark.parametrize("shm", [True, False], ids=["shm", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_the_pool_come_back_in_other_places(open_backend: Any, layout: str, shm: bool) -> None:
    pool = HostPool(layout, shm=shm)
    backend = open_backend(pool)
    keys, bytes_stored = keys_of(1, 2, 3), pool.fill(2, 5, 7)
    assert backend.batch_set_v1(keys, pool.indices(2, 5, 7)) == [True] * 3
    pool.wipe()
    assert backend.batch_exists([*keys, *keys_of(4)]) == 3
    assert backend.batch_get_v1(keys, pool.indices(9, 0, 11)) == [True] * 3
    assert pool.read(9, 0, 11) == bytes_stored


def test_the_shm_pool_is_stored_in_place(open_backend: Any) -> None:
    pool = HostPool("page_first")
    backend = open_backend(pool)
    pool.fill(0, 1)
    assert backend.batch_set_v1(keys_of(1, 2), pool.indices(0, 1)) == [True, True]
    assert backend._link.client.core.memory.used_bytes == 0
    assert not [each for each in backend._link.client.core.memory._regions if hasattr(each, "spans")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_and_pool_pages_are_the_same_pages(open_backend: Any, layout: str) -> None:
    pool = HostPool(layout)
    backend = open_backend(pool)
    stored = pool.fill(0, 1)
    flat = [pool.get_data_page(page * pool.page_size) for page in (0, 1)]
    assert backend.batch_set(keys_of(1), flat[:1])
    assert backend.batch_set_v1(keys_of(2), pool.indices(1)) == [True]
    pool.wipe()
    assert backend.batch_get_v1(keys_of(1), pool.indices(4)) == [True]
    assert pool.read(4) == stored[:1]
    target = pool.get_dummy_flat_data_page()
    assert backend.get(keys_of(2)[0], target) is target
    assert target.view(torch.uint8).numpy().tobytes() == stored[1]


def test_any_page_is_found_by_its_key_alone_in_any_order_and_process(open_backend: Any) -> None:
    pool, other = HostPool(), HostPool(shm=False)
    first, second = open_backend(pool), open_backend(other)
    stored = pool.fill(*range(6))
    prefixed = type("Extra", (), {"prefix_keys": keys_of(98, 99)})()
    assert all(first.batch_set_v1(keys_of(3, 4, 5), pool.indices(3, 4, 5), prefixed))
    assert all(first.batch_set_v1(keys_of(0, 1, 2), pool.indices(0, 1, 2), None))
    assert second.exists(keys_of(5)[0])
    assert second.batch_exists(keys_of(4, 5, 6)) == 2
    assert second.batch_exists(keys_of(6, 5)) == 0
    assert second.batch_get_v1(keys_of(5, 2, 4), other.indices(0, 1, 2), None) == [True] * 3
    assert other.read(0, 1, 2) == [stored[5], stored[2], stored[4]]
    assert second.batch_exists(keys_of(0, 1, 2, 3), prefixed) == 4


def test_what_is_there_is_not_stored_again_and_a_key_may_come_twice(open_backend: Any) -> None:
    pool = HostPool()
    backend = open_backend(pool)
    pool.fill(0, 1)
    assert backend.batch_set_v1(keys_of(1, 1), pool.indices(0, 0)) == [True, True]
    assert backend.batch_set_v1(keys_of(1, 2), pool.indices(0, 1)) == [True, True]
    counts = backend.counts["kv"]
    assert (counts.present_pages, counts.refused_pages) == (1, 0)
    assert backend.batch_get_v1(keys_of(2, 2), pool.indices(5, 6)) == [True, True]
    assert pool.read(5) == pool.read(6) == pool.read(1)


def test_a_page_is_another_ones_where_anything_about_it_differs(open_backend: Any) -> None:
    pool = HostPool()
    backend = open_backend(pool)
    pool.fill(0)
    assert backend.batch_set_v1(keys_of(1), pool.indices(0)) == [True]
    for config, extra in (
        ({"model_name": "another"}, {}),
        ({"tp_rank": 1, "tp_size": 2}, {}),
        ({"pp_rank": 1, "pp_size": 2}, {}),
        ({"attn_cp_rank": 1, "attn_cp_size": 2}, {}),
        ({}, {"salt": "tenant"}),
        ({}, {"revision": "2"}),
        ({}, {"kv_cache_dtype": "fp8_e5m2"}),
    ):
        assert not open_backend(HostPool(), config=config, **extra).exists(keys_of(1)[0]), (config, extra)
    for stranger in (HostPool("page_first_direct"), HostPool("layer_first"), HostPool(dtype="bfloat16")):
        assert not open_backend(stranger).exists(keys_of(1)[0])
    assert open_backend(HostPool(shm=False)).exists(keys_of(1)[0])


def test_ranks_of_a_replicated_model_share_and_their_states_do_not(open_backend: Any) -> None:
    class MLAPool(HostPool):
        pass

    class MambaPool(StatePool):
        pass

    def rank(number: int) -> tuple[Any, Any, Any]:
        pool, states = MLAPool(), MambaPool()
        backend = open_backend(pool, config={"is_mla_model": True, "tp_rank": number, "tp_size": 2})
        backend.register_mem_host_pool_v2(states, "mamba")
        return backend, pool, states

    (first, pool, states), (second, _, others) = rank(0), rank(1)
    pool.fill(0)
    states.fill(0)
    assert first.batch_set_v1(keys_of(1), pool.indices(0)) == [True]
    assert first.batch_set_v2([Transfer("mamba", states.indices(0), keys_of(1))]) == {"mamba": [True]}
    assert second.exists(keys_of(1)[0])
    got = second.batch_get_v2([Transfer("mamba", others.indices(0), keys_of(1))])
    assert got == {"mamba": [False]}


def test_side_pools_limit_the_prefix_by_their_own_rule(open_backend: Any) -> None:
    pool, states, index = HostPool(), StatePool(), HostPool("page_first_direct")
    backend = open_backend(pool)
    backend.register_mem_host_pool_v2(pool, "kv")
    backend.register_mem_host_pool_v2(states, "mamba")
    backend.register_mem_host_pool_v2(index, "indexer")
    keys = keys_of(*range(6))
    pool.fill(*range(6))
    stored = states.fill(1, 3)
    index.fill(*range(5))
    results = backend.batch_set_v2(
        [
            Transfer("kv", pool.indices(*range(6)), keys),
            Transfer("mamba", states.indices(1, 3), [keys[1], keys[3]]),
            Transfer("indexer", index.indices(*range(5)), keys[:5]),
        ]
    )
    assert {name: all(flags) for name, flags in results.items()} == dict.fromkeys(results, True)
    trailing = Transfer("mamba", keys=[keys[5]], hit_policy=HitPolicy.TRAILING_PAGES)
    found = backend.batch_exists_v2(keys, [Transfer("indexer"), trailing])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [2, 4])
    assert found.extra_pool_hit_pages == {"kv": 6, "indexer": 5, "mamba": 4}
    assert backend.batch_exists_v2(keys).kv_hit_pages == 6
    assert backend.batch_exists_v2(keys, [Transfer("unknown")]).kv_hit_pages == 0
    with pytest.raises(InvalidArgumentError, match="block_groups"):
        backend.batch_exists_v2(keys, [Transfer("indexer", hit_policy=HitPolicy.BLOCK_GROUPS)])
    states.wipe()
    assert backend.batch_get_v2([Transfer("mamba", states.indices(8), [keys[3]])]) == {"mamba": [True]}
    assert states.read(8) == stored[1:]
    assert backend.batch_get_v2([Transfer("mamba", None, [keys[3]])]) == {"mamba": [False]}


def test_clear_drops_this_namespace_only(open_backend: Any) -> None:
    pool = HostPool()
    ours, theirs = open_backend(pool), open_backend(pool, salt="theirs")
    pool.fill(0)
    for backend in (ours, theirs):
        assert backend.batch_set_v1(keys_of(1), pool.indices(0)) == [True]
    assert ours.clear()
    assert not ours.exists(keys_of(1)[0])
    assert theirs.exists(keys_of(1)[0])
    assert ours.batch_set_v1(keys_of(1), pool.indices(0)) == [True]


class Traffic:
    """What SGLang's three threads do with one backend."""

    def __init__(self, backend: Any, pool: HostPool) -> None:
        self.backend, self.pool = backend, pool
        self.stored = pool.fill(*range(8))
        self.keys = keys_of(*range(8))
        self.wrong: list[str] = []

    def backup(self) -> None:
        for page in list(range(8)) * 20:
            if self.backend.batch_set_v1([self.keys[page]], self.pool.indices(page)) != [True]:
                self.wrong.append(f"store of {page}")

    def query(self) -> None:
        for _ in range(60):
            if not 0 <= self.backend.batch_exists(self.keys) <= 8:
                self.wrong.append("exists")

    def prefetch(self) -> None:
        for _ in range(40):
            loaded = self.backend.batch_get_v1(self.keys, self.pool.indices(*range(8, 16)))
            bad = [
                page for page in range(8) if loaded[page] and self.pool.read(8 + page) != [self.stored[page]]
            ]
            self.wrong += [f"load of {page}" for page in bad]


def test_three_threads_at_once(open_backend: Any) -> None:
    pool = HostPool("page_first_direct")
    backend = open_backend(pool)
    traffic = Traffic(backend, pool)
    threads = [threading.Thread(target=work) for work in (traffic.backup, traffic.query, traffic.prefetch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not traffic.wrong
    assert not any(thread.is_alive() for thread in threads)
    assert backend.batch_get_v1(traffic.keys, pool.indices(*range(8, 16))) == [True] * 8


def test_figures_are_those_since_they_were_last_asked(open_backend: Any) -> None:
    pool = HostPool()
    backend = open_backend(pool)
    pool.fill(0, 1)
    backend.batch_set_v1(keys_of(1, 2), pool.indices(0, 1))
    backend.batch_get_v1(keys_of(1), pool.indices(5))
    stats = backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([2], [1])
    assert stats.backup_bandwidth[0] > 0
    assert stats.prefetch_bandwidth[0] > 0
    assert backend.get_stats().backup_pgs == []
