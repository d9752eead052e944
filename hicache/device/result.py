"""The completion of a batch in the making."""

from __future__ import annotations

from hicache.device.segment import Indices, Sums
from hicache.types import Batch, Completion, Op, Outcome


class Result:
    """The completion of a batch in the making. A page that no step has settled is a FAULT."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.outcomes = [Outcome.FAULT] * len(batch.slots)
        self.checksums = [0] * len(batch.slots) if batch.op is not Op.DELETE else []
        self.error = ""

    def settle(self, positions: Indices, outcome: Outcome) -> None:
        """Pages that were not moved, and why."""
        for position in positions.tolist():
            self.outcomes[position] = outcome

    def moved(self, positions: Indices, checksums: Sums) -> None:
        """Pages that were moved, with the checksums of the bytes."""
        for position, checksum in zip(positions.tolist(), checksums.tolist(), strict=True):
            self.outcomes[position] = Outcome.OK
            self.checksums[position] = checksum

    def fault(self, reason: str) -> None:
        """Say why pages are left as FAULT; the first reason stands."""
        self.error = self.error or reason

    def completion(self) -> Completion:
        """What the owner gets."""
        return Completion(self.batch.id, tuple(self.outcomes), tuple(self.checksums), error=self.error)
