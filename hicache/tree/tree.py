"""The radix tree: where pages stand, and what is known of them.

Rules: looking reads only. No call recurses; none scans the tree, ``walk`` and ``check`` excepted. The
structure changes here only; which change of state is allowed is decided above. One thread owns a tree.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from hicache.errors import ViolationError
from hicache.keys import KEY_BYTES, chain_keys
from hicache.tree.audit import audit
from hicache.tree.edit import add_pages, drop_last_run, hang_node, removable
from hicache.tree.node import (
    ABSENT,
    LIVE,
    Match,
    Node,
    Run,
    count_above,
    index_at,
    next_runs,
    parent_run,
    present,
)
from hicache.tree.walk import walk_all, walk_live


class Tree:
    """Pages of one symbol width in ``tiers`` tiers.

    Args:
        symbol_bytes: width of one page's symbol.
        tiers: how many tiers a run keeps state for.
        ids: run ids, shared between trees so that an id names one run everywhere.
    """

    def __init__(self, symbol_bytes: int, tiers: int, ids: Iterator[int]) -> None:
        self.symbol_bytes = symbol_bytes
        self.tiers = tiers
        self.ids = ids
        self.root = Node(b"", None)

    # --- looking

    def match(self, prompt: bytes) -> Match:
        """The longest known prefix of whole pages without a hole.

        Reads only. One memcmp a node; ``prompt`` is a whole number of symbols.
        """
        return walk_live(self.root, prompt, self.symbol_bytes)

    def trace(self, prompt: bytes) -> Match:
        """The longest prefix that has a place in the tree, holes included: where ``insert`` would continue.

        Reads only. One memcmp a node; ``prompt`` is a whole number of symbols.
        """
        return walk_all(self.root, prompt, self.symbol_bytes)

    def runs(self, match: Match) -> tuple[list[Run], int]:
        """The matched runs in order from the root, and how many pages of the last one. O(runs)."""
        found: list[Run] = []
        if not match.nodes:
            return found, 0
        *above, last = match.nodes
        for node in above:
            found += node.runs
        if match.last_pages * self.symbol_bytes == len(last.edge):
            found += last.runs
        else:
            found += last.runs[: index_at(last, match.last_pages)]
        return found, match.last_pages - found[-1].start

    def cut(self, match: Match) -> list[Run]:
        """The runs that cover exactly the matched pages, in order from the root. O(runs).

        Where the match ends inside a run, that run is split: the pages that are not matched become a new run,
        which follows the last one returned.
        """
        found, pages = self.runs(match)
        if found and pages < found[-1].pages:
            self.split_run(found[-1], pages)
        return found

    def parent_run(self, run: Run) -> Run | None:
        """The run just before this one, None at the root. O(log runs of the node)."""
        return parent_run(run)

    def child_runs(self, run: Run) -> list[Run]:
        """The runs just after this one. O(log runs of the node + child nodes)."""
        return next_runs(run)

    def depth_pages(self, run: Run) -> int:
        """Pages between the root and the run. O(nodes above)."""
        length = 0
        node = run.node.parent
        while node is not None:
            length += len(node.edge)
            node = node.parent
        return run.start + length // self.symbol_bytes

    def symbols(self, run: Run) -> bytes:
        """The symbols of the run's pages, concatenated. O(pages)."""
        width = self.symbol_bytes
        return bytes(run.node.edge[run.start * width : (run.start + run.pages) * width])

    def prompt_to(self, run: Run) -> bytes:
        """The symbols of every page from the root to the run's end. O(pages)."""
        parts = [run.node.edge[: (run.start + run.pages) * self.symbol_bytes]]
        node = run.node.parent
        while node is not None:
            parts.append(node.edge)
            node = node.parent
        return b"".join(reversed(parts))

    def page_keys(self, run: Run, seed: bytes) -> list[bytes]:
        """Page keys of the run, as a list that is the caller's. ``seed`` is the key before the first page.

        O(pages), plus once in its life each page above; keys are kept in ``run.packed_keys``.
        """
        missing: list[Run] = []
        above: Run | None = run
        while above is not None and above.packed_keys is None:
            missing.append(above)
            above = parent_run(above)
        key = (above.last_key if above is not None else None) or seed
        for each in reversed(missing):
            keys = chain_keys(key, self.symbols(each), self.symbol_bytes)
            each.packed_keys = b"".join(keys)
            key = keys[-1]
        return run.keys or []

    def walk(self) -> Iterator[Node]:
        """Every node but the root, a parent before its children. The tree must not change meanwhile."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def check(self) -> None:
        """Compare the whole tree with its invariants. O(everything); raises ViolationError."""
        audit(self)

    # --- changing

    def insert(self, prompt: bytes, after: Run | None, first_page: int, pages: int) -> Run:
        """Give pages ``[first_page, first_page + pages)`` of the prompt a place: a run, ABSENT everywhere.

        ``after`` ends at ``first_page`` on the prompt's own path (the caller's word: not checked); None
        stands for the root. Costs a copy of the pages' symbols, of a short edge when it is extended, and
        O(runs of the node) when a node is split.

        Raises:
            ViolationError: the pages are not in the prompt, or the first one already has a place. Nothing
                changed.
        """
        width = self.symbol_bytes
        symbols = prompt[first_page * width : (first_page + pages) * width]
        if pages < 1 or len(symbols) != pages * width:
            raise ViolationError(f"insert: pages {first_page}+{pages} of a prompt of {len(prompt)} bytes")
        if after is not None and after.tree is not self:
            raise ViolationError(f"insert: {after} is of another tree")
        if (first_page == 0) != (after is None):
            raise ViolationError(f"insert: page {first_page} cannot stand after {after}")
        return add_pages(self, after, symbols)

    def hang(self, after: Run | None, symbols: bytes) -> Run | None:
        """A new run of these symbols in a node of its own just after ``after``, ABSENT everywhere. O(1).

        None, and nothing changed, where ``after`` does not end its node or the first page has a place already: then
        ``insert`` finds the way.
        """
        return hang_node(self, after, symbols)

    def split_run(self, run: Run, pages: int) -> Run:
        """Split so that ``run`` keeps its first ``pages``; returns the new run that holds the rest.

        The rest takes the anchors along and copies everything else; whoever holds the run holds both, one
        after the other. Both sides get new slot arrays. O(pages + runs of the node). Raises ViolationError
        for ``pages`` outside ``1..run.pages - 1``.
        """
        if not 0 < pages < run.pages:
            raise ViolationError(f"split: {run} cannot keep {pages} pages")
        tail = Run(self, run.node, run.start + pages, run.pages - pages)
        run.node.runs.insert(index_at(run.node, run.start) + 1, tail)
        run.pages = pages
        tail.state = run.state.copy()
        tail.pins = run.pins.copy()
        tail.live, tail.tick, tail.hits, tail.extra = run.live, run.tick, run.hits, run.extra
        tail.use = run.use
        tail.anchors, run.anchors = run.anchors, 0
        tail.below = run.below
        run.below = [int(present(tail, tier)) for tier in range(self.tiers)]
        for tier, slots in enumerate(run.slots):
            if slots is not None:
                tail.slots[tier] = slots[pages:]
                run.slots[tier] = slots[:pages]
        if run.packed_keys is not None:
            tail.packed_keys = run.packed_keys[pages * KEY_BYTES :]
            run.packed_keys = run.packed_keys[: pages * KEY_BYTES]
        if not run.live:
            run.node.holes += 1
        for holder in run.holders:
            holder.runs.insert(holder.runs.index(run) + 1, tail)
            tail.holders.append(holder)
        return tail

    def set_state(self, run: Run, tier: int, state: int) -> Run | None:
        """Change the run's residency in one tier, and what its node and its ancestors count.

        O(1), plus O(ancestors that have nothing else in the tier) when the run appears there or vanishes.
        Returns the one ancestor, if any, that is not ABSENT in the tier and thereby became a leaf of it, or
        ceased to be one.
        """
        old = run.state[tier]
        if old == state:
            return None
        run.state[tier] = state
        if (old in LIVE) != (state in LIVE):
            run.live += 1 if state in LIVE else -1
            if state in LIVE and run.live == 1:
                run.node.holes -= 1
            elif not run.live:
                run.node.holes += 1
        if (old == ABSENT or state == ABSENT) and not run.below[tier]:
            return count_above(parent_run(run), tier, 1 if old == ABSENT else -1)
        return None

    def set_slots(self, run: Run, tier: int, slots: array[int] | None) -> None:
        """Give the run its slots in a tier, one a page; the array is the tree's from now on.

        O(1). Raises ViolationError for another number of slots.
        """
        if slots is not None and len(slots) != run.pages:
            raise ViolationError(f"set_slots: {len(slots)} slots for {run}")
        run.slots[tier] = slots

    def try_merge(self, run: Run, many_hits: int = 0) -> Run | None:
        """Take over the next run of the same node when the two have one residency, history and ``extra``.

        Never when either is held, pinned or anchored. ``many_hits``: from so many on hits are alike (0: never); the
        sum of both is as much used as the first. Returns the run that is no more, or None. O(pages).
        """
        siblings = run.node.runs
        if siblings[-1] is run:
            return None
        index = index_at(run.node, run.start) + 1
        after = siblings[index]
        if not _alike(run, after, many_hits):
            return None
        del siblings[index]
        run.pages += after.pages
        run.below = after.below
        for tier, slots in enumerate(after.slots):
            mine = run.slots[tier]
            run.slots[tier] = mine + slots if mine is not None and slots is not None else None
        keys, more = run.packed_keys, after.packed_keys
        run.packed_keys = keys + more if keys is not None and more is not None else None
        if not run.live:
            run.node.holes -= 1
        return after

    def prune(self, run: Run) -> list[Run]:
        """Take a run out of the tree, and upwards every run that has become as useless.

        That is: ABSENT everywhere, nothing after it, not held, pinned or anchored. Returns what was removed,
        deepest first; nothing if the run itself must stay. O(removed), amortised: a long edge is copied once.
        """
        removed: list[Run] = []
        last: Run | None = run
        while last is not None and removable(last):
            above = parent_run(last)
            drop_last_run(last, self.symbol_bytes)
            removed.append(last)
            last = above
        return removed


def _alike(run: Run, after: Run, many_hits: int) -> bool:
    """Whether two neighbours could be one run."""
    return (
        run.tick == after.tick
        and (run.hits == after.hits or 0 < many_hits <= min(run.hits, after.hits))
        and run.state == after.state
        and (run.extra, run.use) == (after.extra, after.use)
        and not (run.holders or after.holders or run.anchors or after.anchors)
        and not (any(run.pins) or any(after.pins))
    )
