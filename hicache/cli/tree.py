"""``hicache tree``: the tree of cached prefixes, as people want to look at it.

One line a node: how many pages it adds and at what depth, a bar of letters that shows in which tiers its
pages lie, pins, uses and how long it was idle. No content is shown: siblings are told apart by a digest of
their first page.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hicache.cli import link, terminal, units
from hicache.cli.stats import plain
from hicache.errors import ConfigError

if TYPE_CHECKING:
    from rich.tree import Tree as Branch

    from hicache.rpc.client.results import Tree, TreeNode

EPILOG = """\
examples:
  hicache tree                            the top of every namespace's tree
  hicache tree --nodes 20000 --json       for scripts: nodes, parents before children

  meta-llama/Llama-3.1-8B  64 tokens a page
  └── 3f9a12c0  16 pages, 0..16      D███████ H███████ K███████  42 uses, idle 1.2 s
      ├── 77ab0151  9 pages, 16..25  D·······  H███████ K███████  3 uses, idle 20.0 s, 9 pinned

Each tier's bar shows which part of the node's pages lies there: D device, H host, K disk. Only branches indent:
↳ is the one continuation of the line above it.
"""

_LETTERS = {"device": "D", "host": "H", "disk": "K"}
_COLOURS = {"device": "magenta", "host": "green", "disk": "blue"}
_CELLS = 8
#: Before a node that is the only continuation of the one above it.
CONTINUES = "↳ "


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.description = "Show the tree of cached prefixes, by namespace: pages, tiers, pins, uses."
    parser.epilog = EPILOG
    parser.add_argument(
        "--nodes", metavar="N", default="200", help="show at most this many nodes; default 200"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a tree")
    link.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the tree."""
    if not arguments.nodes.isdecimal() or int(arguments.nodes) < 1:
        raise ConfigError(f"--nodes: {arguments.nodes!r} is not a number of 1 or more")
    with link.connect(arguments, "tree") as client:
        tree = client.admin.tree(max_nodes=int(arguments.nodes))
        tiers = [(tier.name, tier.kind) for tier in client.admin.stats().tiers]
    if arguments.json:
        print(json.dumps(as_json(tree, [name for name, _ in tiers]), indent=2))
        return 0
    console = terminal.console()
    for branch in render(tree, tiers):
        console.print(branch)
    if not tree.nodes:
        console.print("nothing is cached")
    if tree.omitted_nodes:
        console.print(
            f"{tree.omitted_nodes:,} more nodes are not shown: --nodes {arguments.nodes} is the limit"
        )
    return 0


def as_json(tree: Tree, tiers: Sequence[str]) -> dict[str, object]:
    """The nodes as plain values; ``tier_pages`` by the tier's name."""
    nodes = [
        plain(node)
        | {
            "first_symbol_digest": node.first_symbol_digest.hex(),
            "tier_pages": dict(zip(tiers, node.tier_pages, strict=False)),
        }
        for node in tree.nodes
    ]
    return {"nodes": nodes, "omitted_nodes": tree.omitted_nodes}


def render(tree: Tree, tiers: Sequence[tuple[str, str]]) -> list[Branch]:
    """One branch a namespace; ``tiers`` are (name, kind)."""
    from rich.tree import Tree as Branch

    children: Mapping[int, list[TreeNode]] = defaultdict(list)
    namespaces: dict[str, list[TreeNode]] = {}
    for node in tree.nodes:
        (children[node.parent] if node.parent else namespaces.setdefault(node.namespace, [])).append(node)
    branches = []
    part = " in the nodes shown" if tree.omitted_nodes else ""
    for name, firsts in namespaces.items():
        branch = Branch(f"[bold]{_escape(name)}[/]  {_pages(_total(firsts, children))}{part}")
        waiting = [(branch, node, "") for node in reversed(firsts)]
        while waiting:
            above, node, lead = waiting.pop()
            here = above.add(lead + line(node, tiers))
            shown = children.get(node.id, [])
            if node.children == len(shown) == 1:  # no branching, no deeper indent
                waiting.append((above, shown[0], CONTINUES))
                continue
            waiting += [(here, child, "") for child in reversed(shown)]
            if node.children > len(shown):
                here.add(f"[dim]... {node.children - len(shown)} more[/]")
        branches.append(branch)
    return branches


def line(node: TreeNode, tiers: Sequence[tuple[str, str]]) -> str:
    """One node in rich markup."""
    bars = " ".join(
        _bar(kind, pages, node.pages) for (_, kind), pages in zip(tiers, node.tier_pages, strict=False)
    )
    end = node.depth_pages + node.pages
    parts = [f"{node.hits:,} uses", f"idle {units.human_duration(node.idle_ms)}"]
    if node.pinned_pages:
        parts.append(f"[yellow]{node.pinned_pages} pinned[/]")
    head = f"[cyan]{node.first_symbol_digest.hex()[:8]}[/]  {_pages(node.pages)}, {node.depth_pages}..{end}"
    return f"{head}  {bars}  {', '.join(parts)}"


def _bar(kind: str, here: int, pages: int) -> str:
    letter, colour = _LETTERS.get(kind, "?"), _COLOURS.get(kind, "white")
    filled = -(-here * _CELLS // pages) if pages else 0
    return f"[{colour}]{letter}{'█' * filled}[/][dim]{'·' * (_CELLS - filled)}[/]"


def _total(nodes: list[TreeNode], children: Mapping[int, list[TreeNode]]) -> int:
    total, waiting = 0, list(nodes)
    while waiting:
        node = waiting.pop()
        total += node.pages
        waiting += children.get(node.id, [])
    return total


def _pages(count: int) -> str:
    return f"{count:,} page{'' if count == 1 else 's'}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
