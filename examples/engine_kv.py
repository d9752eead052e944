"""A toy engine keeps the KV of prompts in hicache: a second process loads what the first has computed.

    hicache serve --socket-path /tmp/hicache.sock &
    python examples/engine_kv.py unix:///tmp/hicache.sock
    python examples/engine_kv.py unix:///tmp/hicache.sock --device cuda:0 --codec fp8-e4m3

It starts two engines, each a process with a paged KV of its own and another block size. "Computing" a token's KV is a
formula here, so that the second engine can check that what it loaded is what it would have computed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import torch

import hicache
from hicache.errors import HicacheError

now = time.perf_counter  # noqa: TID251 - an example is its own clock
LAYERS, HEADS, DIM, PAGE_TOKENS = 8, 4, 64, 16


class Engine:
    """A paged KV ``[2, blocks, block, heads, dim]`` a layer, and a block table for one prompt."""

    def __init__(self, device: str, block: int, tokens: int) -> None:
        self.block, self.tokens = block, tokens
        blocks = -(-tokens // block)
        shape = (2, 2 * blocks, block, HEADS, DIM)
        self.kv = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(LAYERS)]
        self.table = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(block))[:blocks]

    def computed(self, prompt: Any, layer: int) -> Any:
        """[2, tokens, heads, dim]: what a layer's attention would have of these tokens."""
        at = torch.arange(2 * HEADS * DIM).view(2, 1, HEADS, DIM) + layer * 31
        return torch.sin(prompt.view(1, -1, 1, 1) * 0.37 + at * 0.11).to(self.kv[0].device, torch.bfloat16)

    def places(self) -> tuple[Any, Any]:
        """Block and place in the block of every token."""
        token = torch.arange(self.tokens)
        return self.table[token // self.block], token % self.block

    def compute(self, prompt: Any, layer: int) -> None:
        """Fill one layer."""
        self.kv[layer][(slice(None), *self.places())] = self.computed(prompt, layer)

    def error(self, prompt: Any, layer: int, tokens: int) -> float:
        """The largest difference between a layer as it lies there and as it would have been computed."""
        found = self.kv[layer][(slice(None), *self.places())].float()
        return float((found - self.computed(prompt, layer).float()).abs()[:, :tokens].max())


def run(options: argparse.Namespace) -> None:
    """One engine: load what is cached, compute and store the rest."""
    prompt = torch.arange(options.tokens, dtype=torch.int32) % 1009
    engine = Engine(options.device, options.block, options.tokens)
    with hicache.Client(options.target) as client:
        copier = client.copier(engine.kv, layout="kv-nhd", page_tokens=PAGE_TOKENS, codec=options.codec)
        cache = client.namespace(model="toy", salt=options.salt, **copier.namespace_fields())
        begin = now()
        with cache.fetch(prompt.numpy(), wait_ms=1000) as lease:
            loaded = copier.load(lease, engine.table)
            worst = 0.0
            for layer in range(LAYERS):
                loaded.wait_layer(layer)  # a real engine computes the layer now, while later ones arrive
                worst = max(worst, engine.error(prompt, layer, 1)) if loaded.pages else 0.0
            loaded.wait()  # and now it is known to be right
        taken_ms = (now() - begin) * 1e3
        tokens = loaded.pages * PAGE_TOKENS
        if tokens:
            worst = max(engine.error(prompt, layer, tokens) for layer in range(LAYERS))
        say(
            options,
            f"loaded {tokens} of {options.tokens} tokens in {taken_ms:.1f} ms, off by {worst:.4f} at most",
        )
        begin = now()
        with cache.reserve(prompt.numpy()) as room, copier.store(room, engine.table, layered=True) as store:
            for layer in range(LAYERS if store.pages else 0):
                engine.compute(prompt, layer)
                store.layer_ready(layer)  # packed while the next layer computes
            stored = store.commit().stored_pages if store.pages else 0
        taken_ms = (now() - begin) * 1e3
        say(options, f"computed and stored {stored * PAGE_TOKENS} tokens in {taken_ms:.1f} ms")


def say(options: argparse.Namespace, text: str) -> None:
    """A line of one engine."""
    sys.stdout.write(f"engine with blocks of {options.block}: {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Two engines, one after the other; with ``--block`` one of them."""
    parser = argparse.ArgumentParser(description="Two toy engines share KV through a sidecar.")
    parser.add_argument("target", help="the sidecar: unix:///path")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:<n>")
    parser.add_argument("--codec", default=None, choices=("fp8-e4m3", "int8-g64", "int4-g64"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--salt", default="", help="pages of another salt are not found")
    parser.add_argument("--block", type=int, default=0, help="run one engine with blocks of so many tokens")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"engine_kv.py: no GPU for --device {options.device}: torch sees none")
    if options.block:
        try:
            run(options)
        except HicacheError as error:
            sys.exit(f"engine_kv.py: {error}")
        return
    for block in (16, 64):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--block", str(block)], check=False)  # noqa: S603
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
