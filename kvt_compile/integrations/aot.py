"""AOTInductor packages that hold the Triton kernels of k-NN attention, and so need nothing of this library to run.

    program = rewrite(torch.export.export(model.cuda(), inputs), *inputs, topk=0.5).program
    with kernels_inside():
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

Without the `with`, a package calls our operators, and whoever loads it imports `kvt_compile.kernels.ops` first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from kvt_compile.kernels.op import ops
from kvt_compile.kernels.triton import traced

_inside: ContextVar[bool] = ContextVar("kvt_kernels_inside", default=False)
_LIBRARY = torch.library.Library("kvt", "FRAGMENT")


@contextmanager
def kernels_inside() -> Iterator[None]:
    """What is compiled ahead of time in here holds Triton kernels instead of calls of `kvt::attention` and
    `kvt::topk_softmax`, with the block sizes measured for the GPU (`kvt tune`) or else the defaults.

    For inference on NVIDIA GPUs.  A RuntimeWarning names each operator that has to stay and why: tensors that are not
    on such a GPU, dropout, scores with erf, sin, cos or log, or what the Triton lowering does not run at all.
    """
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def _expanded(bind: Callable[..., Any], by: Callable[[Any], Any]) -> Callable[..., Any]:
    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _inside.get():
            try:
                with mode:
                    return by(bind(*args, **kwargs))
            except traced.CannotTraceError as error:
                warnings.warn(
                    f"{op.name()} stays in the package, which then needs `import kvt_compile.kernels.ops` "
                    f"wherever it is loaded: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return mode.__torch_dispatch__(op, types, args, kwargs)

    return rule


for _name, _rule in (
    ("attention", _expanded(ops.attention_arguments, traced.attention)),
    ("topk_softmax", _expanded(ops.softmax_arguments, traced.topk_softmax)),
):
    torch.library.register_torch_dispatch(f"kvt::{_name}", FunctionalTensorMode, _rule, lib=_LIBRARY)
