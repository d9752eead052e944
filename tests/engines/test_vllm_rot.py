"""A page rots between the engine that stored it and the one that loads it: recomputed, counted, gone, stored anew."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engines_kit import Engine, Host, SidecarBox, hicache_connector
from engines_models import Models, prompt
from engines_rot import flip_in_memory, flip_on_disk

TOKENS, NEW_TOKENS, HIT = 1000, 12, 992
GIVEN = prompt(0, TOKENS)
#: Steps in which a request that has to compute once more may compute: chunks, the new tokens, and a few.
STEPS_MAX = NEW_TOKENS + 12


def corrupt_pages(box: SidecarBox, tier: str) -> int:
    return sum(one.corrupt_pages for one in box.stats().tiers if one.name == tier)


def read_once_more(vllm_host: Host, models: Models, box: SidecarBox, truth: list[int]) -> None:
    """Nothing was poisoned: another engine is right, and finds everything."""
    with vllm_host.running(models("llama"), connector=hicache_connector(box.target)) as engine:
        got = engine.run([GIVEN], new_tokens=NEW_TOKENS)
    assert (got.external, got.computed) == (HIT, TOKENS - HIT)
    assert got.tokens == [truth]
    box.wait_idle()


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_rot_in_memory_is_recomputed(
    vllm_host: Host,
    models: Models,
    sidecar: Callable[..., SidecarBox],
    rng: random.Random,
    load_async: bool,
) -> None:
    model, box = models("llama"), sidecar()
    (truth,) = models.greedy(model, [GIVEN], NEW_TOKENS)
    connector = hicache_connector(box.target, load_async=load_async)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run([GIVEN], new_tokens=NEW_TOKENS)
    box.wait_idle()
    flip_in_memory(box.pid, rng)
    with vllm_host.running(model, connector=connector) as engine:
        got = engine.run([GIVEN], new_tokens=NEW_TOKENS, steps_max=STEPS_MAX)
        assert got.tokens == [truth]
        assert sum(got.steps) > NEW_TOKENS + TOKENS - HIT, "something was computed again"
        box.wait_idle()
        assert corrupt_pages(box, "host") == 1
        engine.reset()
        again = engine.run([GIVEN], new_tokens=NEW_TOKENS, steps_max=STEPS_MAX)
        assert (again.tokens, again.external) == ([truth], HIT)
    read_once_more(vllm_host, models, box, truth)


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_rot_in_memory_fails_the_request_where_the_user_wants_that(
    vllm_host: Host,
    models: Models,
    sidecar: Callable[..., SidecarBox],
    rng: random.Random,
    load_async: bool,
) -> None:
    """``kv_load_failure_policy: fail``: the request ends with an error, the next one is right."""
    model, box = models("llama"), sidecar()
    (truth,) = models.greedy(model, [GIVEN], NEW_TOKENS)
    connector = hicache_connector(box.target, policy="fail", load_async=load_async)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run([GIVEN], new_tokens=NEW_TOKENS)
    box.wait_idle()
    flip_in_memory(box.pid, rng)
    with vllm_host.running(model, connector=connector) as engine:
        failed = engine.run([GIVEN], new_tokens=NEW_TOKENS, steps_max=STEPS_MAX)
        assert [answer.finish for answer in failed.answers] == ["error"]
        box.wait_idle()
        assert corrupt_pages(box, "host") == 1
        engine.reset()
        got = engine.run([GIVEN], new_tokens=NEW_TOKENS, steps_max=STEPS_MAX)
        assert got.tokens == [truth]
        box.wait_idle()
    read_once_more(vllm_host, models, box, truth)


def test_much_rot_under_many_requests(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox], rng: random.Random
) -> None:
    """Eight prompts that share a prefix, at once, over pages of which many are bad."""
    model, box = models("llama"), sidecar()
    shared = prompt(50, 400)
    prompts = [shared + prompt(seed, 600) for seed in range(60, 68)]
    truth = models.greedy(model, prompts, NEW_TOKENS)
    connector = hicache_connector(box.target)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run(prompts, new_tokens=NEW_TOKENS)
    box.wait_idle()
    flip_in_memory(box.pid, rng, 40)
    with vllm_host.running(model, connector=connector) as engine:
        for _ in range(4):  # rot behind rot is found in its turn
            got = engine.run(prompts, new_tokens=NEW_TOKENS, steps_max=8 * STEPS_MAX)
            assert got.tokens == truth
            engine.reset()
            box.wait_idle()
        assert corrupt_pages(box, "host") > 0
        last = engine.run(prompts, new_tokens=NEW_TOKENS)
    assert last.tokens == truth
    assert last.external >= 8 * 512, "stored again"
    box.wait_idle()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_rot_on_disk_is_a_miss(
    vllm_host: Host,
    models: Models,
    sidecar: Callable[..., SidecarBox],
    rng: random.Random,
    policy: str,
) -> None:
    """The sidecar itself finds it when it reads the page: the engine is offered the pages before it, and no more."""
    model, box = models("llama"), sidecar("--scrub-bytes-per-s", "0", disk="256MiB")
    (truth,) = models.greedy(model, [GIVEN], NEW_TOKENS)
    connector = hicache_connector(box.target, policy=policy, ack="durable")
    with vllm_host.running(model, connector=connector) as engine:
        engine.run([GIVEN], new_tokens=NEW_TOKENS)
    box.process.stop()
    flip_on_disk(box.disk, rng)
    box.process.start()
    box.wait_recovered()
    with vllm_host.running(model, connector=connector) as engine:
        got = engine.run([GIVEN], new_tokens=NEW_TOKENS, steps_max=STEPS_MAX)
        assert got.tokens == [truth]
        assert got.external + got.computed == TOKENS
        assert got.external < HIT
        box.wait_idle()
        assert corrupt_pages(box, "disk") == 1
        assert recovered(engine, box, truth) == HIT
    read_once_more(vllm_host, models, box, truth)


def recovered(engine: Engine, box: SidecarBox, truth: list[int]) -> int:
    """External tokens of the same prompt asked anew in the same engine."""
    engine.reset()
    got = engine.run([GIVEN], new_tokens=NEW_TOKENS, steps_max=STEPS_MAX)
    assert got.tokens == [truth]
    box.wait_idle()
    return got.external
