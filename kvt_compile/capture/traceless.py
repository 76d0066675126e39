"""A backend that torch.compile calls for a while -> nothing of it stays behind.

Dynamo keeps what it compiled on the code objects it compiled and in the globals of these functions, waits for the end
of what it guards, and lists all backends it has met.  The first function is our own, with globals of its own; where a
graph breaks, the model's functions are compiled as well.  What was kept of either is taken back, and a model that the
user has compiled stays compiled.
"""

from __future__ import annotations

import linecache
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Passing:
    """A backend for one use: after `end` neither it nor what it returned knows a graph."""

    def __init__(self, backend: Backend) -> None:
        self._backend: Backend | None = backend
        self._made: list[_Emptied] = []
        self._sizes: list[ShapeEnv] = []

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if self._backend is None:
            raise RuntimeError("this backend was for looking at a model once")
        mode = detect_fake_mode(example_inputs)
        if mode is not None and mode.shape_env is not None:
            self._sizes.append(mode.shape_env)
        made = _Emptied(self._backend(graph, example_inputs))
        self._made.append(made)
        return made.run

    def end(self) -> None:
        self._backend = None
        for made in self._made:
            made.function = None
        self._made.clear()
        for sizes in self._sizes:
            # a fake view keeps its base in C++, out of the garbage collector's sight, and both would keep one another
            sizes.tracked_fakes = None
        self._sizes.clear()


class _Emptied:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Callable[..., Any] | None = function

    def run(self, *args: Any) -> Any:
        assert self.function is not None
        return self.function(*args)


def call_of_its_own() -> Callable[..., Any]:
    """`self(*args, **kwargs)` as a function with code and globals of its own: Dynamo keeps what it compiled on both."""

    def call(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self(*args, **kwargs)

    names = {"__name__": __name__, "__builtins__": __builtins__}
    return types.FunctionType(call.__code__.replace(co_name=_NAME), names, _NAME)


def is_call_of_its_own(code: types.CodeType) -> bool:
    """Whether it is the code of such a function."""
    return code.co_filename == __file__ and code.co_name == _NAME


_NAME = "explain"
"""What a stack shows of it."""


@contextmanager
def passing(backend: Backend) -> Iterator[Passing]:
    """`backend` for torch.compile; at the end Dynamo forgets it."""
    compiled: list[types.CodeType] = []
    watch = torch._dynamo.convert_frame.register_bytecode_hook(lambda code, _: compiled.append(code))
    mine = Passing(backend)
    texts = torch.fx.graph_module._loader.eval_cache
    texts_before = set(texts)
    # each with a traceback, and so with the code of everything on the stack
    edits = torch._dynamo.utils.get_metrics_context()._edits
    edits_before = len(edits)
    try:
        yield mine
    finally:
        watch.remove()
        mine.end()
        _detach({id(guards) for code in compiled for guards in _forget(code, mine)})
        del edits[edits_before:]
        for name in set(texts) - texts_before:  # the Python of each graph module, for tracebacks through it
            texts.pop(name, None)
            linecache.cache.pop(name, None)
        known = torch._dynamo.eval_frame.cached_backends
        for key in [key for key, wrapper in known.items() if _is_ours(wrapper, mine)]:
            del known[key]


def _forget(code: types.CodeType, mine: Passing) -> list[Any]:
    """Takes what was compiled for `mine` off a code object, and leaves what is others'; returns its guards.

    Code, guards and graph hold each other in a ring that the garbage collector cannot see.
    """
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
    ours = [entry for entry in entries if _is_ours(entry.backend, mine)]
    guards = [entry.guard_manager for entry in ours]
    if all(entry in ours or entry.backend is None for entry in entries):  # None: was taken back before
        torch._C._dynamo.eval_frame.reset_code(code)
    else:
        for entry in ours:
            gone = torch._dynamo.guards.DeletedGuardManagerWrapper("the model was looked at")
            state: Any = entry.guard_manager.extra_state
            state.invalidate(entry, gone)
    return guards


def _detach(guards: set[int]) -> None:
    """Guards wait for the end of what they guard, which for a class or a function is the end of the process."""
    for waiting in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        function = (waiting.peek() or (None, None))[1]
        owner = getattr(getattr(function, "func", None), "__self__", None)
        if id(getattr(owner, "guard_manager", None)) in guards:
            waiting.detach()


def _is_ours(wrapper: Any, mine: Passing) -> bool:
    """Whether a backend as Dynamo knows it (torch.compile wraps what it is given) is `mine`."""
    innermost = torch._dynamo.eval_frame.innermost_backend(wrapper)
    return innermost is mine or getattr(innermost, "compiler_fn", None) is mine
