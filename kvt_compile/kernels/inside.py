"""An operator in a graph that Inductor writes C++ for -> its kernel there: in C on a CPU, in Triton on a GPU.

AOTInductor packages made so need nothing of this library to run (`kvt_compile.integrations.aot`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from kvt_compile.kernels.c import traced as in_c
from kvt_compile.kernels.op import ops
from kvt_compile.kernels.op.arguments import AttentionArguments, SoftmaxArguments
from kvt_compile.kernels.op.lowerings import CannotTraceError
from kvt_compile.kernels.triton import traced as in_triton


@dataclass(frozen=True)
class _Inside:
    objects: in_c.Objects
    tell: bool


_inside: ContextVar[_Inside | None] = ContextVar("kvt_kernels_inside", default=None)
_LIBRARY = torch.library.Library("kvt", "FRAGMENT")


@contextmanager
def kernels_inside(*, tell: bool = True) -> Iterator[None]:
    """What is compiled ahead of time in here holds kernels instead of calls of `kvt::attention` and, on a GPU,
    `kvt::topk_softmax`: on a CPU C kernels for the instruction set of this machine (or `KVT_CPU`), on an NVIDIA GPU
    Triton kernels with the block sizes measured for the GPU (`kvt tune`) or else the defaults.

    For inference.  A RuntimeWarning names each operator that has to stay and why: dropout, a selection with lists of
    keys, no C compiler; on a GPU an AMD one and scores with erf, sin, cos or log; or what the lowering does not run.
    `tell`: False leaves those warnings out.
    """
    with in_c.linked() as objects:
        token = _inside.set(_Inside(objects, tell))
        try:
            yield
        finally:
            _inside.reset(token)


def _attention(a: AttentionArguments, objects: in_c.Objects) -> tuple[Tensor, Tensor, Tensor]:
    return in_c.attention(a, objects) if a.q.device.type == "cpu" else in_triton.attention(a)


def _topk_softmax(a: SoftmaxArguments, objects: in_c.Objects) -> Tensor:
    return in_triton.topk_softmax(a)


def _expanded(bind: Callable[..., Any], by: Callable[[Any, in_c.Objects], Any]) -> Callable[..., Any]:
    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (inside := _inside.get()) is not None:
            try:
                with mode:
                    return by(bind(*args, **kwargs), inside.objects)
            except CannotTraceError as error:
                if inside.tell:
                    warnings.warn(
                        f"{op.name()} stays in the package, which then needs `import kvt_compile.kernels.ops` "
                        f"wherever it is loaded: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return mode.__torch_dispatch__(op, types, args, kwargs)

    return rule


for _name, _rule in (
    ("attention", _expanded(ops.attention_arguments, _attention)),
    ("topk_softmax", _expanded(ops.softmax_arguments, _topk_softmax)),
):
    torch.library.register_torch_dispatch(f"kvt::{_name}", FunctionalTensorMode, _rule, lib=_LIBRARY)
