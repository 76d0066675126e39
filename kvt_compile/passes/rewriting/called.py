"""A function as a module of a graph, with the modules that it reads as its children.

    lambda q, k: predictor(q, k) > 0     ->     Called(held=[predictor])

So their parameters are those of the graph: they move with it, are saved with it, and compilers know of them.
"""

from __future__ import annotations

import contextlib
import dis
import functools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn


class Called(nn.Module):
    """What a callable that is no module returns of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.held = nn.ModuleList(dict.fromkeys(x for x in _read_by(function) if isinstance(x, nn.Module)))

    def forward(self, *args: Any) -> Any:
        return self.function(*args)

    def calls(self, function: Callable[..., Any]) -> bool:
        """Whether it is this function; a method is made anew at each look."""
        mine = self.function
        return mine is function or (isinstance(mine, MethodType) and mine == function)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.held and isinstance(self.function, FunctionType):
            raise TypeError(
                f"{self.extra_repr()} reads {type(self.held[0]).__name__} of the code around it, which no copy of it "
                "would: a function that is to be copied or saved with its model is written as a module"
            )
        return super().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def _read_by(function: Any) -> Iterator[Any]:
    """What a callable may read that is no argument of it: its own state, and names of the code around it."""
    if isinstance(function, MethodType):
        yield function.__self__
        yield from _read_by(function.__func__)
    elif isinstance(function, functools.partial):
        yield function.func
        yield from (*function.args, *function.keywords.values())
        yield from _read_by(function.func)
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that has no value yet
                yield cell.cell_contents
        yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        names = dict.fromkeys(_global_names(function.__code__))
        yield from (function.__globals__[name] for name in names if name in function.__globals__)
    elif isinstance(call := vars(type(function)).get("__call__"), FunctionType):  # an object that can be called
        yield from getattr(function, "__dict__", {}).values()
        yield from _read_by(call)


def _global_names(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
