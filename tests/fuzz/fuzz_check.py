"""The property every random program must have, and the fast capture it is checked through.

at k = N     the rewritten program computes what the original computes: outputs, gradients, what it writes to
at k < N     it computes the original with k-NN softmax, written by hand, at the rewritten places
always       every softmax is a site or a refusal with a reason; the reference lowering agrees; no pass raises
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz_graphs import Program, Selection
from hypothesis import assume
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kvt_compile.capture.capture import Shapes
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.verification.compare import unlike
from kvt_compile.verification.outcome import Outcome, Run

EXACT, ROUNDED = 1e-9, 2e-3
"""Relative tolerances in float64: plain, and with a cast to float32 that a fused kernel does without."""


# ---- capture ----------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Records writes as Dynamo does: x[i] = y and x += y are nodes without a data edge to what is read later."""

    def __setitem__(self, item: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, item, value), {})

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute):
    """`x.mT`, `x.max(0).values`: may be written to as well."""

    __setitem__ = _Proxy.__setitem__


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    for _class in (_Proxy, _Attribute):
        setattr(_class, f"__{_function.__name__}__", _augmented(_function))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Recorder(fx.Interpreter):
    """Leaves on every node what it computes, sharing memory with whatever it really shares memory with."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result if n.op == "get_attr" else pytree.tree_map_only(Tensor, Tensor.detach, result)
        if n.op == "placeholder" and result.is_floating_point():
            n.meta["val"].requires_grad_()
        return result


def with_gradients(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies that a gradient may be asked for."""
    return [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]


def traced(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """A graph of the kind Dynamo makes, at a fiftieth of its price: real tensors stand where fake ones would."""
    graph = fx.GraphModule(model, _Tracer().trace(model))
    with torch.no_grad():  # autograd forbids some writes that a program in inference makes
        _Recorder(graph).run(*(x.clone() for x in inputs))
    return graph


def traced_with_fakes(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same with fake tensors, as a real capture leaves them."""
    graph = fx.GraphModule(model, _Tracer().trace(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x, static_shapes=True) for x in with_gradients(inputs)]
    with torch.no_grad():
        Shapes(graph, mode).propagate_dont_convert_inputs(*fakes)
    return graph


# ---- running ----------------------------------------------------------------------------------------------------------


def run(call: Callable[..., Any], program: Program, parameters: nn.Module, *, backward: bool = True) -> Outcome:
    """Runs a module on fresh copies of the program's inputs; gradients of a fixed random projection of its outputs.

    Those are empty where autograd refuses the program's writes."""

    def run(*inputs: Tensor) -> tuple[Any, ...]:
        found = call(*inputs)
        return found if isinstance(found, tuple) else (found,)

    fixed = {tag.partition(":")[2] for tag in program.tags if tag.startswith("no_grad_input")}
    numbers = frozenset(n for n, name in enumerate(program.inputs) if name in fixed)
    return Run(parameters, tuple(program.inputs.values()), {}, backward, fixed=numbers)(run)


def run_original(program: Program, knn: Sequence[bool] = (), selection: Selection | None = None) -> Outcome:
    """The program itself; forward only when its writes break its own backward."""
    module = program.build(knn, selection)
    try:
        return run(module, program, module)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("inplace", "in-place")):
            raise
        module = program.build(knn, selection)
        return run(module, program, module, backward=False)


def differences(actual: Outcome, expected: Outcome, tolerance: float) -> list[str]:
    """What differs, in words: values, what is written to, gradients, and which of them there are."""
    if not actual.gradients or not expected.gradients:
        actual, expected = (replace(x, gradients={}, attached=frozenset()) for x in (actual, expected))
    return list(map(str, unlike(actual, expected, tolerance)))


_SUMS = frozenset(
    {"logsumexp", "log_softmax", "softmax", "sum", "mean", "var", "std", "norm", "normalize", "cumsum", "matmul",
     "__matmul__", "bmm", "baddbmm", "einsum", "exp", "log", "log1p"}
)  # fmt: skip


_ROUNDS = frozenset({"softmax", "log_softmax", "float", "to", "type"})


class _Rounding(TorchFunctionMode):
    """Moves the last bit of what no two libraries compute alike: (t - t.logsumexp(-1)).exp() of scores near 1e9 has few
    digits, whatever it is given.  Sums and differences of two numbers are the same everywhere, ties included.  What a
    program rounds to float32 is moved by as much as that: of masked scores that were squared nothing is left."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        made = func(*args, **kwargs)
        if name in _ROUNDS and made.dtype is torch.float32 and args[0].dtype is torch.float64:
            made = func(args[0] * _nudges(args[0], self._generator, 2**-23), *args[1:], **kwargs)
        if name in _SUMS:
            made.data.mul_(_nudges(made, self._generator))
        return made


def _nudges(x: Tensor, generator: torch.Generator, by: float = 2**-50) -> Tensor:
    return (1 + (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5) * by).to(x.dtype)


def rounding_decides(program: Program, tolerance: float, knn: Sequence[bool] = (), topk: int = 1) -> bool:
    """Whether the last bit of its inputs, or of what it makes of them, moves the program by about as much as is
    tolerated: then nothing can be said of a difference.  The gradient of a learned factor is such a case where it multiplies a mask of -1e9."""
    plain = run_original(program, knn, Selection(topk, 0.0))
    generator = torch.Generator().manual_seed(0)

    def nudged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x * _nudges(x, generator) if x.is_floating_point() else x for name, x in tensors.items()}

    def rounded(other: Program) -> Outcome:
        with _Rounding(generator):
            return run_original(other, knn, Selection(topk, 0.0))

    others = (
        replace(program, inputs=nudged(program.inputs), parameters=nudged(program.parameters)) for _ in range(32)
    )  # fmt: skip
    return any(differences(rounded(other), plain, tolerance / 8) for other in others)


# ---- the property -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """What became of one softmax."""

    rewritten: bool
    tier: str
    reason: str


def fates_of(graph: fx.GraphModule, result: PassResult, order: dict[fx.Node, int]) -> list[Fate]:
    """One fate per softmax, in program order (two products that read one softmax are two sites)."""
    found: dict[fx.Node, Fate] = {}
    for decision in result.decisions:
        site = decision.site
        found[site.softmax] = Fate(decision.topk is not None, site.tier, decision.reason or site.tier_reason)
    for refusal in result.refusals:
        assert refusal.reason, f"{refusal.node} is refused without a reason"
        if refusal.reason.startswith("between the products"):
            continue  # no softmax
        assert refusal.node not in found, f"{refusal.node} is a site and a refusal"
        found[refusal.node] = Fate(False, "", refusal.reason)
    return [found[node] for node in sorted(found, key=lambda node: order[node])]


def rewritten_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    targets = (torch.ops.kvt.attention.default, torch.ops.kvt.topk_softmax.default)
    return [node for node in graph.graph.nodes if node.target in targets]


def set_arguments(graph: fx.GraphModule, *, topk: int | None = None, lowering: str | None = None) -> None:
    """The same rewritten graph with another k or lowering."""
    changes = {name: x for name, x in (("topk", topk), ("lowering", lowering)) if x is not None}
    for node in rewritten_nodes(graph):
        names = [argument.name for argument in node.target._schema.arguments]
        node.args = tuple(changes.get(name, x) for name, x in zip(names, node.args, strict=False))


def check(
    program: Program, topk: int, *, capture: Callable[..., fx.GraphModule] = traced, reference: bool = True
) -> list[Fate]:
    """Asserts the property for one program and returns what became of its softmaxes.

    Args:
        program: what to check.
        topk: k, at most the number of keys or more.
        capture: how the program becomes a graph.
        reference: whether to run the reference lowering as well.
    """
    tolerance = EXACT if program.exact else ROUNDED
    dense = run_original(program)
    assume(all(x.isfinite().all() for x in dense.outputs.values()))
    assume(all(x.isfinite().all() for x in dense.gradients.values() if x is not None))
    module = program.build()
    graph = capture(module, list(program.inputs.values()))
    order = {node: n for n, node in enumerate(graph.graph.nodes)}
    result = run_passes(graph, Policy(topk=topk, force_rewrite=True), lowering="aten")
    fates = fates_of(graph, result, order)
    candidates = _choices(program, fates)
    if program.negative:
        assert not any(fate.rewritten for fate in fates), f"not attention, but rewritten: {fates}\n{program!r}"

    def actual(**changes: Any) -> Outcome:
        set_arguments(graph, **changes)
        for name, x in (*program.parameters.items(), *program.buffers.items()):
            module.get_parameter(name).data.copy_(x) if name in program.parameters else module.get_buffer(name).copy_(x)
        interpreter = fx.Interpreter(graph)  # generating code for each change would take longer than running it
        return run(interpreter.run, program, module, backward=bool(dense.gradients))

    selected = actual()
    # weights that are normalised again are the softmax of other scores, and select by those: the oracle knows the first alone
    if "renormalised" not in program.tags:
        _assert_selects(program, topk, selected, candidates, tolerance, f"{fates}\n{program!r}\n{graph.graph}")
    if rewritten_nodes(graph):
        if reference and (wrong := differences(actual(lowering="reference"), selected, tolerance)):
            assume(not rounding_decides(program, tolerance))
            raise AssertionError(f"the reference lowering differs: {wrong}\n{program!r}\n{graph.graph}")
        if wrong := differences(actual(topk=1 << 20, lowering="aten"), dense, tolerance):
            assume(not rounding_decides(program, tolerance))
            raise AssertionError(f"k = N differs from dense: {wrong}; {fates}\n{program!r}\n{graph.graph}")
    return fates


def _assert_selects(
    program: Program, topk: int, selected: Outcome, candidates: list[tuple[bool, ...]], tolerance: float, shown: str
) -> None:
    """What was computed is the program with k-NN softmax by hand at one of the candidates' places."""
    misses: list[list[str]] = []
    for choice in candidates:
        selection = Selection(topk, 10 * tolerance)
        try:
            expected = run_original(program, choice, selection)
        except RuntimeError as error:  # its weights by hand may lie otherwise in memory than the program's own
            assume("view size is not compatible" not in str(error))
            raise
        assume(not selection.close and all(x.isfinite().all() for x in expected.outputs.values()))
        misses.append(differences(selected, expected, tolerance))
        if not misses[-1]:
            return
    assume(not any(rounding_decides(program, tolerance, choice, topk) for choice in candidates))
    raise AssertionError(f"k = {topk}: {min(misses, key=len)}; {shown}")


def _choices(program: Program, fates: list[Fate]) -> list[tuple[bool, ...]]:
    """Which anchors may have become k-NN attention.  Only a softmax by hand may go unnoticed."""
    if len(fates) == program.anchors:
        return [tuple(fate.rewritten for fate in fates)]
    by_hand = any(tag in ("softmax:by_hand", "softmax:exp_log") for tag in program.tags)
    assert len(fates) < program.anchors, f"more softmaxes found than there are: {fates}\n{program!r}"
    assert by_hand, f"a softmax is neither a site nor refused: {fates}\n{program!r}"
    rewritten = sum(fate.rewritten for fate in fates)
    every = itertools.product((False, True), repeat=program.anchors)
    return [choice for choice in every if sum(choice) == rewritten]
