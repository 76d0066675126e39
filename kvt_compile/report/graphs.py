"""fx graphs before and after the rewrite -> `GraphReport`: text and numbers, to draw, compare and keep.

    run_passes(..., watch=recorder)        recorder.reports  ->  one GraphReport per graph, nested graphs included

A node of the report knows its module, its line in the model and its shape; a site knows which nodes were its own before
and which stand for them after.  Composites such as `multi_head_attention_forward` are expanded in both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvt_compile.passes.canonical.values import dim_of, meta_value
from kvt_compile.passes.decide import Decision
from kvt_compile.passes.finding.describe import place, size_text
from kvt_compile.passes.pipeline import Stage
from kvt_compile.passes.rewriting.rewrite import rewrite
from kvt_compile.passes.site import Fused, Refusal
from kvt_compile.report.diff import site_diff
from kvt_compile.report.facts import GraphReport, Kind, NodeReport, SiteNodes, location_of

log = logging.getLogger(__name__)

_SITE_OPS = (torch.ops.kvt.attention.default, torch.ops.kvt.topk_softmax.default)


class GraphRecorder:
    """What `run_passes` shows it -> `GraphReport`s.  Numbers count through all graphs it is shown."""

    def __init__(self) -> None:
        self.graph = 0
        """Which captured graph the next ones belong to."""
        self._open: list[_Recorded] = []
        self._sites = 0
        self._refusals = 0

    def __call__(
        self, stage: Stage, name: str, gm: fx.GraphModule, decided: Sequence[Decision], refusals: Sequence[Refusal]
    ) -> None:
        if stage == "found":
            sites = [_core(number, d) for number, d in enumerate(decided, self._sites)]
            refused = {number: refusal.node.name for number, refusal in enumerate(refusals, self._refusals)}
            self._sites += len(sites)
            self._refusals += len(refused)
            self._open.append(_Recorded(self.graph, name, gm, tuple(decided), snapshot(gm), sites, refused))
        else:
            self._open[-1].after = snapshot(gm)

    def finish(self, lowering: str = "auto", tolerance: float = 0.0) -> tuple[GraphReport, ...]:
        """The reports.  Graphs that were only read are rewritten now, to see what would become of them."""
        for recorded in self._open:
            if recorded.after is None:
                rewrite(recorded.gm, recorded.decided, lowering, tolerance)
                recorded.after = snapshot(recorded.gm)
        return tuple(recorded.report() for recorded in self._open)


@dataclass
class _Recorded:
    graph: int
    name: str
    gm: fx.GraphModule
    decided: tuple[Decision, ...]
    before: tuple[NodeReport, ...]
    sites: list[tuple[int, str, str, set[str], bool]]
    refusals: dict[int, str]
    after: tuple[NodeReport, ...] | None = None

    def report(self) -> GraphReport:
        after = self.after or ()
        order = {node.name: position for position, node in enumerate(self.before)}
        old, new = {n.name for n in self.before}, {n.name for n in after}
        owner = {name: site for site, _, _, names, _ in self.sites for name in names}
        _spread(owner, reversed(self.before), old - new, forwards=False)
        # a kvt:: node is inserted where the node it replaces stood
        rewritten = sorted((s for s in self.sites if s[4]), key=lambda s: order[s[2]])
        anchors = dict(zip((s[0] for s in rewritten), (n.name for n in after if n.target in _KVT_NAMES), strict=False))
        owner_after = {name: site for site, name in anchors.items()}
        _spread(owner_after, reversed(after), new - old, forwards=False)
        _spread(owner_after, after, new - old, forwards=True)
        sites = tuple(
            SiteNodes(
                site,
                anchor,
                tuple(n.name for n in self.before if owner.get(n.name) == site),
                tuple(n.name for n in after if owner_after.get(n.name) == site),
                anchors.get(site, ""),
            )
            for site, anchor, _, _, _ in self.sites
        )
        return GraphReport(self.graph, self.name, self.before, after, sites, self.refusals)


_KVT_NAMES = ("kvt.attention", "kvt.topk_softmax")


def _core(number: int, decision: Decision) -> tuple[int, str, str, set[str], bool]:
    """(site, anchor, the node that is replaced, names of its nodes, whether it is rewritten)"""
    site, plan = decision.site, decision.site.plan
    names = {site.softmax.name, plan.node.name}
    if isinstance(plan, Fused):
        names |= {value.node.name for value in plan.interior}
    return number, site.softmax.name, plan.node.name, names, decision.topk is not None


def _spread(owner: dict[str, int], nodes: Iterable[NodeReport], free: set[str], *, forwards: bool) -> None:
    """Gives a free node to the site of a node it reads (forwards), or of one that reads it."""
    for node in nodes:
        if forwards:
            sites = {owner[x] for x in node.inputs if x in owner and x in free}
            if node.name in free and node.name not in owner and sites:
                owner[node.name] = min(sites)
        elif node.name in owner:
            for x in node.inputs:
                if x in free:
                    owner.setdefault(x, owner[node.name])


def log_changes(graphs: Iterable[GraphReport]) -> None:
    """At level DEBUG: the graph around every rewritten site, before and after, one record a site."""
    for graph in graphs:
        modules = {node.name: node.module for node in graph.before}
        for site in graph.sites:
            if site.after:
                lines = "\n".join(map(str, site_diff(graph, site)))
                log.debug("%s, %s\n%s", modules[site.anchor] or "(top level)", graph.title, lines)


# --- one graph --------------------------------------------------------------------------------------------------------


def snapshot(gm: fx.GraphModule) -> tuple[NodeReport, ...]:
    """Every node in the order it runs."""
    weights = {node for node in gm.graph.nodes if _is_weight(node)}
    names = {node: _weight_name(node) if node in weights else _input_name(node) for node in gm.graph.nodes}
    return tuple(_node(node, gm, names, node in weights) for node in gm.graph.nodes)


def _node(node: fx.Node, gm: fx.GraphModule, names: Mapping[fx.Node, str], is_weight: bool) -> NodeReport:
    where = place(node)
    value = meta_value(node)
    shape = tuple(size_text(dim_of(size)) for size in value.shape) if isinstance(value, torch.Tensor) else None
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""
    kind: Kind = "operation"
    if is_weight:
        kind = "weight"
    elif node.op in ("placeholder", "output"):
        kind = "input" if node.op == "placeholder" else "output"
    target = names[node] if node.op in ("placeholder", "get_attr") else _target(node, gm)

    def text(x: fx.Node) -> str:
        name = names[x]
        return name.removeprefix(f"{where.module}.") if where.module else name

    match node.op:
        case "placeholder" | "get_attr":
            code = target
        case "output":
            code = f"return {_argument(node.args[0], text)}"
        case _:
            arguments = [_argument(x, text) for x in node.args]
            arguments += [f"{name}={_argument(x, text)}" for name, x in node.kwargs.items()]
            code = f"{target}({', '.join(arguments)})"
    inputs = tuple(dict.fromkeys(x.name for x in node.all_input_nodes))
    return NodeReport(node.name, kind, target, where.module, location_of(where), inputs, shape, dtype, code)


def _target(node: fx.Node, gm: fx.GraphModule) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = str(node.target).partition(".")
        return f"kvt.{name.removesuffix('.default')}" if namespace == "kvt" else name.partition(".")[0]
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.strip("_") if node.op == "call_function" else name


def _argument(x: Any, text: Any) -> str:
    match x:
        case fx.Node():
            return str(text(x))
        case tuple() | list():
            inner = ", ".join(_argument(item, text) for item in x)
            return f"[{inner}]" if isinstance(x, list) else f"({inner}{',' if len(x) == 1 else ''})"
        case dict():
            return "{" + ", ".join(f"{key!r}: {_argument(item, text)}" for key, item in x.items()) + "}"
        case slice():
            parts = ["" if part is None else _argument(part, text) for part in (x.start, x.stop)]
            return ":".join(parts) + ("" if x.step is None else f":{_argument(x.step, text)}")
        case torch.dtype():
            return str(x).removeprefix("torch.")
        case type():
            return x.__name__
        case _ if x is Ellipsis:
            return "..."
    return repr(x)


def _is_weight(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return not isinstance(meta_value(node), fx.GraphModule)
    if node.op != "placeholder":
        return False
    if isinstance(meta_value(node), torch.nn.Parameter):
        return True
    return bool(re.search(r"_(parameters|buffers)_", node.name) or re.match(r"(p|b|c)_", node.name))


def _weight_name(node: fx.Node) -> str:
    """`l_self_modules_blocks_modules_0_..._parameters_weight_` -> `blocks.0.attn.qkv.weight`."""
    if node.op == "get_attr":
        return str(node.target)
    found = re.search(r"_(?:parameters|buffers)_(.+?)_$", node.name)
    if not found:
        return node.name
    module = place(node).module
    return f"{module}.{found[1]}" if module else found[1]


def _input_name(node: fx.Node) -> str:
    """`l_args_0_` -> `args[0]`, `l_kwargs_mask_` -> `mask`; other nodes keep their names."""
    if node.op != "placeholder":
        return node.name
    if found := re.fullmatch(r"l_args_(\d+)_", node.name):
        return f"args[{found[1]}]"
    return re.sub(r"^l_(kwargs_)?(.+?)_?$", r"\2", node.name)
