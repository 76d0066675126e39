"""A model and inputs -> an `Outcome`: everything one run shows, by name.

    output, output['logits'], output[1]      what it returns, tensors and plain values
    input x afterwards                       what it wrote to
    buffer norm.running_mean afterwards
    gradient of head.weight, of input x      of a fixed random functional of the outputs; None where there is none

Every run sees the same inputs, buffers and random numbers, and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvt_compile.capture.unchanged import unchanged

SEED, DIRECTION = 1, 2
_LEAF = (Tensor, bool, int, float, complex, str, bytes, type(None))


class VerificationError(RuntimeError):
    """The model cannot be verified on these inputs; the message says what was found and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What one run shows."""

    outputs: dict[str, Any]
    """Tensors (detached) and plain values; what was written to, too."""
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    attached: frozenset[str] = frozenset()
    """The outputs through which a backward may come."""


@dataclass(frozen=True)
class Run:
    """What a model is run on."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    backward: bool
    """Whether gradients are computed."""
    inputs: bool = True
    """Whether floating-point inputs get one, but for ..."""
    fixed: frozenset[int] = frozenset()
    """... the positional ones of these numbers."""

    def __call__(self, call: Callable[..., Any] | None = None) -> Outcome:
        """Runs the model, or `call`, which runs on the model's parameters."""
        args, kwargs = self._fresh()
        tensors = dict(_named(args, kwargs))
        with unchanged(self.model), _without_gradients(self.model), torch.set_grad_enabled(self.backward):
            torch.manual_seed(SEED)
            returned = dict(named_leaves("output", (self.model if call is None else call)(*args, **kwargs)))
            attached = frozenset(n for n, x in returned.items() if isinstance(x, Tensor) and x.requires_grad)
            gradients = self._gradients([returned[n] for n in returned if n in attached], tensors)
            buffers = {f"buffer {n} afterwards": x.detach().clone() for n, x in self.model.named_buffers()}
        written = {f"{name} afterwards": x.detach() for name, x in tensors.items()}
        outputs = {n: x.detach() if isinstance(x, Tensor) else x for n, x in (returned | written | buffers).items()}
        return Outcome(outputs, gradients, attached)

    def _fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the inputs; what is one tensor stays one."""
        made: dict[int, Tensor] = {}
        fixed = {id(self.args[n]) for n in self.fixed}

        def fresh(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in made:
                wanted = self.backward and self.inputs and (x.is_floating_point() or x.is_complex())
                wanted = wanted and id(x) not in fixed
                made[id(x)] = x.detach().clone().requires_grad_(wanted)
            return made[id(x)]

        copies: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(fresh, (self.args, dict(self.kwargs)))
        return copies

    def _gradients(self, outputs: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        if not self.backward:
            return {}
        generator = torch.Generator().manual_seed(DIRECTION)
        directions = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64) / max(x.numel(), 1) for x in outputs
        ]
        used = [d.to(x.device, x.dtype) for d, x in zip(directions, outputs, strict=True)]
        if used:
            torch.autograd.backward(list(outputs), used)
        leaves = {n: x for n, x in inputs.items() if x.requires_grad} | dict(self.model.named_parameters())
        return {f"gradient of {n}": _dense(x.grad) for n, x in leaves.items()}


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    gradient = gradient.detach()
    return gradient.clone() if gradient.layout is torch.strided else gradient.to_dense()


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.grad = None


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in (*enumerate(args), *kwargs.items()):
        yield from ((n, x) for n, x in named_leaves(f"input {name}", value) if isinstance(x, Tensor))


def named_leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`output` -> `output[0]`, `output['logits']`: tensors and plain values in any nest of lists, tuples, dicts,
    dataclasses and what is registered as a pytree; other objects say nothing."""
    for path, leaf in pytree.tree_leaves_with_path(value):
        place = f"{name}{pytree.keystr(path)}"
        if isinstance(leaf, _LEAF):
            yield place, leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for part in fields(leaf):
                yield from named_leaves(f"{place}.{part.name}", getattr(leaf, part.name))


def first_line(error: BaseException) -> str:
    """An exception as `ValueError: what it says`, its first line only."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
