"""generate() that remembers across calls and processes: run this twice against one sidecar.

    hicache serve --socket-path /tmp/hicache.sock &
    python examples/transformers_generate.py unix:///tmp/hicache.sock
    python examples/transformers_generate.py unix:///tmp/hicache.sock

A batch of three questions about one document, padded on the left, then a second turn of the first of them, with the
model's own ``generate``. Without ``--model`` it makes a small Llama with random weights, the same in every process.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hicache
from hicache.integrations.transformers import HiCacheCache, PrefixStore

PAD = 0


def small_model() -> Any:
    """A Llama of four layers with grouped-query attention."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """What a tokenizer with ``padding_side="left"`` returns."""
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def main() -> None:
    """Ask, then ask on."""
    parser = argparse.ArgumentParser(description="Generate through a sidecar.")
    parser.add_argument("target", help="the sidecar: unix:///path or host:port")
    parser.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--tokens", type=int, default=600, help="length of the document")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small_model()
    document = [1 + number % 997 for number in range(args.tokens)]
    questions = [document + list(range(3, 3 + length)) for length in (40, 25, 31)]
    with hicache.Client(args.target) as client:
        prefixes = PrefixStore(client, model.eval())
        cache = HiCacheCache(prefixes)  # tells what happened; `generate` makes its own where none is given
        inputs = padded(questions)
        answers = prefixes.generate(
            **inputs, cache=cache, max_new_tokens=40, do_sample=False, pad_token_id=PAD
        )
        sys.stdout.write(
            f"three questions: loaded {cache.loaded_tokens} of {[len(row) for row in questions]} tokens\n"
        )
        turn = torch.cat([answers[:1], torch.tensor([[7, 8, 9]])], dim=1)
        with HiCacheCache(prefixes) as cache:
            model.generate(turn, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        sys.stdout.write(f"a second turn: loaded {cache.loaded_tokens} of {turn.shape[1]} tokens\n")
        sys.stdout.write(
            f"the first answer goes on with {answers[0, inputs['input_ids'].shape[1] :][:8].tolist()}\n"
        )


if __name__ == "__main__":
    main()
