"""Another selection for a module that already has selected attention, without capturing it again.

    kvt::attention(..., "window(13) | prefix", [14, 14], 1)  ->  kvt::attention(..., "halo(7, 3) | prefix", [14, 14], 1)

The selection is a constant of the graph, which is written anew, and what functions decide of it a few nodes before;
k is that of `set_topk`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from kvt_compile.adjust import KeysToKeep, make_adjustable
from kvt_compile.config import OptionError
from kvt_compile.kernels.op import ops as _ops  # noqa: F401 - registers torch.ops.kvt
from kvt_compile.passes.canonical.modes import undisturbed
from kvt_compile.passes.canonical.values import meta_value
from kvt_compile.passes.finding.describe import place
from kvt_compile.passes.pipeline import nested_graphs
from kvt_compile.passes.rewriting.given import put_in, taken_out
from kvt_compile.passes.rewriting.trial import called
from kvt_compile.passes.selecting import Functions, Grid, Select, Selected, validate_places, validate_select
from kvt_compile.select.function import has_given
from kvt_compile.select.geometry import Geometry, needs_grid, needs_prefix
from kvt_compile.select.values import SelectionError, Selector, for_node
from kvt_compile.topk import TopK

_TOPK, _DRAW, _SELECT, _GRID, _PREFIX = 6, 12, 13, 14, 15
"""Places of arguments of `kvt::attention`."""


def set_select(
    module: nn.Module, select: Select | Mapping[str, Select], *, grid: Grid = None, prefix: int | None = None
) -> None:
    """Changes by which rule the attention in a rewritten module keeps keys, from its next call on.

    Args:
        module: what `rewrite` returned as `module`, a program that was loaded with `torch.export.load(...).module()`,
            or a module that contains such modules.
        select: a value of `kvt_compile.select`, its text, or a mapping from module-path pattern to one of them (first
            match wins; sites that no pattern matches keep what they have).  None: every key.
        grid, prefix: where the tokens of the matched sites stand; None: as the site has it, which it does where it was
            rewritten under a selection that asks for it.  No size may be -1: how many tokens there are is not known.

    Raises OptionError when there is no such attention or a pattern matches no site, SelectionError for a selection that
    asks for a grid where none is known; sizes are checked when the module runs.
    """
    validate_places(grid, prefix)
    rules = validate_select(select if isinstance(select, Mapping) else {"*": select})
    assert isinstance(rules, Mapping)
    sites = list(_sites(module))
    if not sites:
        raise OptionError(
            f"there is no selected attention in {type(module).__name__}; expected the module of kvt_compile.rewrite "
            '(what torch.compile(backend="kvt") compiled has its selection in its code)'
        )
    for pattern in rules:
        if not any(fnmatch.fnmatchcase(place(node).module, pattern) for _, node in sites):
            known = ", ".join(dict.fromkeys(place(node).module or "(top level)" for _, node in sites))
            raise OptionError(f"select pattern {pattern!r} matches no attention site; the sites are: {known}")
    changes = []
    for graph, node in sites:
        for pattern, chosen in rules.items():
            if fnmatch.fnmatchcase(place(node).module, pattern):
                changes.append((graph, node, *_asked(node, chosen, grid, prefix)))  # type: ignore[arg-type]
                break
    for graph, node, best, told in changes:  # all or none
        _write(graph, node, best, told)
    for graph in {id(graph): graph for graph, *_ in changes}.values():
        graph.graph.lint()
        graph.recompile()


def _sites(module: nn.Module) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    for part in list(module.modules()):
        if isinstance(part, fx.GraphModule):
            make_adjustable(part)
            for graph in nested_graphs(part):
                for node in graph.graph.nodes:
                    if node.op == "call_function" and node.target is torch.ops.kvt.attention.default:
                        yield graph, node


def _asked(
    node: fx.Node, chosen: Selector | None, grid: Grid, prefix: int | None
) -> tuple[TopK | None, Selected | None]:
    """(k, what else the node is told); None: all keys, nothing."""
    if chosen is None:
        return None, None
    have_grid = node.args[_GRID] if len(node.args) > _GRID else None
    have_prefix = node.args[_PREFIX] if len(node.args) > _PREFIX else 0
    said = [grid] if isinstance(grid, int) else None if grid is None else list(grid)
    if said is not None and -1 in said:
        raise SelectionError(f"grid is {grid}, expected the size of every axis")
    where: Any = said if said is not None else have_grid
    if needs_grid(chosen) and where is None:
        raise SelectionError(
            f"{chosen} asks where tokens stand, and {place(node)} does not know: give grid= and prefix="
        )
    sizes = tuple(where) if needs_grid(chosen) else ()
    before: Any = (have_prefix if prefix is None else prefix) if needs_prefix(chosen) else 0
    if not has_given(chosen):
        text, best = for_node(chosen)
        return best, Selected(text, Geometry(sizes, before), None)
    if not all(isinstance(x, int) for x in (*sizes, before)):
        raise SelectionError(f"{chosen} takes a grid of numbers, and that of {place(node)} is known only at run time")
    q, k = (meta_value(x) for x in node.args[:2] if isinstance(x, fx.Node))
    with undisturbed():
        return called(Selected("", Geometry(sizes, before), None, functions=Functions(chosen)), q, k)


def _write(graph: fx.GraphModule, node: fx.Node, best: TopK | None, select: Selected | None) -> None:
    kept = node.args[_TOPK]
    assert isinstance(kept, fx.Node)
    keeper = graph.get_submodule(str(kept.target))
    assert isinstance(keeper, KeysToKeep)
    keeper.set(best)
    taken_out(graph, node)
    if select is not None and select.functions is not None:
        put_in(graph, node, select)
    draw = node.args[_DRAW] if len(node.args) > _DRAW else None
    tolerance = node.args[_DRAW - 1] if len(node.args) > _DRAW - 1 else 0.0
    last = ("", None, 0) if select is None else select.arguments
    node.args = (*node.args[: _DRAW - 1], tolerance, draw, *last)
