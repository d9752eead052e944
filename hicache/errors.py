"""Errors with one vocabulary for every floor.

Each error says what went wrong, where, and what to do. ``code`` names the class of the failure and is the
only thing the gRPC edge translates (one table, ``rpc/common/status.py``); nothing else maps errors.
"""

from __future__ import annotations

import enum


class ErrorCode(enum.Enum):
    """What a caller can do about a failure; one value for each gRPC status the API uses."""

    INVALID = "INVALID_ARGUMENT"  # malformed; nothing changed; fix the call
    NOT_FOUND = "NOT_FOUND"  # the lease, reservation or operation expired or never was
    STALE = "FAILED_PRECONDITION"  # epoch or layout changed; attach again
    CONFLICT = "ABORTED"  # the ground moved (parent evicted meanwhile); match again
    EXHAUSTED = "RESOURCE_EXHAUSTED"  # no room within the deadline; retry after ``retry_after_ms``
    UNAVAILABLE = "UNAVAILABLE"  # draining, starting or lost; retry
    CORRUPT = "DATA_LOSS"  # a checksum said no
    DENIED = "PERMISSION_DENIED"  # not this caller's
    UNAUTHENTICATED = "UNAUTHENTICATED"  # no or wrong credentials
    EXISTS = "ALREADY_EXISTS"  # same request id, other payload
    UNSUPPORTED = "UNIMPLEMENTED"  # this build or configuration does not offer it
    INTERNAL = "INTERNAL"  # we broke our own invariant


class HicacheError(Exception):
    """Base of every error hicache raises on purpose.

    Args:
        message: what went wrong and where, in one sentence.
        hint: what to do about it (a flag to change, a call to make first); may be empty.
        retry_after_ms: for errors that pass by themselves, when to try again; 0 means no advice.
    """

    code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, hint: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint
        self.retry_after_ms = retry_after_ms


class InvalidArgumentError(HicacheError):
    """The call is malformed; nothing changed."""

    code = ErrorCode.INVALID


class NotFoundError(HicacheError):
    """A lease, reservation, region or operation that expired, was released, or never existed."""

    code = ErrorCode.NOT_FOUND


class StaleError(HicacheError):
    """The server restarted or a layout changed: attach again."""

    code = ErrorCode.STALE


class ConflictError(HicacheError):
    """The tree moved under the call (a parent page is gone): match again."""

    code = ErrorCode.CONFLICT


class ExhaustedError(HicacheError):
    """No room within the deadline; ``retry_after_ms`` says when to try again."""

    code = ErrorCode.EXHAUSTED


class UnavailableError(HicacheError):
    """The server is starting, draining or lost; retry."""

    code = ErrorCode.UNAVAILABLE


class CorruptError(HicacheError):
    """A checksum said no."""

    code = ErrorCode.CORRUPT


class DeniedError(HicacheError):
    """The thing asked for belongs to another session or tenant."""

    code = ErrorCode.DENIED


class UnauthenticatedError(HicacheError):
    """No credentials, or wrong ones."""

    code = ErrorCode.UNAUTHENTICATED


class ExistsError(HicacheError):
    """A request id was used again with another payload."""

    code = ErrorCode.EXISTS


class UnsupportedError(HicacheError):
    """This build or configuration does not offer what was asked."""

    code = ErrorCode.UNSUPPORTED


class ConfigError(HicacheError):
    """A setting is wrong; the message names the flag or the TOML key."""

    code = ErrorCode.INVALID


class ViolationError(HicacheError):
    """hicache broke one of its own invariants. Carries the story: the last events before it."""

    code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, story: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.story = story

    def __str__(self) -> str:
        if not self.story:
            return self.message
        return "\n  ".join((self.message, "the last events before it:", *self.story))


#: Error class by code, for the client, which receives codes and raises classes.
ERROR_BY_CODE: dict[ErrorCode, type[HicacheError]] = {
    cls.code: cls
    for cls in (
        HicacheError,
        InvalidArgumentError,
        NotFoundError,
        StaleError,
        ConflictError,
        ExhaustedError,
        UnavailableError,
        CorruptError,
        DeniedError,
        UnauthenticatedError,
        ExistsError,
        UnsupportedError,
    )
}
