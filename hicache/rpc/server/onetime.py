"""Tokens good once, for a short time: they tie a gRPC call to what passed over the descriptor socket."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from hicache.errors import ExhaustedError
from hicache.rpc.common import fdproto

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Held(Generic[T]):
    value: T
    owner: Hashable
    expires_s: float


class OneTimeTokens(Generic[T]):
    """A bounded table of one-time tokens.

    ``now`` gives seconds; ``discard`` is called with each value that nobody redeemed in time. An owner holds
    at most ``per_owner`` tokens, so that one caller cannot starve others.
    """

    def __init__(
        self, *, now: Callable[[], float], ttl_s: float, per_owner: int, discard: Callable[[T], object]
    ) -> None:
        self._now = now
        self._ttl_s = ttl_s
        self._per_owner = per_owner
        self._discard = discard
        self._held: dict[bytes, _Held[T]] = {}  # in order of expiry, since all live equally long
        self._owned: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    def issue(self, owner: Hashable, value: T) -> bytes:
        """A fresh token for a value. ExhaustedError at the owner's bound: the value stays the caller's."""
        self.expire()
        if self._owned[owner] >= self._per_owner:
            raise ExhaustedError(
                f"{self._per_owner} tokens are outstanding already",
                hint="use each token before asking for the next",
                retry_after_ms=int(self._ttl_s * 1000),
            )
        token = secrets.token_bytes(fdproto.SECRET_BYTES)
        self._held[token] = _Held(value, owner, self._now() + self._ttl_s)
        self._owned[owner] += 1
        return token

    def redeem(self, token: bytes, owner: Hashable = None) -> T | None:
        """The token's value, now the caller's; None where it is unknown, used, expired or another owner's."""
        self.expire()
        held = self._held.get(token)
        if held is None or owner not in {None, held.owner}:
            return None
        self._drop(token)
        return held.value

    def expire(self) -> None:
        """Discard what is over its time."""
        now = self._now()
        while self._held:
            token, held = next(iter(self._held.items()))
            if held.expires_s > now:
                return
            self._drop(token)
            self._discard(held.value)

    def forget(self, owner: Hashable) -> None:
        """Discard all of an owner."""
        for token in [token for token, held in self._held.items() if held.owner == owner]:
            held = self._held[token]
            self._drop(token)
            self._discard(held.value)

    def clear(self) -> None:
        """Discard everything."""
        for owner in list(self._owned):
            self.forget(owner)

    def _drop(self, token: bytes) -> None:
        owner = self._held.pop(token).owner
        self._owned[owner] -= 1
        if not self._owned[owner]:
            del self._owned[owner]
