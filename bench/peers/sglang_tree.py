"""SGLang's unified radix cache on its default (Rust) tree core, as a contender of ``bench/tree.py``.

Runs in ``bench/.venvs/sglang``. Alone, for a look: ``bench/.venvs/sglang/bin/python bench/peers/sglang_tree.py``.

What is timed, per case (always at the level the scheduler calls, ``UnifiedRadixCache``):

match_*        RadixKey + MatchPrefixParams + match_prefix. The key's token ids are an ``array('q')`` that exists
               before, as the scheduler's request has it. The result is a length and a node handle.
match_slots_*  the same, then the matched slots as one tensor (``collect_full_device_indices``), which the
               scheduler fetches for a request that it admits.
insert_*       RadixKey + InsertParams + insert of a prompt that is new; the slot tensor exists before.
evict_*        EvictParams + evict of one leaf's tokens, least recently used first. Freed slots go to a stand-in
               allocator that only counts them: the peer's own allocator is not charged.
"""

from __future__ import annotations

import os
import sys
import warnings
from array import array
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _stubs
import torch
import workloads
from contender import Sample, serve, timed_each, timed_loop

STUBBED = [
    "triton",
    "IPython",
    "torchvision",
    "sentencepiece",
    "compressed_tensors",
    "gguf",
    "partial_json_parser",
]
torch.set_num_threads(1)
warnings.simplefilter("ignore")
_stubs.install(STUBBED)

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402

INSERT_ITERATIONS = {8_192: 128, 131_072: 24}
EVICTIONS_PER_SAMPLE = 64


class CountingAllocator:
    """Stands in for the slot allocator: takes freed slots and counts them."""

    device = "cpu"

    def __init__(self, page_tokens: int) -> None:
        self.page_size = page_tokens
        self.freed = 0

    def free_segment(self, indices: torch.Tensor, *, start_pos: int) -> None:
        """Take the slots back."""
        self.freed += len(indices)


def make_cache(spec: workloads.TreeSpec) -> UnifiedRadixCache:
    """An empty cache; refuses to measure anything but the Rust core."""
    cache = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=CountingAllocator(spec.page_tokens),
            page_size=spec.page_tokens,
            tree_components=(ComponentType.FULL,),
        )
    )
    core = type(cache.tree_core).__name__
    if core != "RustUnifiedTreeCore":
        raise RuntimeError(f"the tree core is {core}, not the Rust one")
    return cache


def wide(prompt: array) -> array:
    """Token ids as the peer wants them: 8-byte integers."""
    return array("q", prompt)


def insert(cache: UnifiedRadixCache, ids: array, slots: torch.Tensor) -> None:
    """Insert a prompt whose slots are the start of ``slots``."""
    cache.insert(InsertParams(key=RadixKey(ids), value=slots[: len(ids)]))


def with_others(spec: workloads.TreeSpec) -> UnifiedRadixCache:
    """A cache that holds the unrelated prompts."""
    cache = make_cache(spec)
    slots = torch.arange(spec.others_tokens)
    for prompt in workloads.others(spec):
        insert(cache, wide(prompt), slots)
    return cache


def match_case(
    spec: workloads.TreeSpec, length: int, *, deep: bool, slots: bool
) -> Callable[[], Callable[[], Sample]]:
    """Match a prompt that the tree holds whole, flat or in turns; optionally fetch its slots too."""

    def set_up() -> Callable[[], Sample]:
        cache = with_others(spec)
        prompt = workloads.tokens(spec.seed, length)
        values = torch.arange(length)
        for part in workloads.turns(spec, prompt) if deep else [prompt]:
            insert(cache, wide(part), values)
        ids = wide(prompt)
        root = cache.root_node_handle()

        def match() -> int:
            return cache.match_prefix(MatchPrefixParams(key=RadixKey(ids))).device_prefix_len

        def match_slots() -> int:
            found = cache.match_prefix(MatchPrefixParams(key=RadixKey(ids)))
            return len(cache.tree_core.collect_full_device_indices(found.last_device_node, root))

        call = match_slots if slots else match
        if call() != length:
            raise RuntimeError(f"matched {call()} of {length} tokens")
        return timed_loop(call)

    return set_up


def insert_case(spec: workloads.TreeSpec, length: int) -> Callable[[], Callable[[], Sample]]:
    """Insert prompts that are new, into a tree that is made anew (untimed) before each sample."""

    def set_up() -> Callable[[], Sample]:
        count = INSERT_ITERATIONS[length]
        new = [wide(p) for p in workloads.fresh(spec, count, length, salt=length)]
        values = torch.arange(length)

        def sample() -> Sample:
            cache = with_others(spec)
            before = cache.total_size()
            taken = timed_each(lambda ids: insert(cache, ids, values), new)
            if cache.total_size()[0] - before[0] != count * length:
                raise RuntimeError(f"the tree holds {cache.total_size()} tokens after {before}")
            return taken

        return sample

    return set_up


def evict_case(spec: workloads.TreeSpec, count: int) -> Callable[[], Callable[[], Sample]]:
    """Evict one leaf's tokens at a time from a tree of ``count`` leaves; what left comes back untimed."""

    def set_up() -> Callable[[], Sample]:
        cache = make_cache(spec)
        values = torch.arange(spec.group_tokens + spec.leaf_tokens)
        prompts = [wide(p) for p in workloads.leaves(spec, count)]
        for prompt in prompts:
            insert(cache, prompt, values)
        oldest = 0

        def sample() -> Sample:
            nonlocal oldest
            allocator = cache.token_to_kv_pool_allocator
            freed = allocator.freed
            params = [spec.evict_tokens] * EVICTIONS_PER_SAMPLE
            taken = timed_each(lambda n: cache.evict(EvictParams(num_tokens=n)), params)
            if allocator.freed - freed != spec.evict_tokens * EVICTIONS_PER_SAMPLE:
                raise RuntimeError(f"{allocator.freed - freed} tokens were evicted")
            for _ in range(EVICTIONS_PER_SAMPLE):
                insert(cache, prompts[oldest % count], values)
                oldest += 1
            return taken

        return sample

    return set_up


def prepare(raw: dict[str, int]) -> dict[str, Callable[[], Callable[[], Sample]]]:
    """The cases for a spec."""
    spec = workloads.TreeSpec(**raw)
    cases: dict[str, Callable[[], Callable[[], Sample]]] = {}
    for shape in ("flat", "deep"):
        for label, length in (("8k", 8_192), ("128k", 131_072)):
            deep = shape == "deep"
            cases[f"match_{shape}_{label}"] = match_case(spec, length, deep=deep, slots=False)
            cases[f"match_slots_{shape}_{label}"] = match_case(spec, length, deep=deep, slots=True)
    cases["insert_new_8k"] = insert_case(spec, 8_192)
    cases["insert_new_128k"] = insert_case(spec, 131_072)
    cases["evict64_10k_leaves"] = evict_case(spec, 10_000)
    cases["evict64_100k_leaves"] = evict_case(spec, 100_000)
    return cases


def versions() -> dict[str, str]:
    """What is measured."""
    found = {name: metadata.version(name) for name in ("sglang", "torch", "numpy")}
    return {"python": sys.version.split()[0], **found}


if __name__ == "__main__":
    if sys.stdin.isatty():
        for case, set_up in prepare(workloads.TreeSpec().to_json()).items():
            sampler = set_up()
            taken = sorted(sampler().cpu_us for _ in range(7))
            print(f"{case:<28} {taken[3]:.1f} us cpu, median of 7")
    else:
        serve("sglang", prepare, versions, {"core": "rust", "stubbed": STUBBED})
