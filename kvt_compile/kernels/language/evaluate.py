"""Score expression -> tensors of one tile, and the adjoint: gradient of a tile -> gradient of a captured tensor.

    "0.125*s + c0[h, i, j]"  --compiled once-->  Environment -> [b, h, i, j] tile

Types follow the values: indices and integer captured tensors stay int64, comparisons are bool, and whatever meets a
float is brought to the accumulation dtype first, so that a captured bfloat16 or a coordinate is widened exactly, and
only at tile size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any, cast

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.grid import AXES, Environment, Program, Value, plain_view


@lru_cache(maxsize=4096)
def compile_text(text: str) -> Program:
    """Text -> a function of an environment.  Its result broadcasts to the tile; a constant is a number."""
    return compile_expression(language.parse(text))


@lru_cache(maxsize=4096)
def compile_expression(expression: sympy.Expr) -> Program:
    """As `compile_text`, from the algebra."""
    match expression:
        case sympy.Integer():
            return _constant(int(expression))
        case _ if expression in (sympy.oo, -sympy.oo) or isinstance(expression, sympy.Number):
            return _constant(float(expression))
        case sympy.Symbol():
            return _symbol(str(expression))
        case language.load():
            return lambda env, load=expression: read(load, env)  # type: ignore[misc]
        case sympy.Add():
            return _fold(operator.add, [compile_expression(x) for x in expression.args])
        case sympy.Mul():
            return _product(expression)
        case sympy.Pow():
            return _power(*expression.args)
        case sympy.Function() if type(expression).__name__ in language.FUNCTIONS:
            return _call(type(expression).__name__, [compile_expression(x) for x in expression.args])
    raise language.ScoreSyntaxError(f"{expression} ({type(expression).__name__}) is not part of the score language")


def tile(program: Program, env: Environment) -> Tensor:
    """The value of a program as a full tile of the accumulation dtype `[b, h, i, j]` (possibly an expanded view)."""
    value = program(env)
    if not isinstance(value, Tensor):
        value = torch.full((), float(value), dtype=env.grid.dtype, device=env.grid.device)
    return value.to(env.grid.dtype).expand(env.grid.shape)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _constant(value: float | int) -> Program:
    return lambda env: value


def _symbol(name: str) -> Program:
    if name == "s":
        return lambda env: cast(Tensor, env.s)
    if name == "p":
        return lambda env: cast(Tensor, env.p)
    if name in AXES:
        return lambda env: env.grid.coordinate(name)
    number = int(name[1:])
    return lambda env: env.sizes[number]


def _is_float(value: Value) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)


def _widen(values: list[Value], env: Environment) -> list[Value]:
    """As soon as one operand is a float, all tensors become the accumulation dtype (numbers adapt by themselves)."""
    if any(_is_float(x) for x in values):
        return [x.to(env.grid.dtype) if isinstance(x, Tensor) else x for x in values]
    return values


def _float(value: Value, env: Environment) -> Value:
    return value.to(env.grid.dtype) if isinstance(value, Tensor) else float(value)


def _fold(function: Callable[[Any, Any], Any], terms: list[Program]) -> Program:
    def run(env: Environment) -> Value:
        return reduce(function, _widen([term(env) for term in terms], env))

    return run


def _product(expression: sympy.Mul) -> Program:
    above, below = [], []
    for factor in expression.args:
        # x / y is one rounding, x * (1 / y) two
        if isinstance(factor, sympy.Pow) and factor.exp == -1:
            below.append(compile_expression(factor.base))
        else:
            above.append(compile_expression(factor))
    numerator = _fold(operator.mul, above) if above else _constant(1.0)
    if not below:
        return numerator
    denominator = _fold(operator.mul, below)
    return lambda env: _divide(_float(numerator(env), env), _float(denominator(env), env))


def _divide(x: Any, y: Any) -> Value:
    if not isinstance(x, Tensor) and not isinstance(y, Tensor) and y == 0:
        return math.nan if x == 0 or x != x else math.copysign(math.inf, x) * math.copysign(1.0, y)
    return cast(Value, x / y)


def _power(base: sympy.Expr, exponent: sympy.Expr) -> Program:
    x, y = compile_expression(base), compile_expression(exponent)
    if exponent == -1:
        return lambda env: _divide(1.0, _float(x(env), env))
    if isinstance(exponent, sympy.Integer) and exponent > 0:
        return lambda env: cast(Value, _widen([x(env)], env)[0] ** int(exponent))
    return lambda env: cast(Value, _float(x(env), env) ** _float(y(env), env))


# --- functions --------------------------------------------------------------------------------------------------------

_UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "exp": (torch.exp, math.exp),
    "log": (torch.log, lambda x: math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)),
    "sqrt": (torch.sqrt, lambda x: math.sqrt(x) if x >= 0 else math.nan),
    "sin": (torch.sin, math.sin),
    "cos": (torch.cos, math.cos),
    "tanh": (torch.tanh, math.tanh),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + math.exp(-x))),
    "erf": (torch.erf, math.erf),
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {x: getattr(operator, x) for x in ("lt", "le", "gt", "ge", "eq", "ne")}


def _call(name: str, arguments: list[Program]) -> Program:
    if name in _UNARY:
        on_tensor, on_number = _UNARY[name]

        def unary(env: Environment) -> Value:
            x = _float(arguments[0](env), env)
            return on_tensor(x) if isinstance(x, Tensor) else on_number(x)

        return unary
    if name in _COMPARE:
        return _fold(_COMPARE[name], arguments)
    function = _FUNCTIONS[name]
    return lambda env: function(env, *(argument(env) for argument in arguments))


def _bool(x: Value) -> Any:
    if isinstance(x, Tensor):
        return x if x.dtype == torch.bool else x != 0
    return bool(x)


def _where(env: Environment, condition: Value, x: Value, y: Value) -> Value:
    condition = _bool(condition)
    x, y = _widen([x, y], env)
    if not isinstance(condition, Tensor):
        return x if condition else y
    if not isinstance(x, Tensor) and not isinstance(y, Tensor) and (_is_float(x) or _is_float(y)):
        # two numbers would become torch's default dtype, which need not be the accumulation dtype
        x = torch.full((), float(x), dtype=env.grid.dtype, device=env.grid.device)
    return torch.where(condition, x, y)


def _extremum(env: Environment, x: Any, y: Any, largest: bool) -> Value:
    x, y = _widen([x, y], env)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.maximum(x, y) if largest else torch.minimum(x, y)
    if not isinstance(x, Tensor):
        x, y = y, x
    if not isinstance(x, Tensor):
        return cast(Value, max(x, y) if largest else min(x, y))
    # clamp, like maximum and minimum, lets NaN through
    return x.clamp(min=y) if largest else x.clamp(max=y)


def _abs(env: Environment, x: Any) -> Value:
    return cast(Value, abs(x))


def _relu(env: Environment, x: Value) -> Value:
    return _extremum(env, x, 0, True)


def _clamp(env: Environment, x: Value, low: Value, high: Value) -> Value:
    return _extremum(env, _extremum(env, x, low, True), high, False)


def _floordiv(env: Environment, x: Any, y: Any) -> Value:
    x, y = _widen([x, y], env)
    return cast(Value, x // y)  # torch and Python both round down


def _mod(env: Environment, x: Any, y: Any) -> Value:
    x, y = _widen([x, y], env)
    return cast(Value, x % y)  # torch and Python both take the divisor's sign


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "where": _where,
    "abs": _abs,
    "relu": _relu,
    "maximum": lambda env, x, y: _extremum(env, x, y, True),
    "minimum": lambda env, x, y: _extremum(env, x, y, False),
    "clamp": _clamp,
    "floordiv": _floordiv,
    "mod": _mod,
    "logical_and": lambda env, x, y: cast(Value, _bool(x) & _bool(y)),
    "logical_or": lambda env, x, y: cast(Value, _bool(x) | _bool(y)),
    "logical_not": lambda env, x: ~_bool(x) if isinstance(x, Tensor) else not x,
}


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
        value = compile_expression(index)(env)
        if not isinstance(value, Tensor):
            value = torch.full((1, 1, 1, 1), int(value), dtype=torch.int64, device=env.grid.device)
        positions.append(value.to(torch.int64).clamp(0, max(size - 1, 0)))
    return positions
