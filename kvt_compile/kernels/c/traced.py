"""An operator in a graph that Inductor writes C++ for -> its C kernel there, called by no dispatcher and no Python.

    kvt::attention(q, k, v, [c0], "s + c0[j]", ...)    ->    kvt_c::attention_<digest>(q, k, v, c0, topk)

One operator for each spec.  What Inductor writes calls `aoti_torch_cpu_attention_<digest>`, a function of the spec's C
text (`templates/inside.c.jinja`) whose object the linker puts into what Inductor builds.  Where such an operator is
called in Python after all it is `kvt::attention`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.c.generate import source_inside
from kvt_compile.kernels.c.lowering import refusal
from kvt_compile.kernels.c.settings import from_environment
from kvt_compile.kernels.c.toolchain import BuildError, find_compiler
from kvt_compile.kernels.op.arguments import AttentionArguments
from kvt_compile.kernels.op.lowerings import CannotTraceError
from kvt_compile.kernels.op.spec import KernelSpec

_LIBRARY = torch.library.Library("kvt_c", "FRAGMENT")
_operators: dict[str, Any] = {}


@dataclass(frozen=True)
class Objects:
    """What is to be linked, as Inductor's configuration takes it."""

    folder: Path
    declarations: dict[Any, list[str]] = field(default_factory=dict)
    """Operator -> the C declaration of the function that runs it."""
    libraries: list[str] = field(default_factory=list)

    def operator(self, spec: KernelSpec) -> Any:
        """The operator of a spec, its object built.  Raises BuildError."""
        digest = hashlib.sha256(source_inside(spec, "attention").encode()).hexdigest()[:16]
        name = f"attention_{digest}"
        if name not in _operators:
            _operators[name] = _define(spec, name)
        op = _operators[name]
        if op not in self.declarations:
            file = self.folder / f"{name}.c"
            file.write_text(source_inside(spec, name), encoding="utf-8")
            settings = from_environment()
            compiler = find_compiler(settings.compiler, settings.target).probed()
            compiler.build(file, file.with_suffix(".o"), ("-c",))
            self.libraries.append(f":{name}.o")
            self.declarations[op] = [_declaration(spec, name)]
        return op


@contextmanager
def linked() -> Iterator[Objects]:
    """What Inductor builds in here is linked with the objects of the operators that were asked for."""
    from torch._inductor import config

    with tempfile.TemporaryDirectory(prefix="kvt_compile.inside-") as folder:
        objects = Objects(Path(folder))
        names = {"custom_ops_to_c_shims": objects.declarations, "custom_op_libs": objects.libraries}
        before = os.environ.get("LIBRARY_PATH")  # where compilers look for what is linked
        os.environ["LIBRARY_PATH"] = os.pathsep.join(x for x in (folder, before) if x)
        try:
            with config.patch({f"aot_inductor.{name}": value for name, value in names.items()}):
                yield objects
        finally:
            if before is None:
                del os.environ["LIBRARY_PATH"]
            else:
                os.environ["LIBRARY_PATH"] = before


def attention(a: AttentionArguments, objects: Objects) -> tuple[Tensor, Tensor, Tensor]:
    """`kvt::attention` by the operator of its spec.  Raises CannotTraceError."""
    captured, sizes = a.captured or (), a.sizes or ()
    if a.dropout_p:
        raise CannotTraceError("it has dropout, which inference has not")
    if a.lowering not in ("auto", "c"):
        raise CannotTraceError(f"it asks for the lowering {a.lowering!r}")
    if a.select:
        raise CannotTraceError("its selection makes lists of keys in Python")
    if any(x.device.type != "cpu" for x in captured):
        raise CannotTraceError("a captured tensor is on another device")
    spec = KernelSpec.of(a.q, a.k, a.v, captured, a.score, a.weight, len(sizes))
    if reason := refusal(spec):
        raise CannotTraceError(reason)
    try:
        op = objects.operator(spec)
    except (BuildError, OSError) as error:
        raise CannotTraceError(str(error)) from error
    return op(a.q, a.k, a.v, *captured, a.topk, *sizes)  # type: ignore[no-any-return]


def _arguments(spec: KernelSpec, tensor: str, number: str) -> list[str]:
    tensors = ["q", "k", "v", *(f"c{n}" for n in range(len(spec.captured)))]
    numbers = ["topk", *(f"n{n}" for n in range(spec.sizes))]
    return [*(f"{tensor} {x}" for x in tensors), *(f"{number} {x}" for x in numbers)]


def _declaration(spec: KernelSpec, name: str) -> str:
    results = [f"AtenTensorHandle* {x}" for x in ("out", "lse", "threshold")]
    arguments = [*_arguments(spec, "AtenTensorHandle", "int64_t"), *results]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(arguments)})"


def _define(spec: KernelSpec, name: str) -> Any:
    results = "(Tensor out, Tensor logsumexp, Tensor threshold)"
    _LIBRARY.define(
        f"{name}({', '.join(_arguments(spec, 'Tensor', 'SymInt'))}) -> {results}",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
    captured = 3 + len(spec.captured)

    def run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        rest = spec.score, spec.weight, args[captured], list(args[captured + 1 :]), 0.0, None, "c"
        return torch.ops.kvt.attention(*args[:3], list(args[3:captured]), *rest)  # type: ignore[no-any-return]

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kvt_c::{name}", run, lib=_LIBRARY)
    return getattr(torch.ops.kvt_c, name).default
