"""Settings of a client; frozen, checked when made."""

from __future__ import annotations

import dataclasses
import enum

from hicache.errors import ConfigError


class DataPlane(enum.Enum):
    """How pages travel between this process and the sidecar."""

    AUTO = "auto"  # shared memory where both ends can, else streams
    SHM = "shm"  # shared memory, or an error that says why not
    STREAM = "stream"  # gRPC streams of checksummed chunks


class Verify(enum.Enum):
    """When the checksums of leased pages are compared."""

    ON_COPY = "on-copy"  # on every copy; views are handed out as they lie
    ALWAYS = "always"  # also before views are handed out
    OFF = "off"  # never; generations and deadlines are still checked


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """PEM contents for a TCP target. Without ``root_certificates`` the system's are used.

    ``private_key`` and ``certificate_chain`` go together: they prove this client. ``server_name`` overrides the
    name that the server's certificate must carry.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ConfigError("tls: private_key and certificate_chain go together")


@dataclasses.dataclass(frozen=True, slots=True)
class ClientOptions:
    """What a client may use and how long it waits.

    ``timeout_s`` bounds every call, on top of the wait that the call itself asks for; ``connect_timeout_s`` bounds
    the first attachment. ``write_limit_bytes`` bounds the shared memory in which pages to be stored are prepared;
    it grows by regions of ``write_step_bytes``. ``deadline_margin_ms`` is taken off every lease.
    ``keep_message_memory`` lets glibc's malloc keep the memory of large messages (``hicache/heap.py``), for the
    whole process: look-ups of long prompts take less than half the time; switch it off if the process minds.
    """

    name: str = "python"
    timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    data_plane: DataPlane = DataPlane.AUTO
    verify: Verify = Verify.ON_COPY
    token: str = ""
    tls: Tls | None = None
    write_limit_bytes: int = 1 << 30
    write_step_bytes: int = 64 << 20
    deadline_margin_ms: int = 50
    keep_message_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("timeout_s", "connect_timeout_s", "write_limit_bytes", "write_step_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if self.deadline_margin_ms < 0:
            raise ConfigError("deadline_margin_ms must not be negative")


def data_plane(value: DataPlane | str) -> DataPlane:
    """The data plane of that name. Raises ConfigError."""
    try:
        return DataPlane(value)
    except ValueError:
        raise ConfigError(f"data_plane is auto, shm or stream, not {value!r}") from None


def verify(value: Verify | str) -> Verify:
    """The verification of that name. Raises ConfigError."""
    try:
        return Verify(value)
    except ValueError:
        raise ConfigError(f"verify is on-copy, always or off, not {value!r}") from None
