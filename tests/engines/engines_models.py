"""Model folders, made once a session when they are first asked for."""

from __future__ import annotations

import random
from pathlib import Path

from engines_kit import Host

VOCABULARY = 512


class Models:
    """``models("llama", "bfloat16")`` is a folder; the seed makes other weights of the same shape."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._greedy: dict[tuple[Path, str, int], list[list[int]]] = {}

    def __call__(self, shape: str, dtype: str = "float32", seed: int = 0) -> Path:
        folder = self._folder / f"{shape}-{dtype}-{seed}"
        if not folder.exists():
            with self._host.engine() as maker:
                maker.ask("model", shape=shape, folder=str(folder), dtype=dtype, seed=seed)
        return folder

    def adapter(self, model: Path, seed: int) -> Path:
        """A LoRA adapter's folder."""
        folder = self._folder / f"{model.name}-lora-{seed}"
        if not folder.exists():
            with self._host.engine() as maker:
                maker.ask("adapter", model=str(model), folder=str(folder), seed=seed)
        return folder

    def greedy(self, model: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """What transformers generates with a DynamicCache."""
        key = (model, repr(prompts), new_tokens)
        if key not in self._greedy:
            with self._host.engine() as oracle:
                self._greedy[key] = oracle.ask(
                    "greedy", model=str(model), prompts=prompts, new_tokens=new_tokens
                )
        return self._greedy[key]


def prompt(seed: int, tokens: int) -> list[int]:
    """Random token ids."""
    made = random.Random(f"prompt {seed}")
    return [made.randrange(3, VOCABULARY) for _ in range(tokens)]
