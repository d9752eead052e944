"""The one table between hicache's error codes and gRPC's, and the details that travel with them.

A failed call carries, besides code and text, ``google.rpc.ErrorInfo`` (reason: the name of the ErrorCode,
domain "hicache", metadata "hint") and, where waiting helps, ``google.rpc.RetryInfo``; both ends are here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import grpc
from google.protobuf.message import DecodeError

from hicache.errors import ERROR_BY_CODE, ErrorCode, HicacheError
from hicache.rpc.common.details import ErrorInfo, RetryInfo, Status

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "hicache"
#: gRPC drops calls whose trailing metadata exceeds 8 KiB; the text travels twice, percent-encoded once.
MAX_TEXT_BYTES = 1000

_STATUS_BY_CODE = {code: grpc.StatusCode[code.value] for code in ErrorCode}
_CODE_BY_STATUS = {status: code for code, status in _STATUS_BY_CODE.items()} | {
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED: ErrorCode.UNAVAILABLE,
    grpc.StatusCode.OUT_OF_RANGE: ErrorCode.INVALID,
}


@dataclasses.dataclass(frozen=True, slots=True)
class WireStatus:
    """A failure as a gRPC server sends it."""

    code: grpc.StatusCode
    text: str
    trailing: tuple[tuple[str, bytes], ...]


def status_of(code: ErrorCode) -> grpc.StatusCode:
    """The gRPC status that stands for an error code."""
    return _STATUS_BY_CODE[code]


def code_of(status: grpc.StatusCode) -> ErrorCode:
    """The error code that a gRPC status stands for; INTERNAL for those the API does not use."""
    return _CODE_BY_STATUS.get(status, ErrorCode.INTERNAL)


def to_wire(error: HicacheError) -> WireStatus:
    """The status, text (message and hint) and details to send for an error."""
    status = status_of(error.code)
    text = _clip(f"{error.message} ({error.hint})" if error.hint else error.message)
    rich = Status(code=status.value[0], message=text)
    info = ErrorInfo(reason=error.code.name, domain=DOMAIN)
    if error.hint:
        info.metadata["hint"] = _clip(error.hint)
    rich.details.add().Pack(info)
    if error.retry_after_ms > 0:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        rich.details.add().Pack(retry)
    return WireStatus(status, text, ((DETAILS_KEY, rich.SerializeToString()),))


def from_wire(
    status: grpc.StatusCode,
    text: str | None,
    trailing: Iterable[tuple[str, str | bytes]] | None,
) -> HicacheError:
    """The error that a failed call stands for; details that are missing or unreadable are left out."""
    hint, retry_after_ms = _read_details(trailing or ())
    message = text or status.name
    if hint:
        message = message.removesuffix(f" ({hint})")
    return ERROR_BY_CODE[code_of(status)](message, hint=hint, retry_after_ms=retry_after_ms)


def _read_details(trailing: Iterable[tuple[str, str | bytes]]) -> tuple[str, int]:
    """The hint and the retry advice found in the trailing metadata: ("", 0) where there is none."""
    hint, retry_after_ms = "", 0
    raw = next((value for key, value in trailing if key == DETAILS_KEY), b"")
    if not isinstance(raw, bytes):
        return hint, retry_after_ms
    info, retry = ErrorInfo(), RetryInfo()
    try:
        for detail in Status.FromString(raw).details:
            if detail.Unpack(info):
                hint = info.metadata.get("hint", "")
            elif detail.Unpack(retry):
                retry_after_ms = retry.retry_delay.ToMilliseconds()
    except DecodeError:
        return "", 0
    return hint, retry_after_ms


def _clip(text: str) -> str:
    raw = text.encode(errors="replace")
    return text if len(raw) <= MAX_TEXT_BYTES else raw[: MAX_TEXT_BYTES - 3].decode(errors="ignore") + "..."
