"""Traces from recordings: a sidecar's own (``hicache serve --record``), or converted ones.

A request that was looked up and then stored left two entries; they come out as one request. Its ``blocks`` are
those of the longer one; what lies beyond ``input_tokens`` was stored, not asked for. A store without a look-up is a
request with ``input_tokens`` 0.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from hicache import recording
from hicache.errors import InvalidArgumentError
from hicache.recording import BlockKind, Damaged, Entry, EntryKind
from hicache.sim.traces import source
from hicache.sim.traces.model import Problems, Request

#: A look-up waits for its store while fewer entries than this came after it (and less than PAIR_MS passed).
PAIR_ENTRIES = 4096
PAIR_MS = 60_000


@dataclasses.dataclass(slots=True)
class _Waiting:
    """A look-up whose store may still come."""

    number: int
    entry: Entry
    store: Entry | None = None

    def request(self) -> Request:
        entry, store = self.entry, self.store
        blocks, output = entry.ids, entry.output_tokens
        if store is not None and len(store.ids) > len(blocks):
            output = max(output, (len(store.ids) - len(blocks)) * entry.page_tokens)
            blocks = store.ids
        return _request(entry, blocks, entry.input_tokens, output)


def _request(entry: Entry, blocks: array[int], asked: int, answered: int) -> Request:
    return Request(
        entry.at_ms, asked, answered, blocks, cls=entry.cls, turn=entry.turn, session=entry.session
    )


class RecordingTrace:
    """A recording. A damaged or cut file is read up to there; that is noted, or raised with ``strict``.

    Namespaces with pages of other sizes than the first one's (or than ``block_tokens``) are left out, and noted.
    """

    def __init__(self, path: Path, *, block_tokens: int, strict: bool) -> None:
        self.path = path
        self.format = "recording"
        self.problems = Problems()
        self._strict = strict
        self._sha256 = ""
        self.block_tokens = block_tokens or self._first_grain()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def sha256(self) -> str:
        """Of the uncompressed bytes; read once, then remembered."""
        if not self._sha256:
            self._sha256 = source.sha256(self.path)
        return self._sha256

    def info(self) -> dict[str, object]:
        """What the file tells of itself; empty where that is damaged."""
        with source.opened(self.path) as stream:
            try:
                recording.read_magic(stream)
                block = recording.read_block(stream)
                found = json.loads(block[1]) if block and block[0] == BlockKind.INFO else {}
            except (*source.DAMAGE, Damaged):
                return {}
        return found if isinstance(found, dict) else {}

    def _first_grain(self) -> int:
        first = next((entry.page_tokens for _, entry in self._entries(Problems())), 0)
        told = self.info().get("block_tokens", 0)
        return first or (told if isinstance(told, int) else 0) or 1

    def __iter__(self) -> Iterator[Request]:
        """The requests, by the time of their look-up."""
        self.problems = problems = Problems()
        waiting: deque[_Waiting] = deque()
        others: set[str] = set()
        for number, (block, entry) in enumerate(self._entries(problems)):
            if entry.page_tokens != self.block_tokens:
                if entry.space not in others:
                    others.add(entry.space)
                    problems.note(
                        block, f"namespace {entry.space} has pages of {entry.page_tokens} tokens: left out"
                    )
                continue
            if entry.kind is EntryKind.STORE and self._joins(waiting, number - entry.of, entry):
                continue
            waiting.append(
                _Waiting(number, _asked_nothing(entry) if entry.kind is EntryKind.STORE else entry)
            )
            while waiting and (
                waiting[0].number <= number - PAIR_ENTRIES or waiting[0].entry.at_ms < entry.at_ms - PAIR_MS
            ):
                yield waiting.popleft().request()
        for left in waiting:
            yield left.request()

    @staticmethod
    def _joins(waiting: deque[_Waiting], number: int, store: Entry) -> bool:
        if not store.of:
            return False
        for found in reversed(waiting):
            if found.number == number:
                found.store = store
                return True
            if found.number < number:
                return False
        return False

    def _entries(self, problems: Problems) -> Iterator[tuple[int, Entry]]:
        block = 0
        with source.opened(self.path) as stream:
            try:
                recording.read_magic(stream)
                while (found := recording.read_block(stream)) is not None:
                    block += 1
                    if found[0] == BlockKind.ENTRIES:
                        for entry in recording.entries(found[1]):
                            yield block, entry
                if not block:  # a writer begins with what it has to say of the file
                    raise Damaged("the file ends before its first block")
            except source.DAMAGE as error:
                if self._strict:
                    raise InvalidArgumentError(f"{self.path}: block {block + 1}: {error}") from error
                problems.note(block + 1, f"the recording cannot be read on from here: {error}")


def _asked_nothing(store: Entry) -> Entry:
    return dataclasses.replace(store, input_tokens=0, output_tokens=len(store.ids) * store.page_tokens)
