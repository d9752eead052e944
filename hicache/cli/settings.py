"""What can be set, each declared once: flag, TOML key, variable, default and help all come from here.

A setting ``host_bytes`` of the section ``tiers`` is ``--host-bytes`` on the command line,
``HICACHE_HOST_BYTES`` in the environment and ``host_bytes`` below ``[tiers]`` in a TOML file. Durations lose
their ``_ms`` there, since they are written with a unit. Names are those of ``ServiceOptions`` and
``ServerOptions``, so that their errors name them, too.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

from hicache.cli import units
from hicache.errors import ConfigError
from hicache.policy import ADMISSIONS, POLICIES
from hicache.policy.admission import NO_ADMISSION
from hicache.tier.codec_names import LOSSLESS, PAGE_CODECS
from hicache.types import WritePolicy

LOG_LEVELS = ("debug", "info", "warning", "error")

#: A setting's value as the program uses it.
Value = str | int | float | bool | Mapping[int, str]


class Kind(enum.Enum):
    """How a setting is written."""

    TEXT = "TEXT"
    PATH = "PATH"
    SIZE = "SIZE"
    DURATION = "DURATION"
    COUNT = "N"
    SHARE = "0..1"
    SWITCH = "true|false"
    MODE = "OCTAL"
    TENANTS = "UID=NAME,..."


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One setting of one configuration class."""

    name: str
    section: str
    kind: Kind
    default: Value
    help: str
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key in a TOML file."""
        return self.name.removesuffix("_ms") if self.kind is Kind.DURATION else self.name

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "HICACHE_" + self.key.upper()


def setting(section: str, kind: Kind, default: Value, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    """Declare a field of a configuration class. Typed Any, as dataclasses.field is: the annotation counts."""
    metadata = {"section": section, "kind": kind, "help": help_text, "choices": choices}
    if kind is Kind.TENANTS:
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class ServeConfig:
    """All settings of ``hicache serve``."""

    socket_path: str = setting(
        "server",
        Kind.PATH,
        "",
        "unix socket to listen on; default $XDG_RUNTIME_DIR/hicache.sock, or /tmp/hicache-<uid>/hicache.sock",
    )
    socket_mode: int = setting("server", Kind.MODE, 0o600, "file mode of the socket")
    tcp_address: str = setting(
        "server", Kind.TEXT, "", "also listen on host:port; needs token_file or tls_client_ca to know callers"
    )
    tls_cert: str = setting("server", Kind.PATH, "", "PEM certificate for TCP")
    tls_key: str = setting("server", Kind.PATH, "", "PEM private key for TCP")
    tls_client_ca: str = setting("server", Kind.PATH, "", "PEM authority of client certificates (mTLS)")
    token_file: str = setting(
        "server", Kind.PATH, "", "bearer tokens for TCP: lines of 'tenant token [admin]'"
    )
    allow_plain_tcp: bool = setting(
        "server", Kind.SWITCH, default=False, help_text="permit TCP without TLS, on loopback only"
    )
    tenants: Mapping[int, str] = setting(
        "server", Kind.TENANTS, {}, "tenant of each local uid; uids not named are of the tenant 'default'"
    )
    default_tenant: str = setting(
        "server", Kind.TEXT, "default", "tenant of local uids that tenants does not name"
    )
    resume_window_ms: int = setting(
        "server", Kind.DURATION, 10_000, "how long a lost session may come back for what it held"
    )
    max_sessions: int = setting("server", Kind.COUNT, 1024, "sessions at one time")
    metrics_port: int = setting(
        "server", Kind.COUNT, 0, "serve Prometheus metrics on 127.0.0.1 at this port; 0: none"
    )
    grace_ms: int = setting(
        "server", Kind.DURATION, 10_000, "on SIGTERM, how long to finish copies and to save pages to disk"
    )
    log_level: str = setting("server", Kind.TEXT, "info", "least severe log lines shown", LOG_LEVELS)

    device: str = setting(
        "tiers",
        Kind.TEXT,
        "",
        "device tier: 'cpu' (through torch), 'cuda:<n>', several as 'cuda:0,cuda:1' or 'cuda:0-3'; empty: none",
    )
    device_bytes: int = setting(
        "tiers", Kind.SIZE, 0, "capacity of the device tier, of several devices together"
    )
    share_device: bool = setting(
        "tiers",
        Kind.SWITCH,
        default=False,
        help_text="let clients map the device tier; on a GPU they could write to it, too, and cannot be made to let go:"
        " for processes that trust each other",
    )
    host_bytes: int = setting(
        "tiers", Kind.SIZE, 1 << 30, "capacity of the host tier (shared memory); 0: no host tier"
    )
    disk_path: str = setting(
        "tiers", Kind.PATH, "", "directory of the disk tier, made if absent; empty: no disk tier"
    )
    disk_bytes: int = setting("tiers", Kind.SIZE, 0, "capacity of the disk tier, a bound on real disk use")
    disk_sync: bool = setting(
        "tiers", Kind.SWITCH, default=False, help_text="fsync every disk commit, to survive power cuts, too"
    )
    disk_codec: str = setting(
        "tiers", Kind.TEXT, LOSSLESS, "how the disk tier compresses (see docs/CODECS.md)", PAGE_CODECS
    )
    disk_quarantine_bytes: int = setting(
        "tiers", Kind.SIZE, 64 << 20, "damaged records kept for study, within the disk's capacity; 0: none"
    )
    prefault: bool = setting(
        "tiers", Kind.SWITCH, default=True, help_text="fault host memory in ahead of need, in the background"
    )

    record: str = setting(
        "recording",
        Kind.PATH,
        "",
        "file for what is looked up and stored, as salted ids (see docs/TRACES.md); empty: none",
    )
    record_bytes: int = setting(
        "recording", Kind.SIZE, 256 << 20, "size at which a recording moves on to FILE.1 and a new one begins"
    )
    record_files: int = setting("recording", Kind.COUNT, 3, "recordings that are kept, with the current one")
    record_salt: bool = setting(
        "recording",
        Kind.SWITCH,
        default=False,
        help_text="write the salt into the file: who has both can find a prompt that he knows",
    )

    kv_events: str = setting(
        "events",
        Kind.TEXT,
        "",
        "publish for routers which blocks are held, at ADDRESS[,option=...][;...] (see hicache publish); empty: no",
    )

    policy: str = setting(
        "policy", Kind.TEXT, "adaptive", f"which pages leave first: {', '.join(sorted(POLICIES))}"
    )
    device_policy: str = setting("policy", Kind.TEXT, "", "the same in the device tier; empty: as policy")
    host_policy: str = setting("policy", Kind.TEXT, "", "the same in the host tier; empty: as policy")
    disk_policy: str = setting("policy", Kind.TEXT, "", "the same in the disk tier; empty: as policy")
    admission: str = setting(
        "policy",
        Kind.TEXT,
        NO_ADMISSION,
        f"which pages are worth writing to a lower tier: {', '.join(sorted(ADMISSIONS))}",
    )
    host_admission: str = setting(
        "policy", Kind.TEXT, "", "the same for the host tier below a device tier; empty: as admission"
    )
    disk_admission: str = setting("policy", Kind.TEXT, "", "the same for the disk tier; empty: as admission")
    write_policy: str = setting(
        "policy",
        Kind.TEXT,
        WritePolicy.SELECTIVE.value,
        "when the copy in the next tier is made: at insert, at the n-th use, or at eviction",
        tuple(policy.value for policy in WritePolicy),
    )
    selective_hits: int = setting("policy", Kind.COUNT, 2, "the n of write-through-selective")
    free_low_fraction: float = setting(
        "policy", Kind.SHARE, 0.05, "below this share of free room, cold pages are copied down ahead of need"
    )
    default_ttl_ms: int = setting(
        "policy", Kind.DURATION, 30_000, "life of a lease or reservation that asks for none"
    )
    max_ttl_ms: int = setting("policy", Kind.DURATION, 600_000, "the longest life that may be asked for")
    expiry_grace_ms: int = setting(
        "policy",
        Kind.DURATION,
        2_000,
        "how long the slots of an expired lease rest before they are used again",
    )

    workers: int = setting("tuning", Kind.COUNT, 2, "threads that copy clients' pages in")
    host_workers: int = setting("tuning", Kind.COUNT, 1, "copying threads of the host tier")
    disk_readers: int = setting("tuning", Kind.COUNT, 2, "reading threads of the disk tier")
    disk_compress_workers: int = setting("tuning", Kind.COUNT, 2, "compressing threads of the disk tier")
    scrub_bytes_per_s: int = setting(
        "tuning",
        Kind.SIZE,
        8 << 20,
        "how much of the disk tier is verified a second, in the background; 0: none",
    )
    copy_engine: str = setting(
        "tuning",
        Kind.TEXT,
        "auto",
        "how a CUDA device copies; auto: the fastest as measured when pages of a size are first met",
        ("auto", "kernel", "staged", "batch", "dma"),
    )
    device_timeout_ms: int = setting(
        "tuning",
        Kind.DURATION,
        30_000,
        "a GPU without an answer for so long is given up until the next start; 0s: never",
    )
    device_segment_bytes: int = setting(
        "tuning", Kind.SIZE, 0, "grain in which the device tier gives room to page sizes; 0: a sixteenth"
    )
    host_segment_bytes: int = setting("tuning", Kind.SIZE, 0, "the same for the host tier")
    bounce_bytes: int = setting("tuning", Kind.SIZE, 64 << 20, "buffers for copies that need one in between")
    copy_chunk_bytes: int = setting("tuning", Kind.SIZE, 4 << 20, "how much one thread copies at a time")
    max_copy_pages: int = setting("tuning", Kind.COUNT, 64, "pages in one copy between tiers")
    max_copies: int = setting("tuning", Kind.COUNT, 32, "copies between tiers at one time")


@dataclasses.dataclass(frozen=True, slots=True)
class ClientConfig:
    """Where a command finds the sidecar."""

    target: str = setting(
        "client",
        Kind.TEXT,
        "",
        "the sidecar: unix:///path or host:port; default the socket of `hicache serve`",
    )
    auth_token_file: str = setting("client", Kind.PATH, "", "file holding the bearer token, for TCP")
    tls_ca: str = setting("client", Kind.PATH, "", "PEM authority of the server's certificate, for TCP")
    timeout_ms: int = setting("client", Kind.DURATION, 10_000, "how long to wait for the sidecar to answer")


@dataclasses.dataclass(frozen=True, slots=True)
class PublishConfig:
    """All settings of ``hicache publish`` besides where the sidecar is."""

    bind: str = setting(
        "publisher", Kind.TEXT, "", "endpoints: ADDRESS[,option=value]..., several separated by semicolons"
    )
    pod: str = setting("publisher", Kind.TEXT, "", "what {pod} in topics stands for; default the host's name")
    all_tenants: bool = setting(
        "publisher", Kind.SWITCH, default=False, help_text="publish all tenants' pages; for administrators"
    )
    lost_ms: int = setting(
        "publisher", Kind.DURATION, 5_000, "say AllBlocksCleared when the sidecar was away for so long"
    )
    metrics_port: int = setting(
        "publisher", Kind.COUNT, 0, "serve Prometheus metrics on 127.0.0.1 at this port; 0: none"
    )
    log_level: str = setting("publisher", Kind.TEXT, "info", "least severe log lines shown", LOG_LEVELS)


def settings_of(cls: type) -> tuple[Setting, ...]:
    """The settings of a configuration class, in order."""
    defaults = cls()
    return tuple(
        Setting(name=f.name, default=getattr(defaults, f.name), **dict(f.metadata))
        for f in dataclasses.fields(cls)
    )


# --- reading and writing values


def parse(found: Setting, raw: object, origin: str) -> Value:
    """The value of a setting from text or from TOML's types. Raises ConfigError that names ``origin``."""
    try:
        value = _from_text(found, raw) if isinstance(raw, str) else _from_toml(found, raw)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error.message}", hint=error.hint) from None
    if found.choices and value not in found.choices:
        raise ConfigError(f"{origin}: {value!r} is not one of {', '.join(found.choices)}")
    return value


def _from_text(found: Setting, text: str) -> Value:
    parser = _TEXT_PARSERS.get(found.kind)
    return text if parser is None else parser(text)


def _from_toml(found: Setting, raw: object) -> Value:
    if found.kind is Kind.SWITCH and isinstance(raw, bool):
        return raw
    numeric = found.kind in {Kind.SIZE, Kind.COUNT, Kind.MODE}
    if numeric and isinstance(raw, int) and not isinstance(raw, bool):
        return _count(str(raw))
    if found.kind is Kind.SHARE and isinstance(raw, float | int) and not isinstance(raw, bool):
        return _share(str(raw))
    if found.kind is Kind.TENANTS and isinstance(raw, Mapping):
        return {_count(str(uid)): str(name) for uid, name in raw.items()}
    wanted = 'a duration in quotes, such as "30s"' if found.kind is Kind.DURATION else found.kind.value
    raise ConfigError(f"{raw!r} does not fit", hint=f"expected {wanted}")


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{text!r} is not a number from 0 to less than 1")
    return value


def _switch(text: str) -> bool:
    word = text.lower()
    if word not in {"true", "yes", "on", "1", "false", "no", "off", "0"}:
        raise ConfigError(f"{text!r} is neither true nor false")
    return word in {"true", "yes", "on", "1"}


def _mode(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError:
        raise ConfigError(f"{text!r} is not a file mode", hint="write it in octal, for example 600") from None


def _tenants(text: str) -> Mapping[int, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not equals or not name.strip() for _, equals, name in pairs):
        raise ConfigError(f"{text!r} does not pair uids and tenants", hint="for example 1000=red,1001=blue")
    return {_count(uid): name.strip() for uid, _, name in pairs}


_TEXT_PARSERS: Mapping[Kind, Callable[[str], Value]] = {
    Kind.SIZE: units.parse_size,
    Kind.DURATION: units.parse_duration_ms,
    Kind.COUNT: _count,
    Kind.SHARE: _share,
    Kind.SWITCH: _switch,
    Kind.MODE: _mode,
    Kind.TENANTS: _tenants,
}


def show(found: Setting, value: Value) -> str:
    """The value as help and ``--print-config`` show it, without TOML's quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{uid}={name}" for uid, name in sorted(value.items()))
    if isinstance(value, int):
        writers: Mapping[Kind, Callable[[int], str]] = {
            Kind.SIZE: units.exact_size,
            Kind.DURATION: units.exact_duration,
            Kind.MODE: lambda mode: f"{mode:03o}",
        }
        return writers.get(found.kind, str)(value)
    return str(value)
