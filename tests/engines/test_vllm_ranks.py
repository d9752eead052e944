"""Tensor parallel: a page has a part of every rank, and counts only once all of them are stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines_kit import HERE, ROOT, Host, SidecarBox, hicache_connector
from engines_models import Models, prompt

NEW_TOKENS = 12
PROMPTS = [prompt(seed, 200) for seed in range(2)]


@pytest.mark.timeout(400)  # each rank imports vLLM for itself
def test_a_page_that_one_rank_could_not_store_is_not_there(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """Nobody is offered half a page, and the engine's answers are right all the same."""
    model, box = models("llama"), sidecar()
    connector = hicache_connector(box.target) | {
        "kv_connector": "LameConnector",
        "kv_connector_module_path": "vllm_lame",
    }
    truth = models.greedy(model, PROMPTS, NEW_TOKENS)
    with vllm_host.running(
        model,
        environ={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": f"{ROOT}:{HERE}"},
        connector=connector,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as engine:
        for _ in range(2):
            got = engine.run(PROMPTS, new_tokens=NEW_TOKENS)
            assert (got.external, got.tokens) == (0, truth)
            engine.reset()
        assert "no staging memory here" in engine.log_text()
    box.wait_idle()
    assert box.stats().tree_pages == 0
