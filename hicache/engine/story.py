"""What the engine remembers of the last events, for the message of an internal error.

Only small values are kept: an event may carry a prompt of half a megabyte, or a client's memory, and what the story
keeps could not be freed.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from operator import attrgetter

from hicache.engine import events as ev
from hicache.types import Ack, Pressure, Use

Memory = tuple[type, tuple[object, ...]]

#: Columns up to this length are kept whole.
SHORT = 8


def remember(event: ev.Event) -> Memory:
    """The event's type and its fields, without content: bytes and long columns by their length."""
    kind = type(event)
    small, large = _FIELDS[kind]
    values: tuple[object, ...] = small(event)
    for name in large:
        value = getattr(event, name)
        values += (Bytes(len(value)) if type(value) is bytes else _brief(value),)
    return kind, values


def tell(memory: Memory) -> str:
    """One event for people."""
    kind, values = memory
    pairs = zip(_NAMES[kind], values, strict=True)
    parts = ", ".join(
        f"{name}={value.name if isinstance(value, enum.Enum) else value}" for name, value in pairs
    )
    return f"{kind.__name__}({parts})"


class Bytes(int):
    """So many bytes of content that is not kept."""

    def __repr__(self) -> str:
        return f"<{int(self)} bytes>"


def _brief(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(value) if len(value) <= SHORT and not _has_bytes(value) else f"<{len(value)} entries>"
    if isinstance(value, enum.Enum):
        return value.name
    return value if value is None else f"<{type(value).__name__}>"


def _has_bytes(values: typing.Sequence[object]) -> bool:
    return any(isinstance(value, bytes | list) for value in values)


def _plan(
    kind: type,
) -> tuple[typing.Callable[[object], tuple[object, ...]], tuple[str, ...], tuple[str, ...]]:
    names = [field.name for field in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    simple = {int, bool, str, Ack, Pressure, Use}
    small = tuple(name for name in names if hints[name] in simple)
    large = tuple(name for name in names if name not in small)
    getter = (
        attrgetter(*small) if len(small) > 1 else lambda event: tuple(getattr(event, name) for name in small)
    )
    return getter, small, large


_PLANS = {kind: _plan(kind) for kind in typing.get_args(ev.Event)}
_FIELDS = {kind: (getter, large) for kind, (getter, _, large) in _PLANS.items()}
_NAMES = {kind: (*small, *large) for kind, (_, small, large) in _PLANS.items()}
