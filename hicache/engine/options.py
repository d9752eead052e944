"""What the engine can be told. Frozen; the shells build it from their own settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hicache.errors import ConfigError
from hicache.policy import make_admission, make_policy
from hicache.policy.admission import NO_ADMISSION
from hicache.types import TierSpec, WritePolicy


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of one engine.

    ``tiers`` are ordered, fastest first; commits land in the first. ``policy`` is that of every tier to which
    ``tier_policies`` (by tier name) gives no other; ``admission`` and ``tier_admissions`` say in the same way what is
    written to the tiers below the first. ``selective_hits``: the use at which a run is
    copied down ahead of its eviction. ``expiry_grace_ms``: how long the slots of an expired lease rest before they
    may be used again. ``free_low_fraction``: below this share of free room a tier's coldest unsaved pages are copied
    down ahead of need. ``max_copy_pages`` bounds one Copy, ``max_copies`` those under way, ``promotion_copies`` those
    of one promotion, so that small ones do not wait behind large ones and a cancelled one wastes little.
    ``story_events``: how many past events an internal error tells. ``digest``: keep a running digest of all actions
    (``Engine.action_digest``).
    """

    tiers: tuple[TierSpec, ...]
    policy: str = "adaptive"
    tier_policies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    admission: str = NO_ADMISSION
    tier_admissions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    write_policy: WritePolicy = WritePolicy.SELECTIVE
    selective_hits: int = 2
    default_ttl_ms: int = 30_000
    max_ttl_ms: int = 600_000
    expiry_grace_ms: int = 2_000
    free_low_fraction: float = 0.05
    max_copy_pages: int = 64
    max_copies: int = 32
    promotion_copies: int = 4
    story_events: int = 64
    digest: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot work. Raises ConfigError."""
        if not self.tiers:
            raise ConfigError(
                "no tier is configured", hint="give at least one of device, host and disk a size"
            )
        counts = (self.selective_hits, self.max_copy_pages, self.max_copies, self.promotion_copies)
        if min(counts) < 1:
            raise ConfigError(
                "selective_hits, max_copy_pages, max_copies and promotion_copies must be at least 1"
            )
        self._check_policies()
        if not 0.0 <= self.free_low_fraction < 1.0:
            raise ConfigError("free_low_fraction must be in [0, 1)")
        if not 0 < self.default_ttl_ms <= self.max_ttl_ms:
            raise ConfigError("default_ttl_ms must be positive and at most max_ttl_ms")

    def policy_of(self, tier: str) -> str:
        """The policy of a tier."""
        return self.tier_policies.get(tier, self.policy)

    def admission_of(self, tier: str) -> str:
        """The admission of a tier, which is not the first."""
        return self.tier_admissions.get(tier, self.admission)

    def _check_policies(self) -> None:
        names = [spec.name for spec in self.tiers]
        for what, given, known in (
            ("tier_policies", self.tier_policies, names),
            ("tier_admissions", self.tier_admissions, names[1:]),
        ):
            strange = sorted(set(given) - set(known))
            if strange:
                hint = f"it has {', '.join(known)}" if known else "there is no tier below the first"
                raise ConfigError(f"{what} names {', '.join(strange)}, which is no such tier", hint=hint)
        for name in {self.policy, *self.tier_policies.values()}:
            make_policy(name)
        for name in {self.admission, *self.tier_admissions.values()}:
            make_admission(name)
