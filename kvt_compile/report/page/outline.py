"""The nodes of a graph, in the order they run -> nested boxes, one for each module they pass through.

    conv2d   (patch_embed.proj)                 patch_embed
    add      ()                          ->         proj · conv2d
    linear   (blocks.0.attn.qkv)                add
    softmax  (blocks.0.attn)                    blocks / 0 / attn
                                                    qkv · linear
                                                    softmax

A module that is left and entered again has a box for each time; one with a single node is that node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvt_compile.report.facts import GraphReport, NodeReport


@dataclass(frozen=True)
class Leaf:
    """One node."""

    number: int
    """Its place in the outline, from 0."""
    node: NodeReport
    module: str
    """The last part of its module's path where the node stands for the whole module, else empty."""
    site: int | None
    """The attention it belongs to, as a place in `Report.sites`."""
    anchor: bool
    """Whether it is the softmax that stands for the attention."""
    refusal: int | None
    """As a place in `Report.refusals`."""

    @property
    def own_name(self) -> str:
        """The node's name where it says more than what it calls: `q` of a getitem."""
        node = self.node
        plain = node.kind != "operation" or node.name.startswith(node.target.replace(".", "_"))
        return "" if plain else node.name


@dataclass
class Box:
    """One pass through a module."""

    path: str
    label: str
    children: list[Box | Leaf] = field(default_factory=list)
    open: bool = False

    @property
    def leaves(self) -> Iterator[Leaf]:
        for child in self.children:
            if isinstance(child, Leaf):
                yield child
            else:
                yield from child.leaves

    @property
    def sites(self) -> list[int]:
        return list(dict.fromkeys(leaf.site for leaf in self.leaves if leaf.site is not None))

    @property
    def refusals(self) -> list[int]:
        return [leaf.refusal for leaf in self.leaves if leaf.refusal is not None]

    @property
    def count(self) -> int:
        return sum(1 for _ in self.leaves)


@dataclass(frozen=True)
class Outline:
    root: Box
    weights: tuple[NodeReport, ...]
    """Parameters, buffers and constants: nodes of the graph that would only stand in the way."""
    edges: tuple[tuple[int, int], ...]
    """(from, to) as numbers of leaves."""


def outline(graph: GraphReport, *, visible: int = 40) -> Outline:
    """Boxes are open from the outside in until about `visible` rows show, and down to the first attention."""
    sites = {name: nodes.site for nodes in graph.sites for name in nodes.before}
    anchors = {nodes.anchor for nodes in graph.sites}
    refused = {name: number for number, name in graph.refusals.items()}
    root = Box("", "", open=True)
    numbers: dict[str, int] = {}
    shown = [node for node in graph.before if node.kind != "weight"]
    for number, node in enumerate(shown):
        numbers[node.name] = number
        leaf = Leaf(number, node, "", sites.get(node.name), node.name in anchors, refused.get(node.name))
        path = node.module.split(".") if node.module and node.kind == "operation" else []
        _place(root, path, leaf)
    _fold(root)
    _open(root, visible)
    edges = tuple((numbers[x], numbers[node.name]) for node in shown for x in node.inputs if x in numbers)
    return Outline(root, tuple(node for node in graph.before if node.kind == "weight"), edges)


def _place(box: Box, path: Sequence[str], leaf: Leaf) -> None:
    for depth in range(len(path)):
        below = ".".join(path[: depth + 1])
        last = box.children[-1] if box.children else None
        if not isinstance(last, Box) or last.path != below:
            last = Box(below, path[depth])
            box.children.append(last)
        box = last
    box.children.append(leaf)


def _fold(box: Box) -> None:
    """A box with one node becomes the node, one with one box becomes that box under both names."""
    for place, child in enumerate(box.children):
        if isinstance(child, Leaf):
            continue
        _fold(child)
        if len(child.children) == 1:
            only = child.children[0]
            if isinstance(only, Box):
                only.label = f"{child.label}.{only.label}"
                box.children[place] = only
            else:
                name = f"{child.label}.{only.module}" if only.module else child.label
                box.children[place] = Leaf(only.number, only.node, name, only.site, only.anchor, only.refusal)


def _open(root: Box, visible: int) -> None:
    """Level by level while no more than `visible` rows show, and then down to the first attention."""
    level, rows = [root], 0
    while level:
        rows += sum(len(box.children) for box in level)
        if rows > visible and root not in level:
            break
        for box in level:
            box.open = True
        level = [child for box in level for child in box.children if isinstance(child, Box)]
    box = root
    while found := next((child for child in box.children if isinstance(child, Box) and child.sites), None):
        found.open = True
        box = found
