"""The cached columns of a batch: each row's pages, brought into line with the others'.

A cache has one length for all rows, and a row that is padded on the left by ``start`` columns has its first token in
column ``start``. So the rows can take over columns up to the least that any of them has; where padding shifts the
rows against each other this cuts through a page. Columns of padding hold zeros: no token looks at them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hicache.errors import ErrorCode, HicacheError
from hicache.integrations.transformers.pages import KeysValues, PageReader, PageShape

if TYPE_CHECKING:
    from hicache.rpc.client import Lease
    from hicache.rpc.client.client import NamespaceHandle

logger = logging.getLogger(__name__)

#: Failures that are the caller's to mend; all others pass, or cost recomputing.
CALLERS = frozenset({
    ErrorCode.INVALID,
    ErrorCode.DENIED,
    ErrorCode.UNAUTHENTICATED,
    ErrorCode.UNSUPPORTED,
})  # fmt: skip


def let_pass(error: HicacheError, what: str) -> None:
    """Report a failure that costs recomputing; raise one that the caller must mend."""
    if error.code in CALLERS:
        raise error
    logger.warning("hicache: %s (%s)", what, error)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One sequence: its tokens without padding, which stand in the columns from ``start`` on."""

    tokens: Tensor
    start: int


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Columns ``[begin, end)`` of all rows, layer by layer; ``layers`` can be taken once.

    ``whole``: every row had all whole pages of its tokens. ``failures``: rows whose look-up or reading failed.
    """

    end: int
    layers: Iterator[KeysValues]
    whole: bool
    failures: int


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where pages come from, and where they go."""

    namespace: NamespaceHandle
    shape: PageShape
    device: torch.device
    wait_ms: int
    timeout_s: float | None

    def columns(self, rows: Sequence[Row], begin: int, end: int) -> Columns:
        """The cached columns of ``rows`` from ``begin`` on, ``end`` at most; as few as the row with the fewest has.

        Raises only for what the caller must mend.
        """
        distinct, which = _distinct(rows)
        size = self.shape.page_tokens
        pieces = [_Piece(row, self, begin) for row in distinct]
        with contextlib.ExitStack() as leases:
            for piece in pieces:
                piece.fetch(leases)
                if piece.failed:
                    break  # the sidecar is in trouble: what the others have would not help
            whole = all(piece.pages == len(piece.row.tokens) // size for piece in pieces)
            reach = min(end, *(piece.row.start + piece.pages * size for piece in pieces))
            if gains := reach > max(begin, min(row.start for row in distinct)):
                reach = min(piece.read(reach) for piece in pieces)
                gains = reach > max(begin, min(row.start for row in distinct))
        failures = sum(piece.failed for piece in pieces)
        if not gains:
            return Columns(begin, iter(()), whole, failures)
        return Columns(reach, self._layers(pieces, which, reach), whole, failures)

    def _layers(self, pieces: Sequence[_Piece], which: Sequence[int], end: int) -> Iterator[KeysValues]:
        index = torch.tensor(which, device=self.device)
        parts = [piece.layers(end) for piece in pieces]
        for _ in range(self.shape.layers):
            pairs = [next(part) for part in parts]
            keys, values = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            if len(which) == len(pieces):
                yield keys, values
            else:
                yield keys.index_select(0, index), values.index_select(0, index)


class _Piece:
    """What one row contributes: its columns from ``begin`` on."""

    def __init__(self, row: Row, source: Source, begin: int) -> None:
        self.row = row
        self.pages = 0  # granted, from the row's first token on
        self.failed = False
        self._source = source
        self._begin = begin
        self._lease: Lease | None = None
        self._reader = PageReader(source.shape, source.device)
        self._first_page = max(0, begin - row.start) // source.shape.page_tokens

    def fetch(self, leases: contextlib.ExitStack) -> None:
        """Lease the row's cached pages."""
        size = self._source.shape.page_tokens
        tokens = self.row.tokens[: len(self.row.tokens) // size * size]
        if not len(tokens):
            return
        try:
            lease = self._source.namespace.fetch(
                tokens, wait_ms=self._source.wait_ms, timeout_s=self._source.timeout_s
            )
            self._lease = leases.enter_context(lease)
            self.pages = len(lease)
        except HicacheError as error:
            self.failed = True
            let_pass(error, "looking up what is cached of a prompt failed; the rest is recomputed")

    def read(self, end: int) -> int:
        """Read what of the row stands before column ``end``. Returns how far that went: ``end``, or less."""
        size = self._source.shape.page_tokens
        pages = -(-(end - self.row.start) // size) - self._first_page
        if pages <= 0 or self._lease is None:
            return end
        try:
            self._reader.read(self._lease, self._first_page, pages)
        except HicacheError as error:
            self.failed = True
            got = self._first_page + self._reader.pages
            let_pass(error, f"loading ended after {got} pages; the rest is recomputed")
        return min(end, self.row.start + (self._first_page + self._reader.pages) * size)

    def layers(self, end: int) -> Iterator[KeysValues]:
        """The row's columns ``[begin, end)`` of each layer, ``[1, heads, columns, dim]``."""
        source, row = self._source, self.row
        first = max(self._begin, row.start)
        padding = min(first, end) - self._begin
        skip = first - row.start - self._first_page * source.shape.page_tokens
        size = (1, source.shape.heads, padding, source.shape.dim)
        zeros = torch.zeros(size, dtype=source.shape.dtype, device=source.device)
        if first >= end:
            for _ in range(source.shape.layers):
                yield zeros, zeros
            return
        for keys, values in self._reader.layers():
            pair = keys[:, :, skip : skip + end - first], values[:, :, skip : skip + end - first]
            yield (torch.cat([zeros, pair[0]], 2), torch.cat([zeros, pair[1]], 2)) if padding else pair


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The different rows, and for each row which of them it is."""
    numbers: dict[bytes, int] = {}
    distinct: list[Row] = []
    which = []
    for row in rows:
        name = row.tokens.cpu().numpy().tobytes()
        if name not in numbers:
            numbers[name] = len(distinct)
            distinct.append(row)
        which.append(numbers[name])
    return distinct, which
