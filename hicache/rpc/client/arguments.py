"""Callers' arguments, checked: settings of a client, fields of a namespace, numbers."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, Required, SupportsIndex, TypedDict, Unpack

from hicache import keys
from hicache.errors import InvalidArgumentError, UnsupportedError
from hicache.rpc.client import options as settings
from hicache.rpc.client.calls import FetchAsk, MatchAsk, ReserveAsk
from hicache.rpc.client.core import NamespaceState
from hicache.rpc.client.options import ClientOptions, DataPlane, Tls, Verify
from hicache.types import NO_USE, Namespace, SymbolKind, Use


class OptionFields(TypedDict, total=False):
    """The fields of ClientOptions, as keywords of a Client."""

    name: str
    timeout_s: float
    connect_timeout_s: float
    data_plane: DataPlane | str
    verify: Verify | str
    token: str
    tls: Tls | None
    write_limit_bytes: int
    write_step_bytes: int
    deadline_margin_ms: int
    keep_message_memory: bool


class NamespaceFields(TypedDict, total=False):
    """The fields of a Namespace that callers set; the tenant is the server's to say."""

    model: Required[str]
    page_bytes: Required[int]
    page_tokens: int
    salt: str
    revision: str
    adapter: str
    kv_dtype: str
    layout: str
    codec: str
    layers: int
    kv_heads: int
    head_size: int
    world_size: int
    engine_version: str
    symbol_kind: SymbolKind | str
    symbol_hash_bytes: int
    extra_key_bytes: int


DEFAULT_PAGE_TOKENS = 64


def make_options(options: ClientOptions | None, fields: OptionFields) -> ClientOptions:
    """Options with some fields set. Raises ConfigError for values that cannot work."""
    changes: dict[str, Any] = dict(fields)
    if "data_plane" in changes:
        changes["data_plane"] = settings.data_plane(changes["data_plane"])
    if "verify" in changes:
        changes["verify"] = settings.verify(changes["verify"])
    base = options if options is not None else ClientOptions()
    return dataclasses.replace(base, **changes)


def make_namespace(**fields: Unpack[NamespaceFields]) -> NamespaceState:
    """A namespace to be opened at its first use. Raises InvalidArgumentError naming the field."""
    if "tenant" in fields:
        raise InvalidArgumentError(
            "namespace: the tenant is the server's to say, from this client's credentials"
        )
    known: dict[str, Any] = {"page_tokens": DEFAULT_PAGE_TOKENS, **fields}
    if "symbol_kind" in fields:
        try:
            known["symbol_kind"] = SymbolKind(known["symbol_kind"])
        except ValueError:
            raise InvalidArgumentError(
                f"namespace: symbol_kind is tokens or hashes, not {known['symbol_kind']!r}"
            ) from None
    spec = Namespace(**known)
    keys.validate(spec)
    return NamespaceState(spec)


def count_of(name: str, value: SupportsIndex) -> int:
    """An argument that must not be negative. Raises InvalidArgumentError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if not 0 <= count < 1 << 63:
        raise InvalidArgumentError(f"{name} must be a whole number, 0 or more, not {value!r}")
    return count


def pages_of(max_pages: int | None) -> int:
    """``max_pages`` as Fetch takes it. Raises InvalidArgumentError for 0, which would mean all."""
    if max_pages is not None and not 1 <= max_pages < 1 << 32:
        raise InvalidArgumentError(f"max_pages must be at least 1, not {max_pages!r}; None for all")
    return 0 if max_pages is None else max_pages


def refuse_torch_views(*, copy: bool) -> None:
    """Torch has no read-only tensors, and a write to a read-only mapping kills the process."""
    if not copy:
        raise UnsupportedError(
            "torch views of leased pages are not given out: torch cannot make them read-only, and a write through "
            "one kills this process",
            hint="use copy=True, or numpy() for read-only arrays in place",
        )


def match_ask(use: Use | None, *, touch: bool, prefetch: bool) -> MatchAsk:
    """What a caller asks of Match. Raises InvalidArgumentError."""
    return MatchAsk(touch, prefetch, use_of(use))


def fetch_ask(
    max_pages: int | None, ttl_ms: int, wait_ms: int, use: Use | None, *, device: bool = False
) -> FetchAsk:
    """What a caller asks of Fetch. Raises InvalidArgumentError."""
    pages = pages_of(max_pages)
    times = count_of("ttl_ms", ttl_ms), count_of("wait_ms", wait_ms)
    return FetchAsk(pages, *times, use_of(use), device=device)


def fetch_and_reserve_ask(
    ttl_ms: int, reserve_ttl_ms: int, wait_ms: int, use: Use | None, *, device: bool = False
) -> FetchAsk:
    """What a caller asks of Fetch who also wants room for the rest. Raises InvalidArgumentError."""
    ask = fetch_ask(None, ttl_ms, wait_ms, use, device=device)
    return dataclasses.replace(ask, reserve=True, reserve_ttl_ms=count_of("reserve_ttl_ms", reserve_ttl_ms))


def use_of(use: Use | None) -> Use:
    """What a caller says of its request. Raises InvalidArgumentError."""
    return NO_USE if use is None else keys.validate_use(use)


def reserve_ask(ttl_ms: int, wait_ms: int, use: Use | None, *, drop_pressure: bool) -> ReserveAsk:
    """What a caller asks of Reserve. Raises InvalidArgumentError."""
    return ReserveAsk(count_of("ttl_ms", ttl_ms), count_of("wait_ms", wait_ms), drop_pressure, use_of(use))
