"""fx.Graph -> the modes every node runs in: grad mode, inference mode, autocast, levels of torch.func.

    _set_grad_enabled(False);  w = softmax(q @ kT);  _set_grad_enabled(True);  w @ v
      ->  softmax: Mode(grad=False), w @ v: Mode(grad=True)

A captured graph switches modes by nodes that have no value.  They are part of what the model means: what is computed
without grad passes no gradient on, what is computed under autocast has another dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

Autocast = tuple[str, torch.dtype | None, bool]
"""Device type, dtype (None: the device's own), enabled."""


@dataclass(frozen=True)
class Mode:
    """What a node runs in."""

    grad: bool = True
    """The switch of no_grad, enable_grad and set_grad_enabled; entering or leaving inference mode turns it as well."""
    inference: bool = False
    """Inference mode, in which nothing is recorded whatever the switch says."""
    autocast: tuple[Autocast, ...] = ()
    """What was entered, outermost first."""
    transforms: tuple[str, ...] = ()
    """Levels of torch.func that were entered, outermost first: "grad", "vmap", "jvp"."""
    custom: bool = False
    """Inside a torch.autograd.Function, whose derivative is written by hand."""

    @property
    def records(self) -> bool:
        """Whether what is computed is recorded for a backward."""
        return self.grad and not self.inference


def ambient() -> Mode:
    """The modes this thread is in: those a graph starts in that Dynamo captures now."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    autocast = tuple((d, torch.get_autocast_dtype(d), True) for d in devices)
    return Mode(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


def modes_of(graph: fx.Graph, entry: Mode) -> dict[fx.Node, Mode]:
    """The mode of every node of a graph that starts in `entry`."""
    modes: dict[fx.Node, Mode] = {}
    mode, before = entry, {}  # before: node that enters something -> the mode it was entered from
    for node in graph.nodes:
        modes[node] = mode
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            mode = replace(mode, grad=bool(node.args[0]))
        elif name == "_enter_inference_mode":
            before[node] = mode
            mode = replace(mode, grad=not node.args[0], inference=bool(node.args[0]))
        elif name == "_enter_autocast":
            before[node] = mode
            mode = replace(mode, autocast=(*mode.autocast, _autocast(node.args)))
        elif name in ("_exit_inference_mode", "_exit_autocast"):
            left = before.get(node.args[0], entry)
            parts = ("grad", "inference") if name == "_exit_inference_mode" else ("autocast",)
            mode = replace(mode, **{part: getattr(left, part) for part in parts})
        elif (level := _LEVELS.get(name)) is not None:
            mode = replace(mode, transforms=(*mode.transforms, level))
        elif name in _LEAVES:
            mode = replace(mode, transforms=mode.transforms[:-1])
    return modes


_LEVELS = {
    "_grad_increment_nesting": "grad",
    "_vmap_increment_nesting": "vmap",
    "_jvp_increment_nesting": "jvp",
    "_enter_dual_level": "jvp",
}
_LEAVES = frozenset(
    {"_grad_decrement_nesting", "_vmap_decrement_nesting", "_jvp_decrement_nesting", "_exit_dual_level"}
)


def _autocast(arguments: Sequence[Any]) -> Autocast:
    device, dtype, enabled = (*arguments, None, True)[:3] if len(arguments) < 3 else arguments[:3]
    return device, dtype, enabled


def mode_of_body(user: fx.Node, here: Mode) -> Mode:
    """The mode the body of a higher-order operator starts in, of which `user` is the call."""
    name = str(getattr(user.target, "__name__", user.target))
    if name == "wrap_with_set_grad_enabled":
        return replace(here, grad=bool(user.args[0]))
    if name == "wrap_with_autocast":
        return replace(here, autocast=(*here.autocast, _autocast(user.args)))
    if name in ("autograd_function_apply", "register_hook"):
        return replace(here, custom=True)
    return here


@contextmanager
def running_as(mode: Mode) -> Iterator[None]:
    """Runs operators as a node of this mode would, but records no gradient: for shapes and dtypes."""
    with ExitStack() as stack:
        for device, dtype, enabled in mode.autocast:
            stack.enter_context(torch.autocast(device, dtype, enabled))
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs operators on fake tensors such that nothing of the process is seen: neither saved-tensor hooks (nothing is
    saved), nor the user's modes and devices, nor autocast, and such that no hook or mode of the user's sees them."""
    with without_modes(), torch.no_grad():
        yield


@contextmanager
def without_modes() -> Iterator[None]:
    """Without autocast, inference mode, and the modes a user entered.  The device that `torch.set_default_device` set
    for the whole process stays: a model makes its tensors there."""
    # (no public names take all modes off.)
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _disable_current_modes

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_disable_current_modes())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        modes = []
        while torch._C._len_torch_function_stack():
            modes.append(torch._C._pop_torch_function_stack())
        whole = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
        kept = [mode for mode in modes if isinstance(mode, DeviceContext) and mode is whole]
        for mode in kept:
            torch._C._push_on_torch_function_stack(mode)
        try:
            yield
        finally:
            for _ in kept:
                torch._C._pop_torch_function_stack()
            for mode in reversed(modes):
                torch._C._push_on_torch_function_stack(mode)
