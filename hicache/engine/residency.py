"""The residency table: which state of (page, tier) may follow which, and why.

    ABSENT ──fill──► FILLING ──arrive──► RESIDENT ──drain──► DRAINING ──leave──► ABSENT
                        └──fail──► ABSENT    ▲  └──leave──► ABSENT  └──rescue──► RESIDENT

Only RESIDENT pages are read. A page under a copy away from its tier is either RESIDENT with a pin (write-through) or
DRAINING (demotion); its place is used again only after the copy. A hit on a DRAINING page rescues it: the copy goes
on, the page stays. ABSENT to RESIDENT directly happens for pages copied in by a commit (their slots were reserved,
the tree learned of them only when the bytes were there) and for pages recovered from a durable tier.
"""

from __future__ import annotations

from hicache.errors import ViolationError
from hicache.types import Residency

_A, _F, _R, _D = Residency.ABSENT, Residency.FILLING, Residency.RESIDENT, Residency.DRAINING

STEPS: dict[tuple[int, int], str] = {
    (_A, _F): "fill",
    (_A, _R): "appear",
    (_F, _R): "arrive",
    (_F, _A): "fail",
    (_R, _D): "drain",
    (_R, _A): "leave",
    (_D, _A): "leave",
    (_D, _R): "rescue",
}


def check_step(old: int, new: int) -> None:
    """Raise ViolationError for a step that the table does not have."""
    if (old, new) not in STEPS:
        raise ViolationError(f"no residency step from {Residency(old).name} to {Residency(new).name}")
