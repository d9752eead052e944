"""What a page of SGLang's is, besides its key: the namespace that its key is looked up in.

SGLang's key is a chained digest of the tokens, and of the request's LoRA and cache_salt; it says nothing of the model,
the rank, the number format, the page size or how the bytes lie. All of these go into the namespace, so that where one
differs there is a miss.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from hicache.errors import ConfigError
from hicache.integrations.sglang.settings import SglangSettings
from hicache.rpc.client.arguments import NamespaceFields

KEY_BYTES = 32
#: Number formats of which the stored bytes do not say what they are.
OPAQUE_DTYPES = frozenset({"uint8", "int8"})
#: Host pools whose content differs by tensor-parallel rank even where the model's KV does not.
SHARDED_POOLS = ("Mamba", "MHA")


@dataclasses.dataclass(frozen=True, slots=True)
class RankFacts:
    """What one rank is, from SGLang's HiCacheStorageConfig. ``replicated``: all ranks' KV is the same (MLA)."""

    model: str
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dcp_rank: int
    dcp_size: int
    replicated: bool
    sglang_version: str

    def tag(self, *, replicated: bool) -> str:
        """The rank's place, as far as the bytes depend on it."""
        shard = "all" if replicated else f"{self.tp_rank}of{self.tp_size}"
        parts = [f"tp{shard}", f"pp{self.pp_rank}of{self.pp_size}", f"cp{self.cp_rank}of{self.cp_size}"]
        if self.dcp_size > 1:
            # Ranks of one shard in different groups hold the same; which shards there are depends on both sizes.
            parts.append(f"dcp{self.dcp_rank}of{self.dcp_size}-tp{self.tp_size}")
        return "-".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolFacts:
    """What one host pool holds. ``order``: how the pieces of a page follow each other in what is stored."""

    name: str
    kind: str
    layout: str
    dtype: str
    order: str
    page_tokens: int
    page_bytes: int
    layers: int = 0
    heads: int = 0
    head_size: int = 0


def rank_facts(config: Any, settings: SglangSettings, sglang_version: str) -> RankFacts:
    """The facts of a HiCacheStorageConfig. Raises ConfigError for what is not supported."""
    if getattr(config, "should_split_heads", False):
        raise ConfigError(
            "SGLang asks for pages split by heads (tp_lcm_size), which hicache does not support",
            hint="leave tp_lcm_size out of hicache-storage-backend-extra-config",
        )
    model = settings.model or config.model_name or ""
    if not model:
        raise ConfigError(
            "hicache-storage-backend-extra-config: model is missing, and SGLang names none either",
            hint='set "model" to a name that stands for these weights',
        )
    return RankFacts(
        model=model,
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        pp_rank=config.pp_rank,
        pp_size=config.pp_size,
        cp_rank=config.attn_cp_rank,
        cp_size=config.attn_cp_size,
        dcp_rank=getattr(config, "dcp_rank", 0),
        dcp_size=getattr(config, "dcp_size", 1),
        replicated=bool(config.is_mla_model),
        sglang_version=sglang_version,
    )


def namespace_fields(
    rank: RankFacts, pool: PoolFacts, kv: PoolFacts, settings: SglangSettings
) -> NamespaceFields:
    """The namespace of one pool's pages on one rank; ``kv``: the facts of the rank's main pool.

    Raises ConfigError where the number format of the KV is not known.
    """
    dtype = settings.kv_cache_dtype or kv.dtype
    if dtype in OPAQUE_DTYPES:
        raise ConfigError(
            f"hicache-storage-backend-extra-config: kv_cache_dtype is missing: the pool stores its numbers as "
            f"{kv.dtype}, which does not say what they are",
            hint='set it to what the engine runs with, such as "fp8_e4m3"',
        )
    replicated = rank.replicated and not any(word in pool.kind for word in SHARDED_POOLS)
    layout = "/".join(
        ("sglang", pool.name, pool.kind, pool.layout, pool.order, rank.tag(replicated=replicated))
    )
    return NamespaceFields(
        model=rank.model,
        revision=settings.revision,
        salt=settings.salt,
        page_bytes=pool.page_bytes,
        page_tokens=pool.page_tokens,
        kv_dtype=f"{dtype}:{pool.dtype}",
        layout=layout,
        layers=pool.layers,
        kv_heads=pool.heads,
        head_size=pool.head_size,
        engine_version=f"sglang {rank.sglang_version}",
        symbol_kind="hashes",
        symbol_hash_bytes=KEY_BYTES,
    )


def symbol(key: str) -> bytes:
    """A key as a page's symbol: SGLang's own digest, or a digest of anything else."""
    if len(key) == 2 * KEY_BYTES:
        try:
            return bytes.fromhex(key)
        except ValueError:
            pass
    return hashlib.sha256(b"sglang key\0" + key.encode()).digest()
