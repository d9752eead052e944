"""What the synchronous and the asyncio handles share: settings, arguments, and everything that needs no I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Required, TypedDict, Unpack

from hicache import keys
from hicache.errors import InvalidArgumentError, UnsupportedError
from hicache.rpc.client import options as settings
from hicache.rpc.client import prompt
from hicache.rpc.client.core import NS_PER_MS, NamespaceState
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.options import ClientOptions, DataPlane, Tls, Verify
from hicache.rpc.client.prompt import Tokens
from hicache.rpc.client.reservation import ReservationState
from hicache.types import Namespace, SymbolKind


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
    return dataclasses.replace(ClientOptions() if options is None else options, **changes)


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


def count_of(name: str, value: int | None) -> int:
    """An argument that must not be negative; None is 0. Raises InvalidArgumentError."""
    if value is None:
        return 0
    if not isinstance(value, int) or value < 0 or value >= 1 << 63:
        raise InvalidArgumentError(f"{name} must be a whole number, 0 or more, not {value!r}")
    return value


def pages_of(max_pages: int | None) -> int:
    """``max_pages`` as Fetch takes it. Raises InvalidArgumentError for 0, which would mean all."""
    if max_pages is not None and not 1 <= max_pages < 1 << 32:
        raise InvalidArgumentError(f"max_pages must be at least 1, not {max_pages!r}; None for all")
    return max_pages or 0


class NamespaceBase:
    """A namespace without its calls."""

    def __init__(self, state: NamespaceState) -> None:
        self._state = state

    @property
    def spec(self) -> Namespace:
        """What was asked for; its tenant means nothing here."""
        return self._state.spec

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.spec.page_bytes

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self._state.spec.page_tokens

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that stand for all of the namespace, once it was used; empty before."""
        return self._state.fingerprint

    def pages(self, tokens: Tokens, extra_keys: Sequence[bytes] | None = None) -> int:
        """How many whole pages a prompt has."""
        return len(self._pack(tokens, extra_keys)) // self._state.spec.symbol_bytes

    def _pack(self, tokens: Tokens, extra_keys: Sequence[bytes] | None) -> bytes:
        return prompt.pack(self._state.spec, tokens, extra_keys)


class LeaseBase:
    """A lease without its calls. ``len()`` is the number of pages that can be read now."""

    def __init__(self, state: LeaseState) -> None:
        self._state = state

    def __len__(self) -> int:
        return self._state.granted_pages

    def __bool__(self) -> bool:
        return True  # a lease of no pages is a lease: test len()

    @property
    def lease_id(self) -> int:
        """The server's number for it; 0 where nothing was granted and nothing is coming."""
        return self._state.lease

    @property
    def matched_pages(self) -> int:
        """Pages of the prompt that are cached, in whatever tier."""
        return self._state.matched_pages

    @property
    def granted_pages(self) -> int:
        """Pages, from the first, that can be read now."""
        return self._state.granted_pages

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.terms.page_bytes

    @property
    def tier_pages(self) -> dict[str, int]:
        """By tier, how many matched pages it served."""
        return dict(self._state.tier_pages)

    @property
    def operation(self) -> int:
        """Not 0 while more pages of this lease are on their way: see ``wait``."""
        return self._state.operation

    @property
    def expires(self) -> float:
        """When to stop reading: seconds of this process's monotonic clock, before the server's own deadline."""
        return self._state.deadline_ns / 1e9

    @property
    def remaining_ms(self) -> int:
        """Milliseconds until ``expires``, 0 when past."""
        return max(0, (self._state.deadline_ns - self._state.terms.now_ns()) // NS_PER_MS)

    @property
    def zero_copy(self) -> bool:
        """Whether its pages are read in place, in shared memory."""
        return not self._state.streamed

    def still_valid(self) -> bool:
        """Whether the pages are still what was leased: ask *after* reading a view, before using what was read."""
        return self._state.still_valid()


def refuse_torch_views(*, copy: bool) -> None:
    """Torch has no read-only tensors, and a write to a read-only mapping kills the process."""
    if not copy:
        raise UnsupportedError(
            "torch views of leased pages are not given out: torch cannot make them read-only, and a write through "
            "one kills this process",
            hint="use copy=True, or numpy() for read-only arrays in place",
        )


class ReservationBase:
    """A reservation without its calls. Several threads may prepare its pages."""

    def __init__(self, state: ReservationState) -> None:
        self._state = state

    @property
    def present_pages(self) -> int:
        """Pages [0, present_pages) are cached already."""
        return self._state.present_pages

    @property
    def missing_pages(self) -> int:
        """How many pages, from ``present_pages`` on, are to be written."""
        return self._state.missing_pages

    @property
    def missing(self) -> range:
        """The numbers of the pages to be written."""
        return range(self._state.present_pages, self._state.present_pages + self._state.missing_pages)

    @property
    def ended(self) -> bool:
        """Whether nothing more can be written: all committed, aborted, or nothing was missing."""
        return self._state.ended

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.page_bytes

    def buffer(self, page: int) -> memoryview:
        """A writable view of a missing page in this client's own memory; it is taken back at the commit.

        Raises InvalidArgumentError for a page that is not missing, ExhaustedError at ``write_limit_bytes``.
        """
        return self._state.buffer(page)
