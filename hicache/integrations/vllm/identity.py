"""The namespace of an engine's pages: everything that must be equal for its KV to be reusable.

Pages of another model, revision, adapter, dtype, layout or salt are in another namespace, so they are never found. The
model's name is not identity where its files can be digested: a copy elsewhere is the same model, other weights under
the same name are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hicache.errors import UnsupportedError
from hicache.integrations.configs import config_digest
from hicache.integrations.vllm.engine import LENGTH_DEPENDENT_ROPE, EngineFacts, ModelFacts
from hicache.integrations.vllm.settings import VllmSettings, page_tokens
from hicache.integrations.vllm.weights import folder_digest
from hicache.rpc.client.arguments import NamespaceFields

#: How a page is made of blocks. Another order of ours gets another name.
PAGE_LAYOUT = "vllm/1 [rank][layer][block]"

#: Load formats whose weights are the files in the model's folder (vllm/model_executor/model_loader).
FOLDER_FORMATS = frozenset({
    "auto",
    "bitsandbytes",
    "fastsafetensors",
    "gguf",
    "hf",
    "instanttensor",
    "mistral",
    "npcache",
    "pt",
    "runai_streamer",
    "runai_streamer_sharded",
    "safetensors",
    "sharded_state",
})  # fmt: skip


def namespace_fields(
    engine: EngineFacts, settings: VllmSettings, *, adapter: str = "", salt: str = ""
) -> NamespaceFields:
    """The fields of the engine's namespace, all but the tenant.

    ``adapter``: as ``adapter_digest`` tells it. ``salt``: the request's. Raises UnsupportedError where the weights
    cannot be told, and ConfigError for a page size that does not fit. Reads the weights' files: call it once, and
    ``dataclasses.replace`` adapter and salt, or cache it.
    """
    tokens = page_tokens(settings, engine.block_size)
    return NamespaceFields(
        model=_model_name(engine.model, settings),
        revision=f"{weights_identity(engine.model, settings)} config:{_config(engine.model)}",
        adapter=adapter,
        salt=salt,
        kv_dtype=engine.kv_dtype,
        layout=_layout(engine),
        engine_version=f"vllm {engine.version}",
        layers=len(engine.layers),
        kv_heads=engine.kv_heads,
        head_size=engine.head_size,
        world_size=engine.world,
        page_tokens=tokens,
        page_bytes=engine.page_bytes(tokens),
    )


def _model_name(model: ModelFacts, settings: VllmSettings) -> str:
    """A word for people; what tells models apart is in the revision."""
    return settings.model_identity or str(model.config.get("model_type") or "model")


def _layout(engine: EngineFacts) -> str:
    """How a block's bytes are to be read: layout, backend, instructions, block size, each layer's kind and share."""
    said = [engine.attention, *((layer.name, layer.block_bytes) for layer in engine.layers)]
    layers = hashlib.sha256(repr(said).encode())
    return (
        f"{PAGE_LAYOUT} {engine.backend} {engine.layout or '?'} {engine.isa or '-'} block:{engine.block_size} "
        f"layers:{layers.hexdigest()[:16]}"
    )


def weights_identity(model: ModelFacts, settings: VllmSettings) -> str:
    """What stands for the weights. Raises UnsupportedError where nothing can."""
    if settings.model_identity:
        return f"named:{settings.model_identity}"
    if model.load_format not in FOLDER_FORMATS:
        raise UnsupportedError(
            f"load format {model.load_format}: the weights need not be those in the model's folder (made-up ones are "
            "often replaced by a trainer's), so they cannot be told",
            hint="set model_identity to a name that changes with them",
        )
    if not model.path:
        raise UnsupportedError(
            f"the files of the model {model.name} are not found on this host, so its weights cannot be told",
            hint="set model_identity to a name that changes with them",
        )
    return f"sha256:{folder_digest(Path(model.path))}"


def _config(model: ModelFacts) -> str:
    """The configuration's digest, with dtype, quantisation and overrides, which vLLM keeps elsewhere."""
    extra: dict[str, Any] = {"/dtype": model.dtype, "/quantization": model.quantization}
    if LENGTH_DEPENDENT_ROPE & _rope_types(model.config):
        extra["/max_model_len"] = model.max_model_len
    return config_digest(model.config, extra)


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """The rope types that a configuration names, in it and in the configurations within it."""
    found: set[str] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _rope_types(value)
        elif key in {"rope_type", "type"} and isinstance(value, str):
            found.add(value)
    return found


def adapter_digest(name: str, path: str) -> str:
    """What stands for a LoRA adapter: its configuration and its weights, wherever they are and however it is called.

    Raises UnsupportedError where its files are not on this host: its requests are then not to be cached.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UnsupportedError(
            f"adapter {name}: {path!r} is no folder on this host, so its weights cannot be told"
        )
    config = folder / "adapter_config.json"
    try:
        said = hashlib.sha256(config.read_bytes()).hexdigest()
    except OSError as error:
        raise UnsupportedError(f"adapter {name}: {config} cannot be read: {error}") from error
    return f"lora:{folder_digest(folder)} config:{said}"
