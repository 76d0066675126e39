"""Score expression -> tensors of one tile, and the adjoint: gradient of a tile -> gradient of a captured tensor.

    "0.125*s + c0[h, i, j]"  --compiled once-->  Environment -> [b, h, i, j] tile

Every operation is torch's own, in the type that `types.py` says: what is computed of captured tensors alone is what
torch computes of them, and whatever is made of s or p is in the accumulation type.  Numbers stay Python's, which adapt
by themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any, cast

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.grid import AXES, Environment, Program, Value, plain_view
from kvt_compile.kernels.language.types import FLOAT, INT, promote


@lru_cache(maxsize=4096)
def compile_text(text: str) -> Program:
    """Text -> a function of an environment.  Its result broadcasts to the tile; a constant is a number."""
    return compile_expression(language.parse(text))


@lru_cache(maxsize=4096)
def compile_expression(expression: sympy.Expr) -> Program:
    """As `compile_text`, from the expression."""
    match expression:
        case sympy.Integer():
            return _constant(int(expression))
        case _ if language.is_number(expression):
            return _constant(float(expression))
        case sympy.Symbol():
            return _symbol(str(expression))
        case language.load():
            return lambda env, load=expression: _element(load, env)  # type: ignore[misc]
        case language.Operation() if not language.is_index(expression):
            return _operation(type(expression).__name__, expression)
        case _ if language.is_index(expression):
            return _whole(compile_index(expression))
    raise language.ScoreSyntaxError(f"{expression} ({type(expression).__name__}) is not part of the score language")


def tile(program: Program, env: Environment) -> Tensor:
    """The value of a program as a full tile of the accumulation dtype `[b, h, i, j]` (possibly an expanded view)."""
    value = program(env)
    if not isinstance(value, Tensor):
        value = torch.full((), float(value), dtype=env.grid.dtype, device=env.grid.device)
    return value.to(env.grid.dtype).expand(env.grid.shape)


def _constant(value: float | int) -> Program:
    return lambda env: value


def _symbol(name: str) -> Program:
    if name == "s":
        return lambda env: cast(Tensor, env.s)
    if name == "p":
        return lambda env: cast(Tensor, env.p)
    if name == "gradient":
        return lambda env: cast(Tensor, env.gradient)
    return _whole(_coordinate(name))


def _element(load: language.load, env: Environment) -> Tensor:
    value = read(load, env)
    return value.to(env.grid.dtype) if value.dtype in (torch.float16, torch.bfloat16) else value


def _coordinate(name: str) -> Program:
    if name in AXES:
        return lambda env: env.grid.coordinate(name)
    number = int(name[1:])
    return lambda env: env.sizes[number]


def _whole(program: Program) -> Program:
    """A size is a Python number, but has the type of a coordinate."""

    def run(env: Environment) -> Value:
        value = program(env)
        return value if isinstance(value, Tensor) else torch.full((), int(value), device=env.grid.device)

    return run


# --- types ------------------------------------------------------------------------------------------------------------


def _type(value: Value) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    return FLOAT if isinstance(value, float) else INT


def _is_whole(value: Value) -> bool:
    return not (value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float))


def _met(values: list[Value], env: Environment, holds: bool, arithmetic: bool = False) -> list[Value]:
    """Values in the type they meet in."""
    real = env.grid.dtype
    if holds and not all(map(_is_whole, values)):
        dtype: torch.dtype | None = real
    else:
        name = promote([_type(x) for x in values], str(real).removeprefix("torch."))
        dtype = None if name in (INT, FLOAT) else getattr(torch, name)
    if dtype is None:
        return values
    if dtype is torch.bool and arithmetic:
        dtype = torch.int64
    return [x.to(dtype) if isinstance(x, Tensor) else x if dtype.is_floating_point else int(x) for x in values]


def _real(value: Value, env: Environment) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(env.grid.dtype)
    return torch.full((), value, dtype=env.grid.dtype, device=env.grid.device)


# --- operations -------------------------------------------------------------------------------------------------------


def _rounded_down(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Value]:
    """torch and Python both round down; a whole number divided by 0 is 0 here, where torch raises or leaves it open."""

    def run(x: Any, y: Any) -> Value:
        if not _is_whole(x) or not _is_whole(y):
            return cast(Value, function(x, y))
        if isinstance(y, Tensor):
            return torch.where(y == 0, 0, function(x, torch.where(y == 0, 1, y)))
        return cast(Value, function(x, y) if y else x * 0)

    return run


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name) for name in ("exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf")
}


def _bool(x: Value) -> Any:
    if isinstance(x, Tensor):
        return x if x.dtype == torch.bool else x != 0
    return bool(x)


def _extremum(x: Any, y: Any, largest: bool) -> Value:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.maximum(x, y) if largest else torch.minimum(x, y)
    if not isinstance(x, Tensor):
        x, y = y, x
    if not isinstance(x, Tensor):
        return cast(Value, max(x, y) if largest else min(x, y))
    # clamp, like maximum and minimum, lets NaN through
    return x.clamp(min=y) if largest else x.clamp(max=y)


def _clamp(x: Any, low: Any, high: Any) -> Value:
    return _extremum(_extremum(x, low, True), high, False)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {x: getattr(operator, x) for x in ("lt", "le", "gt", "ge", "eq", "ne")}
_ARITHMETIC: dict[str, Callable[..., Value]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": abs,
    "floordiv": _rounded_down(operator.floordiv),
    "mod": _rounded_down(operator.mod),
}
_TOGETHER: dict[str, Callable[..., Value]] = {
    **_COMPARE,
    "relu": lambda x: _extremum(x, 0, True),
    "maximum": lambda x, y: _extremum(x, y, True),
    "minimum": lambda x, y: _extremum(x, y, False),
    "clamp": _clamp,
    "hardtanh": _clamp,
}
_LOGIC: dict[str, Callable[..., Value]] = {
    "logical_and": lambda x, y: cast(Value, x & y),
    "logical_or": lambda x, y: cast(Value, x | y),
    "logical_not": lambda x: ~x if isinstance(x, Tensor) else not x,
}


def _operation(name: str, expression: sympy.Expr) -> Program:
    arguments = [compile_expression(x) for x in expression.args]
    holds = language.holds(expression)

    def values(env: Environment) -> list[Value]:
        return [argument(env) for argument in arguments]

    if name in _UNARY:
        return lambda env: _UNARY[name](_real(arguments[0](env), env))
    if name in _ARITHMETIC:
        return lambda env: _ARITHMETIC[name](*_met(values(env), env, holds, arithmetic=True))
    if name in _TOGETHER:
        return lambda env: _TOGETHER[name](*_met(values(env), env, holds))
    if name in _LOGIC:
        return lambda env: _LOGIC[name](*map(_bool, values(env)))
    if name in language.CASTS:
        return lambda env: _cast(values(env)[0], name, holds, env)
    if name == "where":
        return lambda env: _where(values(env), holds, env)
    if name == "div":
        return lambda env: _quotient(_met(values(env), env, holds), env)
    assert name == "power"
    return lambda env: _raised(_met(values(env), env, holds, arithmetic=True), env)


def _cast(value: Value, name: str, holds: bool, env: Environment) -> Value:
    dtype = getattr(torch, name)
    if holds and dtype.is_floating_point:
        dtype = env.grid.dtype
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=env.grid.device)


def _where(values: list[Value], holds: bool, env: Environment) -> Value:
    condition = _bool(values[0])
    x, y = _met(values[1:], env, holds)
    if not isinstance(condition, Tensor):
        return x if condition else y
    if not isinstance(x, Tensor) and not isinstance(y, Tensor) and not (_is_whole(x) and _is_whole(y)):
        # two numbers would become torch's default dtype, which need not be the accumulation dtype
        x = torch.full((), float(x), dtype=env.grid.dtype, device=env.grid.device)
    return torch.where(condition, x, y)


def _quotient(values: list[Value], env: Environment) -> Value:
    if all(map(_is_whole, values)) or not any(isinstance(x, Tensor) for x in values):
        values = [_real(x, env) for x in values]
    x, y = values
    return cast(Value, x / y)


def _raised(values: list[Value], env: Environment) -> Value:
    x, y = values
    wholes = _is_whole(x) and isinstance(y, int) and y >= 0
    if wholes and not isinstance(x, Tensor):  # Python's whole numbers grow without end, torch's wrap around
        x = torch.full((), int(x), device=env.grid.device)
    if not wholes and (_is_whole(x) or not any(isinstance(z, Tensor) for z in values)):
        x = _real(x, env)
    return cast(Value, x * x if isinstance(y, int | float) and y == 2 else x**y)


# --- indices ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def compile_index(expression: sympy.Expr) -> Program:
    """What stands in the brackets of a load: sums and products of whole numbers, which sympy may have rearranged."""
    match expression:
        case sympy.Symbol() if language.is_index(expression):
            return _coordinate(str(expression))
        case language.load():
            return lambda env, load=expression: read(load, env).to(torch.int64)  # type: ignore[misc]
        case sympy.Add():
            return _fold(operator.add, expression)
        case sympy.Mul():
            return _fold(operator.mul, expression)
        case sympy.Pow():
            return _fold(operator.pow, expression)
        case language.floordiv() | language.mod():
            return _fold(_ARITHMETIC[type(expression).__name__], expression)
    return compile_expression(expression)


def _fold(function: Callable[[Any, Any], Any], expression: sympy.Expr) -> Program:
    terms = [compile_index(term) for term in expression.args]
    return lambda env: reduce(function, (term(env) for term in terms))


# --- captured tensors -------------------------------------------------------------------------------------------------


def read(load: language.load, env: Environment) -> Tensor:
    """The elements a load means in this tile, broadcastable to it.  A view where the indices are plain coordinates."""
    view = plain_view(load, env.captured[load.slot], env.grid)
    if view is not None:
        return view
    return env.captured[load.slot][tuple(_positions(load, env))]


def scatter(load: language.load, gradient: Tensor, env: Environment, into: Tensor) -> None:
    """Adjoint of `read`: add the tile's gradient `[b, h, i, j]` into `into`, shaped like the captured tensor."""
    view = plain_view(load, into, env.grid)
    if view is not None:
        view += _sum_to(gradient, tuple(view.shape) or (1, 1, 1, 1)).view(view.shape).to(into)
        return
    positions = _positions(load, env)
    shape = torch.broadcast_shapes(*(x.shape for x in positions))
    reduced = _sum_to(gradient, (1,) * (4 - len(shape)) + tuple(shape)).to(into.dtype)
    # index_put sums in a fixed order on every device, unlike index_add on a GPU
    into.index_put_(tuple(positions), reduced, accumulate=True)


def _sum_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    absent = [axis for axis in range(4) if shape[axis] == 1 and x.shape[axis] != 1]
    return x.sum(absent, keepdim=True) if absent else x


def _positions(load: language.load, env: Environment) -> list[Tensor]:
    """One int64 tensor per dimension, clamped into range (an index may only leave it where the value is not used)."""
    positions = []
    for index, size in zip(load.index, env.captured[load.slot].shape, strict=True):
        value = compile_index(index)(env)
        if not isinstance(value, Tensor):
            value = torch.full((1, 1, 1, 1), int(value), dtype=torch.int64, device=env.grid.device)
        positions.append(value.to(torch.int64).clamp(0, max(size - 1, 0)))
    return positions
