"""A compilation that torch drops in silence -> one warning: what was to be k-NN attention runs exactly dense.

    TORCH_COMPILE_DISABLE, torch._dynamo.config.disable, a stance "force_eager"     seen when the backend is asked for
    vmap, grad, vjp, jvp of a compiled function                                     seen when Dynamo gives the frame up

What cannot be seen from here, since torch calls nothing of ours: a stance or a switch that is set after the first
`torch.compile(backend="kvt")` of the process, and a deep copy of a model after `model.compile()`, which torch makes
without what was compiled.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

_told: set[str] = set()
_DENSE = "what it holds runs exactly dense"


def tell(reason: str) -> None:
    """Warns once for each reason."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f'torch.compile(backend="kvt"): {reason}', stacklevel=2)


def told() -> list[str]:
    """What was dropped in this process so far."""
    return sorted(_told)


def tell_if_disabled() -> None:
    """For when the backend is asked for: whether torch will call it at all."""
    if reason := disabled():
        tell(reason)


def disabled() -> str:
    """Why torch would compile nothing now; empty when it would."""
    import torch._dynamo.eval_frame as eval_frame

    config: Any = torch._dynamo.config
    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return f"compilation is switched off (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE): {_DENSE}"
    if getattr(getattr(eval_frame, "_stance", None), "stance", "default") == "force_eager":
        return f'the compiler\'s stance is "force_eager": while it is, {_DENSE}'
    return ""


def tell_of_transforms(backend: Callable[..., Any]) -> None:
    """From now on: of every frame compiled by `backend` that is called under a transform of torch.func, where Dynamo
    gives up before it calls a backend."""
    from torch._dynamo.callback import on_compile_start

    def started(_: Any) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None and _is_for(backend):
            tell(
                "torch does not compile a function that is called under torch.func (vmap, grad, vjp, jvp ...): "
                f"{_DENSE}. Put the transform inside the compiled function to be told what becomes of each "
                "attention, or use kvt_compile.rewrite, whose module runs under vmap, grad and vjp"
            )

    on_compile_start(started)


def _is_for(backend: Callable[..., Any]) -> bool:
    """Whether the frame that Dynamo has begun to compile goes to this backend."""
    # (no public name says so; where the variable is called otherwise nothing is told.)
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("compiler_fn") if frame.f_code.co_name == "_compile" else None
        if found is not None:
            while hasattr(found, "_torchdynamo_orig_backend"):
                found = found._torchdynamo_orig_backend
            return getattr(found, "compiler_fn", found) is backend
        frame = frame.f_back
    return False
