"""The namespaces of this process: numbers for the engine, fingerprints for the disk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hicache.errors import ConfigError, NotFoundError, UnsupportedError
from hicache.keys import fingerprint, validate, whole_pages
from hicache.tier.codec_names import LOSSY, LOSSY_DTYPES, NAMESPACE_CODECS
from hicache.types import Namespace, TierSpec, segment_slots


class NamespaceBook:
    """Knows every namespace that was opened or recovered since the start."""

    def __init__(self, specs: Sequence[TierSpec]) -> None:
        self._specs = specs
        self._ids = itertools.count(1)
        self._by_fingerprint: dict[bytes, int] = {}
        self._by_id: dict[int, tuple[Namespace, bytes]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def check(self, spec: Namespace) -> None:
        """Refuse what cannot be served.

        Raises InvalidArgumentError for a malformed namespace, UnsupportedError for what this release does not serve,
        ConfigError, naming the flag, for pages that a tier could never hold.
        """
        validate(spec)
        _check_codec(spec)
        for tier in self._specs:
            if tier.keyed and spec.page_bytes > tier.capacity_bytes // 4:
                raise ConfigError(
                    f"pages of {spec.page_bytes} bytes are too large for tier {tier.name}",
                    hint=f"raise --{tier.name}-bytes",
                )
            if not tier.keyed and not segment_slots(tier, spec.page_bytes):
                raise ConfigError(
                    f"pages of {spec.page_bytes} bytes fit no segment of tier {tier.name}, "
                    f"which has {tier.segment_bytes} bytes",
                    hint=f"raise --{tier.name}-segment-bytes, or --{tier.name}-bytes",
                )

    def add(self, spec: Namespace) -> tuple[int, bytes, bool]:
        """Its number, its fingerprint, and whether it is new."""
        digest = fingerprint(spec)
        number = self._by_fingerprint.get(digest)
        if number is not None:
            return number, digest, False
        number = self._by_fingerprint[digest] = next(self._ids)
        self._by_id[number] = (spec, digest)
        return number, digest, True

    def find(self, number: int) -> tuple[Namespace, bytes]:
        """A namespace and its fingerprint. Raises NotFoundError."""
        found = self._by_id.get(number)
        if found is None:
            raise NotFoundError(f"namespace {number} is not open", hint="open it first")
        return found

    def prompt(self, number: int, prompt: bytes) -> bytes:
        """The whole pages of a prompt. Raises NotFoundError, InvalidArgumentError."""
        return whole_pages(self.find(number)[0], prompt)


def _check_codec(spec: Namespace) -> None:
    if spec.codec not in NAMESPACE_CODECS:
        raise UnsupportedError(f"codec {spec.codec!r}: this release has {', '.join(NAMESPACE_CODECS)}")
    if spec.codec in LOSSY and spec.kv_dtype not in LOSSY_DTYPES:
        raise UnsupportedError(
            f"codec {spec.codec!r} quantises {', '.join(LOSSY_DTYPES)}, not {spec.kv_dtype!r}",
            hint="use lossless",
        )
