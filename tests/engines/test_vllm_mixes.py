"""Prefixes partly in vLLM's own cache, longer conversations, preemption, aborts, small memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines_kit import Host, SidecarBox, hicache_connector
from engines_models import Models, prompt
from engines_oracle import Oracle

NEW_TOKENS = 12


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_a_prefix_that_vllm_has_itself_and_more_from_the_sidecar(
    vllm_host: Host, models: Models, oracle: Oracle, sidecar: Callable[..., SidecarBox], load_async: bool
) -> None:
    """Pages of two blocks: vLLM's own prefix ends inside a page, whose second block alone is loaded."""
    model = models("llama")
    whole = prompt(0, 1000)
    short = whole[:300]
    truth = oracle(model, 32, [whole], NEW_TOKENS)
    connector = hicache_connector(sidecar().target, load_async=load_async, page_tokens=64)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run([whole], new_tokens=NEW_TOKENS)
    reader = hicache_connector(
        connector["kv_connector_extra_config"]["endpoint"], load_async=load_async, page_tokens=64
    )
    with vllm_host.running(model, connector=reader) as engine:
        first = engine.run([{"tokens": short, "transfer": {"hicache": "off"}}], new_tokens=1)
        second = engine.run([whole], new_tokens=NEW_TOKENS, logprobs=5)
    assert (first.computed, first.external) == (300, 0)
    assert second.local == 288, "nine blocks, the last of them half of a page"
    assert (second.external, second.computed) == (960 - 288, 40)
    assert second.answers[0].tokens == truth.cold[0].tokens


def test_a_conversation_moves_from_engine_to_engine(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """What was generated is part of the next turn's prefix, whoever answers it."""
    model = models("qwen2")
    box = sidecar()
    connector = hicache_connector(box.target)
    talk = prompt(3, 400)
    stored = 0
    for turn in range(3):
        with vllm_host.running(model, connector=connector) as engine:
            got = engine.run([talk], new_tokens=70)
        assert got.external == stored
        assert got.tokens[0] == models.greedy(model, [talk], 70)[0]
        # the last generated token's keys and values were never computed
        stored = (len(talk) + 70 - 1) // 32 * 32
        talk = talk + got.tokens[0] + prompt(10 + turn, 50)
        box.wait_idle()


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_requests_that_are_preempted_go_on_right(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox], load_async: bool
) -> None:
    """Too few blocks for what four requests generate: some are thrown out, and come back from the sidecar."""
    model = models("llama")
    prompts = [prompt(seed, 300) for seed in range(4)]
    box = sidecar()
    how: dict[str, Any] = {
        "connector": hicache_connector(box.target, load_async=load_async),
        "num_gpu_blocks_override": 48,
        "max_model_len": 1024,
    }
    truth = models.greedy(model, prompts, 140)
    with vllm_host.running(model, **how) as engine:
        cold = engine.run(prompts, new_tokens=140)
        engine.reset()
        warm = engine.run(prompts, new_tokens=140)
    assert cold.metric("vllm:num_preemptions_total") > 0
    assert warm.metric("vllm:num_preemptions_total") > 0
    assert cold.tokens == truth
    assert warm.tokens == truth
    assert warm.external >= 4 * 288
    box.wait_idle()


def test_aborted_requests_leave_nothing_behind(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """Aborted while waiting for the sidecar, while loading, while computing: nothing is held, the rest is right."""
    model = models("llama")
    prompts = [prompt(seed, 1000) for seed in range(6)]
    box = sidecar()
    connector = hicache_connector(box.target)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run(prompts, new_tokens=1)
    truth = models.greedy(model, prompts[3:], NEW_TOKENS)
    acts = [{"what": "abort", "request": place, "step": place} for place in range(3)]
    with vllm_host.running(model, connector=connector, max_num_batched_tokens=256) as engine:
        engine.run([*prompts, prompt(9, 1000)], new_tokens=NEW_TOKENS, at=acts)
        box.wait_idle()
        engine.reset()
        got = engine.run(prompts[3:], new_tokens=NEW_TOKENS)
    assert got.tokens == truth
    assert got.external == 3 * 992
    box.wait_idle()


def test_little_staging_memory_drops_pages_and_delays_nobody(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """Two pages' worth: what finds no place is not stored. What was stored is right."""
    model = models("llama")
    prompts = [prompt(seed, 1000) for seed in range(8)]
    box = sidecar()
    connector = hicache_connector(box.target, staging_bytes=256 << 10)
    truth = models.greedy(model, prompts, NEW_TOKENS)
    with vllm_host.running(model, connector=connector) as engine:
        assert engine.run(prompts, new_tokens=NEW_TOKENS).tokens == truth
    box.wait_idle()
    with vllm_host.running(model, connector=connector) as engine:
        got = engine.run(prompts, new_tokens=NEW_TOKENS)
    assert got.tokens == truth
    assert got.external < 8 * 992
    box.wait_idle()


def test_a_sidecar_smaller_than_the_prompts(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """Pages are evicted while others are stored and loaded; what is found is right, and it goes on."""
    model = models("llama")
    prompts = [prompt(seed, 1000) for seed in range(8)]
    box = sidecar(host="4MiB")
    truth = models.greedy(model, prompts, NEW_TOKENS)
    for _ in range(2):
        with vllm_host.running(model, connector=hicache_connector(box.target)) as engine:
            for _ in range(2):
                assert engine.run(prompts, new_tokens=NEW_TOKENS).tokens == truth
                engine.reset()
    box.wait_idle()


def test_reset_cache(vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]) -> None:
    """vLLM's own reset keeps the sidecar's pages; with the connector's (new weights, say) they are not used again."""
    model = models("llama")
    box = sidecar()
    given = prompt(0, 1000)
    truth = models.greedy(model, [given], NEW_TOKENS)
    with vllm_host.running(model, connector=hicache_connector(box.target)) as engine:
        engine.run([given], new_tokens=NEW_TOKENS)
        box.wait_idle()
        assert engine.reset()
        kept = engine.run([given], new_tokens=NEW_TOKENS)
        assert engine.reset(connector=True)
        box.wait_idle()
        gone = engine.run([given], new_tokens=NEW_TOKENS)
        box.wait_idle()
        assert engine.reset()
        back = engine.run([given], new_tokens=NEW_TOKENS)
    assert (kept.external, kept.computed) == (992, 8)
    assert (gone.external, gone.computed) == (0, 1000)
    assert (back.external, back.computed) == (992, 8)
    assert kept.tokens == gone.tokens == back.tokens == truth
