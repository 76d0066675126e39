"""A model -> copies to run: without what the user compiled of it, without dropout, in float64 and in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvt_compile.verification.outcome import VerificationError, first_line


def plain(model: nn.Module) -> nn.Module:
    """A copy in which nothing is compiled.  Raises VerificationError where the model cannot be copied."""
    try:
        made = copy.deepcopy(_inner(model))
    except Exception as error:
        raise VerificationError(
            f"{type(model).__name__} cannot be copied, and verify runs copies of it: {first_line(error)}"
        ) from error
    for module in list(made.modules()):
        module._compiled_call_impl = None
        for name, child in list(module.named_children()):
            if _inner(child) is not child:
                setattr(module, name, _inner(child))
    return made


def _inner(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given."""
    while type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def quiet(model: nn.Module) -> nn.Module:
    """Switches off what is random in a model's training mode: every number called drop-something, in a module or its
    configuration, becomes 0."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
                if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(module).__name__)):
                    setattr(holder, name, 0.0)
    return model


def converted(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The same model and inputs in another floating-point type."""
    made: dict[int, Tensor] = {}

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return made.setdefault(id(x), x.detach().to(dtype))

    made_args, made_kwargs = pytree.tree_map(cast, (args, dict(kwargs)))
    return copy.deepcopy(model).to(dtype), made_args, made_kwargs


def doubled(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The same model and inputs in float64."""
    return converted(model, args, kwargs, torch.float64)


def is_wide(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a model computes in float64 by itself."""
    tensors = [*model.parameters(), *(x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor))]
    kinds = {x.dtype for x in tensors if x.is_floating_point()}
    return bool(kinds) and kinds == {torch.float64}
