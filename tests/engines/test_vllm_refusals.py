"""What the connector cannot serve it refuses when vLLM starts, in words that say what and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines_kit import EngineError, Host, SidecarBox, hicache_connector
from engines_models import Models, prompt

NEW_TOKENS = 12


def refusal(vllm_host: Host, model: Any, **options: Any) -> str:
    """What an engine says instead of starting."""
    with vllm_host.engine() as engine, pytest.raises(EngineError) as refused:
        engine.start(model, **options)
    return refused.value.message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lod_async": True}, ["unknown key 'lod_async'", "load_async"]),
        ({"page_tokens": 48}, ["page_tokens 48", "block size 32"]),
        ({"staging_bytes": 0}, ["staging_bytes must be positive"]),
        ({"ack": "sometimes"}, ["ack is one of visible, durable"]),
        ({"endpoint": "dns:///somewhere:50051"}, ["endpoint", "unix socket"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_wrong(
    vllm_host: Host, models: Models, extra: dict[str, Any], words: list[str]
) -> None:
    connector = hicache_connector("unix:///nowhere.sock")
    connector["kv_connector_extra_config"] |= extra
    said = refusal(vllm_host, models("llama"), connector=connector)
    for word in words:
        assert word in said


def test_another_version_of_vllm(vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]) -> None:
    """Refused, and tried where the user says so."""
    model, box = models("llama"), sidecar()
    with vllm_host.engine() as engine, pytest.raises(EngineError) as refused:
        engine.ask("pretend", version="0.99.1")
        engine.start(model, connector=hicache_connector(box.target))
    for word in ("0.99.1", "0.32", "allow_other_versions"):
        assert word in refused.value.message
    with vllm_host.engine() as engine:
        engine.ask("pretend", version="0.99.1")
        engine.start(model, connector=hicache_connector(box.target, allow_other_versions=True))
        assert engine.run([prompt(0, 100)], new_tokens=NEW_TOKENS).tokens == models.greedy(
            model, [prompt(0, 100)], NEW_TOKENS
        )
        engine.close()


@pytest.mark.parametrize("shape", ["mamba", "sliding"])
def test_models_whose_state_is_no_prefix(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox], shape: str
) -> None:
    """vLLM itself runs them; pages of them would be wrong, or of no use."""
    model = models(shape)
    said = refusal(vllm_host, model, connector=hicache_connector(sidecar().target))
    assert "hicache" in said
    assert {"mamba": "recurrent", "sliding": "SlidingWindow"}[shape] in said


def test_sliding_windows_beside_full_attention(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]
) -> None:
    """Two KV groups are refused. With vLLM's switch that makes one group of them, answers are right."""
    model, box = models("hybrid"), sidecar()
    connector = hicache_connector(box.target)
    prompts = [prompt(seed, 500) for seed in range(2)]
    said = refusal(vllm_host, model, connector=connector, disable_hybrid_kv_cache_manager=False)
    assert "groups" in said or "HMA" in said or "hybrid" in said
    one_group = {"disable_hybrid_kv_cache_manager": True}
    with vllm_host.running(model, **one_group) as engine:
        truth = engine.run(prompts, new_tokens=NEW_TOKENS).tokens
    with vllm_host.running(model, connector=connector, **one_group) as engine:
        assert engine.run(prompts, new_tokens=NEW_TOKENS).tokens == truth
    box.wait_idle()
    with vllm_host.running(model, connector=connector, **one_group) as engine:
        got = engine.run(prompts, new_tokens=NEW_TOKENS)
    assert (got.tokens, got.external) == (truth, 2 * 480)
