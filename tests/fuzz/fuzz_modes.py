"""Random programs with what stands around operations: modes, transforms, checkpoints, graph breaks, hooks, dtypes.

A program of fuzz_programs in float32 gets one to three of

    no_grad, enable_grad, autocast                       around some of its lines
    detach, hooks, graph breaks                          between them
    whole-number and float64 tensors, large offsets      added to what they compute
    checkpoint, vmap, grad, vjp, jvp                     around all of it, in the compiled model

and `kvt_compile.verify` says whether torch.compile keeps its meaning at k = N: values, gradients, and which there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import fuzz_programs
import torch
import torch.nn.functional as F
from fuzz_graphs import Program
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kvt_compile

Draw = Callable[[st.SearchStrategy[Any]], Any]

AROUND = (
    "with torch.no_grad():",
    "with torch.enable_grad():",
    "with torch.autocast('cpu', torch.bfloat16):",
    "with torch.autocast('cpu', torch.float16):",
    "with torch.autocast('cpu', enabled=False):",
)
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
)
WHOLE = ("checkpoint", "vmap", "grad", "vjp", "jvp")


@st.composite
def modes(draw: Draw) -> Program:
    """A program in float32, its lines wrapped."""
    program: Program = draw(fuzz_programs.positives())
    assume(program.exact and not any("float64" in line.dense for line in program.lines))
    lines = [line.dense for line in program.lines]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(lines) - 1))
        if draw(st.booleans()):
            stop = draw(st.integers(start + 1, len(lines)))
            head = draw(st.sampled_from(AROUND))
            body = "\n".join(f"    {part}" for line in lines[start:stop] for part in line.splitlines())
            lines[start:stop] = [f"{head}\n{body}"]
        else:
            name = lines[start].partition(" = ")[0].strip()
            assume(name.isidentifier())
            lines.insert(start + 1, draw(st.sampled_from(BETWEEN)).format(x=name))
    whole = draw(st.sampled_from(("", "", *WHOLE)))
    source = "\n".join(lines).replace(".double()", ".float()")
    indented = "\n".join(f"    {line}" for line in source.splitlines())
    head = f"def forward({', '.join(['self', *program.inputs])}):"
    program.tags.append(f"whole:{whole}")
    program.text = f"{head}\n{indented}\n    return {', '.join(program.returns)}\n"  # type: ignore[attr-defined]
    program.whole = whole  # type: ignore[attr-defined]
    return program


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


def built(program: Program) -> tuple[nn.Module, list[Tensor]]:
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec(program.text, namespace)  # type: ignore[attr-defined]
    module = type("Fuzzed", (nn.Module,), {"forward": namespace["forward"]})()
    for name, x in program.parameters.items():
        module.register_parameter(name, nn.Parameter(_small(x)))
    for name, x in program.buffers.items():
        module.register_buffer(name, _small(x))
    return Around(module, program.whole), [_small(x) for x in program.inputs.values()]  # type: ignore[attr-defined]


def _small(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x.clone()


def check_modes(program: Program) -> bool:
    """Asserts that `verify` has nothing to say of a program; returns whether something was rewritten."""
    model, inputs = built(program)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = kvt_compile.verify(model, *inputs, lowering="aten", one_by_one=False, reproduce_in=False)
        except kvt_compile.VerificationError as error:  # a program that does not run by itself, or has nothing finite
            assume("the model itself fails" not in str(error) and "NaN or infinite" not in str(error))
            raise
    # what torch gives up on is in found.dropped, and is torch's
    text = program.text  # type: ignore[attr-defined]
    assert found.together is None or found.together.ok, f"{found}\n{program!r}\n{text}"
    return found.together is not None
