"""The synchronous face of ``batch``: many short prompts of one namespace, from a thread of the caller's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from hicache.errors import ExhaustedError, HicacheError, StaleError, UnavailableError
from hicache.rpc.client.batch import Place, StoreAsk, Stored, match_many, store_many
from hicache.rpc.client.buffers import Bytes
from hicache.rpc.client.client import Client, NamespaceHandle
from hicache.rpc.client.core import Budget
from hicache.rpc.client.region import Block
from hicache.rpc.client.staging import ForeignMemory

#: Pages are gathered and sent in parts of this size: bounded memory, and still in the processor's cache.
PART_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class PageSource:
    """A page's bytes: pieces in their order. With ``memory`` it is one piece that lies there, at ``offset``."""

    pieces: Sequence[Bytes]
    memory: ForeignMemory | None = None
    offset: int = 0


class Batches:
    """Look-ups and stores of many prompts in one namespace. Any thread may call it."""

    def __init__(self, client: Client, namespace: NamespaceHandle) -> None:
        self._driver = client._driver
        self._core = client.core
        self._namespace = namespace._state
        self.handle = namespace

    def match(self, prompts: Sequence[bytes], timeout_s: float) -> list[int]:
        """How many pages of each prompt are cached; counts as a use, in the order given."""
        return self._driver.run(match_many(self._core, self._namespace, prompts, self._budget(timeout_s)))

    def store(
        self, stores: Sequence[tuple[bytes, Sequence[PageSource]]], ask: StoreAsk, timeout_s: float
    ) -> list[Stored]:
        """Store what is missing of each prompt. One outcome each; raises HicacheError where nothing was answered.

        The memory of a page that lies in an ForeignMemory must stand still until this returns; later it may change,
        whatever became of the call: the server compares checksums.
        """
        deadline_ns = self._core.now_ns() + int(timeout_s * 1e9)
        done: list[Stored] = []
        for part in self._parts(stores):
            left_s = (deadline_ns - self._core.now_ns()) / 1e9
            if left_s <= 0:
                raise UnavailableError(f"{len(done)} of {len(stores)} prompts were stored in the time given")
            done += self._store_part(part, ask, left_s)
        return done

    def _budget(self, timeout_s: float) -> Budget:
        return self._core.budget(timeout_s)

    def _parts(
        self, stores: Sequence[tuple[bytes, Sequence[PageSource]]]
    ) -> Iterator[Sequence[tuple[bytes, Sequence[PageSource]]]]:
        """As many prompts at once as PART_BYTES hold, one at least."""
        if not stores:
            return
        each = max(1, PART_BYTES // (len(stores[0][1]) * self._namespace.spec.page_bytes))
        for first in range(0, len(stores), each):
            yield stores[first : first + each]

    def _store_part(
        self, part: Sequence[tuple[bytes, Sequence[PageSource]]], ask: StoreAsk, timeout_s: float
    ) -> list[Stored]:
        staging = _Staging(self._core.memory.allocate, self._namespace.spec.page_bytes)
        settled = False
        try:
            staging.expect(sum(source.memory is None for _, sources in part for source in sources))
            placed = [(prompt, [staging.place(source) for source in sources]) for prompt, sources in part]
            steps = store_many(self._core, self._namespace, placed, ask, self._budget(timeout_s))
            answer = self._driver.run(steps)
            settled = True
        except HicacheError as error:
            settled = not isinstance(error, UnavailableError | StaleError)
            raise
        finally:
            for block in staging.blocks:
                if not settled:  # the server may still read there
                    self._core.memory.poison(block.region)
                for index in range(block.pages):
                    at = block.offset + index * self._namespace.spec.page_bytes
                    self._core.memory.free(block.region, at, self._namespace.spec.page_bytes)
        return answer


class _Staging:
    """Places in the client's own memory for pages that are gathered."""

    def __init__(self, allocate: object, page_bytes: int) -> None:
        assert callable(allocate), "allocate is WriteMemory.allocate"
        self._allocate = allocate
        self._page_bytes = page_bytes
        self._free: list[tuple[Block, int]] = []
        self.blocks: list[Block] = []

    def expect(self, pages: int) -> None:
        """Take room for so many pages. Raises ExhaustedError."""
        while pages > 0:
            block: Block = self._allocate(self._page_bytes, pages)
            self.blocks.append(block)
            self._free += [(block, index) for index in range(block.pages)]
            pages -= block.pages
        self._free.reverse()

    def place(self, source: PageSource) -> Place:
        """Where the server finds the page: where it is, or a copy."""
        if source.memory is not None:
            checksum = xxhash.xxh3_64_intdigest(source.pieces[0].data)
            return Place(source.memory.region, source.offset, checksum)
        if not self._free:
            raise ExhaustedError("more pages are gathered than were expected")
        block, index = self._free.pop()
        offset = block.offset + index * self._page_bytes
        row = block.region.bytes[offset : offset + self._page_bytes]
        digest, at = xxhash.xxh3_64(), 0
        for piece in source.pieces:
            np.copyto(row[at : at + piece.nbytes], piece)
            digest.update(row[at : at + piece.nbytes].data)
            at += piece.nbytes
        return Place(block.region, offset, digest.intdigest())
