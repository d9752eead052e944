"""A job's pages where the device reaches them, and the ways that their layers take between there and the planes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from hicache.device.copying import mapped
from hicache.device.copying.cuda_lane import Addresses, Lane, Spot
from hicache.device.copying.jobs import LoadJob, StoreJob
from hicache.device.copying.mapped import Using


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """Some pages of a job where the device reaches them. ``pieces``: as ``Using.pieces``."""

    first: int
    at: Addresses
    pieces: Addresses

    @property
    def end(self) -> int:
        """The page behind the last."""
        return self.first + len(self.at)

    def part(self, spot: Spot) -> Spot:
        """Where in the planes they lie, of all pages of the job."""
        return spot.part(self.first, len(self.at))


class Transfer:
    """A slab's layers between planes and host memory, one way or another."""

    def __init__(self, lane: Lane, way: str, spot: Spot, slab: Slab, layers: range) -> None:
        self._lane, self._way, self._slab, self._spot = lane, way, slab, slab.part(spot)
        self._first = layers.start
        self._layer_bytes = lane.kv.plane_bytes * lane.kv.planes_per_layer
        if way == "kernel":  # all layers' tables with one copy
            steps = np.arange(layers.start, layers.stop, dtype=np.int64)[:, None] * self._layer_bytes
            self._rows = lane.rows(slab.at + steps, host=True)
        else:
            most = max(1, min(len(slab.at), lane.stage_bytes // self._layer_bytes))
            self._stage = lane.stage_rows(most, self._layer_bytes)
            self._rows = lane.rows(self._stage)

    def layer(self, layer: int, *, pack: bool) -> None:
        """Queue one layer."""
        lane, one, width = self._lane, range(layer, layer + 1), self._layer_bytes
        count = len(self._slab.at)
        if self._way == "kernel":
            lane.move(one, self._spot, self._rows.part((layer - self._first) * count), pack=pack)
            return
        for begin in range(0, count, len(self._stage)):
            end = min(begin + len(self._stage), count)
            host, pieces = self._slab.at[begin:end] + layer * width, self._slab.pieces[begin:end]
            stage = self._stage[: end - begin]
            if not pack:
                lane.strips(stage, host, width, pieces)
            lane.move(one, self._spot.part(begin, end - begin), self._rows, pack=pack)
            if pack:
                lane.strips(host, stage, width, pieces)


def slabs(lane: Lane, job: LoadJob | StoreJob, using: Using, most: int = 0) -> Iterator[Slab]:
    """A job's pages, ``most`` at a time; 0: as many as can be.

    Pages in memory that the device does not reach are copied through pinned memory, before or after.
    """
    if using.ready:
        at, step = mapped.addresses(job.spans), most or job.pages or 1
        for first in range(0, job.pages, step):
            yield Slab(first, at[first : first + step], using.pieces[first : first + step])
        return
    most = lane.stage_bytes // lane.kv.page_bytes
    for first in range(0, job.pages, most):
        rows = lane.bounce(min(most, job.pages - first))
        spans = mapped.parts(job.spans, first, len(rows))
        if isinstance(job, LoadJob):
            if first:
                lane.drain()  # the rows are used again
            for span in spans:
                np.copyto(rows[span.first - first : span.first - first + len(span.rows)], span.rows)
        at = rows.ctypes.data + np.arange(len(rows), dtype=np.int64) * rows.shape[1]
        yield Slab(first, at, np.zeros_like(at))
        if isinstance(job, StoreJob):
            lane.drain()
            for span in spans:
                np.copyto(span.rows, rows[span.first - first : span.first - first + len(span.rows)])
