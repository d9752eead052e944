"""A small byte-level causal language model (4 layers, 4 heads of 64, rotary), trained on the spot.

Not to be good at anything: to have K and V that came out of training on text. `kv.py` uses it; needs torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

LAYERS, HEADS, HEAD_SIZE = 4, 4, 64
WIDTH = HEADS * HEAD_SIZE
BATCH, TOKENS = 8, 128
PEAK_RATE = 2e-3


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [..., tokens, heads, head size]."""
    tokens, half = x.shape[-3], HEAD_SIZE // 2
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.before(x)).view(*x.shape[:-1], 3, HEADS, HEAD_SIZE).unbind(-3)
        q, k = rotate(q), rotate(k)
        heads = [t.transpose(-2, -3) for t in (q, k, v)]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(-2, -3)
        x = x + self.out(attended.reshape(x.shape))
        x = x + self.narrow(functional.gelu(self.wide(self.between(x))))
        return x, torch.stack([k, v], dim=-4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, kept = self.embed(tokens), []
        for block in self.blocks:
            x, kv = block(x)
            kept.append(kv)
        return self.norm(x) @ self.embed.weight.T, kept


def keys_and_values(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """[layers, 2, tokens, heads, head size] of one sequence."""
    return torch.stack(model(tokens[None])[1])[:, 0]


def load(path: Path, text: Iterator[bytes], steps: int) -> Model:
    """The model, trained now if its weights are not there yet."""
    torch.manual_seed(0)
    model = Model()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, text, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model.eval()


def train(model: Model, text: Iterator[bytes], steps: int) -> None:
    """A few minutes of next-byte prediction, the same every time on the same machine."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(WIDTH))
    corpus = bytearray()
    while len(corpus) < 4 << 20:
        corpus += next(text)
    data = torch.frombuffer(corpus, dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))
    for step in range(steps):
        rate = PEAK_RATE * min((step + 1) / 40, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(data) - TOKENS - 1, (BATCH,))
        chunk = torch.stack([data[s : s + TOKENS + 1] for s in starts.tolist()]).long()
        loss = functional.cross_entropy(model(chunk[:, :-1])[0].flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"training: step {step + 1} of {steps}, loss {loss.item():.2f}", file=sys.stderr)
