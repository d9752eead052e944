"""What can happen to the engine. The shell turns calls, completions and time into these and nothing else.

Events that ask for an answer carry ``request``, a number chosen by the shell; the answer comes back as an
``actions.Reply`` with the same number, at once or after later events. Times are milliseconds of the shell's clock.

Nobody changes an event once it is made. The frequent ones are not ``frozen``, which would make them twice as slow to
make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hicache.types import NO_USE, Ack, Namespace, Outcome, Pressure, Use

# --- sessions and namespaces


@dataclasses.dataclass(frozen=True, slots=True)
class SessionOpened:
    """A client attached. ``request`` is not answered: sessions cannot be refused here."""

    session: int
    tenant: str


@dataclasses.dataclass(frozen=True, slots=True)
class SessionSuspended:
    """Its life line broke; it ends at the end of the resume window unless it resumes."""

    session: int
    window_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class SessionResumed:
    """The life line is back."""

    session: int


@dataclasses.dataclass(frozen=True, slots=True)
class SessionEnded:
    """Goodbye, or a death that was seen: everything it holds is released.

    ``dead``: the process is gone, so that its leases need no grace before their slots are used again.
    """

    session: int
    dead: bool


@dataclasses.dataclass(frozen=True, slots=True)
class NamespaceOpened:
    """First use of a namespace in this process. Idempotent."""

    namespace: int
    spec: Namespace
    fingerprint: bytes


# --- calls


@dataclasses.dataclass(slots=True)
class Touch:
    """Count a look-up as a use; answered with nothing. ``prefetch``: start promoting what it found, within bounds."""

    namespace: int
    prompt: bytes
    use: Use = NO_USE
    prefetch: bool = False


@dataclasses.dataclass(slots=True)
class Fetch:
    """Match, lease what is readable, promote the rest. Answered at once with a FetchResult.

    ``tier``: the slotted tier in which the lease is, and to which the rest is promoted; -1: the leases' usual one, the
    first that clients can map. ``reserve_missing``: with it, a reservation for what does not match, if room can be had
    now: one call where a Reserve would follow. ``reserve_ttl_ms`` is that one's.
    """

    request: int
    session: int
    namespace: int
    prompt: bytes
    max_pages: int = 0
    ttl_ms: int = 0
    promote: bool = True
    use: Use = NO_USE
    reserve_missing: bool = False
    reserve_ttl_ms: int = 0
    tier: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Prefetch:
    """Promote a prefix to a tier. Answered at once with an OperationResult."""

    request: int
    session: int
    namespace: int
    prompt: bytes
    tier: int


@dataclasses.dataclass(frozen=True, slots=True)
class CancelOperation:
    """The session no longer waits for this; a lease's promotions that nobody else needs are not extended."""

    session: int
    operation: int


@dataclasses.dataclass(slots=True)
class Reserve:
    """Room for the missing pages. Answered with a ReserveResult or a Failure, perhaps after a drain."""

    request: int
    session: int
    namespace: int
    prompt: bytes
    ttl_ms: int = 0
    wait_ms: int = 0
    pressure: Pressure = Pressure.WAIT
    use: Use = NO_USE


@dataclasses.dataclass(slots=True)
class Commit:
    """The session has written pages [first, first + count) for each piece; copy them in.

    ``source`` is handed back untouched in the CopyIn actions. Answered with a CommitResult when the pages are
    visible (or durable). ``last`` gives the room that remains back.
    """

    request: int
    session: int
    reservation: int
    pieces: Sequence[tuple[int, int]]
    source: object
    ack: Ack = Ack.VISIBLE
    last: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Abort:
    """Give a reservation back; unknown ones are fine."""

    session: int
    reservation: int


@dataclasses.dataclass(frozen=True, slots=True)
class RenewLeases:
    """Answered with a RenewResult."""

    request: int
    session: int
    leases: Sequence[int]
    ttl_ms: int


@dataclasses.dataclass(slots=True)
class ReleaseLeases:
    """Not answered; unknown leases are fine."""

    session: int
    leases: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """Keep a prefix in a tier. Answered with a PinResult. ``ttl_ms`` 0: until Unpin."""

    request: int
    namespace: int
    prompt: bytes
    tier: int
    ttl_ms: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Unpin:
    """Unknown pins are fine."""

    pin: int


@dataclasses.dataclass(frozen=True, slots=True)
class Evict:
    """Make the prefix and all below it leave a tier (``tier``), or all tiers (-1). Answered with an EvictResult."""

    request: int
    namespace: int
    prompt: bytes
    tier: int


@dataclasses.dataclass(frozen=True, slots=True)
class Clear:
    """Drop everything of a namespace (or of all: ``namespace`` 0) that is not pinned. Answered with an EvictResult."""

    request: int
    namespace: int


# --- completions


@dataclasses.dataclass(slots=True)
class CopyDone:
    """A Copy or CopyIn finished. ``outcomes`` None: every page is OK. ``charges``: keyed destinations only.

    ``source_fault``: outcomes other than OK are the source's doing (the page is gone there), not the destination's.
    """

    copy: int
    outcomes: Sequence[Outcome] | None = None
    charges: Sequence[int] = ()
    source_fault: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentClosed:
    """No session maps the segment any more: its room may be used again."""

    tier: int
    segment: int


@dataclasses.dataclass(frozen=True, slots=True)
class PageCorrupt:
    """A read found that a page's bytes in a tier are not what was stored; the copy there is void."""

    namespace: int
    tier: int
    prompt: bytes  # up to and including the page


@dataclasses.dataclass(frozen=True, slots=True)
class PagesLost:
    """A keyed tier has found pages of its own that are damaged, and removed them. Unknown keys are fine."""

    tier: int
    keys: Sequence[bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class TierLatched:
    """A tier takes no more pages (``readable``) or is gone altogether."""

    tier: int
    readable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class TierRestored:
    """A latched tier is well again: it takes pages, and what is written from now on can be read."""

    tier: int


@dataclasses.dataclass(frozen=True, slots=True)
class Recovering:
    """A durable tier is being read (``going``), or is no more. Meanwhile a Clear holds for what is still to come."""

    tier: int
    going: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """Pages found on a durable tier at start. Chains of one namespace, parents before children.

    ``parents[i]`` is the index of the chain whose last page precedes chain i, -1 at the root, -2 if the page before it
    is not stored: then ``parent_keys[i]`` is that page's key. Index base is the first chain ever recovered of this
    namespace, so that long recoveries come in several events. ``last_use_ms``: in the shell's clock, where times before
    this process may be negative. The last three columns may be left empty.
    """

    namespace: int
    tier: int
    parents: Sequence[int]
    symbols: Sequence[bytes]
    keys: Sequence[Sequence[bytes]]
    charges: Sequence[Sequence[int]]
    done: bool = False  # the last event of this namespace's recovery
    last_use_ms: Sequence[int] = ()
    hits: Sequence[int] = ()
    parent_keys: Sequence[bytes] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Drain:
    """Copy every unsaved page down to the durable tier; answered with a DrainResult when done or at the deadline."""

    request: int
    grace_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Watching:
    """From now on changes of what can be read are announced, or no longer; surveys end with that."""

    on: bool


@dataclasses.dataclass(frozen=True, slots=True)
class SurveyOpened:
    """A watcher wants to know what there is: ``tenant``'s, or everybody's (empty). Each SurveyNext tells a piece."""

    survey: int
    tenant: str


@dataclasses.dataclass(frozen=True, slots=True)
class SurveyNext:
    """The next piece of a survey, bounded in time; unknown ones are fine. After the last comes SurveyDone."""

    survey: int


@dataclasses.dataclass(frozen=True, slots=True)
class SurveyClosed:
    """Nobody needs the survey any more; unknown ones are fine."""

    survey: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; see ``Engine.next_deadline_ms``."""


Event = (
    SessionOpened
    | SessionSuspended
    | SessionResumed
    | SessionEnded
    | NamespaceOpened
    | Touch
    | Fetch
    | Prefetch
    | CancelOperation
    | Reserve
    | Commit
    | Abort
    | RenewLeases
    | ReleaseLeases
    | Pin
    | Unpin
    | Evict
    | Clear
    | CopyDone
    | SegmentClosed
    | PageCorrupt
    | PagesLost
    | TierLatched
    | TierRestored
    | Recovering
    | Recovered
    | Drain
    | Watching
    | SurveyOpened
    | SurveyNext
    | SurveyClosed
    | Tick
)
