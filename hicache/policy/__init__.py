"""The order in which runs leave a tier. Policies see run ids, ticks and a few numbers, never nodes."""

from __future__ import annotations

from hicache.policy.base import Plan, Policy, RunInfo
from hicache.policy.registry import POLICIES, ZOO, Entry, make_policy

__all__ = ["POLICIES", "ZOO", "Entry", "Plan", "Policy", "RunInfo", "make_policy"]
