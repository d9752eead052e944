"""The shell that serves: real clock, real tiers, one event loop."""

from hicache.runtime.options import ServiceOptions
from hicache.runtime.service import Service

__all__ = ["Service", "ServiceOptions"]
