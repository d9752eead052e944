"""Where pages lie in an engine's paged KV, as calls say it; and whether that can be."""

from __future__ import annotations

import dataclasses

import numpy as np

from hicache.device.kv import PagedKv, Places
from hicache.errors import InvalidArgumentError
from hicache.types import Namespace

PLACE_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class PagedPlaces:
    """``places``: int64, little-endian, ``units`` a page, page after page. ``timeline`` 0: no counter."""

    units: int
    places: bytes
    timeline: int = 0
    counter: int = 0

    def by_page(self) -> Places:
        """``[pages, units]``. Raises InvalidArgumentError for bytes that are not whole pages."""
        width = self.units * PLACE_BYTES
        if self.units < 1 or not self.places or len(self.places) % width:
            raise InvalidArgumentError(
                f"places: {len(self.places)} bytes are not the places of pages of {self.units} units",
                hint=f"one int64, little-endian, a unit, page after page: {width} bytes a page",
            )
        return np.frombuffer(self.places, dtype="<i8").astype(np.int64, copy=False).reshape(-1, self.units)


def check_fit(kv: PagedKv, spec: Namespace, *, whole: bool) -> None:
    """Raise InvalidArgumentError unless an engine's planes hold pages of a namespace, or a rank's part of them.

    ``whole``: a part will not do.
    """
    part = kv.part_bytes(spec.page_tokens)
    end = kv.page_offset + part
    if whole or spec.world_size == 1:
        fits, wanted = (
            (kv.page_offset, part) == (0, spec.page_bytes),
            f"all {spec.page_bytes} bytes of a page",
        )
    else:
        fits, wanted = end <= spec.page_bytes, f"a part of the {spec.page_bytes} bytes of a page"
    if fits:
        return
    hint = "register the KV as the namespace was opened: planes, page_tokens, heads, head_size, element_bytes"
    if spec.world_size > 1 and whole:
        hint = "a page is committed whole: gather the ranks' parts into one registered region, and commit from there"
    raise InvalidArgumentError(
        f"paged KV holds bytes {kv.page_offset} to {end} of pages of {spec.page_tokens} tokens, not {wanted}",
        hint=hint,
    )


def layers_of(kv: PagedKv, first: int, layers: int) -> int:
    """How many layers from ``first`` on are meant; ``layers`` 0: all. Raises InvalidArgumentError."""
    count = layers or kv.layers - first
    if not (0 <= first < kv.layers and 0 < count <= kv.layers - first):
        raise InvalidArgumentError(
            f"{layers or 'all'} layers from layer {first} on: the paged KV has {kv.layers}",
            hint="layers are numbered from 0",
        )
    return count
