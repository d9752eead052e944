"""A bounded memory of pages that have left: ghost ids in order of arrival, each with a small number.

Open addressing over flat arrays, so that a ghost costs bytes, not objects: at most 48 a ghost when full (key 8, note
8, two links 4 each, two to four places of 4 in the index; ``tests/policy`` measures it). A new id at the limit pushes
out the oldest. Every operation is O(1) expected.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

_WORD = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: spreads ids that differ in their low bits only
_FIRST_ROOM = 64


class GhostTable:
    """Ids to notes (ints below 2**63), oldest first; adding an id that is there makes it the newest."""

    __slots__ = ("_after", "_before", "_free", "_index", "_keys", "_notes", "_shift", "limit", "size")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        room = _FIRST_ROOM
        self._keys = array("Q", bytes(8 * (room + 1)))
        self._notes = array("q", bytes(8 * (room + 1)))
        self._before = array("I", bytes(4 * (room + 1)))  # place 0 is the list's head
        self._after = array("I", [0, *range(2, room + 1), 0])  # of free places: the next free one
        self._free = 1
        self._clear_index(room)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        """The ids, oldest first."""
        after, keys = self._after, self._keys
        place = after[0]
        while place:
            yield keys[place]
            place = after[place]

    def get(self, ghost: int) -> int:
        """The note of an id; -1 if it is not there."""
        index, keys = self._index, self._keys
        mask = len(index) - 1
        ghost &= _WORD
        at = (ghost * _MIX & _WORD) >> self._shift
        while place := index[at]:
            if keys[place] == ghost:
                return self._notes[place]
            at = at + 1 & mask
        return -1

    def add(self, ghost: int, note: int) -> None:
        """Remember an id as the newest."""
        if self.limit <= 0:
            return
        if self.size:
            self.pop(ghost)
        while self.size >= self.limit:
            self.pop(self._keys[self._after[0]])
        place = self._free
        if not place:
            self._grow()
            place = self._free
        after, before = self._after, self._before
        self._free = after[place]
        self._keys[place] = ghost & _WORD
        self._notes[place] = note
        newest = before[0]
        after[newest] = before[0] = place
        before[place], after[place] = newest, 0
        self._enter(place)
        self.size += 1

    def add_all(self, ghosts: Sequence[int], note: int) -> None:
        """Remember ids in the order in which leaves leave: the last page of a prompt first."""
        for ghost in reversed(ghosts):
            self.add(ghost, note)

    def pop(self, ghost: int) -> int:
        """Forget an id; its note, or -1 if it was not there."""
        index, keys = self._index, self._keys
        mask = len(index) - 1
        ghost &= _WORD
        at = (ghost * _MIX & _WORD) >> self._shift
        while place := index[at]:
            if keys[place] == ghost:
                self._close(at)
                return self._release(place)
            at = at + 1 & mask
        return -1

    def recall(self, ghosts: Sequence[int]) -> int:
        """Forget all of these; the note of the first of them, or -1 if it was not there."""
        note = -1
        if ghosts and self.size:
            note = self.pop(ghosts[0])
            for ghost in ghosts[1:] if note >= 0 else ():
                self.pop(ghost)
        return note

    def shrink(self, limit: int) -> None:
        """Forget the oldest until there are so many at most."""
        while self.size > max(0, limit):
            self.take_oldest()

    def take_oldest(self) -> int:
        """Forget the oldest id; its note, or -1 if there is none."""
        return self.pop(self._keys[self._after[0]]) if self.size else -1

    def notes(self, stride: int = 1) -> Iterator[int]:
        """The notes of about one id in ``stride``, in no order."""
        index, notes = self._index, self._notes
        for at in range(0, len(index), stride):
            if index[at]:
                yield notes[index[at]]

    def missing(self, ghosts: Sequence[int], start: int = 0) -> int:
        """Where the first id from ``start`` on stands that is here; the end if none is."""
        index, keys, shift = self._index, self._keys, self._shift
        mask = len(index) - 1
        for number in range(start, len(ghosts)):
            ghost = ghosts[number] & _WORD
            at = (ghost * _MIX & _WORD) >> shift
            while place := index[at]:
                if keys[place] == ghost:
                    return number
                at = at + 1 & mask
        return len(ghosts)

    def leading(self, ghosts: Sequence[int]) -> int:
        """How many of the ids, from the first on, are here."""
        count = 0
        for ghost in ghosts:
            if self.get(ghost) < 0:
                break
            count += 1
        return count

    def resize(self, limit: int) -> None:
        """Another limit; the oldest go if it is smaller."""
        self.limit = limit
        self.shrink(limit)

    def nbytes(self) -> int:
        """What the arrays take."""
        arrays = (self._index, self._keys, self._notes, self._after, self._before)
        return sum(each.itemsize * len(each) for each in arrays)

    def _clear_index(self, room: int) -> None:
        bits = (2 * room - 1).bit_length()
        self._index = array("I", bytes(4 << bits))
        self._shift = 64 - bits

    def _grow(self) -> None:
        """Half as much room again: O(size), paid for by the ids that filled it."""
        room = len(self._keys) - 1
        more = max(1, min(room // 2, self.limit - room))
        first = room + 1
        self._keys.frombytes(bytes(8 * more))
        self._notes.frombytes(bytes(8 * more))
        self._before.frombytes(bytes(4 * more))
        self._after.extend(range(first + 1, first + more))
        self._after.append(0)
        self._free = first
        if 3 * (room + more) > 2 * len(self._index):
            self._clear_index(room + more)
            place = self._after[0]
            while place:
                self._enter(place)
                place = self._after[place]

    def _enter(self, place: int) -> None:
        index = self._index
        mask = len(index) - 1
        at = (self._keys[place] * _MIX & _WORD) >> self._shift
        while index[at]:
            at = at + 1 & mask
        index[at] = place

    def _close(self, at: int) -> None:
        """Empty one index place and move up what stood behind it, so that no search ends early."""
        index, keys, shift = self._index, self._keys, self._shift
        mask = len(index) - 1
        hole = at
        while True:
            at = at + 1 & mask
            place = index[at]
            if not place:
                break
            home = (keys[place] * _MIX & _WORD) >> shift
            if (at - home & mask) >= (at - hole & mask):
                index[hole] = place
                hole = at
        index[hole] = 0

    def _release(self, place: int) -> int:
        before, after = self._before, self._after
        older, newer = before[place], after[place]
        after[older] = newer
        before[newer] = older
        after[place] = self._free
        self._free = place
        self.size -= 1
        return self._notes[place]
