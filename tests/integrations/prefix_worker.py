"""A process that uses a model's prefixes in a sidecar: ``python prefix_worker.py ROLE TARGET MODEL OUT``.

``compute`` stores the prefix, and says what the suffix gives on the cache in its own memory, and the whole prompt in
one piece. ``load`` says what it was given, what it computed, and what other models are given. ``generate`` answers a
padded batch, beside the model alone. All write to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hicache
from hicache.integrations.transformers import HiCacheCache, PrefixStore

THREADS = 2
PAGE_TOKENS = 64
PREFIX_TOKENS = 17 * PAGE_TOKENS
SUFFIX_TOKENS = 23
DTYPES = ("float32", "bfloat16")


def load_model(folder: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def prompt(model: Any) -> torch.Tensor:
    size = (1, PREFIX_TOKENS + SUFFIX_TOKENS)
    return torch.randint(0, model.config.vocab_size, size, generator=torch.Generator().manual_seed(7))


def snapshot(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def watched(model: Any) -> list[int]:
    """How many tokens the model embeds, call by call."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counts.append(ids[0].numel()))
    return counts


def compute(client: hicache.Client, folder: str, dtype: str) -> dict[str, Any]:
    model = load_model(folder, dtype)
    ids, counts = prompt(model), watched(model)
    prefixes = PrefixStore(client, model, page_tokens=PAGE_TOKENS, durable=True)
    done = prefixes.prefill(ids[:, :PREFIX_TOKENS])
    cache = done.outputs.past_key_values
    found = {"kv": snapshot(cache), "stored": done.stored.committed}
    with torch.no_grad():
        found["suffix"] = model(input_ids=ids[:, PREFIX_TOKENS:], past_key_values=cache).logits
        found["kv_after"] = snapshot(cache)
        found["full"] = model(input_ids=ids, use_cache=False).logits[:, PREFIX_TOKENS:]
    return found | {"embedded": counts}


def load(client: hicache.Client, folder: str, dtype: str) -> dict[str, Any]:
    model = load_model(folder, dtype)
    ids, counts = prompt(model), watched(model)
    prefixes = PrefixStore(client, model, page_tokens=PAGE_TOKENS, durable=True)
    loaded = prefixes.load(ids)
    found = {"kv": snapshot(loaded.cache), "loaded_tokens": loaded.cached_tokens}
    done = prefixes.prefill(ids)
    found |= {"suffix": done.outputs.logits, "kv_after": snapshot(done.outputs.past_key_values)}
    found |= {"cached_tokens": done.cached_tokens, "embedded": list(counts)}
    return found | {"others": {name: other.load(ids).cached_tokens for name, other in others(client, model)}}


def generate(client: hicache.Client, folder: str, dtype: str) -> dict[str, Any]:
    model = load_model(folder, dtype)
    ids, mask = prompt(model)[:, :310].repeat(2, 1), torch.ones(2, 310, dtype=torch.long)
    ids[1], mask[1, :70] = ids[1].flip(0), 0
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone, counts = model.generate(ids, **how), watched(model)
    cache = HiCacheCache(prefixes := PrefixStore(client, model, page_tokens=PAGE_TOKENS))
    found = prefixes.generate(ids, cache=cache, **how)
    said = {"loaded": cache.loaded_tokens, "stored": cache.stored, "embedded": counts}
    return said | {"alone": alone, "found": found}


def others(client: hicache.Client, model: Any) -> list[tuple[str, PrefixStore]]:
    """Models that differ in one thing."""
    named = {"page size": {"page_tokens": 32}, "lora": {"adapter": "lora-b"}, "salt": {"salt": "alice"}}
    named |= {"revision": {"revision": "v2"}, "other revision": {"revision": "v3"}}
    found = [
        (name, PrefixStore(client, model, **{"page_tokens": PAGE_TOKENS, **settings}))
        for name, settings in named.items()
    ]
    dtype = torch.float16
    found.append(("dtype", PrefixStore(client, model, page_tokens=PAGE_TOKENS, kv_dtype=dtype)))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    return [*found, ("weights", PrefixStore(client, model, page_tokens=PAGE_TOKENS))]


def main() -> None:
    role, target, folder, out = sys.argv[1:]
    torch.set_num_threads(THREADS)
    work = {"compute": compute, "load": load, "generate": generate}[role]
    with hicache.Client(target, timeout_s=10) as client:
        dtypes = DTYPES[:1] if role == "generate" else DTYPES
        torch.save({dtype: work(client, folder, dtype) for dtype in dtypes}, Path(out))


if __name__ == "__main__":
    main()
