"""The messages, as vLLM and SGLang publish them since 2026 (maps), and as they did before (positional arrays).

Field names and orders are those of vLLM's ``vllm/distributed/kv_events.py`` (0.32; arrays: 0.10). A batch is an array
in both: ``[ts, [event, ...], data_parallel_rank]``.
"""

from __future__ import annotations

from typing import Any

import msgspec

BlockHash = int | bytes


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """Blocks that a medium has from now on."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    """Blocks that a medium has no longer."""

    block_hashes: list[BlockHash]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """Nothing is there; what follows says what is."""


Event = BlockStored | BlockRemoved | AllBlocksCleared
_ENCODER = msgspec.msgpack.Encoder()


def encode(ts: float, events: list[Event], rank: int, *, arrays: bool) -> bytes:
    """One message's payload."""
    rows: list[Any] = [_positional(event) for event in events] if arrays else list(events)
    return _ENCODER.encode([ts, rows, rank])


def _positional(event: Event) -> list[Any]:
    return [type(event).__name__, *(getattr(event, name) for name in event.__struct_fields__)]
