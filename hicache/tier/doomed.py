"""Deletes that were asked for and not done yet: gathered, so that one commit removes many pages of a shard.

Random eviction takes a page here and a page there; a commit for each would cost more than the page. So deletes
wait, while there are puts to write, for a few groups at most: those of a shard ride along with the puts that go into
it, as far as no doomed page below them lies in another shard; the rest goes shard by shard, children first, when there
are many, when their room is needed, or when nothing else is to do. Nobody was told that they are done, and whatever
names one of these pages, or a page below it, waits until they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from hicache.tier.ops import DeleteKeys, take_free
from hicache.tier.outbox import Pending
from hicache.tier.remove import Homes, Remover
from hicache.tier.shelf import Shard
from hicache.types import Outcome

_KEYS_MAX = 256
_GROUPS_MAX = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Grave:
    """One page that must go, and who waits for that."""

    places: tuple[Shard, ...]
    parent: bytes
    pending: Pending
    at: int


class Doomed:
    """The deletes that wait. For the writer's thread only. Errors of the medium end in ``Remover``."""

    def __init__(self, remover: Remover) -> None:
        self._remover = remover
        self._graves: dict[bytes, _Grave] = {}
        self._groups = 0  # since the oldest of them came

    def __len__(self) -> int:
        return len(self._graves)

    @property
    def due(self) -> bool:
        """Whether they have waited long enough; called once a group."""
        self._groups += bool(self._graves)
        return self._groups > _GROUPS_MAX or len(self._graves) >= _KEYS_MAX

    def names(self, keys: Iterable[bytes]) -> bool:
        """Whether one of these pages waits to be removed."""
        return bool(self._graves) and any(key in self._graves for key in keys)

    def add(self, ops: Sequence[DeleteKeys], homes: Homes) -> None:
        """Take deletes in; what is not stored is settled as a MISS."""
        keys = [bytes(key) for op in ops for key in op.pending.batch.keys]
        parents = self._remover.parents({key: homes[key] for key in keys if homes[key]})
        for op in ops:
            pending, missing = op.pending, 0
            for at, key in enumerate(map(bytes, pending.batch.keys)):
                if homes[key] and key not in self._graves:
                    self._graves[key] = _Grave(homes[key], parents[key], pending, at)
                else:
                    pending.outcomes[at] = Outcome.MISS
                    missing += 1
            if missing:
                pending.settle(missing)

    def of(self, shard: Shard) -> list[bytes]:
        """What may be removed from a shard in its next transaction: nothing doomed below it stays elsewhere."""
        here = (shard,)
        waiting = dict.fromkeys(key for key, grave in self._graves.items() if grave.places == here)
        if not waiting:
            return []
        children: dict[bytes, int] = {}
        for key, grave in self._graves.items():
            if grave.parent in self._graves and grave.parent != key:
                children[grave.parent] = children.get(grave.parent, 0) + len(grave.places)
        return take_free(waiting, {key: grave.parent for key, grave in self._graves.items()}, children)

    def settle(self, keys: Iterable[bytes], failed: dict[bytes, str]) -> None:
        """These were tried: they are gone, or failed."""
        for key in keys:
            grave = self._graves.pop(key)
            error = failed.get(key, "")
            grave.pending.outcomes[grave.at] = Outcome.FAULT if error else Outcome.OK
            grave.pending.error = grave.pending.error or error
            grave.pending.settle()
        if not self._graves:
            self._groups = 0

    def flush(self) -> None:
        """Remove them all now."""
        if self._graves:
            failed = self._remover.delete({key: grave.places for key, grave in self._graves.items()})
            self.settle(list(self._graves), failed)
