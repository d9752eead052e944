"""Configurations made of plain objects, shaped as vLLM 0.32's are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from worker_kit import make_facts

from hicache.errors import UnsupportedError
from hicache.integrations.vllm.engine import EngineFacts, engine_facts
from hicache.integrations.vllm.layout import LayerTensor


class FullAttentionSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


class UniformTypeKVCacheSpecs(SimpleNamespace):
    pass


def spec(kind: type[SimpleNamespace] = FullAttentionSpec, **changes: Any) -> SimpleNamespace:
    fields = {
        "block_size": 32,
        "num_kv_heads": 2,
        "head_size": 64,
        "dtype": "torch.bfloat16",
        "unpadded_page_size_bytes": 16384,
        "kv_quant_mode": SimpleNamespace(name="NONE"),
        "non_causal": False,
        "tokens_per_state": 1,
    }
    return kind(**{**fields, **changes})


def cache_config(*specs: SimpleNamespace, layers: int = 2) -> Any:
    groups = [
        SimpleNamespace(layer_names=[f"g{number}.l{n}" for n in range(layers)], kv_cache_spec=each)
        for number, each in enumerate(specs or (spec(),))
    ]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=100, kv_cache_layout="LBHNC")


def vllm_config(**changes: Any) -> Any:
    """A configuration; ``changes`` by dotted names."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            rank=0,
        ),
        kv_transfer_config=SimpleNamespace(kv_role="kv_both"),
        speculative_config=None,
        scheduler_config=SimpleNamespace(async_scheduling=False),
        cache_config=SimpleNamespace(
            cache_dtype="auto", calculate_kv_scales=False, kv_cache_dtype_skip_layers=[]
        ),
        load_config=SimpleNamespace(load_format="auto"),
        model_config=SimpleNamespace(
            model="some/model",
            revision=None,
            hf_config=SimpleNamespace(to_dict=lambda: {"model_type": "llama"}),
            dtype="torch.bfloat16",
            quantization=None,
            max_model_len=2048,
            is_encoder_decoder=False,
            is_hybrid=False,
            runner_type="generate",
            enable_prompt_embeds=False,
        ),
    )
    for name, value in changes.items():
        holder, _, field = name.rpartition("__")
        setattr(getattr(config, holder) if holder else config, field, value)
    return config


@dataclasses.dataclass
class Probe:
    vllm: str = "0.32.0"

    def version(self) -> str:
        return self.vllm

    def device(self) -> str:
        return "cpu"

    def backend(self, vllm_config: Any, spec: Any) -> str:
        return "CPU_ATTN"

    def isa(self, vllm_config: Any, spec: Any) -> str:
        return "amx"

    def local_path(self, model: str, revision: str | None) -> str:
        return ""


def facts(config: Any = None, cache: Any = None, **keywords: Any) -> EngineFacts:
    return engine_facts(config or vllm_config(), cache or cache_config(), probe=Probe(), **keywords)


def test_what_is_read_of_a_plain_engine() -> None:
    found = facts()
    assert [layer.name for layer in found.layers] == ["g0.l0", "g0.l1"]
    assert found.part_block_bytes == 2 * 16384
    assert found.page_bytes(64) == found.part_bytes(64) == 4 * 16384
    assert (found.kv_dtype, found.backend, found.isa) == ("bfloat16/auto", "cpu:CPU_ATTN", "amx")
    assert (found.world, found.rank, found.steps_ahead, found.num_blocks) == (1, 0, 0, 100)
    assert found.attention == "FullAttentionSpec window None chunk None"


def test_ranks_and_steps_ahead() -> None:
    config = vllm_config(
        parallel_config__tensor_parallel_size=4,
        parallel_config__rank=6,
        scheduler_config__async_scheduling=True,
    )
    found = facts(config)
    assert (found.world, found.rank, found.steps_ahead) == (4, 2, 1)
    assert found.page_bytes(32) == 4 * found.part_bytes(32)


def test_latent_attention_and_layers_with_specs_of_their_own() -> None:
    assert facts(cache=cache_config(spec(MLAAttentionSpec, num_kv_heads=1))).kv_heads == 1
    each = {"g0.l0": spec(), "g0.l1": spec(unpadded_page_size_bytes=99)}
    found = facts(cache=cache_config(UniformTypeKVCacheSpecs(kv_cache_specs=each)))
    assert [layer.block_bytes for layer in found.layers] == [16384, 99]


REFUSED_ENGINES: dict[str, dict[str, Any]] = {
    "pipeline parallelism": {"parallel_config__pipeline_parallel_size": 2},
    "decode context parallelism": {"parallel_config__decode_context_parallel_size": 2},
    "prefill context parallelism": {"parallel_config__prefill_context_parallel_size": 2},
    "kv_role kv_producer": {"kv_transfer_config__kv_role": "kv_producer"},
    "speculative decoding by eagle": {"speculative_config": SimpleNamespace(method="eagle")},
    "encoder-decoder": {"model_config__is_encoder_decoder": True},
    "recurrent state": {"model_config__is_hybrid": True},
    "runner pooling": {"model_config__runner_type": "pooling"},
    "calculate_kv_scales": {"cache_config__calculate_kv_scales": True},
    "images are told apart by numbers": {
        "model_config__multimodal_config": SimpleNamespace(mm_processor_cache_gb=0),
        "cache_config__enable_prefix_caching": False,
    },
    "kv_cache_dtype_skip_layers": {"cache_config__kv_cache_dtype_skip_layers": ["0"]},
}


@pytest.mark.parametrize("why", REFUSED_ENGINES)
def test_engines_that_cannot_be_served_are_refused(why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        facts(vllm_config(**REFUSED_ENGINES[why]))


REFUSED_CACHES: dict[str, Callable[[], Any]] = {
    "2 KV cache groups": lambda: cache_config(spec(), spec(SlidingWindowSpec)),
    "0 KV cache groups": lambda: SimpleNamespace(kv_cache_groups=[]),
    "SlidingWindowSpec: it does not keep": lambda: cache_config(spec(SlidingWindowSpec)),
    "MambaSpec: it does not keep": lambda: cache_config(spec(MambaSpec)),
    "quantised as NVFP4": lambda: cache_config(spec(kv_quant_mode=SimpleNamespace(name="NVFP4"))),
    "not causal": lambda: cache_config(spec(non_causal=True)),
    "compressed KV states": lambda: cache_config(spec(MLAAttentionSpec, tokens_per_state=4)),
    "indexer cache": lambda: cache_config(
        spec(MLAAttentionSpec, cache_role=SimpleNamespace(value="indexer"))
    ),
    "different block sizes": lambda: cache_config(
        UniformTypeKVCacheSpecs(kv_cache_specs={"g0.l0": spec(), "g0.l1": spec(block_size=64)})
    ),
}


@pytest.mark.parametrize("why", REFUSED_CACHES)
def test_caches_that_pages_cannot_be_made_of_are_refused(why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        facts(cache=REFUSED_CACHES[why]())


@pytest.mark.parametrize(("cache_gb", "own"), [(4, False), (0, True), (4, True)])
def test_images_that_are_hashed_are_served(cache_gb: int, own: bool) -> None:
    images = SimpleNamespace(mm_processor_cache_gb=cache_gb)
    assert facts(
        vllm_config(model_config__multimodal_config=images, cache_config__enable_prefix_caching=own)
    ).layers


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_speculation_without_draft_layers_is_served(method: str) -> None:
    assert facts(vllm_config(speculative_config=SimpleNamespace(method=method))).layers


def test_scales_that_are_part_of_the_weights_are_served() -> None:
    quantised = cache_config(spec(kv_quant_mode=SimpleNamespace(name="FP8_PER_TENSOR"), dtype="torch.uint8"))
    assert facts(vllm_config(cache_config__cache_dtype="fp8"), quantised).kv_dtype == "uint8/fp8"


def test_other_versions_are_refused_unless_asked_for() -> None:
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.33\.1: .* allow_other_versions"):
        engine_facts(vllm_config(), cache_config(), probe=Probe("0.33.1"))
    with pytest.raises(UnsupportedError, match="vLLM"):
        engine_facts(vllm_config(), cache_config(), probe=Probe("0.320"))
    found = engine_facts(vllm_config(), cache_config(), probe=Probe("0.33.1"), allow_other_versions=True)
    assert found.version == "0.33.1"


def test_tensors_in_another_order_than_announced_are_refused() -> None:
    announced = make_facts(layout="LBNHC")
    heads_first = LayerTensor("a", (64, 2, 32, 64), (4096, 2048, 64, 1), 2, 0, 1, 1 << 20, "cpu")
    tokens_first = dataclasses.replace(heads_first, strides=(4096, 64, 128, 1))
    announced.check_tensors({"a": tokens_first})
    with pytest.raises(UnsupportedError, match="not those of the layout LBNHC"):
        announced.check_tensors({"a": heads_first})
    one_head = dataclasses.replace(heads_first, shape=(64, 1, 32, 64))
    announced.check_tensors({"a": one_head})  # where one dimension has one entry, both are the same
    make_facts(layout="").check_tensors({"a": heads_first})
