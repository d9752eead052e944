"""A small leaf-first driver: one pool, prefix-chained block ids, a policy, and no engine around it.

For truth and for trying policies: what a policy is worth in a tree, in seconds instead of minutes. A request is
matched from its first block, the path it matched is pinned, what is missing is stored if room can be made from
unpinned leaves, and the last victim gives no more pages than are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from hicache.policy import Policy, RunInfo

TICKS = 1024  # between two requests: not the one tick that parts a fetch from the store after it


class _Run:
    """Consecutive blocks that share one place in the policy's order."""

    __slots__ = ("above", "below", "blocks", "depth", "ident")

    def __init__(self, ident: int, blocks: Sequence[int], above: _Run | None, depth: int) -> None:
        self.ident = ident
        self.blocks = blocks
        self.above = above
        self.below = 0
        self.depth = depth


@dataclasses.dataclass(slots=True)
class LeafResult:
    """What a replay counted, in blocks."""

    blocks: int = 0
    hits: int = 0

    @property
    def ratio(self) -> float:
        """Hits in the prefix over blocks asked for."""
        return self.hits / self.blocks if self.blocks else 0.0


class LeafCache:
    """One pool of ``capacity`` pages."""

    def __init__(self, policy: Policy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.used = 0
        self.result = LeafResult()
        self._first: dict[int, _Run] = {}  # by the first block's id, which stands for all before it too
        self._runs: dict[int, _Run] = {}
        self._next_id = 0
        self._tick = 0

    def replay(self, requests: Iterable[Sequence[int]]) -> LeafResult:
        """All requests in turn."""
        for blocks in requests:
            self.request(blocks)
        return self.result

    def request(self, blocks: Sequence[int], cls: str = "", turn: int = 0) -> int:
        """One prompt: matched, touched, stored. Returns how many blocks it hit."""
        self._tick += TICKS
        path, found = self._match(blocks)
        policy = self.policy
        for run in path:
            policy.hit(run.ident, self._tick)
        last = path[-1] if path else None
        if last is not None:
            policy.hide(last.ident)
        missing = blocks[found : self.capacity]  # what is matched fits, so this does too
        if missing:
            room = self._make_room(len(missing), last)
            self._store(missing[:room], last, cls, turn)
        elif last is not None and not last.below:
            policy.expose(last.ident)
        self.result.blocks += len(blocks)
        self.result.hits += found
        return found

    def _match(self, blocks: Sequence[int]) -> tuple[list[_Run], int]:
        path: list[_Run] = []
        at, total = 0, len(blocks)
        while at < total:
            run = self._first.get(blocks[at])
            if run is None:
                break
            here = run.blocks
            size = len(here)
            if blocks[at : at + size] != here:
                size = min(size, total - at)
                size = next((i for i in range(1, size) if blocks[at + i] != here[i]), size)
                run = self._split(run, size)
            path.append(run)
            at += size
        return path, at

    def _split(self, run: _Run, keep: int) -> _Run:
        """Cut a run in two; returns the head. The object becomes the tail, since what is below points at it."""
        head = _Run(run.ident, run.blocks[:keep], run.above, run.depth)
        head.below = 1
        self._next_id += 1
        run.ident = self._next_id
        run.blocks = run.blocks[keep:]
        run.above = head
        run.depth += keep
        self._first[head.blocks[0]] = self._runs[head.ident] = head
        self._first[run.blocks[0]] = self._runs[run.ident] = run
        self.policy.split(head.ident, run.ident, len(run.blocks))
        self.policy.hide(head.ident)
        if not run.below:
            self.policy.expose(run.ident)
        return head

    def _make_room(self, need: int, pinned: _Run | None) -> int:
        """Evict until ``need`` pages are free, or nothing is left that may go; returns how many may be stored."""
        free = self.capacity - self.used
        if free >= need:
            return need
        plan = self.policy.begin()
        gained = free
        chosen: list[tuple[_Run, int]] = []
        gone: dict[int, int] = {}
        while gained < need:
            ident = plan.next()
            if ident is None:
                break
            run = self._runs[ident]
            pages = min(len(run.blocks), need - gained)
            gained += pages
            chosen.append((run, pages))
            above = run.above
            if pages == len(run.blocks) and above is not None:
                gone[above.ident] = gone.get(above.ident, 0) + 1
                if gone[above.ident] == above.below and above is not pinned:
                    plan.expose(above.ident)
        plan.commit([run.ident for run, pages in chosen if pages == len(run.blocks)])
        for run, pages in chosen:
            self._evict(run, pages, pinned)
        return min(need, gained)

    def _evict(self, run: _Run, pages: int, pinned: _Run | None) -> None:
        policy = self.policy
        keep = len(run.blocks) - pages
        ghosts = run.blocks[keep:] if policy.wants_ghosts else ()
        self.used -= pages
        if keep:
            policy.trim(run.ident, pages, ghosts)
            run.blocks = run.blocks[:keep]
            return
        policy.forget(run.ident, ghosts)
        del self._runs[run.ident], self._first[run.blocks[0]]
        above = run.above
        if above is not None:
            above.below -= 1
            if not above.below and above is not pinned:
                policy.expose(above.ident)

    def _store(self, blocks: Sequence[int], above: _Run | None, cls: str, turn: int) -> None:
        """Store a stretch below a run, cut where the policy's memory ends."""
        policy = self.policy
        if not blocks:
            if above is not None and not above.below:
                policy.expose(above.ident)
            return
        ghosts = policy.wants_ghosts
        cut = policy.known(blocks) if ghosts else 0
        depth = above.depth + len(above.blocks) if above is not None else 0
        for piece in (blocks[:cut], blocks[cut:]):
            if piece:
                self._next_id += 1
                run = _Run(self._next_id, piece, above, depth)
                self._runs[run.ident] = self._first[piece[0]] = run
                policy.insert(
                    run.ident,
                    RunInfo(len(piece), depth, None, cls, turn, 1.0),
                    self._tick,
                    piece if ghosts else (),
                )
                if above is not None:
                    above.below += 1
                above = run
                depth += len(piece)
        self.used += len(blocks)
        assert above is not None
        policy.expose(above.ident)
