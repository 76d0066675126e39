"""What a model does around its operations -> what a capture would lose of it.

    with torch.autocast("cpu", torch.bfloat16): ...   by a symbolic trace: gone;  by torch.export: kept
    with torch.inference_mode(): ...                  gone in both

A trace records operations.  The modes they run in are looked at for every operation, so nothing has to be known of how
a model enters them: a `with`, a decorator, a call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from kvt_compile.capture.literals import Making
from kvt_compile.capture.unchanged import Held, unchanged
from kvt_compile.capture.watching import Watching
from kvt_compile.passes.canonical.spellings import HOOKS
from kvt_compile.passes.finding.describe import in_torch

MADE_ANEW = "a tensor that is made anew in every call"
NEW_BUFFER = "a buffer that is another tensor after the call"
UNRECORDED = "random numbers that depend on no input"
KEPT_BY_EXPORT = frozenset({"grad mode", "autocast", MADE_ANEW, NEW_BUFFER, UNRECORDED})
_BOTH = "grad mode and autocast, one within the other"


def _state() -> dict[str, Any]:
    devices = ("cpu", "cuda")
    return {
        "grad mode": torch.is_grad_enabled(),
        "autocast": tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
        "inference mode": torch.is_inference_mode_enabled(),
        "saved-tensor hooks (activation checkpointing, save_on_cpu)": _hooks(),
        "the default dtype": torch.get_default_dtype(),
        _MODE: sum(type(mode) is not Making for mode in _get_current_function_mode_stack()),
        "a mode for operators": torch._C._len_torch_dispatch_stack(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _hooks() -> int | None:
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if top is None else id(top[0])


_INNER = (os.path.dirname(os.path.dirname(__file__)) + os.sep, contextlib.__file__)
_RANDOM = "torch's random state (fork_rng, manual_seed)"
_MODE = "a mode for functions (a default device, say)"


def _told_by_calls() -> dict[CodeType, str]:
    """Code of torch's -> what its being called means: what an operation does not show, or may not, as autocast that is
    switched off where it is off already, but may be on when the model runs."""
    calls: dict[Callable[..., Any], str] = {
        **dict.fromkeys((torch.random.fork_rng, torch.random.manual_seed, torch.random.seed), _RANDOM),
        torch.random.set_rng_state: _RANDOM,
        torch.autocast.__enter__: "autocast",
        torch.enable_grad.__enter__: "grad, which it switches on again (enable_grad)",
        DeviceContext.__enter__: _MODE,
        TorchFunctionMode.__enter__: _MODE,
        TorchDispatchMode.__enter__: "a mode for operators",
        **dict.fromkeys((Tensor.register_hook, Tensor.register_post_accumulate_grad_hook), "a hook on a gradient"),
    }
    return {inspect.unwrap(function).__code__: name for function, name in calls.items()}


def _asks(code: CodeType, module: str) -> bool:
    """Python's own library asks for the classes of much, and of what it is given in singledispatch."""
    if in_torch(code.co_filename) or code.co_filename.startswith(_INNER) or module.partition(".")[0] in _LIBRARY:
        return False
    return not {"type", "__class__", "is_fx_tracing"}.isdisjoint(code.co_names)


_LIBRARY = sys.stdlib_module_names - {functools.__name__}


def _applies_a_function(called: Any) -> bool:
    of = getattr(called, "__self__", None)
    return called.__name__ == "apply" and isinstance(of, type) and issubclass(of, torch.autograd.Function)


class Watch:
    """Notes where an operation runs in another mode than the model as a whole, and calls that enter one."""

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        """What differs -> the model's line where it did first."""
        self.writes_buffers = self.makes_buffers = False
        self.remembers = False
        """Whether a call leaves something on the model that is no buffer: a counter, a table, what it saw last."""
        self.asks = False
        """Whether code of the model's asks what proxies and fakes answer otherwise than tensors."""
        self._start = _state()

    def note(self) -> None:
        changed = {name for name, value in _state().items() if value != self._start[name]}
        if {"grad mode", "autocast"} <= changed:
            changed.add(_BOTH)  # of which torch.export keeps one
        for name in changed - self.lost.keys():
            self.lost[name] = _line(sys._getframe(1))

    @contextmanager
    def of_calls(self) -> Iterator[None]:
        """Notes the calls that no operation shows."""
        told, before, seen = _told_by_calls(), sys.getprofile(), set[CodeType]()

        def profile(frame: FrameType, event: Any, argument: Any) -> None:
            name = told.get(frame.f_code, "") if event == "call" else ""
            if not self.asks and frame.f_code not in seen:
                seen.add(frame.f_code)
                self.asks = _asks(frame.f_code, frame.f_globals.get("__name__", ""))
            if event == "c_call" and _applies_a_function(argument):
                name = "a torch.autograd.Function (reentrant checkpointing, say)"
            if name and (not name.startswith("grad") or torch.is_grad_enabled()):
                self.lost.setdefault(name, _line(frame))
            if before is not None:
                before(frame, event, argument)

        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(before)

    def note_held(self, held: Held) -> None:
        """What a call of the model has left on it."""
        self.writes_buffers, self.makes_buffers = held.writes_buffers(), held.makes_buffers()
        self.remembers = bool(held.replaced()) or held.has_new_content() or self.makes_buffers
        if names := held.new_buffers():
            self.lost.setdefault(NEW_BUFFER, names[0])
        if names := held.written():
            self.lost.setdefault("a write to a tensor that is no buffer", names[0])

    def text(self) -> str:
        return "; ".join(f"{name} at {line}" for name, line in self.lost.items())


def _line(frame: FrameType | None) -> str:
    """The model's own line."""
    while frame is not None and (in_torch(frame.f_code.co_filename) or frame.f_code.co_filename.startswith(_INNER)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"


class _Noting(Watching):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._watch.note()
        return func(*args, **kwargs)


def lost_when_run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Watch:
    """Runs the model once, as it is, and says what it does around its operations.  All it holds is as before
    afterwards; whatever the model raises is raised."""
    with unchanged(model) as held:
        watch = Watch()
        with _Noting(watch), watch.of_calls():
            model(*args, **kwargs)
        watch.note_held(held)
    return watch


def hooked(model: nn.Module, stays: Callable[[nn.Module, str], bool]) -> str:
    """Who has hooks that would run while the model is traced and never again; empty when nobody has.  `stays`: whether
    a module is one node of the trace, and keeps its hooks.  torch's own (weight_norm) only compute its weight."""
    if torch.nn.modules.module._has_any_global_hook():
        return "every module (torch.nn.modules.module.register_module_forward_hook and its like)"
    for name, module in model.named_modules():
        if name and stays(module, name):
            continue
        hooks = (hook for kind in HOOKS for hook in (getattr(module, kind) or {}).values())
        if not all(map(_is_of_torch, hooks)):
            return name or type(model).__name__
    return ""


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """The model without its users' hooks, while this is open."""
    kept = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in HOOKS]
    for module, kind, hooks in kept:
        setattr(module, kind, type(hooks)((key, hook) for key, hook in hooks.items() if _is_of_torch(hook)))
    try:
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)


def _is_of_torch(hook: Any) -> bool:
    return type(hook).__module__ in _OF_TORCH


_OF_TORCH = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
