"""Another k for a module that already has k-NN attention, without capturing it again.

    kvt::attention(q, k, v, ..., 64, ...)     ->     kvt::attention(q, k, v, ..., kvt_topk_0(k, 64), ...)

`kvt_topk_0` is a `KeysToKeep`: a submodule without parameters, so the `state_dict` stays what it was.  It answers with
the number that was captured until `set_topk` or `options` says otherwise.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvt_compile.config import OptionError
from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op import ops as _ops  # noqa: F401 - registers torch.ops.kvt
from kvt_compile.passes.canonical.values import meta_value
from kvt_compile.passes.finding.describe import place
from kvt_compile.passes.pipeline import nested_graphs
from kvt_compile.passes.rewriting.rewrite import OWN_K
from kvt_compile.topk import TopK, resolve, validate

Choice = TopK | None
"""How many keys each query keeps: an int >= 1, a share in (0, 1], or None for all of them."""

_forced: list[Choice] = []
"""What `options` asks for, innermost last.  A plain list: Dynamo guards on what it read of it."""


@dataclass(frozen=True)
class Adjustable:
    """One attention whose k can be changed: the path of its module, and how to change it."""

    path: str
    set: Callable[[Choice], None]
    own: bool = False
    """Whether its k is the model's own, which only a pattern that names it changes."""


FINDERS: list[Callable[[nn.Module], Iterator[Adjustable]]] = []
"""Further places where k-NN attention lives; an integration adds its own."""


class KeysToKeep(nn.Module):
    """k of one site, computed when the module runs: (keys, k of the capture) -> k."""

    def __init__(self, path: str, dim: int, own: bool = False) -> None:
        super().__init__()
        self.path = path
        self.dim = dim
        self.own = own
        self.topk: Choice = None
        self.adjusted = False

    def set(self, topk: Choice) -> None:
        self.topk, self.adjusted = topk, True

    def forward(self, keys: Tensor, captured: int) -> int:
        if not self.adjusted and (self.own or not _forced):
            return captured
        return keep(self.topk, keys.shape[self.dim])

    def extra_repr(self) -> str:
        return f"{self.path}, topk={self.topk if self.adjusted else 'as captured'}"


def keep(own: Choice, keys: int) -> int:
    """k for `keys` keys, of each rank that shares them: what `options` asks for inside its `with`, else the attention's
    own `own`."""
    keys *= lowerings.inside().ranks
    topk = _forced[-1] if _forced else own
    return keys if topk is None else resolve(topk, keys)


def set_topk(module: nn.Module, topk: Choice | Mapping[str, Choice]) -> None:
    """Changes how many keys the k-NN attention in a module keeps, from its next call on; nothing is captured again.

    Args:
        module: what `rewrite` returned as `module`, a program that was loaded with `torch.export.load(...).module()`, a
            transformers model with `attn_implementation="kvt"`, or a module that contains such modules.
        topk: an int >= 1, a share in (0, 1], None (all keys), or a mapping from module-path pattern to one of these
            (first match wins; sites that no pattern matches keep the k they have).  A calibrated policy is such a
            mapping.  A site whose k is the model's own is changed by a pattern that matches it alone.

    Sites that were left dense when the module was rewritten are not there to be changed: a schedule that begins at all
    keys rewrites with `force_rewrite=True`.  Under `torch.compile(result.module)` each new k is a guard that fails, so
    the graph is compiled again, up to Dynamo's `recompile_limit`; `torch.compile(backend="kvt")` has k in its code.

    Raises OptionError when the module has no k-NN attention, when a pattern matches no site, or for a callable;
    TypeError or ValueError for a topk that is none.
    """
    rules = _rules(topk)
    sites = list(adjustable(module))
    if not sites:
        raise OptionError(
            f"there is no k-NN attention in {type(module).__name__}; expected the module of kvt_compile.rewrite, "
            'or a transformers model with attn_implementation="kvt" (what torch.compile(backend="kvt") compiled has k '
            "in its code: compile it again with another topk)"
        )
    for pattern in rules:
        if not any(fnmatch.fnmatchcase(site.path, pattern) for site in sites):
            known = ", ".join(dict.fromkeys(site.path or "(top level)" for site in sites))
            raise OptionError(f"topk pattern {pattern!r} matches no attention site; the sites are: {known}")
    for site in sites:
        if site.own and not isinstance(topk, Mapping):
            continue
        for pattern, value in rules.items():
            if fnmatch.fnmatchcase(site.path, pattern):
                site.set(value)
                break


def _rules(topk: Choice | Mapping[str, Choice]) -> dict[str, Choice]:
    if callable(topk) and not isinstance(topk, Mapping):
        raise OptionError(
            "topk is a function of an AttentionSite, and sites are known only while a model is captured; give an int, "
            "a share, None or a mapping from module-path pattern to one of these"
        )
    rules = dict(topk) if isinstance(topk, Mapping) else {"*": topk}
    for value in rules.values():
        if value is not None:
            validate(value)
    return rules


@contextmanager
def options(*, topk: Choice) -> Iterator[None]:
    """While this is open, every rewritten module and every transformers attention "kvt" keeps `topk` keys per query.

    Args:
        topk: an int >= 1, a share in (0, 1], or None (all keys).  For another k per site see `set_topk`.  Sites that
            keep the model's own k keep it.

    It holds for the whole process, not for one thread, and not for what `torch.compile(backend="kvt")` compiled, which
    has k in its code.  A backward pass keeps the keys its forward kept, wherever it runs.

    Raises TypeError or ValueError for a topk that is none of these.
    """
    if isinstance(topk, Mapping):
        raise TypeError("options takes one topk for all sites; for a k per site use kvt_compile.set_topk(module, topk)")
    if topk is not None:
        validate(topk)
    _forced.append(topk)
    try:
        yield
    finally:
        _forced.pop()


def adjustable(module: nn.Module) -> Iterator[Adjustable]:
    """Every attention in a module whose k can be changed."""
    for part in list(module.modules()):
        if isinstance(part, fx.GraphModule):
            make_adjustable(part)
    for part in module.modules():
        if isinstance(part, KeysToKeep):
            yield Adjustable(part.path, part.set, part.own)
    for find in FINDERS:
        yield from find(module)


_ARGUMENT: dict[Any, tuple[int, int, int | None]] = {
    # op -> arguments that hold the keys and topk, and the dimension of the keys (None: the next one)
    torch.ops.kvt.attention.default: (1, 6, 2),
    torch.ops.kvt.topk_softmax.default: (0, 2, None),
}


def make_adjustable(gm: fx.GraphModule) -> None:
    """Puts a `KeysToKeep` before every k-NN attention of a graph, and of the graphs nested in it, that has none."""
    for graph in nested_graphs(gm):
        changed = False
        for node in list(graph.graph.nodes):
            if node.op == "call_function" and node.target in _ARGUMENT:
                changed |= _insert(graph, node)
        if changed:
            graph.graph.lint()
            graph.recompile()


def _insert(graph: fx.GraphModule, node: fx.Node) -> bool:
    tensor, position, dim = _ARGUMENT[node.target]
    captured = node.args[position]
    if isinstance(captured, fx.Node) and captured.op == "call_module":
        return False
    number = sum(isinstance(child, KeysToKeep) for child in graph.children())
    name = f"kvt_topk_{number}"
    assert not hasattr(graph, name)
    own = OWN_K in node.meta.get("custom", {})
    graph.add_submodule(name, KeysToKeep(place(node).module, node.args[tensor + 1] if dim is None else dim, own))  # type: ignore[arg-type]
    with graph.graph.inserting_before(node):
        new = graph.graph.call_module(name, (node.args[tensor], captured))
    for key in ("nn_module_stack", "stack_trace"):
        if key in node.meta:
            new.meta[key] = node.meta[key]
    new.meta["val"] = meta_value(captured) if isinstance(captured, fx.Node) else captured
    node.update_arg(position, new)
    return True
