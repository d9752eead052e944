"""The oracles that other tests lean on, and the harness itself, with vLLM alone and with a connector of vLLM's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines_kit import Host
from engines_models import Models, prompt

NEW_TOKENS = 16


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3"])
def test_vllm_and_transformers_generate_the_same(vllm_host: Host, models: Models, shape: str) -> None:
    """Two programs agree on models whose answers depend on what was read, so either tells right from wrong."""
    prompts = [prompt(seed, 1000) for seed in range(3)]
    with vllm_host.running(models(shape)) as engine:
        cold = engine.run(prompts, new_tokens=NEW_TOKENS, logprobs=5)
        warm = engine.run(prompts, new_tokens=NEW_TOKENS, logprobs=5)
    assert cold.tokens == models.greedy(models(shape), prompts, NEW_TOKENS)
    assert warm.tokens == cold.tokens
    assert (cold.computed, cold.local) == (3000, 0)
    assert (warm.computed, warm.local) == (3 * 8, 3 * 992)
    assert len({tuple(tokens) for tokens in cold.tokens}) == 3
    assert all(len(set(tokens)) > NEW_TOKENS // 2 for tokens in cold.tokens), "the model repeats itself"


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3"])
def test_one_wrong_page_changes_what_is_generated(vllm_host: Host, models: Models, shape: str) -> None:
    """Otherwise no test would notice a wrong page: 32 of 1000 tokens differ, and the tokens do."""
    right = prompt(1, 1000)
    prompts = [right]
    for place in (0, 320, 640, 960):
        wrong = list(right)
        wrong[place : place + 32] = prompt(place + 77, 32)
        prompts.append(wrong)
    with vllm_host.running(models(shape)) as engine:
        tokens = engine.run(prompts, new_tokens=NEW_TOKENS).tokens
    assert all(other != tokens[0] for other in tokens[1:])


def test_a_connector_of_vllms_own_shows_as_external_tokens(
    vllm_host: Host, models: Models, tmp_path: Path
) -> None:
    """What the harness reports of a connector, shown with one that is not ours."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    given = prompt(0, 1000)
    with vllm_host.running(models("llama"), connector=connector) as engine:
        filled = engine.run([given], new_tokens=NEW_TOKENS)
    with vllm_host.running(models("llama"), connector=connector) as engine:
        loaded = engine.run([given], new_tokens=NEW_TOKENS)
    assert (filled.computed, filled.external) == (1000, 0)
    assert (loaded.computed, loaded.external, loaded.local) == (8, 992, 0)
    assert loaded.tokens == filled.tokens
