"""In which tier a call leases: the usual one, or the device tier where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from hicache.errors import UnsupportedError
from hicache.types import TierKind, TierSpec

#: The engine's own choice: the first tier that clients can map, else the first.
USUAL = -1


class LeaseTiers:
    """Looked up once, asked with every Fetch."""

    def __init__(self, specs: Sequence[TierSpec]) -> None:
        self._device = next((i for i, spec in enumerate(specs) if spec.kind is TierKind.DEVICE), USUAL)

    def asked(self, *, device: bool) -> int:
        """The tier that a Fetch names. Raises UnsupportedError where there is no device tier."""
        if device and self._device < 0:
            raise UnsupportedError(
                "device: this sidecar has no device tier to lease in",
                hint="fetch without device, or start it with --device cuda:0 (or cpu) and --device-bytes",
            )
        return self._device if device else USUAL
