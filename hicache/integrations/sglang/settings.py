"""The JSON of ``--hicache-storage-backend-extra-config``, checked: every error names its key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from hicache.errors import ConfigError

#: Keys of the same JSON that SGLang itself reads (and mostly takes out before we see it).
SGLANG_KEYS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)
LOCAL = ("unix:", "unix-abstract:", "/")
MAX_MS = 600_000


@dataclasses.dataclass(frozen=True, slots=True)
class SglangSettings:
    """What the JSON says. Times in milliseconds.

    ``deadline_ms`` bounds every call of SGLang's; ``attach_wait_ms`` how long the start waits for a sidecar;
    ``retry_ms`` how long calls answer at once, as misses, after one ran out of time. ``load_wait_ms``: for pages that
    come from a lower tier. ``store_wait_ms``: for room. ``ack``: whether a stored page must survive a crash.
    """

    endpoint: str
    model: str = ""
    revision: str = ""
    salt: str = ""
    kv_cache_dtype: str = ""
    ack: str = "visible"
    deadline_ms: int = 5_000
    attach_wait_ms: int = 2_000
    retry_ms: int = 1_000
    load_wait_ms: int = 2_000
    store_wait_ms: int = 500
    write_limit_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        """Refuse what cannot work. Raises ConfigError naming the key."""
        if not self.endpoint:
            raise ConfigError(_name("endpoint", "is missing"), hint='such as "unix:///run/hicache.sock"')
        if not self.endpoint.startswith(LOCAL):
            raise ConfigError(
                _name("endpoint", f"{self.endpoint!r} is not a unix socket"),
                hint="pages are shared as memory: the sidecar runs on this host",
            )
        if self.ack not in {"visible", "durable"}:
            raise ConfigError(_name("ack", f"is visible or durable, not {self.ack!r}"))
        for key in ("deadline_ms", "retry_ms"):
            if not getattr(self, key):
                raise ConfigError(_name(key, "must be at least 1"))
        for key in ("load_wait_ms", "store_wait_ms"):
            if getattr(self, key) > self.deadline_ms:
                raise ConfigError(_name(key, f"must not exceed deadline_ms ({self.deadline_ms})"))
        if self.write_limit_bytes < 1 << 20:
            raise ConfigError(_name("write_limit_bytes", "must be at least 1048576"))

    @property
    def deadline_s(self) -> float:
        """``deadline_ms`` in seconds."""
        return self.deadline_ms / 1000


def read_settings(extra_config: Mapping[str, Any] | None) -> SglangSettings:
    """The settings in SGLang's extra config. Raises ConfigError naming the key that is wrong, unknown or missing."""
    given = dict(extra_config or {})
    fields = {field.name: field for field in dataclasses.fields(SglangSettings)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in fields:
            values[key] = _checked(key, value, fields[key].type == "int")
        elif key == "tp_lcm_size" and value is not None:
            raise ConfigError(
                _name(key, "is not supported: hicache keeps each rank's part as it is"),
                hint="leave it out; ranks of other tensor-parallel sizes do not share pages",
            )
        elif key not in SGLANG_KEYS:
            near = difflib.get_close_matches(key, [*fields, *SGLANG_KEYS], n=1)
            raise ConfigError(_name(key, "is unknown"), hint=f"did you mean {near[0]!r}?" if near else "")
    if "endpoint" not in values:
        values["endpoint"] = ""
    return SglangSettings(**values)


def _checked(key: str, value: Any, number: bool) -> Any:  # noqa: FBT001
    """The value itself. Raises ConfigError where its kind is wrong."""
    if not number:
        if not isinstance(value, str):
            raise ConfigError(_name(key, f"must be a string, not {value!r}"))
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(_name(key, f"must be a whole number, 0 or more, not {value!r}"))
    if key.endswith("_ms") and value > MAX_MS:
        raise ConfigError(_name(key, f"must be at most {MAX_MS}"))
    return value


def _name(key: str, what: str) -> str:
    return f"hicache-storage-backend-extra-config: {key} {what}"
