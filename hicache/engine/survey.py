"""A survey: the trees walked in pieces, parents first, while they go on changing.

``told`` (ids of runs) is closed under ancestors. A node waits in ``todo`` by itself: should it be split meanwhile, its
lower part keeps the object, and the walk first climbs to what is not told yet; should it be pruned, it is empty. A run
that appears below a told one is told at once (``news``), so that nothing is missed behind the walk; a node that cannot
be reached when its turn comes is left out, since it is told when its hole is mended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hicache.engine.names import namespace_of
from hicache.engine.sound import reachable, sound
from hicache.keys import chain_keys
from hicache.tree import Run
from hicache.tree.node import Node, parent_run

if TYPE_CHECKING:
    from hicache.engine.core import Core
    from hicache.engine.holders import NamespaceState

#: What one piece may cost, in pages to hash; a run costs RUN_COST besides, a node to look at LOOK_COST, and pages whose
#: keys are known cost one for every KNOWN_PAGES.
PIECE_COST = 1024
RUN_COST = 24
LOOK_COST = 4
KNOWN_PAGES = 4


class Survey:
    """One walk, for the watchers of one tenant (empty: of all)."""

    def __init__(self, number: int, tenant: str, namespaces: list[NamespaceState]) -> None:
        self.id = number
        self.told: set[int] = set()
        self._tenant = tenant
        self._namespaces = [namespace for namespace in namespaces if self.covers(namespace)]
        self._todo: list[Node] = []
        self._hashed: tuple[Run, list[bytes]] | None = None  # the keys of a long run, so far

    def covers(self, namespace: NamespaceState) -> bool:
        """Whether it tells of this namespace."""
        return not self._tenant or namespace.spec.tenant == self._tenant

    def may_tell(self, run: Run) -> bool:
        """Whether all that stands above the run is told."""
        above = parent_run(run)
        return above is None or above.id in self.told

    @property
    def over(self) -> bool:
        """Whether everything is told."""
        return not self._todo and not self._namespaces

    def piece(self, core: Core) -> Iterator[Run]:
        """The runs to tell next, about PIECE_COST of them. The caller changes nothing meanwhile."""
        left = PIECE_COST
        while left > 0 and not self.over:
            if not self._todo:
                self._todo += self._namespaces.pop().tree.root.children.values()
                continue
            left -= LOOK_COST
            for node in self._untold_path(core, self._todo.pop()):
                for run in node.runs:
                    if not sound(core, run):
                        break
                    if run.id in self.told:
                        continue
                    if left > 0:
                        left -= self._hash(core, run, left)
                    if left <= 0 or run.packed_keys is None:
                        self._todo.append(node)
                        return
                    left -= RUN_COST + run.pages // KNOWN_PAGES
                    self.told.add(run.id)
                    yield run
                else:
                    self._todo += node.children.values()
                    continue
                break

    def _untold_path(self, core: Core, node: Node) -> list[Node]:
        """A node and those above it that are not told, from the top; nothing where they cannot be reached."""
        path: list[Node] = []
        above: Node | None = node
        while above is not None and above.parent is not None:
            if not above.runs:  # it was pruned
                return []
            if path and above.runs[-1].id in self.told:
                break
            path.append(above)
            above = above.parent
        path.reverse()
        return path if path and reachable(core, path[0].runs[0]) else []

    def _hash(self, core: Core, run: Run, most: int) -> int:
        """Have the run's keys worked out, of a long run as many as are left to this piece; what that cost."""
        if run.packed_keys is not None:
            return 0
        known = self._hashed[1] if self._hashed is not None and self._hashed[0] is run else []
        if not known and run.pages <= most:
            core.keys(run)
            return run.pages
        key = known[-1] if known else _seed(core, run)
        width = run.tree.symbol_bytes
        at, end = len(known), min(len(known) + most, run.pages)
        edge = run.node.edge[(run.start + at) * width : (run.start + end) * width]
        known += chain_keys(key, bytes(edge), width)
        self._hashed = (run, known)
        if end == run.pages:
            run.packed_keys = b"".join(known[: run.pages])
            self._hashed = None
        return max(end - at, 1)


def _seed(core: Core, run: Run) -> bytes:
    """The key of what is before a run."""
    above = parent_run(run)
    return core.keys(above)[-1] if above is not None else namespace_of(run).fingerprint
