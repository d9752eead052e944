"""vLLM as it runs in production: the engine's core, and each rank's worker, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines_kit import Host, SidecarBox, hicache_connector, wait_until
from engines_models import Models, prompt

TOKENS, NEW_TOKENS, HIT = 1000, 12, 992
PROMPTS = [prompt(seed, TOKENS) for seed in range(3)]


@pytest.mark.timeout(600)  # each of these processes imports vLLM for itself
def test_core_and_ranks_in_processes_of_their_own(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """With two ranks a page has two parts, and counts once both are stored. Another number of ranks never matches."""
    model, box = models("llama"), sidecar()
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    how: dict[str, Any] = {
        "connector": hicache_connector(
            box.target, lookup_timeout_ms=10_000, load_wait_ms=5_000
        ),  # four busy processes, two cores
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    for external in (0, len(PROMPTS) * HIT):
        with vllm_host.running(model, environ=environ, **how) as engine:
            got = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
            assert (got.external, got.tokens) == (external, truth)
            # vLLM kills a core that is not gone five seconds after it was asked to go
            wait_until("stored", lambda: box.stats().tree_pages >= len(PROMPTS) * (HIT // 32))
        box.wait_idle()
    with vllm_host.running(model, connector=how["connector"]) as engine:
        assert engine.run(PROMPTS, new_tokens=NEW_TOKENS).external == 0
