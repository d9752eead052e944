"""Which shard takes the next pages of a size class.

In this order: the shard of the class being filled; another of the class with much room; a new one; whatever of
the class has room; a shard of another class, where records may end up in pieces. The reserve is lent to a class
when another class's shard can be emptied into its siblings at once (``upkeep`` does).
"""

from __future__ import annotations

from collections.abc import Callable

from hicache.tier.shelf import Shard, Shelf

_MUCH_ROOM_PART = 16


class Placing:
    """Chooses by the figures of the last commits; ``wanted`` is told which class could use another's shard."""

    def __init__(self, shelf: Shelf, *, wanted: Callable[[int], bool]) -> None:
        self._shelf = shelf
        self._wanted = wanted
        self._filling: dict[int, int] = {}  # class -> number of the shard being filled

    def class_of(self, page_bytes: int) -> int:
        """The size class of a page."""
        return page_bytes if self._shelf.geometry.several else 0

    def is_roomy(self, size_class: int, total: int) -> bool:
        """Whether a shard of the class has much room as it is, or a new one may be made."""
        geometry = self._shelf.geometry
        return bool(geometry.map_bytes(size_class, self._shelf.free_bytes - geometry.reserve_bytes)) or any(
            s.room_bytes >= min(total, s.info.map_bytes // _MUCH_ROOM_PART)
            for s in self._shelf.shards
            if s.info.size_class_bytes == size_class and not s.tired
        )

    def choose(self, size_class: int, charge: int, total: int) -> Shard | None:
        """A shard for records whole: room for ``charge``, hopefully for ``total``. Raises OSError, lmdb.Error.

        None when only pieces can help.
        """
        own = [
            s
            for s in self._shelf.shards
            if s.info.size_class_bytes == size_class and s.room_bytes >= charge and not s.tired
        ]
        for shard in own:
            if shard.info.number == self._filling.get(size_class):
                return shard
        best = max(own, key=lambda s: s.room_bytes, default=None)
        much = best is not None and best.room_bytes >= min(total, best.info.map_bytes // _MUCH_ROOM_PART)
        if not much:
            best = self.grow(size_class, charge) or best or self._foreign(charge)
        if best is not None and best.info.size_class_bytes == size_class:
            self._filling[size_class] = best.info.number
        return best

    def choose_for_pieces(self, charge: int) -> Shard | None:
        """The shard with the most room, wherever in its file that is; None when there is none for ``charge``."""
        best = max(self._shelf.shards, key=lambda s: s.room_bytes, default=None)
        return best if best is not None and best.room_bytes >= charge else None

    def grow(self, size_class: int, charge: int) -> Shard | None:
        """A new shard within the bound, if a record of that charge fits into it."""
        shelf = self._shelf
        map_bytes = shelf.geometry.map_bytes(size_class, shelf.free_bytes - shelf.geometry.reserve_bytes)
        if not map_bytes and shelf.geometry.reserve_bytes and self._wanted(size_class):
            map_bytes = shelf.geometry.map_bytes(size_class, shelf.free_bytes)
        if map_bytes // 2 < charge:
            return None
        return shelf.create(size_class, map_bytes)

    def _foreign(self, charge: int) -> Shard | None:
        """A shard of another class that has room to spare."""
        found = [s for s in self._shelf.shards if s.room_bytes >= charge and not s.tired]
        return max(found, key=lambda s: s.room_bytes, default=None)
