"""One prompt, computed once: run this twice against one sidecar, and the second process loads what the first computed.

    hicache serve --socket-path /tmp/hicache.sock &
    python examples/transformers_prefix.py unix:///tmp/hicache.sock
    python examples/transformers_prefix.py unix:///tmp/hicache.sock

Without ``--model`` it makes a small Llama with random weights, the same in every process.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hicache
from hicache.integrations.transformers import PrefixStore


def small_model() -> Any:
    """A Llama of four layers with grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Prefill a prompt, then go on from it."""
    parser = argparse.ArgumentParser(description="Prefill one prompt through a sidecar.")
    parser.add_argument("target", help="the sidecar: unix:///path or host:port")
    parser.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--tokens", type=int, default=1500, help="length of the prompt")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small_model()
    prompt = torch.arange(args.tokens).remainder(997).unsqueeze(0)
    with hicache.Client(args.target) as client:
        prefixes = PrefixStore(client, model.eval())
        done = prefixes.prefill(prompt, logits_to_keep=1)
        sys.stdout.write(f"loaded {done.cached_tokens} tokens, computed {done.computed_tokens}\n")
        cache = prefixes.load(prompt).cache
        answer = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
        sys.stdout.write(f"goes on with {answer[0, args.tokens :].tolist()}\n")
        prefixes.store(answer, cache)  # for the conversation's next turn


if __name__ == "__main__":
    main()
