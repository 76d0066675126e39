"""What a model does around its operations -> what a capture would lose of it.

    with torch.autocast("cpu", torch.bfloat16): ...   by a symbolic trace: gone;  by torch.export: kept
    with torch.inference_mode(): ...                  gone in both

A trace records operations.  The modes they run in are looked at for every operation, so nothing has to be known of how
a model enters them: a `with`, a decorator, a call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kvt_compile.capture.unchanged import unchanged
from kvt_compile.passes.finding.describe import in_torch

KEPT_BY_EXPORT = frozenset({"grad mode", "autocast"})


def _state() -> dict[str, Any]:
    devices = ("cpu", "cuda")
    return {
        "grad mode": torch.is_grad_enabled(),
        "autocast": tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
        "inference mode": torch.is_inference_mode_enabled(),
        "saved-tensor hooks (activation checkpointing, save_on_cpu)": _hooks(),
        "the default dtype": torch.get_default_dtype(),
        "a mode for functions (a default device, say)": torch._C._len_torch_function_stack(),
        "a mode for operators": torch._C._len_torch_dispatch_stack(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _hooks() -> int | None:
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if top is None else id(top[0])


def _codes() -> frozenset[Any]:
    functions: tuple[Callable[..., Any], ...] = (
        torch.random.fork_rng, torch.random.manual_seed, torch.random.seed, torch.random.set_rng_state,
    )  # fmt: skip
    return frozenset(inspect.unwrap(function).__code__ for function in functions)


class Watch:
    """Notes where an operation runs in another mode than the model as a whole, and what sets torch's random state."""

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        """What differs -> the model's line where it did first."""
        self._start = _state()

    def note(self) -> None:
        for name, value in _state().items():
            if value != self._start[name] and name not in self.lost:
                self.lost[name] = _line(sys._getframe(1))

    @contextmanager
    def of_random_state(self) -> Iterator[None]:
        """Notes calls that set or fork torch's random state: no operation shows them."""
        codes, before = _codes(), sys.getprofile()

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code in codes:
                self.lost.setdefault("torch's random state (fork_rng, manual_seed)", _line(frame))
            if before is not None:
                before(frame, event, argument)

        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(before)

    def text(self) -> str:
        return "; ".join(f"{name} at {line}" for name, line in self.lost.items())


def _line(frame: FrameType | None) -> str:
    while frame is not None and (in_torch(frame.f_code.co_filename) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"


class _Noting(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watch.note()
        return func(*args, **(kwargs or {}))


def lost_when_run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Watch:
    """Runs the model once, as it is, and says what it does around its operations.  Buffers and random state are as
    before afterwards; whatever the model raises is raised."""
    with unchanged(model):
        watch = Watch()
        with watch.of_random_state(), _Noting(watch):
            model(*args, **kwargs)
    return watch


def hooked(model: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> str:
    """The name of a module with hooks that a trace goes into, so that they would run while it is traced and never
    again; empty when there is none.  A module that stays one node keeps its hooks."""
    for name, module in model.named_modules():
        if name and is_leaf(module, name):
            continue
        if any(getattr(module, kind) for kind in _HOOKS):
            return name or type(model).__name__
    return ""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
