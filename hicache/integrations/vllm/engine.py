"""What is read from vLLM's configuration: everything that a page's identity and layout depend on.

The rule for what is supported: a token's keys and values follow from the tokens before it, the weights and the
configuration, and from nothing else; every layer keeps them for every token, in blocks of one table. What breaks it,
or might, is refused when the engine starts.

With ``connector`` the only file that imports vLLM, and only inside ``VllmProbe``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hicache.errors import UnsupportedError
from hicache.integrations.vllm.layout import LayerTensor

#: What this was written against and is tested with.
VERSIONS = ("0.32.",)

#: Kinds of KV cache that keep every token's keys and values as they were computed.
PLAIN_SPECS = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})

#: Speculative methods that add no layers with KV of their own, which would depend on tokens behind the page.
DRAFTLESS_METHODS = frozenset({"ngram", "ngram_gpu", "suffix"})

#: Rope types whose frequencies vLLM chooses by the longest context that it serves.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope", "su", "mllama"})


@dataclasses.dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer with KV of its own: its name in vLLM, and what one block of one rank takes."""

    name: str
    block_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """Which weights, and how they are used. ``path``: their folder or file on this host; empty if not known."""

    name: str
    revision: str
    path: str
    load_format: str
    quantization: str
    config: Mapping[str, Any]
    dtype: str
    max_model_len: int


@dataclasses.dataclass(frozen=True, slots=True)
class EngineFacts:
    """What hicache needs to know of an engine. ``steps_ahead``: steps scheduled before a step's outcome is known."""

    version: str
    model: ModelFacts
    kv_dtype: str
    attention: str  # the kind of cache, and how far its layers see
    backend: str
    layout: str
    isa: str
    block_size: int
    num_blocks: int
    kv_heads: int  # of one rank
    head_size: int
    layers: tuple[LayerFacts, ...]
    world: int
    rank: int
    steps_ahead: int

    @property
    def part_block_bytes(self) -> int:
        """What one block of one rank takes, all layers."""
        return sum(layer.block_bytes for layer in self.layers)

    def part_bytes(self, page_tokens: int) -> int:
        """One rank's part of a page."""
        return self.part_block_bytes * (page_tokens // self.block_size)

    def page_bytes(self, page_tokens: int) -> int:
        """A page: the parts of all ranks."""
        return self.part_bytes(page_tokens) * self.world

    def check_tensors(self, tensors: Mapping[str, LayerTensor]) -> None:
        """Raise UnsupportedError where the real tensors' dimensions lie in another order than announced."""
        order = LAYOUTS.get(self.layout)
        for name, tensor in tensors.items():
            if order is None or len(tensor.shape) != len(order):
                continue  # sizes are compared later; there is no announced order to compare with
            strides = [tensor.strides[dim] for dim in order if tensor.shape[dim] > 1]
            if strides != sorted(strides, reverse=True):
                raise UnsupportedError(
                    f"layer {name}: strides {list(tensor.strides)} are not those of the layout {self.layout}"
                )


#: Order in memory of a layer tensor's dimensions (blocks, heads, tokens, content), by vLLM's names of layouts.
LAYOUTS: dict[str, tuple[int, int, int, int]] = {
    "LBHNC": (0, 1, 2, 3),
    "LBNHC": (0, 2, 1, 3),
    "LHBNC": (1, 0, 2, 3),
    "BLHNC": (0, 1, 2, 3),
    "BLNHC": (0, 2, 1, 3),
    "BHLNC": (0, 1, 2, 3),
}


class Probe(Protocol):
    """What has to be asked of vLLM's code rather than of its configuration."""

    def version(self) -> str:
        """Of vLLM."""

    def device(self) -> str:
        """``cpu``, ``cuda``, ..."""

    def backend(self, vllm_config: Any, spec: Any) -> str:
        """The attention backend's name. Raises UnsupportedError where it cannot be told."""

    def isa(self, vllm_config: Any, spec: Any) -> str:
        """On a CPU, for which instructions keys are laid out; else empty."""

    def local_path(self, model: str, revision: str | None) -> str:
        """Where the model's files are on this host; empty if not known."""


class VllmProbe:
    """Asks vLLM."""

    def version(self) -> str:
        """Of the installed package."""
        import vllm

        return str(vllm.__version__)

    def device(self) -> str:
        """The platform's."""
        from vllm.platforms import current_platform

        return str(current_platform.device_type)

    def backend(self, vllm_config: Any, spec: Any) -> str:
        """As vLLM will choose it."""
        if self.device() == "cpu":
            return "CPU_ATTN"
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.selector import get_attn_backend

        try:
            with set_current_vllm_config(vllm_config):
                found = get_attn_backend(
                    spec.head_size,
                    vllm_config.model_config.dtype,
                    vllm_config.cache_config.cache_dtype,
                    use_mla=type(spec).__name__ == "MLAAttentionSpec",
                )
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(
                f"the attention backend, which KV layouts depend on, cannot be told: {error}",
                hint="name it with --attention-backend",
            ) from error
        return str(found.get_name())

    def isa(self, vllm_config: Any, spec: Any) -> str:
        """As the CPU backend chooses it: keys are transposed differently for each."""
        if self.device() != "cpu":
            return ""
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        model, cache = vllm_config.model_config, vllm_config.cache_config
        return str(_get_attn_isa(model.dtype, spec.block_size, spec.head_size, cache.cache_dtype))

    def local_path(self, model: str, revision: str | None) -> str:
        """A folder, or the snapshot in the Hugging Face cache."""
        if Path(model).exists():
            return model
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
        return str(Path(found).parent) if isinstance(found, str) else ""


def engine_facts(
    vllm_config: Any, kv_cache_config: Any, *, probe: Probe | None = None, allow_other_versions: bool = False
) -> EngineFacts:
    """What hicache needs to know. Raises UnsupportedError, saying why, for an engine that it cannot serve."""
    probe = probe or VllmProbe()
    version = probe.version()
    if not allow_other_versions and not version.startswith(VERSIONS):
        raise UnsupportedError(
            f"vLLM {version}: the connector was written for {', '.join(v + 'x' for v in VERSIONS)}",
            hint="set allow_other_versions to try it",
        )
    _refuse(_engine_limits(vllm_config))
    _refuse(_model_limits(vllm_config.model_config))
    _refuse(_image_limits(vllm_config))
    group = _only_group(kv_cache_config)
    _refuse(_cache_limits(vllm_config.cache_config, group))
    specs = _specs(group)
    spec = specs[0][1]
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    world = int(parallel.tensor_parallel_size)
    return EngineFacts(
        version=version,
        model=_model(vllm_config, probe),
        kv_dtype=f"{_dtype(spec.dtype)}/{cache.cache_dtype}",
        attention=_attention(specs),
        backend=f"{probe.device()}:{probe.backend(vllm_config, spec)}",
        layout=str(kv_cache_config.kv_cache_layout or ""),
        isa=probe.isa(vllm_config, spec),
        block_size=int(spec.block_size),
        num_blocks=int(kv_cache_config.num_blocks),
        kv_heads=int(spec.num_kv_heads),
        head_size=int(spec.head_size),
        layers=tuple(LayerFacts(name, int(each.unpadded_page_size_bytes)) for name, each in specs),
        world=world,
        rank=int(getattr(parallel, "rank", 0) or 0) % world,
        steps_ahead=1 if getattr(vllm_config.scheduler_config, "async_scheduling", False) else 0,
    )


def _refuse(reasons: Iterator[str]) -> None:
    for reason in reasons:
        raise UnsupportedError(f"hicache cannot serve this engine: {reason}")


def _engine_limits(vllm_config: Any) -> Iterator[str]:
    """Why this way to run the engine is not supported."""
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism: each stage has only some of a page's layers"),
        ("decode_context_parallel_size", "decode context parallelism: blocks are spread over ranks by token"),
        (
            "prefill_context_parallel_size",
            "prefill context parallelism: blocks are spread over ranks by token",
        ),
    ):
        if int(getattr(parallel, name, 1) or 1) > 1:
            yield f"{what} ({name} {getattr(parallel, name)})"
    role = str(getattr(transfer, "kv_role", "kv_both"))
    if role != "kv_both":
        yield f"kv_role {role}: it is a cache, not a transfer between prefill and decode; set kv_both"
    speculative = getattr(vllm_config, "speculative_config", None)
    method = str(getattr(speculative, "method", None)) if speculative is not None else "ngram"
    if method not in DRAFTLESS_METHODS:
        yield f"speculative decoding by {method}: its draft layers' KV depends on tokens behind a page"


def _model_limits(model: Any) -> Iterator[str]:
    """Why this model is not supported."""
    if getattr(model, "is_encoder_decoder", False):
        yield "an encoder-decoder's KV depends on the encoder's input, not on a prefix"
    if getattr(model, "is_hybrid", False) or getattr(model, "has_inner_state", False):
        yield "a model with recurrent state (Mamba, hybrid): its state is not kept for every token"
    if str(getattr(model, "runner_type", "generate")) != "generate":
        yield f"runner {model.runner_type}: only generation is supported"


def _image_limits(vllm_config: Any) -> Iterator[str]:
    """Why images and the like have no identity.

    vLLM hashes them only for caches of its own (vllm/renderers/base.py, _process_mm_uuids); else it counts them, and
    the next process counts from the beginning again.
    """
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if multimodal is None or getattr(vllm_config.cache_config, "enable_prefix_caching", True):
        return
    if not getattr(multimodal, "mm_processor_cache_gb", 1):
        yield (
            "images are told apart by numbers, not by content, without prefix caching and with mm_processor_cache_gb "
            "0; set one of them"
        )


def _only_group(kv_cache_config: Any) -> Any:
    """The one KV cache group. Raises UnsupportedError for several."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
        raise UnsupportedError(
            f"hicache cannot serve this engine: it has {len(groups)} KV cache groups ({kinds}), and pages are made of "
            "one",
            hint="models with sliding windows beside full attention work with --disable-hybrid-kv-cache-manager",
        )
    return groups[0]


def _cache_limits(cache: Any, group: Any) -> Iterator[str]:
    """Why this KV cache is not supported."""
    for kind in sorted({type(spec).__name__ for _, spec in _specs(group)} - PLAIN_SPECS):
        yield f"{kind}: it does not keep the keys and values of every token as they were computed"
    if len({spec.block_size for _, spec in _specs(group)}) > 1:
        yield "layers with different block sizes"
    for _, spec in _specs(group):
        yield from _spec_limits(spec)
    if getattr(group, "is_eagle_group", False) or getattr(group, "host_resident", False):
        yield "a KV cache group of draft layers, or in host memory"
    if getattr(cache, "calculate_kv_scales", False):
        yield "calculate_kv_scales: scales come from the first prompts, so equal tokens get different KV"
    skipped: Sequence[str] = getattr(cache, "kv_cache_dtype_skip_layers", None) or ()
    if skipped:
        yield f"kv_cache_dtype_skip_layers {list(skipped)}: layers with different dtypes"


def _spec_limits(spec: Any) -> Iterator[str]:
    """Why this kind of layer is not supported."""
    quantised = str(getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE"))
    if quantised not in {"NONE", "FP8_PER_TENSOR"}:
        yield f"KV quantised as {quantised}: whether its scales are within the blocks is not known"
    if getattr(spec, "non_causal", False):
        yield "attention is not causal: a token's KV depends on the tokens after it"
    if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "model_version", None):
        yield "compressed KV states (one for several tokens)"
    if str(getattr(getattr(spec, "cache_role", None), "value", "sparse")) == "indexer":
        yield "sparse attention with an indexer cache"


def _specs(group: Any) -> list[tuple[str, Any]]:
    """Each layer's name and spec, in the engine's order."""
    spec = group.kv_cache_spec
    each = getattr(spec, "kv_cache_specs", None)
    return [(name, each[name] if each else spec) for name in group.layer_names]


def _attention(specs: list[tuple[str, Any]]) -> str:
    """What the layers' caches are, and the windows of those that have one though all tokens are kept."""
    kinds = {
        (
            type(spec).__name__,
            f"window {getattr(spec, 'sliding_window', None)}",
            f"chunk {getattr(spec, 'attention_chunk_size', None)}",
        )
        for _, spec in specs
    }
    return ", ".join(" ".join(kind) for kind in sorted(kinds))


def _model(vllm_config: Any, probe: Probe) -> ModelFacts:
    model, load = vllm_config.model_config, vllm_config.load_config
    config: Mapping[str, Any] = model.hf_config.to_dict()
    return ModelFacts(
        name=str(model.model),
        revision=str(model.revision or ""),
        path=probe.local_path(str(model.model), model.revision),
        load_format=str(getattr(load.load_format, "value", load.load_format)),
        quantization=str(model.quantization or ""),
        config=config,
        dtype=_dtype(model.dtype),
        max_model_len=int(model.max_model_len),
    )


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
