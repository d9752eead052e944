"""What a model's KV weighs and what its prefill costs, from published shapes.

Bytes a token
    with grouped heads: ``2 * layers * kv_heads * head_size * 2`` (keys and values, 16 bits each); with latent
    attention: ``layers * (kv_rank + rope_size) * 2``, one compressed vector a layer.

FLOPs of computing positions [first, end)
    ``2 * active_params * (end - first)`` for the weights, and for attention, where position p looks at p + 1
    positions in each of ``layers * heads`` heads, ``2 * (qk_size + v_size)`` a look:
    ``layers * heads * (qk_size + v_size) * (end * (end + 1) - first * (first + 1))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hicache.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A model's shape. ``gpus``: how many work on one prompt together. ``source``: where the shape is published."""

    name: str
    layers: int
    heads: int
    qk_size: int
    v_size: int
    token_bytes: int
    active_params: float
    gpus: int
    source: str

    def prefill_flops(self, first: int, end: int) -> float:
        """Of computing the positions [first, end), with the ones before at hand."""
        looks = end * (end + 1) - first * (first + 1)
        weights = 2.0 * self.active_params * (end - first)
        return weights + self.layers * self.heads * (self.qk_size + self.v_size) * looks


def _grouped(name: str, *, layers: int, heads: int, kv_heads: int, params: float, gpus: int = 1) -> Model:
    size = 128
    token_bytes = 2 * layers * kv_heads * size * 2
    source = f"config.json and model card of {name.split('-tp', maxsplit=1)[0]} on huggingface.co"
    return Model(name, layers, heads, size, size, token_bytes, params, gpus, source)


def _all() -> list[Model]:
    latent = 61 * (512 + 64) * 2  # kv_lora_rank 512, qk_rope_head_dim 64
    return [
        _grouped("llama-3-8b", layers=32, heads=32, kv_heads=8, params=8.03e9),
        _grouped("llama-3-70b-tp4", layers=80, heads=64, kv_heads=8, params=70.6e9, gpus=4),
        _grouped("qwen2.5-7b", layers=28, heads=28, kv_heads=4, params=7.62e9),
        Model(
            "deepseek-v3-mla",
            61,
            128,
            192,
            128,
            latent,
            37e9,
            8,
            "DeepSeek-V3 technical report, arXiv 2412.19437",
        ),
    ]


MODELS: Mapping[str, Model] = {model.name: model for model in _all()}


def find_model(name: str) -> Model:
    """By its name. Raises ConfigError."""
    if name not in MODELS:
        raise ConfigError(f"--model: unknown model {name!r}", hint=f"one of {', '.join(sorted(MODELS))}")
    return MODELS[name]
