"""The order in which runs leave a tier. Policies see run ids, ticks and a few numbers, never nodes."""

from __future__ import annotations

from hicache.policy.admission import ADMISSIONS, Admission, make_admission
from hicache.policy.base import Plan, Policy, RunInfo
from hicache.policy.registry import POLICIES, ZOO, Entry, make_policy

__all__ = [
    "ADMISSIONS",
    "POLICIES",
    "ZOO",
    "Admission",
    "Entry",
    "Plan",
    "Policy",
    "RunInfo",
    "make_admission",
    "make_policy",
]
