"""The prompts and trees that every contender of the tree benchmark is given. Standard library only.

Everything comes from a seed, so that two interpreters make the same tokens. Token ids are below 128,256, as
large vocabularies are today.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import asdict, dataclass

VOCABULARY = 128_256


@dataclass(frozen=True)
class TreeSpec:
    """What a tree contender is told. Sent as JSON to contenders in other environments."""

    page_tokens: int = 16
    turn_tokens: int = 512  # agent-style paths grow by this much at a time
    others: int = 200  # unrelated prompts that share the tree
    others_tokens: int = 2048
    leaf_tokens: int = 64  # of the trees that are evicted from
    leaf_groups: int = 100  # leaves hang below this many shared prompts
    group_tokens: int = 512
    evict_tokens: int = 64
    seed: int = 20_26

    def to_json(self) -> dict[str, int]:
        """The fields, for the wire."""
        return asdict(self)


def tokens(seed: int, count: int) -> array[int]:
    """``count`` token ids as 4-byte integers, the same for the same seed everywhere."""
    rng = random.Random(seed)
    raw = array("I")
    raw.frombytes(rng.randbytes(4 * count))
    return array("i", [value % VOCABULARY for value in raw])


def others(spec: TreeSpec) -> list[array[int]]:
    """The unrelated prompts of a tree."""
    return [tokens(spec.seed + 1000 + i, spec.others_tokens) for i in range(spec.others)]


def turns(spec: TreeSpec, prompt: array[int]) -> list[array[int]]:
    """The growing prefixes of ``prompt`` in which an agent's conversation reaches a cache."""
    step = spec.turn_tokens
    return [prompt[:end] for end in range(step, len(prompt) + 1, step)]


def fresh(spec: TreeSpec, count: int, length: int, salt: int) -> list[array[int]]:
    """``count`` prompts that share no page with each other or with anything else: they differ in page 0.

    After page 0 they are alike; no contender hashes or shares pages below different first pages.
    """
    body = tokens(spec.seed + 1, length)
    made = []
    for i in range(count):
        head = tokens(spec.seed + 10_000_000 + salt * 100_003 + i, spec.page_tokens)
        made.append(head + body[spec.page_tokens :])
    return made


def leaves(spec: TreeSpec, count: int) -> list[array[int]]:
    """``count`` prompts, each a shared prompt of its group and then a leaf of its own, groups in turn."""
    heads = [tokens(spec.seed + 2_000_000 + g, spec.group_tokens) for g in range(spec.leaf_groups)]
    return [
        heads[i % spec.leaf_groups] + tokens(spec.seed + 3_000_000 + i, spec.leaf_tokens)
        for i in range(count)
    ]
