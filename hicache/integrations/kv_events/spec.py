"""How an endpoint is described: its address, then what differs from the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hicache.errors import ConfigError

FORMATS = ("map", "array")
HASHES = ("int", "bytes")
SEQUENCES = ("clock", "zero")
FIELDS_OF_TOPICS = {"pod": "p", "model": "m", "adapter": "a", "namespace": "n"}
SEPARATOR = ";"


@dataclasses.dataclass(frozen=True, slots=True)
class OutletSpec:
    """One endpoint.

    ``replay``: address of its ROUTER, "": none. ``topic`` may name {pod}, {model}, {adapter} and {namespace} (the
    start of its fingerprint). ``hash``: the first 8 bytes of a page key as one number, or the whole key as bytes.
    ``block_size`` 0: the page itself. ``model`` "": all. ``gpu``, ``cpu``, ``disk``: how media are called.
    ``buffer``: messages kept for replay; ``hwm``: messages that wait for one slow subscriber.
    ``sequence``: numbers begin with the time in microseconds ("clock"), so that they go on over restarts, or with zero.
    ``connect`` 1: the address is a consumer's, which listens there.
    """

    bind: str
    replay: str = ""
    format: str = "map"
    topic: str = ""
    hash: str = "int"
    block_size: int = 0
    rank: int = 0
    model: str = ""
    gpu: str = "GPU"
    cpu: str = "CPU"
    disk: str = "DISK"
    buffer: int = 10_000
    hwm: int = 5_000
    sequence: str = "clock"
    connect: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work. Raises ConfigError."""
        for name, known in (("format", FORMATS), ("hash", HASHES), ("sequence", SEQUENCES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{self.bind}: {name} is one of {', '.join(known)}")
        for name in ("bind", "replay"):
            address = getattr(self, name)
            if "://" not in address and (address or name == "bind"):
                raise ConfigError(
                    f"{name}: {address!r} is no ZMQ address", hint="for example tcp://*:5557 or ipc:///run/kv"
                )
        if self.bind == self.replay:
            raise ConfigError(f"{self.bind}: replay needs an address of its own")
        if self.buffer < 1 or self.hwm < 1:
            raise ConfigError(f"{self.bind}: buffer and hwm must be at least 1")
        try:
            self.topic.format(**FIELDS_OF_TOPICS)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{self.bind}: topic {self.topic!r} is no template",
                hint=f"it may name {', '.join(FIELDS_OF_TOPICS)} in braces",
            ) from error

    def medium(self, tier: str) -> str:
        """The name of a tier's medium."""
        return {"device": self.gpu, "host": self.cpu, "disk": self.disk}.get(tier, tier.upper())


def parse_outlet(text: str) -> OutletSpec:
    """``ADDRESS[,key=value]...``. Raises ConfigError naming the part."""
    bind, *parts = [part.strip() for part in text.split(",")]
    known = {field.name: field for field in dataclasses.fields(OutletSpec) if field.name != "bind"}
    values: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"{bind}: {part!r} is no option", hint=f"options are {', '.join(known)}")
        read: Callable[[str], Any] = int if isinstance(known[name].default, int) else str
        try:
            values[name] = read(value)
        except ValueError:
            raise ConfigError(f"{bind}: {name} is a whole number, not {value!r}") from None
        if isinstance(values[name], int) and values[name] < 0:
            raise ConfigError(f"{bind}: {name} must not be negative")
    return OutletSpec(bind, **values)


def parse_outlets(text: str) -> list[OutletSpec]:
    """Several of them, separated by semicolons. Raises ConfigError."""
    return [parse_outlet(part) for part in text.split(SEPARATOR) if part.strip()]
