"""Random programs with what stands around operations: modes, transforms, checkpoints, graph breaks, hooks, dtypes.

A program of fuzz_programs in float32 gets one to three of

    no_grad, enable_grad, inference_mode(False), autocast    around some of its lines: a `with`
    checkpoint, decorators, torch.func.grad                  around some of its lines: a function
    detach, hooks, graph breaks, transforms                  between them
    whole-number and float64 tensors, large offsets          added to what they compute
    checkpoint, vmap, grad, vjp, jvp                         around all of it, in the compiled model
    forward and backward hooks                               on the module

and `kvt_compile.verify` says whether torch.compile keeps its meaning at k = N: values, gradients, and which there are.
Where every softmax of it is rewritten, k < N is compared with the same program in float64, its softmaxes k-NN by hand.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import fuzz_programs
import torch
import torch.nn.functional as F
from fuzz_check import EXACT, ROUNDED, differences
from fuzz_graphs import Program, Selection
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import kvt_compile
from kvt_compile.passes.canonical.modes import ambient
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.verification.outcome import Outcome, Run

Draw = Callable[[st.SearchStrategy[Any]], Any]

AROUND = (
    "with torch.no_grad():",
    "with torch.enable_grad():",
    "with torch.no_grad(), torch.inference_mode(False):",
    "with torch.autocast('cpu', torch.bfloat16):",
    "with torch.autocast('cpu', torch.float16):",
    "with torch.autocast('cpu', enabled=False):",
)
FUNCTIONS = (
    "{outs} = checkpoint(body, {ins}, use_reentrant=False)",
    "{outs} = torch.no_grad()(body)({ins})",
    "{outs} = torch.set_grad_enabled(False)(body)({ins})\ntorch.set_grad_enabled(True)",
    "{outs} = torch.autocast('cpu', torch.bfloat16)(body)({ins})",
    "{outs} = torch.enable_grad()(body)({ins})",
    "{outs} = body({ins})\n{last} = {last} + torch.func.grad(lambda *z: body(*z)[-1].float().sum())({ins}).mean()",
)
"""Ways to call some lines that became a function."""
BETWEEN = (
    "torch._dynamo.graph_break()",
    "{x} = {x}.detach()",
    "{x} = {x} * 1.0\nif {x}.requires_grad:\n    {x}.register_hook(lambda g: g * 2.0)",
    "{x} = {x} + ({x}.detach() - {x}.detach())",
    "{x} = ({x} + 64.0) - 64.0",
    "{x} = {x} + torch.arange({x}.shape[-1])",
    "{x} = {x} - 0.05 * (torch.arange({x}.shape[-1]) + 1700000000 - (1700000000 - 2))",
    "{x} = {x} + (torch.arange({x}.shape[-1], dtype=torch.uint8) - 3)",
    "{x} = {x} + (torch.arange({x}.shape[-1], dtype=torch.int32) * 1103515245 % 7)",
    "{x} = {x} - (torch.arange({x}.shape[-1], dtype=torch.float64) / 60 + 1e6 - 1e6).abs().float()",
    "{x} = torch.where(torch.arange({x}.shape[-1], dtype=torch.float64) != 1.0, {x}, -1e4)",
    "{x} = {x}.clamp(-1.0, 1.0)",
    "{x} = torch.func.grad(lambda z: 0.5 * (z * z).sum())({x})",
    "{x} = torch.vmap(lambda z: z * 1.5)({x})",
    "{x} = torch.func.vjp(lambda z: z * 0.5, {x})[1]({x})[0]",
    "{x} = torch.func.jvp(lambda z: z.sin(), ({x},), ({x},))[1]",
    "{x} = torch.vmap(torch.func.grad(lambda z: (z * z).sum()))({x})",
)
WHOLE = ("checkpoint", "vmap", "grad", "vjp", "jvp")
HOOKS: dict[str, Callable[..., Any]] = {
    "forward": lambda module, given, out: out,
    "forward_pre": lambda module, given: (given[0] * 2.0, *given[1:]),
    "full_backward": lambda module, given, out: _doubled(given),
    "full_backward_pre": lambda module, out: _doubled(out),
}


def _doubled(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A mask has a gradient of its own type in such a hook."""
    return tuple(g if g is None or not g.is_floating_point() else g * 2.0 for g in gradients)


Lines = list[list[str]]
"""Every line as it is, and with k-NN attention by hand in it."""


@st.composite
def modes(draw: Draw) -> Program:
    """A program in float32, its lines wrapped."""
    program: Program = draw(fuzz_programs.positives())
    assume(program.exact and not any("float64" in line.dense for line in program.lines))
    lines: Lines = [[line.dense, line.knn or line.dense] for line in program.lines]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(("with", "between", "between", "function")))
        if kind == "between":
            name = lines[start][0].partition(" = ")[0].strip()
            assume(name.isidentifier())
            lines.insert(start + 1, [draw(st.sampled_from(BETWEEN)).format(x=name)] * 2)
            continue
        stop = draw(st.integers(start + 1, len(lines)))
        if kind == "with":
            head = draw(st.sampled_from(AROUND))
            bodies = ["\n".join(text) for text in zip(*lines[start:stop], strict=True)]
            lines[start:stop] = [[f"{head}\n{_indented(body)}" for body in bodies]]
        else:
            _as_function(draw(st.sampled_from(FUNCTIONS)), lines, start, stop, program)
    whole = draw(st.sampled_from(("", "", *WHOLE)))
    hook = draw(st.sampled_from(("", "", "", *HOOKS)))
    program.tags += [f"whole:{whole}", f"hook:{hook}"]
    head = f"def forward({', '.join(['self', *program.inputs])}):"
    texts = [
        f"{head}\n{_indented(chr(10).join(text))}\n    return {', '.join(program.returns)}\n"
        for text in zip(*lines, strict=True)
    ]
    program.texts, program.whole, program.hook = texts, whole, hook  # type: ignore[attr-defined]
    return program


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _as_function(call: str, lines: Lines, start: int, stop: int, program: Program) -> None:
    """Makes a function of some lines, of what they read, which returns what they set."""

    def names(text: str) -> list[str]:
        return list(dict.fromkeys(re.findall(r"(?<![\w.])([a-z]\d+)\b", text)))

    inside = [line[0] for line in lines[start:stop]]
    known = [*program.inputs, *names("\n".join(line[0] for line in lines[:start]))]
    ins = [name for name in names("\n".join(inside)) if name in known]
    outs = list(dict.fromkeys(n for text in inside for n in re.findall(r"^ *([a-z]\d+) = ", text, re.MULTILINE)))
    assigned = "\n".join(inside)
    assume(ins and outs and "_(" not in assigned and "def " not in assigned and not set(ins) & set(outs))
    assume(all(re.match(r" *[a-z]\d+ = |with |    ", text) for line in inside for text in line.splitlines()))
    after = call.format(outs=f"{', '.join(outs)},", ins=", ".join(ins), last=outs[-1])
    bodies = ["\n".join(text) for text in zip(*lines[start:stop], strict=True)]
    head, result = f"def body({', '.join(ins)}):", f"    return {', '.join(outs)},"
    lines[start:stop] = [[f"{head}\n{_indented(body)}\n{result}\n{after}" for body in bodies]]


class Around(nn.Module):
    """A module called as a whole in another way."""

    def __init__(self, inner: nn.Module, whole: str) -> None:
        super().__init__()
        self.inner, self.whole = inner, whole

    def forward(self, *xs: Tensor) -> Any:
        def first(x: Tensor) -> Tensor:
            return self.inner(x, *xs[1:])

        match self.whole:
            case "checkpoint":
                return checkpoint(self.inner, *xs, use_reentrant=False)
            case "vmap":
                return torch.vmap(first)(torch.stack([xs[0], xs[0] * 0.5]))
            case "grad":
                return torch.func.grad(lambda x: first(x).sum())(xs[0])
            case "vjp":
                out, pull = torch.func.vjp(first, xs[0])
                return out, *pull(torch.ones_like(out))
            case "jvp":
                return torch.func.jvp(first, (xs[0],), (torch.ones_like(xs[0]),))
        return self.inner(*xs)


def built(program: Program, selection: Selection | None = None, wide: bool = False) -> tuple[nn.Module, list[Tensor]]:
    """The model and its inputs; with a `selection` its softmaxes are k-NN by hand; `wide`: in float64."""
    namespace: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint, "knn": selection}
    text = program.texts[selection is not None]  # type: ignore[attr-defined]
    exec(text if wide else text.replace(".double()", ".float()"), namespace)
    module = type("Fuzzed", (nn.Module,), {"forward": namespace["forward"]})()
    cast = Tensor.clone if wide else _small
    for name, x in program.parameters.items():
        module.register_parameter(name, nn.Parameter(cast(x)))
    for name, x in program.buffers.items():
        module.register_buffer(name, cast(x))
    if hook := program.hook:  # type: ignore[attr-defined]
        getattr(module, f"register_{hook}_hook")(HOOKS[hook])
    return Around(module, program.whole), [cast(x) for x in program.inputs.values()]  # type: ignore[attr-defined]


def _small(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x.clone()


def _finite(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether there is something to judge: of a row of NaN every key has a gradient of NaN here, masked ones too."""
    leaves = pytree.tree_leaves(model(*inputs))
    return all(bool(x.isfinite().all()) for x in leaves if isinstance(x, Tensor))


def check_modes(program: Program, topk: int) -> str:
    """Asserts that `verify` has nothing to say of a program, and that k < N is k-NN attention by hand; returns what became
    of it: "rewritten", "selected" (k < N compared too), "left", or "dropped: " and why torch compiles nothing."""
    model, inputs = built(program)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = kvt_compile.verify(model, *inputs, lowering="aten", one_by_one=False, reproduce_in=False)
        except kvt_compile.VerificationError as error:  # a program that does not run by itself, or has nothing finite
            assume("the model itself fails" not in str(error) and "NaN or infinite" not in str(error))
            raise
        text = program.texts[0]  # type: ignore[attr-defined]
        ok = found.together is None or found.together.ok
        assume(ok or _finite(model, inputs))
        assert ok, f"{found}\n{program!r}\n{text}"
        if found.together is None:  # what torch gives up on is torch's
            return f"dropped: {found.dropped[0].splitlines()[0]}" if found.dropped else "left"
        selected = "autocast" not in text and _selects(program, topk)
    return "selected" if selected else "rewritten"


def _selects(program: Program, topk: int) -> bool:
    """Compares k < N with k-NN attention by hand; False where some softmax of the program is not rewritten, or its choice
    is too near."""
    model, inputs = built(program, wide=True)
    selection = Selection(topk, 10 * ROUNDED)
    by_hand = built(program, selection, wide=True)[0]
    results: list[PassResult] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        results.append(run_passes(gm, Policy(topk, force_rewrite=True), lowering="aten", entry=ambient()))
        return gm.forward

    def run(model: nn.Module, call: Callable[..., Any]) -> Outcome:
        return Run(model, tuple(inputs), {}, backward=True)(call)

    torch._dynamo.reset()
    found = run(model, torch.compile(model, backend=backend))
    decisions = [x for result in results for x in result.decisions]
    if len(decisions) != program.anchors or any(x.topk is None for x in decisions):
        return False
    if any(result.refusals for result in results):  # a softmax in a function that is called again, under torch.func
        return False
    try:
        expected = run(by_hand, by_hand)
    except (
        NameError,
        RuntimeError,
    ):  # by hand a softmax is one line: a function around a part of its lines, or a view of
        return False  # the memory they make, is then no program
    if selection.close or not all(x.isfinite().all() for x in expected.outputs.values()):
        return False
    text = program.texts[0]  # type: ignore[attr-defined]
    wrong = differences(found, expected, EXACT if "float()" not in text else ROUNDED)
    assert not wrong, f"k = {topk}: {wrong}\n{program!r}\n{text}"
    return True
