"""Several engines and one sidecar: what one stores others find, and never what is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines_kit import Host, SidecarBox, hicache_connector
from engines_models import Models, prompt
from engines_oracle import Oracle

TOKENS, NEW_TOKENS, HIT = 1000, 12, 992
GIVEN = prompt(0, TOKENS)


def test_two_engines_at_once(vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]) -> None:
    """The second finds what the first stored moments ago, and the other way round; then both store the same."""
    model, box = models("llama"), sidecar()
    connector = hicache_connector(box.target)
    both = [prompt(seed, TOKENS) for seed in range(20, 24)]
    with (
        vllm_host.running(model, connector=connector) as one,
        vllm_host.running(model, connector=connector) as two,
    ):
        stored = one.run([GIVEN], new_tokens=40)
        box.wait_idle()
        found = two.run([GIVEN], new_tokens=40)
        assert (found.external, found.computed) == (HIT, TOKENS - HIT)
        longer = GIVEN + found.tokens[0] + prompt(1, 60)
        two.run([longer], new_tokens=NEW_TOKENS)
        box.wait_idle()
        back = one.run([longer], new_tokens=NEW_TOKENS)
        assert back.local == 1024, "of its own turn: 1000 and 39 tokens, whole blocks"
        assert back.external == 1088 - 1024
        for engine in (one, two):
            engine.begin(both, new_tokens=NEW_TOKENS)
        rounds = [engine.finish() for engine in (one, two)]
        box.wait_idle()
        for engine in (one, two):
            assert engine.reset()
            again = engine.run(both, new_tokens=NEW_TOKENS)
            assert again.external == 4 * HIT
            assert again.tokens == rounds[0].tokens
    assert stored.tokens == found.tokens == models.greedy(model, [GIVEN], 40)
    assert rounds[0].tokens == rounds[1].tokens == models.greedy(model, both, NEW_TOKENS)
    assert back.tokens == models.greedy(model, [longer], NEW_TOKENS)
    box.wait_idle()


def test_what_is_not_the_same_never_matches(
    vllm_host: Host, models: Models, oracle: Oracle, sidecar: Callable[..., SidecarBox]
) -> None:
    """Other weights under a name of their own, another dtype, another block size, other rope: the same token ids."""
    box = sidecar()
    connector = hicache_connector(box.target)
    mine = models("llama")
    with vllm_host.running(mine, connector=connector) as engine:
        engine.run([GIVEN], new_tokens=NEW_TOKENS)
        box.wait_idle()
    others: list[tuple[Path, dict[str, Any]]] = [
        (models("llama", seed=1), {}),
        (mine, {"dtype": "bfloat16"}),
        (mine, {"block_size": 64}),
        (mine, {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}}),
    ]
    for model, options in others:
        with vllm_host.running(model, **options) as engine:
            truth = engine.run([GIVEN], new_tokens=NEW_TOKENS)
        with vllm_host.running(model, connector=connector, **options) as engine:
            first = engine.run([GIVEN], new_tokens=NEW_TOKENS)
            box.wait_idle()
            assert engine.reset()
            second = engine.run([GIVEN], new_tokens=NEW_TOKENS)
        assert first.external == 0, (model, options)
        assert second.external > 0
        assert first.tokens == truth.tokens
        assert second.tokens == truth.tokens or options.get("dtype") == "bfloat16"
    with vllm_host.running(mine, connector=connector) as engine:
        again = engine.run([GIVEN], new_tokens=NEW_TOKENS)
    assert (again.external, again.tokens) == (HIT, models.greedy(mine, [GIVEN], NEW_TOKENS))


def test_a_copy_of_a_model_is_the_same_model(
    vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox], tmp_path: Path
) -> None:
    """Identity is what is in the files, not where they are."""
    box = sidecar()
    mine, copy = models("llama"), tmp_path / "elsewhere"
    copy.mkdir()
    for file in mine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for model, external in ((mine, 0), (copy, HIT)):
        with vllm_host.running(model, connector=hicache_connector(box.target)) as engine:
            assert engine.run([GIVEN], new_tokens=NEW_TOKENS).external == external
            box.wait_idle()


def test_salts_are_apart(vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]) -> None:
    model, box = models("llama"), sidecar()
    truth = models.greedy(model, [GIVEN], NEW_TOKENS)
    with vllm_host.running(model, connector=hicache_connector(box.target)) as engine:
        found = []
        for salt in ("", "one", "two", "one", ""):
            got = engine.run([{"tokens": GIVEN, "salt": salt}], new_tokens=NEW_TOKENS)
            assert got.tokens == truth
            found.append(got.external)
            box.wait_idle()
            assert engine.reset()
    assert found == [0, 0, 0, HIT, HIT]


def test_adapters_are_apart(vllm_host: Host, models: Models, sidecar: Callable[..., SidecarBox]) -> None:
    """LoRA: each adapter has pages of its own, by what is in its files and not by its name or number."""
    model, box = models("llama"), sidecar()
    paths = [str(models.adapter(model, seed)) for seed in (1, 2)]
    adapters: list[dict[str, Any] | None] = [
        None,
        {"name": "first", "number": 1, "path": paths[0]},
        {"name": "second", "number": 2, "path": paths[1]},
    ]
    how = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with vllm_host.running(model, **how) as engine:
        truth = [
            engine.run([{"tokens": GIVEN, "lora": one}], new_tokens=NEW_TOKENS).tokens for one in adapters
        ]
    assert len({repr(tokens) for tokens in truth}) == 3, "the adapters change what is generated"
    connector = hicache_connector(box.target)
    with vllm_host.running(model, connector=connector, **how) as engine:
        for one, tokens in zip(adapters, truth, strict=True):
            got = engine.run([{"tokens": GIVEN, "lora": one}], new_tokens=NEW_TOKENS)
            assert (got.external, got.tokens) == (0, tokens)
            box.wait_idle()
    renamed = [
        None,
        {"name": "b", "number": 7, "path": paths[0]},
        {"name": "a", "number": 8, "path": paths[1]},
    ]
    with vllm_host.running(model, connector=connector, **how) as engine:
        for one, tokens in zip(renamed, truth, strict=True):
            got = engine.run([{"tokens": GIVEN, "lora": one}], new_tokens=NEW_TOKENS)
            assert (got.external, got.tokens) == (HIT, tokens)
    box.wait_idle()
