"""The shell that serves: real clock, real tiers, one event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache.runtime.options import ServiceOptions as ServiceOptions
    from hicache.runtime.service import Service as Service

__all__ = ["Service", "ServiceOptions"]


def __getattr__(name: str) -> object:
    # Lazy: the client takes its clock from this room and must not load engine and tiers for it.
    if name == "Service":
        from hicache.runtime.service import Service

        return Service
    if name == "ServiceOptions":
        from hicache.runtime.options import ServiceOptions

        return ServiceOptions
    raise AttributeError(f"module 'hicache.runtime' has no attribute {name!r}")
