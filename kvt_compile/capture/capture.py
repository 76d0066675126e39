"""A model, however it comes -> one `fx.GraphModule` with fake values, and what its placeholders are.

nn.Module        torch.fx.symbolic_trace, else torch.export
fx.GraphModule   a copy, with shapes propagated unless the capture left them
ExportedProgram  its own graph (a copy of the program)

and, where the model is to run as it would under torch.compile: nn.Module -> the graphs Dynamo makes of it.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from kvt_compile.capture.as_run import (
    Hookless,
    NotAsRunError,
    check_again,
    check_as_run,
    fools,
    honest_dtypes,
    in_order,
)
from kvt_compile.capture.contexts import KEPT_BY_EXPORT, MADE_ANEW, UNRECORDED, Watch, hooked, lost_when_run
from kvt_compile.capture.environment import LOCK, capturing
from kvt_compile.capture.frames import guard_module, note_paths
from kvt_compile.capture.inputs import note_inputs
from kvt_compile.capture.literals import Making, attribute, note_lifted, note_made
from kvt_compile.capture.state import keep_state
from kvt_compile.capture.traceless import call_of_its_own, passing
from kvt_compile.capture.unchanged import unchanged
from kvt_compile.passes.canonical.canonicalise import is_more_than_read
from kvt_compile.passes.canonical.modes import undisturbed
from kvt_compile.passes.canonical.values import meta_value


class CaptureError(RuntimeError):
    """The model could not be turned into one graph; the message says what was tried."""


class LostError(RuntimeError):
    """A capture would lose something the model does around its operations."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(f"a graph would lose {watch.text()}")
        self.watch = watch


@dataclass(frozen=True)
class Captured:
    """One graph of a model.  `program` is set when it came through torch.export."""

    graph: fx.GraphModule
    how: str
    program: ExportedProgram | None = None
    origins: dict[str, str] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """A proxy that tells what it cannot record: `x.data = y`, `x.grad = None`.  What a model itself puts on a tensor
    (`x.is_padded = True`) is there when the model asks for it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(torch.Tensor, name):
            self.tracer.watch.lost.setdefault("what is assigned to an attribute of a tensor", name)  # type: ignore[attr-defined]
        super().__setattr__(name, value)


class _Tracer(fx.Tracer):
    """symbolic_trace that remembers the model's own file and line for every node, notes what it cannot record, and
    leaves alone what other threads run: fx patches every module of the process while it traces."""

    record_stack_traces = True

    def __init__(self, buffers: bool = True) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self.watch = Watch()
        self._thread = threading.get_ident()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.watch.note()
        node = super().create_node(*args, **kwargs)
        frames = (node.stack_trace or "").split(_FRAME)
        node.stack_trace = _FRAME.join(frame for frame in frames if not frame.startswith(_HERE)) or None
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # nn.MultiheadAttention is a leaf by default, which would hide the attention in it; and a softmax that does more
        # than a softmax is not to be taken for one
        opened = isinstance(m, _OPENED) or is_more_than_read(m)
        return super().is_leaf_module(m, module_qualified_name) and not opened


_HERE = os.path.dirname(__file__) + os.sep
_FRAME = '  File "'
"""How a frame begins in the text of a stack; ours is none of the model's."""
_ADVICE = "torch.compile(model, backend='kvt') does not need one graph."
_SCALARS = (bool, int, float, str, type(None))
_OPENED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def capture(
    model: nn.Module | fx.GraphModule | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Captured:
    """One graph of the model with fake values on its nodes; the model itself is not changed.

    Raises CaptureError when neither symbolic_trace nor torch.export can trace the model, or both would lose a part of
    what it means; TypeError for anything that is not a module, a graph or a program.
    """
    with capturing():
        return _capture(model, args, kwargs)


def _capture(
    model: nn.Module | fx.GraphModule | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Captured:
    if isinstance(model, ExportedProgram):
        return _from_program(copy.deepcopy(model), "torch.export program", alone=True)
    if isinstance(model, fx.GraphModule):
        graph = fx.GraphModule(model, copy.deepcopy(model.graph))
        keep_state(graph, model)
        if any(meta_value(node) is None for node in graph.graph.nodes if node.op != "output"):
            _propagate(graph, args, kwargs)
        return Captured(graph, "graph module")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, an fx.GraphModule or an ExportedProgram, got {type(model).__name__}")
    _refuse_hooks(model, _Tracer().is_leaf_module)
    with unchanged(model):
        return _capture_module(model, args, kwargs)


def _capture_module(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    try:
        return _by_symbolic_trace(model, args, kwargs)
    except Exception as traced:  # any Python in the model may fail under a tracer
        _refuse_hooks(model, lambda *_: False)
        try:
            watch = traced.watch if isinstance(traced, LostError) else lost_when_run(model, args, kwargs)
            if set(watch.lost) - KEPT_BY_EXPORT:
                raise LostError(watch)
            if watch.remembers:
                check_again(model, args, kwargs)
            if _may_read_buffers(model, traced, watch):
                with suppress(Exception):
                    return _by_symbolic_trace(model, args, kwargs, buffers=False)
            if watch.makes_buffers:  # torch.export takes a new buffer for an input, and writes to that
                watch.lost["a buffer that is made when the model first runs"] = type(model).__name__
                raise LostError(watch)
            program = _export(model, tuple(args), dict(kwargs), strict=watch.asks and fools(model, args, kwargs))
            for name, value in program.constants.items():
                _no_history(name, value, watch)
        except Exception as exported:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured as one graph: symbolic_trace says {_first_line(traced)}; "
                f"torch.export says {_first_line(exported)}.  "
                f"{_ADVICE}"
            ) from exported
        return _from_program(program, "torch.export", alone=False)


def _refuse_hooks(model: nn.Module, stays: Callable[[nn.Module, str], bool]) -> None:
    if name := hooked(model, stays):
        raise CaptureError(f"{name} has hooks, which would run while it is traced and never again.  {_ADVICE}")


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], strict: bool) -> ExportedProgram:
    """With the first dimension of every input dynamic where the model lets it, as `_propagate` has it.

    strict: through Dynamo, which reads the model's code and answers for tensors, but reads less.
    """
    shapes: Any = torch.export.ShapesCollection()
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] > 1:
            shapes[x] = {0: torch.export.Dim.AUTO}
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    except Exception:  # whatever the model does with a size that is not a number
        return torch.export.export(model, args, kwargs, strict=strict)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _may_read_buffers(model: nn.Module, failed: Exception, watch: Watch) -> bool:
    """Whether a trace may go by what is in the buffers (`if self.mask.any()`), as the model writes to none."""
    seen_through = isinstance(failed, LostError | NotAsRunError)
    return not seen_through and not watch.writes_buffers and next(model.buffers(), None) is not None


def _by_symbolic_trace(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], buffers: bool = True
) -> Captured:
    """buffers: whether the graph reads them in every call; else what the model makes of them alone is constant."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    # what is no tensor decides the model's control flow, so it is fixed (and checked at run time) rather than traced
    fixed = {name: value for name, value in bound.arguments.items() if isinstance(value, _SCALARS)}
    tracer, making = _Tracer(buffers), Making()
    with unchanged(model) as held:
        random = torch.get_rng_state()
        with making, honest_dtypes(), tracer.watch.of_calls():
            graph = tracer.trace(model, concrete_args=fixed)
        tracer.watch.note_held(held)
        if not torch.equal(torch.get_rng_state(), random):
            tracer.watch.lost.setdefault(UNRECORDED, type(model).__name__)
        if tracer.watch.lost:
            raise LostError(tracer.watch)
        replaced = [id(x) for x in held.replaced() if isinstance(x, torch.Tensor)]
        held.put_back()  # proxies, above all
        module = _traced(model, graph, bound, tracer.watch)
    for node in graph.find_nodes(op="get_attr"):
        if id(attribute(module, node)) in replaced:
            tracer.watch.lost["what it kept of its last call"] = str(node.target)
            raise LostError(tracer.watch)
    _propagate(module, args, kwargs)
    if name := note_made(module, making):
        tracer.watch.lost[MADE_ANEW] = name
        raise LostError(tracer.watch)
    check_as_run(model, module, args, kwargs, tracer.watch.asks)
    if tracer.watch.remembers:
        check_again(model, args, kwargs)
    return Captured(module, "torch.fx.symbolic_trace")


def _no_history(name: str, value: Any, watch: Watch) -> None:
    """Raises LostError for a tensor that would be a constant of the graph and has a gradient."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        watch.lost["the gradient of a tensor that was computed before"] = name
        raise LostError(watch)


def _traced(model: nn.Module, graph: fx.Graph, bound: inspect.BoundArguments, watch: Watch) -> fx.GraphModule:
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    for name, node in zip(bound.arguments, placeholders, strict=False):
        if str(node.target) == f"{name}_1":  # fx renames fixed arguments; callers know them by their own names
            node.target = name
    module = fx.GraphModule(model, graph, type(model).__name__)
    known = {id(p) for p in model.parameters()}
    for node in graph.nodes:
        value = attribute(module, node) if node.op == "get_attr" else None
        if id(value) not in known:
            _no_history(str(node.target), value, watch)
    keep_state(module, model)
    return module


def _propagate(graph: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Fake values on every node, with the first dimension of every input dynamic (it is the batch, most often)."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = pytree.tree_map_only(torch.Tensor, lambda x: _fake(mode, x), in_order(graph, args, kwargs))
    with undisturbed():
        Shapes(graph, mode).propagate_dont_convert_inputs(*fakes)


class Shapes(Hookless, FakeTensorProp):
    """Leaves on every node what it computes, as a fake."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("placeholder", "get_attr") and isinstance(result, torch.Tensor) and result.requires_grad:
            n.meta["val"].requires_grad_()  # what is noted there is detached, and who has a gradient matters
        if isinstance(result, int | float | torch.SymInt | torch.SymFloat):
            n.meta.setdefault(
                "val", result
            )  # torch before 2.13 forgets numbers; the size that scales the scores is one
        return result


def _fake(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    dynamic = [DimDynamic.DYNAMIC if dim == 0 and size > 1 else DimDynamic.STATIC for dim, size in enumerate(x.shape)]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))


def _from_program(program: ExportedProgram, how: str, alone: bool) -> Captured:
    note_lifted(program, alone)
    signature = program.graph_signature
    origins = dict.fromkeys(signature.inputs_to_parameters, "parameter")
    origins |= dict.fromkeys(signature.inputs_to_buffers, "buffer")
    return Captured(program.graph_module, how, program, origins)


def run_through_dynamo(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], backend: Callable[..., Any]
) -> Any:
    """`model(*args, **kwargs)` as torch.compile would run it, graph breaks included: `backend` gets every graph with
    its example inputs and returns what runs it.  Buffers and random state are as before afterwards.

    Raises TypeError for anything that is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, an fx.GraphModule or an ExportedProgram, got {type(model).__name__}")
    with unchanged(model), through_dynamo(model, backend) as call:
        return call(*args, **kwargs)


@contextmanager
def through_dynamo(model: nn.Module, backend: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """What runs the model as torch.compile would, while this is open; at the end Dynamo forgets it."""

    def named(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        note_paths(gm)
        note_inputs(gm)
        guard_module()
        return backend(gm, example_inputs)

    # More graphs than usual may come from one piece of code when many models are looked at in one process; and what an
    # earlier model was given must not make this one's sizes dynamic.
    limits = torch._dynamo.config.patch(
        recompile_limit=1 << 16, accumulated_recompile_limit=1 << 20, automatic_dynamic_shapes=False
    )
    with LOCK, limits, passing(named) as mine:
        compiled = torch.compile(call_of_its_own(), backend=mine)
        yield lambda *args, **kwargs: compiled(model, args, kwargs)
