"""Namespaces as messages and back: the one place that lists their fields for the wire."""

from __future__ import annotations

from hicache.errors import InvalidArgumentError
from hicache.rpc.pb import session_pb2
from hicache.types import Namespace, SymbolKind


def to_message(spec: Namespace) -> session_pb2.NamespaceSpec:
    """All fields but the tenant, which the server knows from the caller's credentials."""
    return session_pb2.NamespaceSpec(
        model=spec.model,
        revision=spec.revision,
        adapter=spec.adapter,
        salt=spec.salt,
        kv_dtype=spec.kv_dtype,
        layout=spec.layout,
        codec=spec.codec,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_size=spec.head_size,
        page_tokens=spec.page_tokens,
        page_bytes=spec.page_bytes,
        world_size=spec.world_size,
        engine_version=spec.engine_version,
        symbol_kind=spec.symbol_kind.value,
        symbol_hash_bytes=spec.symbol_hash_bytes,
        extra_key_bytes=spec.extra_key_bytes,
    )


def from_message(message: session_pb2.NamespaceSpec, tenant: str) -> Namespace:
    """The namespace that a message describes; what it leaves out has its default. Raises InvalidArgumentError."""
    try:
        kind = SymbolKind(message.symbol_kind or SymbolKind.TOKENS.value)
    except ValueError as error:
        raise InvalidArgumentError(
            f"namespace: symbol_kind is tokens or hashes, not {message.symbol_kind!r}"
        ) from error
    return Namespace(
        tenant=tenant,
        model=message.model,
        revision=message.revision,
        adapter=message.adapter,
        salt=message.salt,
        kv_dtype=message.kv_dtype,
        layout=message.layout,
        codec=message.codec or "lossless",
        layers=message.layers,
        kv_heads=message.kv_heads,
        head_size=message.head_size,
        page_tokens=message.page_tokens,
        page_bytes=message.page_bytes,
        world_size=message.world_size or 1,
        engine_version=message.engine_version,
        symbol_kind=kind,
        symbol_hash_bytes=message.symbol_hash_bytes,
        extra_key_bytes=message.extra_key_bytes,
    )
