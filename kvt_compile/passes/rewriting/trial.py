"""Functions of a selection, called once while their site is decided: on fakes, which have no numbers.

    Decision(given(f) & topk(4))   ->   Decision(k = N, condition "{0}[b, h, i, j]")      or dense, with the reason

What a function returns must be known by its shape and type, as compilers behind us will want it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode

from kvt_compile.passes.canonical.modes import Mode, modes_of, running_as
from kvt_compile.passes.canonical.values import meta_value
from kvt_compile.passes.decide import Decision
from kvt_compile.passes.rewriting.called import Called
from kvt_compile.passes.rewriting.operands import emitter_for, queries_and_keys
from kvt_compile.passes.selecting import Functions, Selected
from kvt_compile.passes.site import Fused
from kvt_compile.select.function import conditioned, givens
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.values import Given, SelectionError, for_node

PLAIN = (bool, int, float, str)
"""What a module may be made with, besides tensors and modules, and decide by."""


def with_functions_called(gm: fx.GraphModule, decision: Decision, entry: Mode, body_of: str) -> Decision:
    """The decision, with what its functions decide; dense, with the reason, where they cannot be called in the graph.

    entry: the mode the graph starts in; body_of: the name of the operator that it is the body of, if any."""
    select, plan = decision.select, decision.site.plan
    if select is None or select.functions is None or not isinstance(plan, Fused):
        return decision
    try:
        if body_of and body_of not in _INLINED:
            raise SelectionError(
                f"it is in the body of {body_of}, whose inputs are all that it reads, and "
                f"{select.whole} brings tensors of its own"
            )
        mode = modes_of(gm.graph, entry)[plan.node]
        with _written(gm.graph, plan, entry) as (q, k), running_as(mode):
            topk, select = called(select, meta_value(q), meta_value(k))
    except SelectionError as error:
        return Decision(decision.site, None, str(error))
    return replace(decision, topk=topk, select=select)


_INLINED = (
    "tag_activation_checkpoint",
    "wrap_activation_checkpoint",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
)
"""Operators that run their body where they stand: what it reads of its own module is read as elsewhere."""


@contextmanager
def _written(graph: fx.Graph, plan: Fused, entry: Mode) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The site's q and k as nodes, while this is open."""
    before = set(graph.nodes)
    try:
        yield queries_and_keys(emitter_for(graph, plan, entry, {}), plan)
    finally:
        for node in reversed(graph.nodes):
            if node not in before:
                graph.erase_node(node)


def called(select: Selected, q: Any, k: Any) -> tuple[int | float, Selected]:
    """(k of the node, what it is told besides), the functions called on fakes q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`.

    Raises SelectionError."""
    functions = select.functions
    assert functions is not None
    whole, geometry = functions.whole, select.geometry or Geometry(())
    if not isinstance(q, FakeTensor):
        raise SelectionError(f"{whole} is called to see what it returns, and of what shape q and k are is not known")
    returned = tuple(_call(x, q, k) for x in givens(whole))
    with _fakes_alone(q.fake_mode):
        condition, tensors = conditioned(whole, returned, q, k, geometry)
    text, best = ("", None) if condition.left is None else for_node(condition.left)
    functions = Functions(whole, condition, returned, tuple(tensors))
    return 1.0 if best is None else best, replace(select, text=text, functions=functions)


def _call(x: Given, q: FakeTensor, k: FakeTensor) -> Any:
    module = x.function if isinstance(x.function, nn.Module) else Called(x.function)
    versions = q._version, k._version
    try:
        with _fakes_alone(q.fake_mode), _kept(module) as changed, _of_fakes(module, q.fake_mode):
            found = module(q, k)
    except Exception as error:  # whatever a user's function does when it is called
        raise SelectionError(_why(x, error)) from error
    if isinstance(found, Tensor) and not isinstance(found, FakeTensor):
        raise SelectionError(_OUTER.format(x))
    if (q._version, k._version) != versions:
        raise SelectionError(f"{x} writes to q or k, which are the model's: let it copy them first")
    if changed:
        raise SelectionError(f"{x} changes {changed[0]!r} of its module when it is called, which a graph would not")
    return found


@contextmanager
def _kept(module: nn.Module) -> Iterator[list[str]]:
    """Takes back what a call writes to the attributes of modules, and says at the end which those were."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for part, old in before:
            now = vars(part)
            names = [name for name in {**old, **now} if not _alike(old.get(name, _NOTHING), now.get(name, _NOTHING))]
            if names:
                now.clear()
                now.update(old)
                changed += names


@contextmanager
def _of_fakes(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """With fakes for parameters and buffers, each module once, whatever names it has."""
    state: list[dict[str, Any]] = [kind for part in module.modules() for kind in (part._parameters, part._buffers)]
    before = [dict(kind) for kind in state]
    try:
        for kind in state:
            for name, tensor in kind.items():
                if tensor is not None:
                    kind[name] = mode.from_tensor(tensor, static_shapes=True)
        yield
    finally:
        for kind, old in zip(state, before, strict=True):
            kind.clear()
            kind.update(old)


_NOTHING = object()


def _alike(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and isinstance(x, PLAIN) and x == y)


@contextmanager
def _fakes_alone(mode: FakeTensorMode) -> Iterator[None]:
    """Inside of a fake mode that refuses real tensors, and forgets the sizes that only numbers would say.

    Operators in C++ that are made of others turn symbolic sizes into numbers; those in Python do not."""
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, False
    forgotten = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else nullcontext()
    try:
        with mode, enable_python_dispatcher(), forgotten:
            yield
    finally:
        mode.allow_non_fake_inputs = allowed


_OUTER = (
    "{} reads a tensor that is no argument of it, and no parameter or buffer of a module that it holds: make it a "
    "buffer of a module"
)


def _why(x: Given, error: Exception) -> str:
    said = str(error).strip().splitlines() or [""]
    if "convert all Tensors to FakeTensors" in str(error):
        return _OUTER.format(x)
    return (
        f"{x} failed when it was called as a graph is traced, without numbers in its tensors ({type(error).__name__}: "
        f"{said[0]}); it takes q [B, H, N, D] and k [B, Hk, N, D], and no if, item() or numpy() may ask for their "
        "numbers"
    )
