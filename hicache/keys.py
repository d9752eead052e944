"""Namespace fingerprints and chained page keys.

A page key names a page's content *and everything before it*: SHA-256 over the parent's key and the page's
symbol, seeded by the namespace fingerprint. Cryptographic on purpose: tenants are not trusted, and a
collision would serve one prompt's KV for another. Keys are computed only when a page leaves for a tier that
outlives the process, or is announced; matching compares the symbols themselves.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib

from hicache.errors import InvalidArgumentError
from hicache.types import Namespace, SymbolKind, Use

KEY_BYTES = 32
MAX_PAGE_TOKENS = 4096
MAX_PAGE_BYTES = 1 << 30
MAX_NAME_BYTES = 1024
MAX_CLASS_BYTES = 64
MAX_TURN = (1 << 32) - 1
MAX_COST = 1e18
_DOMAIN = b"hicache.v1.namespace\0"


def fingerprint(namespace: Namespace) -> bytes:
    """32-byte digest of every field of the namespace; equal exactly when all fields are equal."""
    digest = hashlib.sha256(_DOMAIN)
    for field in sorted(dataclasses.fields(namespace), key=lambda f: f.name):
        value = getattr(namespace, field.name)
        text = value.value if isinstance(value, enum.Enum) else str(value)
        for part in (field.name, text):
            raw = part.encode()
            digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


def chain_keys(parent_key: bytes, symbols: bytes, symbol_bytes: int) -> list[bytes]:
    """Keys of consecutive pages.

    Args:
        parent_key: key of the page before the first one, or the namespace fingerprint at the root.
        symbols: the pages' symbols, concatenated.
        symbol_bytes: width of one symbol.

    Returns:
        One 32-byte key a page, in page order.
    """
    sha256 = hashlib.sha256
    keys = []
    for offset in range(0, len(symbols), symbol_bytes):
        parent_key = sha256(parent_key + symbols[offset : offset + symbol_bytes]).digest()
        keys.append(parent_key)
    return keys


def validate(namespace: Namespace) -> None:
    """Refuse a namespace that could not be served. Raises InvalidArgumentError naming the field."""
    checks = (
        (bool(namespace.model), "model must be named"),
        (bool(namespace.tenant), "tenant must be named"),
        (1 <= namespace.page_tokens <= MAX_PAGE_TOKENS, f"page_tokens must be 1..{MAX_PAGE_TOKENS}"),
        (1 <= namespace.page_bytes <= MAX_PAGE_BYTES, f"page_bytes must be 1..{MAX_PAGE_BYTES}"),
        (namespace.world_size >= 1, "world_size must be at least 1"),
        (min(namespace.layers, namespace.kv_heads, namespace.head_size) >= 0, "counts must not be negative"),
    )
    for ok, problem in checks:
        if not ok:
            raise InvalidArgumentError(f"namespace: {problem}")
    for field in dataclasses.fields(namespace):
        value = getattr(namespace, field.name)
        if isinstance(value, str) and len(value.encode(errors="replace")) > MAX_NAME_BYTES:
            raise InvalidArgumentError(f"namespace: {field.name} must have at most {MAX_NAME_BYTES} bytes")
    if namespace.symbol_kind is SymbolKind.HASHES:
        if not 16 <= namespace.symbol_hash_bytes <= 32:
            raise InvalidArgumentError("namespace: symbol_hash_bytes must be 16..32 for hash symbols")
        if namespace.extra_key_bytes:
            raise InvalidArgumentError("namespace: extra_key_bytes go with token symbols only")
        return
    if namespace.symbol_hash_bytes:
        raise InvalidArgumentError("namespace: symbol_hash_bytes go with hash symbols only")
    if namespace.extra_key_bytes not in range(0, 65):
        raise InvalidArgumentError("namespace: extra_key_bytes must be 0..64")


def validate_use(use: Use) -> Use:
    """The use itself. Raises InvalidArgumentError naming the field that cannot be taken."""
    if len(use.cls.encode(errors="replace")) > MAX_CLASS_BYTES or not use.cls.isprintable():
        raise InvalidArgumentError(f"the request class must be at most {MAX_CLASS_BYTES} printable bytes")
    if not 0 <= use.turn <= MAX_TURN:
        raise InvalidArgumentError(f"the turn must be 0..{MAX_TURN}")
    if not 0.0 <= use.cost <= MAX_COST:  # also false for nan
        raise InvalidArgumentError("the cost of a page must be a finite number of 0 or more")
    return use


def whole_pages(namespace: Namespace, prompt: bytes) -> bytes:
    """The part of a prompt that fills whole pages.

    Token prompts may end in a partial page (dropped here); prompts of hashes, or with extra keys, may not.
    Raises InvalidArgumentError when the length cannot be right.
    """
    width = namespace.symbol_bytes
    rest = len(prompt) % width
    if not rest:
        return prompt
    if namespace.symbol_kind is SymbolKind.HASHES or namespace.extra_key_bytes:
        raise InvalidArgumentError(
            f"prompt of {len(prompt)} bytes is not a whole number of {width}-byte symbols",
        )
    if rest % 4:
        raise InvalidArgumentError(
            f"prompt of {len(prompt)} bytes is not a whole number of int32 token ids",
            hint="send token ids as little-endian int32, 4 bytes each",
        )
    return prompt[: len(prompt) - rest]
