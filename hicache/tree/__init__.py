"""The structure: a radix tree over pages, with residency, slots and pins kept per run."""

from __future__ import annotations

from hicache.tree.node import Holder, Match, Node, Run
from hicache.tree.tree import Tree

__all__ = ["Holder", "Match", "Node", "Run", "Tree"]
