"""The order in which runs leave a tier. Policies see run ids, ticks and a few numbers, never nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hicache.errors import ConfigError
from hicache.policy.admission import ADMISSIONS, Admission, make_admission
from hicache.policy.base import Plan, Policy, RunInfo
from hicache.policy.lru import LruPolicy
from hicache.policy.sieve import SievePolicy

__all__ = [
    "ADMISSIONS",
    "POLICIES",
    "Admission",
    "Plan",
    "Policy",
    "RunInfo",
    "make_admission",
    "make_policy",
]

#: Every eviction policy by the name it has in settings.
POLICIES: Mapping[str, Callable[[], Policy]] = {"lru": LruPolicy, "sieve": SievePolicy}


def make_policy(name: str) -> Policy:
    """A new, empty policy. Raises ConfigError for a name that is not in ``POLICIES``."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}", hint=f"one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
