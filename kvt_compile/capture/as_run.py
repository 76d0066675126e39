"""A symbolic trace against the model: both run once on fakes, and what each asks of torch is compared.

    if isinstance(mask, torch.Tensor): ...      a proxy is none       if x.dtype is torch.float16: ...    never
    if hasattr(x, "lengths"): ...               a proxy has all       try: ... except TypeError: ...      a proxy raises
    if type(mask) is torch.Tensor: ...          nor is a fake         if is_fx_tracing(): ...           in an export

A model that asks what its inputs are goes another way when it is given proxies, and the trace says nothing of it.
What does not depend on the inputs is computed once, while the model is traced, and is no part of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.utils import _pytree as pytree

from kvt_compile.capture.contexts import without_hooks
from kvt_compile.capture.unchanged import unchanged
from kvt_compile.capture.watching import Watching
from kvt_compile.passes.canonical.modes import undisturbed


class NotAsRunError(RuntimeError):
    """The graph of a trace does something else than the model."""


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: str
    of_inputs: bool
    """Whether it has a tensor that is computed of the model's inputs."""

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})"


class _Calls(Watching):
    """Notes what is called of torch, with every argument that is no tensor."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._computed: dict[int, Tensor] = {id(x): x for x in _tensors(inputs)}

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        if not made:
            return result  # a number or a dtype shows in what is done with it
        of_inputs = any(self._computed.get(id(x)) is x for x in _tensors((args, kwargs)))
        if of_inputs:
            self._computed |= {id(x): x for x in made}
        name, shown = getattr(func, "__name__", str(func)), _shown(args, kwargs)
        if name == "unbind" and shown in ("tensor", "tensor, 0", "tensor, dim=0"):  # how a tensor is iterated
            self.calls += [_Call("__getitem__", f"tensor, {n}", of_inputs) for n in range(len(made))]
        else:
            self.calls.append(_Call(name, shown, of_inputs))
        return result


def check_as_run(
    model: nn.Module, graph: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], asks: bool
) -> None:
    """Raises NotAsRunError where the graph calls something else of torch than the model, or with other numbers.

    asks: whether the model asks what a fake answers otherwise than a tensor: it runs as it is then.
    """
    traced = _run_on_fakes(Hookless(graph).run, in_order(graph, args, kwargs), {})
    run = _run if asks else _run_of
    _compare(*run(model, args, kwargs), *traced)


def check_again(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises NotAsRunError for a model whose second call does something else than its first: it counts its calls, or
    keeps what it saw last."""
    first, second = _run_of(model, args, kwargs, 2)
    _compare(first, second)


def fools(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether torch.export, which runs the model on fakes of its own, sees it go another way than it does."""
    with _as_if_traced():
        seen = _run_of(model, args, kwargs)
    try:
        _compare(*_run(model, args, kwargs), *seen)
    except NotAsRunError:
        return True
    return False


def _as_if_traced() -> AbstractContextManager[Any]:
    """What is_fx_tracing says in an export: True."""
    tracing: Any = torch.fx._symbolic_trace
    if hasattr(tracing, "_is_fx_tracing_context"):  # from torch 2.14 on
        return tracing._is_fx_tracing_context(True)  # type: ignore[no-any-return]
    return patch.object(tracing, "_is_fx_tracing_flag", True)


def _run_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], times: int = 1) -> list[list[_Call]]:
    """The calls of so many runs: on fakes; as it is where it has no copy, or looks at what is in a tensor."""
    try:
        with without_hooks(model):
            with undisturbed(), FakeCopyMode(FakeTensorMode()):
                fake = copy.deepcopy(model)
            return _run_on_fakes(fake, args, kwargs, times)
    except Exception:
        return _run(model, args, kwargs, times)


class Hookless(fx.Interpreter):
    """Runs a graph without the hooks of its modules."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)  # a user's hook has no business with fake tensors


def _compare(run: list[_Call], traced: list[_Call]) -> None:
    rest = iter(traced)
    expected = next(rest, None)
    for call in run:
        if call == expected:
            expected = next(rest, None)
        elif call.of_inputs:
            raise NotAsRunError(f"the model calls {call} where its trace has {expected or 'its end'}")
    if expected is not None:
        raise NotAsRunError(f"its trace has {expected}, which the model does not call")


def _run_on_fakes(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], times: int = 1
) -> list[list[_Call]]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (tuple(args), dict(kwargs)))
    with undisturbed(), mode:
        return [_called(function, args, kwargs) for _ in range(times)]


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], times: int = 1) -> list[list[_Call]]:
    args, kwargs = pytree.tree_map_only(Tensor, _cloned, (tuple(args), dict(kwargs)))
    with unchanged(model), without_hooks(model):
        return [_called(model, args, kwargs) for _ in range(times)]


def _called(function: Callable[..., Any], args: Any, kwargs: Any) -> list[_Call]:
    made = _Calls((args, kwargs))
    with made:
        function(*args, **kwargs)
    return made.calls


def _cloned(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def in_order(graph: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of a graph's placeholders."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    rest = placeholders[len(args) :]
    return [*args, *(kwargs.get(str(node.target), node.args[0] if node.args else None) for node in rest)]


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [f"{name}={_text(x)}" for name, x in sorted(kwargs.items())]
    return ", ".join([*map(_text, args), *named])


def _text(x: Any) -> str:
    match x:
        case Tensor():
            return "tensor"
        case tuple() | list():
            return f"[{', '.join(map(_text, x))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_text(value)}' for key, value in x.items())}}}"
        case slice():
            return f"{_text(x.start)}:{_text(x.stop)}:{_text(x.step)}"
        case bool() | int() | float() | complex() | str() | torch.dtype() | torch.device() | None:
            return repr(x)
    return type(x).__name__


@contextmanager
def honest_dtypes() -> Iterator[None]:
    """torch.finfo and torch.iinfo take anything that has a __torch_function__ for a dtype, and read what is there."""
    with patch.object(torch, "finfo", _checked(torch.finfo)), patch.object(torch, "iinfo", _checked(torch.iinfo)):
        yield


class _Checked(type):
    """What is still the class that it stands for, to other threads as well."""

    real: type

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, cls.real)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values())):
            raise TypeError(f"torch.{cls.__name__} of a dtype that is not known while the model is traced")
        return cls.real(*args, **kwargs)


def _checked(real: type) -> type:
    return _Checked(real.__name__, (), {"real": real})
