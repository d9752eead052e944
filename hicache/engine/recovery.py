"""Warm start: what a durable tier held comes back into the tree, and what was cut off comes back to life.

Chains come in events of bounded size, parents first, while serving goes on. A chain whose pages nobody has stored
meanwhile is hung below its parent without a look at the prompt; any other goes the way of a store. Nothing leaves the
tier for room until its recovery is over (``room.make_room``): what comes next may hang below it.

A chain without its parent on the tier is *stranded* (``stranded.py``). Once the page before it can be read again, in
whatever tier, the chain hangs below it: it is found, and not written again. Where that page is not in the durable tier
itself it is a gap there, which is mended first.
"""

from __future__ import annotations

from array import array

from hicache.engine import commits, room
from hicache.engine.core import ABSENT, RESIDENT, TICKS_PER_MS, Core
from hicache.engine.events import Recovered, Recovering
from hicache.engine.holders import NamespaceState
from hicache.engine.stranded import StrandedChain, arriving, delete
from hicache.keys import KEY_BYTES, chain_keys
from hicache.policy import RunInfo
from hicache.tree import Run

STRANDED = -2
#: How often a recovered run's hits are told again to its policy: what tells a run used once from one used often.
TOLD_HITS = 4


def recovering(core: Core, event: Recovering) -> None:
    """Remember what is cleared meanwhile; the last word on it has been spoken when the recovery ends."""
    core.reading = event.going
    core.cleared.clear()


def clear_coming(core: Core, number: int) -> None:
    """What a recovery still brings of a namespace (0: of any) is to be deleted as it comes."""
    if core.reading or (number in core.recovering if number else core.recovering):
        core.cleared.add(number)


def recovered(core: Core, event: Recovered) -> None:
    """Hang what a durable tier held at start into the tree."""
    part = _Part(core, event)
    core.recovering.add(event.namespace)
    for number in range(len(event.parents)):
        part.bring(number)
    part.settle()
    if event.done:
        _end_recovery(core, part.namespace, event.tier)


def _end_recovery(core: Core, namespace: NamespaceState, tier: int) -> None:
    """Forget the numbers of the chains; pages beyond the tier's capacity, which may be smaller by now, leave."""
    core.recovering.discard(namespace.id)
    core.cleared.discard(namespace.id)
    if not core.recovering and not core.reading:
        core.cleared.clear()
    if core.recovering:
        for run in namespace.recovered:
            if run is not None:
                del core.chain_ends[run.id]
    else:
        core.chain_ends = {}
    namespace.recovered, namespace.recovered_keys, namespace.recovered_depths = [], {}, array("q")
    core.room_changed = True
    core.stranded.forget_numbers(namespace.id)
    find_parents(core, namespace, tier)
    revive(core)  # before any room is made: what can be matched again is not the first to go
    pool = namespace.pools[tier]
    if pool.available < 0:
        room.make_room(core, pool, 0, namespace.page_bytes, drop=True)


class _Part:
    """One event's chains on their way into the tree."""

    __slots__ = (
        "arriving",
        "charged",
        "cleared",
        "core",
        "event",
        "namespace",
        "pages",
        "policy",
        "pool",
        "tier",
        "tree",
    )

    def __init__(self, core: Core, event: Recovered) -> None:
        self.core = core
        self.event = event
        self.tier = event.tier
        self.namespace = core.namespaces[event.namespace]
        self.tree = self.namespace.tree
        self.pool = self.namespace.pools[event.tier]
        self.policy = self.pool.policy
        self.pages = self.charged = 0
        self.cleared = not core.cleared.isdisjoint((0, event.namespace))
        self.arriving = arriving(core, event.tier) if self.cleared else set()

    def bring(self, number: int) -> None:
        """Give one chain its place: in the tree, or among the stranded."""
        core, event = self.core, self.event
        keys, parent = event.keys[number], event.parents[number]
        ends = self.namespace.recovered
        above = self._above(parent) if parent >= 0 else None
        run: Run | None = None
        depth = 0
        if not keys or not core.readable[self.tier]:
            core.free_keys(self.tier, list(keys))  # the tier has been lost meanwhile
        elif self.cleared:
            gone = [key for key in keys if key not in self.arriving]
            core.free_keys(self.tier, gone)
            core.counters.dropped_pages[self.tier] += len(gone)
        elif parent == STRANDED or parent in self.namespace.recovered_keys:
            self._strand(number)
        elif parent >= 0 and above is None:
            core.free_keys(self.tier, list(keys))  # the page above has been dropped meanwhile
        else:
            depth = self.namespace.recovered_depths[parent] if parent >= 0 else 0
            run = self._hang(above, depth, number) or self._lay(above, number)
            core.chain_ends[run.id] = len(ends)
            depth += len(keys)
        ends.append(run)
        self.namespace.recovered_depths.append(depth)

    def _above(self, parent: int) -> Run | None:
        """The run in which a chain ends; None if its end has gone meanwhile."""
        run = self.namespace.recovered[parent]
        if run is None or run.state[self.tier] == RESIDENT:
            return run
        end = self.tree.depth_pages(run) + run.pages
        return run if end == self.namespace.recovered_depths[parent] else None

    def _history(self, number: int) -> tuple[int, int]:
        """The tick of a chain's last use, never later than now, and its hits."""
        event = self.event
        last_ms = event.last_use_ms[number] if event.last_use_ms else 0
        hits = event.hits[number] if event.hits else 0
        return min(last_ms, self.core.now_ms) * TICKS_PER_MS, hits

    def _strand(self, number: int) -> None:
        event, namespace = self.event, self.namespace
        parent = event.parents[number]
        parent_key = namespace.recovered_keys[parent] if parent >= 0 else event.parent_keys[number]
        keys = event.keys[number]
        tick, hits = self._history(number)
        charges = array("q", event.charges[number])
        index = len(namespace.recovered)
        namespace.recovered_keys[index] = keys[-1]
        chain = StrandedChain(namespace, event.symbols[number], b"".join(keys), charges, tick, hits, index)
        self.core.stranded.add(parent_key, chain)
        self.charged += sum(charges)

    def _hang(self, above: Run | None, depth: int, number: int) -> Run | None:
        """Hang a chain in a node of its own; None where that is not all there is to do. O(pages)."""
        core, event, tier = self.core, self.event, self.tier
        if self.pool.draining or (above is not None and above.state[tier] != RESIDENT):
            return None
        run = self.tree.hang(above, event.symbols[number])
        if run is None:
            return None
        tick, hits = self._history(number)
        keys = event.keys[number]
        places = array("q", event.charges[number])
        run.extra, run.tick, run.hits = self.namespace, tick, hits
        run.packed_keys = b"".join(keys)
        run.slots[tier] = places
        core.runs[run.id] = run
        leaf = self.tree.set_state(run, tier, RESIDENT)
        if core.news is not None:
            core.news.gained(run, tier)
        policy = self.policy
        if leaf is not None and not leaf.pins[tier]:
            policy.hide(leaf.id)
        policy.insert(run.id, RunInfo(run.pages, depth, keys[-1]), tick)
        for _ in range(min(hits, TOLD_HITS)):
            policy.hit(run.id, tick)
        policy.expose(run.id)
        self.pages += run.pages
        self.charged += sum(places)
        return run

    def _lay(self, above: Run | None, number: int) -> Run:
        event = self.event
        before = self.tree.prompt_to(above) if above is not None else b""
        keys, charges = b"".join(event.keys[number]), array("q", event.charges[number])
        tick, hits = self._history(number)
        chain = StrandedChain(self.namespace, event.symbols[number], keys, charges, tick, hits)
        return lay(self.core, before, self.tier, chain)

    def settle(self) -> None:
        """Write down what the whole part came to."""
        core = self.core
        self.pool.used += self.charged
        core.counters.recovered_pages += self.pages
        core.counters.pages[self.tier][RESIDENT] += self.pages


def lay(core: Core, before: bytes, tier: int, chain: StrandedChain) -> Run:
    """Give a chain's pages, which follow ``before``, their place; those stored anew gain their old copies.

    Returns the run in which they end. A page that the tier has or gets anyway is of the same key: it replaces the old.
    """
    namespace, tree = chain.namespace, chain.namespace.tree
    prompt, first = before + chain.symbols, len(before) // tree.symbol_bytes
    path = core.cut(namespace, tree.trace(prompt))
    rest = commits.from_page(core, path, first)
    if first:
        _note_gap(core, path[-len(rest) - 1], tier)
    page = 0
    run = path[-1] if path else None
    for run in rest:
        if run.state[tier] == ABSENT:
            _appear(core, run, tier, chain, page)
        page += run.pages
    if page < chain.pages:
        run = tree.insert(prompt, path[-1] if path else None, first + page, chain.pages - page)
        core.adopt(run, namespace)
        run.packed_keys = b"".join(chain.key_list()[page:])
        _appear(core, run, tier, chain, page)
    assert run is not None, "a chain without pages"
    return run


def _note_gap(core: Core, above: Run, tier: int) -> None:
    """Pages come to stand on the tier below this run: if the tier lacks it, that is a gap, to be mended."""
    if not above.live:
        core.holes.add(above)
    if above.state[tier] == ABSENT:
        core.gaps.add(above)
        if above.live:
            core.save_early(above, tier - 1)


def _appear(core: Core, run: Run, tier: int, chain: StrandedChain, page: int) -> None:
    """The run's pages, from ``page`` of the chain on, are in the tier. Those that nobody has used keep their age."""
    places = chain.charges[page : page + run.pages]
    new = not run.live
    core.pool(run, tier).used += sum(places)
    if new:
        run.tick, run.hits = chain.tick, max(run.hits, chain.hits)
    core.place(run, tier, places)
    core.set_state(run, tier, RESIDENT)
    for _ in range(min(chain.hits, TOLD_HITS)):
        core.pool(run, tier).policy.hit(run.id, run.tick)
    core.counters.recovered_pages += run.pages


# --- the stranded


def find_parents(core: Core, namespace: NamespaceState, tier: int) -> None:
    """Look at all that was stored while the stranded chains were not known yet. O(runs), where there are any."""
    if not core.stranded.has(namespace.id):
        return
    for node in namespace.tree.walk():
        core.returned.update(run for run in node.runs if run.live and run.state[tier] != RESIDENT)


def revive(core: Core) -> None:
    """Hang stranded chains below the pages that have come back."""
    while core.returned:
        runs = sorted(core.returned, key=lambda run: run.id)
        core.returned.clear()
        for run in runs:
            namespace = run.extra
            if isinstance(namespace, NamespaceState) and core.stranded.has(namespace.id) and run.live:
                _revive_below(core, namespace, run)


def _revive_below(core: Core, namespace: NamespaceState, run: Run) -> None:
    tree = namespace.tree
    prompt = tree.prompt_to(run)
    end = len(prompt) - run.pages * tree.symbol_bytes
    for key in core.keys(run):
        end += tree.symbol_bytes
        for chain in core.stranded.take(key):
            pool = namespace.pools[core.durable_tier]
            pool.used -= sum(chain.charges)
            last = lay(core, prompt[:end], core.durable_tier, chain)
            if namespace.id in core.recovering:  # those that hang below it are still to come
                namespace.recovered[chain.number] = last
                namespace.recovered_depths[chain.number] = end // tree.symbol_bytes + chain.pages
                core.chain_ends[last.id] = chain.number
                del namespace.recovered_keys[chain.number]
            core.counters.revived_pages += chain.pages


def drop_stranded(core: Core, number: int) -> int:
    """Have the stranded pages of a namespace (0: of all) deleted; returns how many."""
    if not core.stranded.pages:
        return 0
    for namespace in core.namespaces.values():
        if namespace.id in core.recovering and number in {0, namespace.id}:
            find_parents(core, namespace, core.durable_tier)  # what somebody has stored again is not stranded
    revive(core)
    return _delete(core, core.stranded.drop(number))


def drop_below(core: Core, namespace: NamespaceState, prompt: bytes) -> int:
    """Have the stranded pages from a prompt's last page on deleted; returns how many. O(prompt + them)."""
    if not core.stranded.has(namespace.id):
        return 0
    width = namespace.tree.symbol_bytes
    path = [namespace.fingerprint, *chain_keys(namespace.fingerprint, prompt, width)]
    doomed: list[StrandedChain] = []
    for at, key in enumerate(path):
        ahead = b"".join(path[at + 1 :])
        doomed += core.stranded.take(key, starting=ahead)
    for chain in doomed:  # which grows
        doomed += core.stranded.take(chain.keys[-KEY_BYTES:])
    return _delete(core, doomed)


def _delete(core: Core, chains: list[StrandedChain]) -> int:
    """Delete chains that are in the ledger no more; returns their pages."""
    pages = 0
    for chain in chains:
        chain.namespace.pools[core.durable_tier].used -= sum(chain.charges)
        delete(core, chain.key_list())
        pages += chain.pages
    core.counters.dropped_pages[core.durable_tier] += pages
    return pages
