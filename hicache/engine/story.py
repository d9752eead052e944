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
Keep = typing.Callable[[object], object]

#: Columns up to this length are kept whole.
SHORT = 8


def remember(event: ev.Event) -> Memory:
    """The event's type and its fields, without content: bytes and long columns by their length."""
    kind = type(event)
    return kind, _FIELDS[kind](event)


def tell(memory: Memory) -> str:
    """One event for people."""
    kind, values = memory
    pairs = zip(_NAMES[kind], values, strict=True)
    return f"{kind.__name__}({', '.join(f'{name}={_told(value)}' for name, value in pairs)})"


def _told(value: object) -> object:
    if isinstance(value, enum.Enum):
        return value.name
    return f"<{len(value)} bytes>" if isinstance(value, range) else value


def _short(value: typing.Sequence[object] | None) -> object:
    """A column of small values: whole if it is short."""
    if not value:
        return value if value is None else ()
    return tuple(value) if len(value) <= SHORT else f"<{len(value)} entries>"


def _long(value: typing.Sequence[object]) -> object:
    """A column whose entries may be content."""
    return f"<{len(value)} entries>"


def _kind(value: object) -> object:
    """Anything else by what it is."""
    return value if value is None else f"<{type(value).__name__}>"


def _keeper(hint: object) -> Keep:
    """How a field of a type is kept. The length of bytes is kept as a range, which is small and no number."""
    if hint is bytes:
        return lambda value: range(len(value))  # type: ignore[arg-type]
    if hint is object or isinstance(hint, type):
        return _kind
    text = str(hint)
    return _long if "bytes" in text or text.count("Sequence") > 1 else _short  # type: ignore[return-value]


def _plan(
    kind: type,
) -> tuple[typing.Callable[[object], tuple[object, ...]], tuple[str, ...], tuple[tuple[str, Keep], ...]]:
    names = [field.name for field in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    simple = {int, bool, str, Ack, Pressure, Use}
    small = tuple(name for name in names if hints[name] in simple)
    large = tuple((name, _keeper(hints[name])) for name in names if name not in small)
    getter = (
        attrgetter(*small) if len(small) > 1 else lambda event: tuple(getattr(event, name) for name in small)
    )
    return getter, small, large


def _reader(
    small: typing.Callable[[object], tuple[object, ...]], large: tuple[tuple[str, Keep], ...]
) -> typing.Callable[[object], tuple[object, ...]]:
    """Both in one call: this is done for every event."""
    if not large:
        return small
    if len(large) == 1:
        get, keep = attrgetter(large[0][0]), large[0][1]
        return lambda event: (*small(event), keep(get(event)))
    gets = tuple((attrgetter(name), keep) for name, keep in large)
    return lambda event: (*small(event), *[keep(get(event)) for get, keep in gets])


_PLANS = {kind: _plan(kind) for kind in typing.get_args(ev.Event)}
_FIELDS = {kind: _reader(getter, large) for kind, (getter, _, large) in _PLANS.items()}
_NAMES = {kind: (*small, *(name for name, _ in large)) for kind, (_, small, large) in _PLANS.items()}
