"""Small models with random weights that do not degenerate; adapters; transformers as an oracle.

transformers' own initial weights make a model that repeats one token whatever it read, which would hide wrong keys and
values. Here embeddings and head have unit variance, and queries meet keys sharply, so that what is generated depends
on single tokens far back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # grouped queries
    "llama": (
        "LlamaConfig",
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32},
    ),
    # a head for each query, biases
    "qwen2": (
        "Qwen2Config",
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    # normed queries and keys, heads wider than the hidden size has room for
    "qwen3": (
        "Qwen3Config",
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 64},
    ),
    # takes 100 ms and more for 1000 tokens on one core
    "large": (
        "LlamaConfig",
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64},
    ),
    # sliding-window layers between full ones: two KV groups
    "hybrid": (
        "Gemma3TextConfig",
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    # every layer slides
    "sliding": (
        "MistralConfig",
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "sliding_window": 64},
    ),
    "mamba": (
        "MambaConfig",
        {"hidden_size": 128, "state_size": 16, "intermediate_size": 256},
    ),
}  # fmt: skip


def make(shape: str, folder: Path, dtype: str, seed: int) -> None:
    """Write config and weights to ``folder``."""
    import transformers

    kind, sizes = SHAPES[shape]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**COMMON, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _spread(name, weight)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def _spread(name: str, weight: torch.Tensor) -> None:
    if weight.ndim == 1:
        if name.endswith("bias"):
            weight.normal_(std=0.1)
        elif "q_norm" in name or "k_norm" in name:
            weight.fill_(1.8)
        return
    if weight.ndim != 2:
        return
    if "embed" in name:
        weight.normal_(std=1.0)
        return
    gain = 1.0
    if "q_proj" in name or "k_proj" in name:
        gain = 1.6
    elif "lm_head" in name:
        gain = 3.0
    weight.normal_(std=gain / weight.shape[1] ** 0.5)


def make_adapter(model: Path, folder: Path, seed: int) -> None:
    """A LoRA adapter of rank 8 on queries and values, as PEFT would have written it."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for part, out in (("q_proj", heads * width), ("v_proj", config["num_key_value_heads"] * width)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(8, hidden, generator=made) / hidden**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 8, generator=made)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))


def greedy(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """transformers' greedy tokens in float32, prompt by prompt, on a DynamicCache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            cache = DynamicCache(config=model.config)
            given = torch.tensor([prompt])
            tokens: list[int] = []
            for _ in range(new_tokens):
                logits = model(given, past_key_values=cache, use_cache=True).logits[0, -1]
                tokens.append(int(logits.argmax()))
                given = torch.tensor([[tokens[-1]]])
            found.append(tokens)
    return found
