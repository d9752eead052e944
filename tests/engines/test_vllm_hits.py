"""One vLLM process fills the sidecar and exits, another answers the same prompts from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from engines_kit import Host, SidecarBox, hicache_connector
from engines_models import Models, prompt
from engines_oracle import Oracle, assert_near

TOKENS, NEW_TOKENS = 1000, 12
ALONE, CROWD = prompt(0, TOKENS), [prompt(seed, TOKENS) for seed in range(1, 9)]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """``step_tokens``: of one step at most; fewer than a prompt has make chunks of it."""

    shape: str
    dtype: str
    block_size: int
    load_async: bool
    step_tokens: int

    def __str__(self) -> str:
        how = "async" if self.load_async else "sync"
        return f"{self.shape}-{self.dtype}-{self.block_size}-{how}-{self.step_tokens}"

    @property
    def hit(self) -> int:
        """Tokens of whole pages, never a prompt's last token."""
        return (TOKENS - 1) // self.block_size * self.block_size


#: Every pair of values is in at least one of these.
CASES = [
    Case("llama", "float32", 32, True, 4096),
    Case("llama", "bfloat16", 64, False, 300),
    Case("llama", "float32", 128, False, 300),
    Case("qwen2", "bfloat16", 32, False, 4096),
    Case("qwen2", "float32", 64, True, 300),
    Case("qwen2", "bfloat16", 128, True, 4096),
    Case("qwen3", "float32", 64, False, 4096),
    Case("qwen3", "bfloat16", 32, True, 300),
    Case("llama", "bfloat16", 128, True, 300),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_another_process_answers_from_what_one_stored(
    vllm_host: Host, models: Models, oracle: Oracle, sidecar: Callable[..., SidecarBox], case: Case
) -> None:
    model = models(case.shape, case.dtype)
    truth = oracle(model, case.block_size, [ALONE, *CROWD], NEW_TOKENS, case.dtype)
    box = sidecar()
    how = {
        "connector": hicache_connector(box.target, load_async=case.load_async),
        "block_size": case.block_size,
        "dtype": case.dtype,
        "max_num_batched_tokens": case.step_tokens,
    }
    with vllm_host.running(model, **how) as engine:
        filled = engine.run([ALONE, *CROWD], new_tokens=NEW_TOKENS)
    assert (filled.computed, filled.external) == (9 * TOKENS, 0)
    box.wait_idle()

    with vllm_host.running(model, **how) as engine:
        alone = engine.run([ALONE], new_tokens=NEW_TOKENS, logprobs=5)
        crowd = engine.run(CROWD, new_tokens=NEW_TOKENS, logprobs=5)
        again = engine.run([ALONE], new_tokens=NEW_TOKENS, logprobs=5)
    assert (alone.external, alone.computed, alone.local) == (case.hit, TOKENS - case.hit, 0)
    assert (crowd.external, crowd.computed) == (8 * case.hit, 8 * (TOKENS - case.hit))
    assert (again.external, again.local) == (0, case.hit), "vLLM's own cache holds what was loaded"
    certain = truth.certain()
    assert len(certain) >= 5 and 0 in certain, "prompts that tell right from wrong"
    # alone: the very batches that vLLM computes from its own cache, so the very bits
    assert alone.answers[0].tokens == truth.cold[0].tokens
    assert alone.answers[0].logprobs == truth.warm[0].logprobs
    assert again.answers[0].logprobs == truth.warm[0].logprobs
    for place in certain[1:]:
        assert_near(crowd.answers[place - 1], truth.warm[place], case.dtype)
    box.wait_idle()


def test_the_figures_of_the_specification(
    vllm_host: Host, models: Models, oracle: Oracle, sidecar: Callable[..., SidecarBox]
) -> None:
    """Of 1000 tokens 992 from hicache and 8 computed, counted by vLLM."""
    model = models("llama")
    box = sidecar()
    connector = hicache_connector(box.target)
    with vllm_host.running(model, connector=connector) as engine:
        engine.run([ALONE], new_tokens=NEW_TOKENS)
    with vllm_host.running(model, connector=connector) as engine:
        got = engine.run([ALONE], new_tokens=NEW_TOKENS, logprobs=5)
    assert got.external == 992
    assert got.computed <= 8
    assert got.metric("vllm:external_prefix_cache_queries_total") == 1000
    assert got.metric("vllm:external_prefix_cache_hits_total") == 992
    assert got.steps[0] == 8, "one step computed the rest of the prompt"
    assert got.answers[0].cached == 992
    assert got.answers[0].tokens == models.greedy(model, [ALONE], NEW_TOKENS)[0]
    assert got.logprobs[0] == oracle(model, 32, [ALONE], NEW_TOKENS).warm[0].logprobs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_and_restarted_sidecar_still_has_what_was_durable(
    vllm_host: Host, models: Models, oracle: Oracle, sidecar: Callable[..., SidecarBox], dtype: str
) -> None:
    model = models("llama", dtype)
    truth = oracle(model, 32, [ALONE, *CROWD], NEW_TOKENS, dtype)
    box = sidecar(disk="256MiB")
    how = {"connector": hicache_connector(box.target, ack="durable"), "dtype": dtype}
    with vllm_host.running(model, **how) as engine:
        engine.run([ALONE, *CROWD[:3]], new_tokens=NEW_TOKENS)
    box.restart()  # kill -9, at once: what the engine's end waited for is on disk
    with vllm_host.running(model, **how) as engine:
        alone = engine.run([ALONE], new_tokens=NEW_TOKENS, logprobs=5)
        crowd = engine.run(CROWD[:3], new_tokens=NEW_TOKENS, logprobs=5)
    assert (alone.external, alone.computed) == (992, 8)
    assert (crowd.external, crowd.computed) == (3 * 992, 3 * 8)
    assert alone.answers[0].logprobs == truth.warm[0].logprobs
    assert alone.answers[0].tokens == truth.cold[0].tokens
    for place in set(truth.certain()) & {1, 2, 3}:
        assert_near(crowd.answers[place - 1], truth.warm[place], dtype)
    box.wait_idle()
