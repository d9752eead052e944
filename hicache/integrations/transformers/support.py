"""What can be cached by prefix, and what is refused: checked when a store is made and at every call.

The rule: a token's keys and values must follow from the tokens before it, the weights and the configuration, and
from nothing else, and the cache must hold them for every token. What breaks it, or might, is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hicache.errors import InvalidArgumentError, UnsupportedError
from hicache.integrations.transformers.layers import WholeSlidingLayer, whole_layers
from hicache.integrations.transformers.pages import KeysValues, PageShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Their frequencies, and with them a token's key, depend on how long the whole prompt is.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedError, saying why, for a model whose KV must not be reused by prefix."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("an encoder-decoder's cache depends on the encoder's input, not on a prefix")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedError(
            f"{config.model_type} takes more than text: equal token ids may stand for different images",
            hint="give the language model within it",
        )
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError("attention is bidirectional: a token's KV depends on the tokens after it")
    for found in sorted(LENGTH_DEPENDENT_ROPE & rope_types(config)):
        raise UnsupportedError(f"rope type {found}: a token's key depends on the prompt's length")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedError("tensor parallel models are not supported: each process holds part of a page")
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedError(f"the model must be on one device, not on {', '.join(sorted(devices))}")
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedError("chunked attention: which tokens a token sees depends on where a chunk begins")
    check_layers(whole_layers(DynamicCache(config=config)))


def rope_types(config: Any) -> set[str]:
    """The rope types of a configuration; of all kinds of layers where they differ."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return {str(kind.get("rope_type", kind.get("type", ""))) for kind in kinds}


def shape_of(config: Any, page_tokens: int, dtype: torch.dtype) -> PageShape:
    """The pages of a model with this configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PageShape(config.num_hidden_layers, page_tokens, heads, dim, dtype)


def check_cache(cache: Any) -> None:
    """Raise UnsupportedError unless the cache is a plain DynamicCache with layers that can be stored."""
    if type(cache) is not DynamicCache:
        raise UnsupportedError(
            f"a {type(cache).__name__} cannot be stored",
            hint="use a DynamicCache, as `use_cache=True` makes it",
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedError(
            "an offloading DynamicCache cannot be stored: its layers move while they are read"
        )
    check_layers(cache)


def check_layers(cache: Any) -> None:
    """Raise UnsupportedError unless every layer of the cache has every token."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            held = 0 if layer.keys is None else layer.keys.shape[-2]
            if held < layer.get_seq_length():
                raise UnsupportedError(
                    f"layer {number} of the cache is a {type(layer).__name__} that holds the last {held} tokens of"
                    f" {layer.get_seq_length()}: its window has passed over the others",
                    hint="compute with prefill, generate or in a HiCacheCache, which keep them",
                )
        elif type(layer) not in {DynamicLayer, WholeSlidingLayer}:
            raise UnsupportedError(
                f"layer {number} of the cache is a {type(layer).__name__}: only layers that keep the keys and values"
                " of all tokens as they are (DynamicLayer, and sliding windows) can be stored",
                hint="linear attention, shared, static and quantised layers cannot",
            )


def layers_of(cache: Any, shape: PageShape, rows: int = 1) -> list[KeysValues]:
    """The keys and values of a cache, checked against ``shape``. Raises UnsupportedError, InvalidArgumentError."""
    check_layers(cache)
    if len(cache.layers) != shape.layers or any(layer.keys is None for layer in cache.layers):
        raise InvalidArgumentError(
            f"the cache has {len(cache.layers)} layers, not all of them filled; the model has {shape.layers}"
        )
    found: list[KeysValues] = [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]
    tokens = found[0][0].shape[-2]
    wanted = (rows, shape.heads, tokens, shape.dim)
    for number, pair in enumerate(found):
        for tensor in pair:
            if tensor.dim() == 4 and tensor.shape[0] != rows:
                raise UnsupportedError(
                    f"a cache of a batch of {tensor.shape[0]}: store one sequence at a time",
                    hint="generate and HiCacheCache take batches",
                )
            if tuple(tensor.shape) != wanted or tensor.dtype != shape.dtype:
                raise InvalidArgumentError(
                    f"layer {number} holds {tensor.dtype} {list(tensor.shape)}, not {shape.dtype} {list(wanted)}",
                    hint="give PrefixStore the kv_dtype that the cache has",
                )
    return found


def prompt_of(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The ids of the one sequence, ``[tokens]``. Raises UnsupportedError for batches and padding."""
    ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise InvalidArgumentError(
            f"input_ids must be integers [tokens] or [1, tokens], not {ids.dtype} {list(input_ids.shape)}"
        )
    if len(ids) != 1:
        raise UnsupportedError(
            f"a batch of {len(ids)}: load, prefill and store one sequence at a time",
            hint="generate and HiCacheCache take batches",
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError(
            "padding: it moves tokens to other positions, where their KV differs",
            hint="strip the padding; generate and HiCacheCache take it on the left",
        )
    if attention_mask is not None and attention_mask.numel() != ids.numel():
        raise InvalidArgumentError(
            f"attention_mask {list(attention_mask.shape)} does not go with input_ids {list(ids.shape)}"
        )
    return ids[0]


def check_generate(model: Any, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedError, saying why, for arguments of ``generate`` that go with no prefix cache."""
    if kwargs.get("past_key_values") is not None:
        raise InvalidArgumentError(
            "generate makes its own cache", hint="use model.generate with a HiCacheCache of yours"
        )
    for source in (kwargs, kwargs.get("generation_config"), model.generation_config):
        read = source.get if isinstance(source, dict) else lambda name, of=source: getattr(of, name, None)
        kind = read("cache_implementation")
        if kind not in {None, "dynamic", "hybrid"}:  # hybrid, of old: transformers takes it for dynamic
            raise UnsupportedError(
                f"cache_implementation={kind!r}: only a dynamic cache holds every token as it was computed",
                hint="leave cache_implementation out",
            )
        if read("use_cache") is False:
            raise InvalidArgumentError("use_cache=False leaves nothing to load or to store")
