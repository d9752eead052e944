"""What the engine asks of its shell, in the order in which it is to be started, and the answers it gives.

Nobody changes them once they are made; the frequent ones are not ``frozen``, as in ``events``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hicache.errors import ErrorCode
from hicache.types import PageRecord


@dataclasses.dataclass(slots=True)
class Copy:
    """Copy pages from one tier to another; finish with ``events.CopyDone``.

    ``src_slots`` / ``dst_slots``: one a page where that tier is slotted, empty where it is keyed; ``keys`` (one a
    page) where either end is keyed; ``records`` where the destination is keyed.
    """

    copy: int
    namespace: int
    src_tier: int
    dst_tier: int
    page_bytes: int
    src_slots: Sequence[int]
    dst_slots: Sequence[int]
    keys: Sequence[bytes] = ()
    records: Sequence[PageRecord] = ()


@dataclasses.dataclass(slots=True)
class CopyIn:
    """Copy a session's pages into slots of the first tier; finish with ``events.CopyDone``.

    ``pages[i]`` is the page number, within the commit's prompt, that goes to ``slots[i]``; ``source`` is the Commit's.
    """

    copy: int
    namespace: int
    tier: int
    page_bytes: int
    pages: Sequence[int]
    slots: Sequence[int]
    keys: Sequence[bytes]
    records: Sequence[PageRecord]
    source: object = dataclasses.field(repr=False)  # no part of what was decided: the digest leaves it out


@dataclasses.dataclass(slots=True)
class Free:
    """These pages are no longer held by the tier: bump generations, or delete keys."""

    tier: int
    slots: Sequence[int]
    keys: Sequence[bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Compare:
    """Pages were committed that were there already: count those whose bytes differ, by their checksums.

    ``slots`` (about to be freed) and ``held`` are of one slotted tier, one a page.
    """

    tier: int
    slots: Sequence[int]
    held: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class OpenSegment:
    """Give a segment of a slotted tier a domain and a slot size; done when the shell returns from it."""

    tier: int
    segment: int
    domain: str
    page_bytes: int
    slots: int


@dataclasses.dataclass(frozen=True, slots=True)
class CloseSegment:
    """Take a segment out of use; answer with ``events.SegmentClosed`` when no session maps it."""

    tier: int
    segment: int


@dataclasses.dataclass(frozen=True, slots=True)
class OperationDone:
    """An operation finished (all its copies did, well or not)."""

    operation: int
    moved_pages: int
    failed_pages: int


# --- answers


@dataclasses.dataclass(slots=True)
class Piece:
    """Consecutive leased pages in one tier."""

    tier: int
    slots: Sequence[int]


@dataclasses.dataclass(slots=True)
class FetchResult:
    """``lease`` 0: nothing granted and nothing coming, else it is in ``tier``. ``operation`` 0: nothing more is coming.

    ``tier_pages``: by tier, from where each matched page was served (its best tier when asked). ``reserved``: where
    that was asked for, what a Reserve would have been answered; None: there was no room at once.
    """

    lease: int
    matched_pages: int
    granted_pages: int
    expires_ms: int
    pieces: Sequence[Piece]
    operation: int
    tier_pages: Sequence[int]
    page_bytes: int = 0
    reserved: ReserveResult | None = None
    tier: int = -1


@dataclasses.dataclass(slots=True)
class ReserveResult:
    """``reservation`` 0: nothing is missing."""

    reservation: int
    present_pages: int
    missing_pages: int
    expires_ms: int


@dataclasses.dataclass(slots=True)
class CommitResult:
    """``failed_pages``: could not be copied in (source short, checksum differs)."""

    stored_pages: int
    already_present_pages: int
    durable_pages: int
    failed_pages: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class OperationResult:
    """``operation`` 0: nothing to move."""

    operation: int
    matched_pages: int
    moving_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class RenewResult:
    """Leases that are gone, and the new expiry of the others."""

    lost: Sequence[int]
    expires_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class PinResult:
    """``pin`` 0: nothing of the prompt is cached."""

    pin: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class EvictResult:
    """``kept_pages`` are leased, pinned or being copied."""

    pages: int
    kept_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class DrainResult:
    """``unsaved_pages`` could not be brought to a durable tier in time."""

    unsaved_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """The event was refused; nothing changed."""

    code: ErrorCode
    message: str
    hint: str = ""
    retry_after_ms: int = 0


Result = (
    FetchResult
    | ReserveResult
    | CommitResult
    | OperationResult
    | RenewResult
    | PinResult
    | EvictResult
    | DrainResult
    | Failure
)


@dataclasses.dataclass(slots=True)
class Announce:
    """Consecutive pages that became readable in a tier (``stored``), or are so no longer; only while somebody watches.

    ``keys`` and, of stored ones, ``symbols`` are joined; ``parent`` is the key of the page before the first, empty at
    the root. ``news``: it has just happened, and all who know everything hear it. ``surveys``: those that hear it, too;
    of what is no news it is one survey, which is told how things stand.
    """

    stored: bool
    namespace: int
    tier: int
    parent: bytes
    keys: bytes
    symbols: bytes
    surveys: tuple[int, ...] = ()
    news: bool = True


@dataclasses.dataclass(slots=True)
class SurveyDone:
    """The survey has told everything."""

    survey: int


@dataclasses.dataclass(slots=True)
class Reply:
    """The answer to the event with this request number."""

    request: int
    result: Result


Action = (
    Copy
    | CopyIn
    | Compare
    | Free
    | OpenSegment
    | CloseSegment
    | OperationDone
    | Announce
    | SurveyDone
    | Reply
)
