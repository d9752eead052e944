"""Stand-in until hicache.runtime lands."""

from typing import Any

Service = Any
