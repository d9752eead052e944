"""``kv_connector_extra_config`` as frozen settings; every error names the key."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from typing import Any

from hicache.errors import ConfigError

#: Where the keys stand, for messages.
WHERE = "kv_connector_extra_config"

#: Keys that vLLM itself, or a wrapper around connectors, puts beside ours.
FOREIGN_KEYS = frozenset({"kv_connector", "kv_connector_module_path", "use_legacy", "tp_rank", "engine_id"})


class Save(enum.Enum):
    """Which pages are stored."""

    ALL = "all"  # of the prompt and of what was generated
    PROMPT = "prompt"  # of the prompt
    OFF = "off"  # none: this engine only reads


class AckAt(enum.Enum):
    """When stored pages count as stored (and are announced as events)."""

    VISIBLE = "visible"  # they can be matched
    DURABLE = "durable"  # they survive kill -9 of the sidecar


@dataclasses.dataclass(frozen=True, slots=True)
class VllmSettings:
    """What a user may set. Times are bounds, none is waited for while there is other work.

    ``endpoint``: the sidecar's unix socket. ``page_tokens`` 0: the least multiple of vLLM's block size from 32 on.
    ``load_async``: load while other requests compute; else within the step, layer by layer.
    ``lookup_timeout_ms``: how long a request waits for the sidecar's answer before it is computed;
    ``load_wait_ms``: of that, how long the sidecar may take to bring pages up from slower tiers.
    ``load_timeout_ms``: a load that takes longer counts as failed. ``lease_ttl_ms``: how long pages are held for a
    request without renewal; ``max_waiting_leases``: for how many requests at once that do not run yet.
    ``staging_bytes``: shared memory in which pages wait for their commit. ``save``, ``ack``: see Save and AckAt.
    ``model_identity``: names the weights where their files are not to be digested. ``allow_other_versions``: run with
    a vLLM that this was not tested with. ``rpc_timeout_ms`` bounds every call in the background, ``flush_ms`` the
    time in which queued pages are still stored at the end. ``reconnect_ms``: pause between attempts to find a
    sidecar that is absent. ``report_stats``: the connector's own metrics.
    """

    endpoint: str
    page_tokens: int = 0
    load_async: bool = True
    lookup_timeout_ms: int = 1_000
    load_wait_ms: int = 500
    load_timeout_ms: int = 10_000
    lease_ttl_ms: int = 20_000
    max_waiting_leases: int = 256
    staging_bytes: int = 1 << 30
    save: Save = Save.ALL
    ack: AckAt = AckAt.VISIBLE
    model_identity: str = ""
    allow_other_versions: bool = False
    rpc_timeout_ms: int = 5_000
    flush_ms: int = 3_000
    reconnect_ms: int = 500
    report_stats: bool = True

    def __post_init__(self) -> None:
        if not self.endpoint.startswith("unix:"):
            raise ConfigError(
                f"{WHERE}: endpoint must be a unix socket of this host, not {self.endpoint!r}: pages are read in place",
                hint='for example "unix:///run/hicache.sock"',
            )
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{WHERE}: {name} must be positive, not {getattr(self, name)}")
        for name in ("page_tokens", "load_wait_ms", "flush_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{WHERE}: {name} must not be negative")
        if self.load_wait_ms > self.lookup_timeout_ms:
            raise ConfigError(
                f"{WHERE}: load_wait_ms ({self.load_wait_ms}) exceeds lookup_timeout_ms ({self.lookup_timeout_ms}), "
                "which bounds it"
            )
        if 2 * self.load_timeout_ms > self.lease_ttl_ms:
            raise ConfigError(
                f"{WHERE}: load_timeout_ms ({self.load_timeout_ms}) exceeds half of lease_ttl_ms "
                f"({self.lease_ttl_ms}): leases are renewed at half their time, and a load has what is left"
            )


POSITIVE = (
    "lookup_timeout_ms",
    "load_timeout_ms",
    "lease_ttl_ms",
    "max_waiting_leases",
    "staging_bytes",
    "rpc_timeout_ms",
    "reconnect_ms",
)
FIELDS = {field.name: field for field in dataclasses.fields(VllmSettings)}


def parse(extra: Mapping[str, Any]) -> VllmSettings:
    """The settings in ``kv_connector_extra_config``. Raises ConfigError naming the key."""
    known: dict[str, Any] = {}
    for key, value in extra.items():
        if key in FIELDS:
            known[key] = _value(key, value)
        elif key not in FOREIGN_KEYS:
            near = difflib.get_close_matches(key, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(FIELDS))}"
            raise ConfigError(f"{WHERE}: unknown key {key!r}", hint=hint)
    if "endpoint" not in known:
        raise ConfigError(
            f"{WHERE}: endpoint is missing: where the sidecar listens",
            hint='for example {"endpoint": "unix:///run/hicache.sock"}',
        )
    return VllmSettings(**known)


def _value(key: str, value: Any) -> Any:
    """One value, of the type that its field has."""
    kind = FIELDS[key].type
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    enums: dict[str, type[Save] | type[AckAt]] = {"Save": Save, "AckAt": AckAt}
    if kind in enums:
        return _choice(key, value, enums[str(kind)])
    words = {"str": "a text", "bool": "true or false", "int": "a whole number"}
    raise ConfigError(f"{WHERE}: {key} must be {words[str(kind)]}, not {value!r}")


def _choice(key: str, value: Any, choices: type[Save] | type[AckAt]) -> Save | AckAt:
    try:
        return choices(value)
    except ValueError:
        allowed = ", ".join(choice.value for choice in choices)
        raise ConfigError(f"{WHERE}: {key} is one of {allowed}, not {value!r}") from None


def page_tokens(settings: VllmSettings, block_size: int) -> int:
    """Tokens of one page. Raises ConfigError where the setting is no multiple of vLLM's block size."""
    if not settings.page_tokens:
        return block_size * -(-LEAST_PAGE_TOKENS // block_size)
    if settings.page_tokens % block_size:
        raise ConfigError(
            f"{WHERE}: page_tokens {settings.page_tokens} is not a multiple of vLLM's block size {block_size}"
        )
    return settings.page_tokens


#: Smaller pages cost more to look up than they save.
LEAST_PAGE_TOKENS = 32
