"""The score language: the text of `f` in  t_ij = f(s_ij, b, h, i, j, captured tensors).

    "0.125*s + c0[h, i, j] + where(c1[b % 4, i, j], 0.0, -oo)"   <->   a program of typed operations

A score expression travels through graphs, caches and kernel generators as plain text, because text is hashable,
readable and an ordinary operator argument.  This module is the one place that reads it and prints it; `types.py` says
which type every operation is done in, `derivative.py` differentiates; `kernels/*` lower it, `passes/*` build it.

Vocabulary
    s            raw score  q_i . k_j                     p            softmax weight (weight expressions only)
    b, h, i, j   batch, query head, key head, key index   n0, n1, ...  sizes known only at run time
    c0[...]      element of captured tensor 0             oo           infinity
    + - * / **   arithmetic, in the order it is written   // %         division that rounds down, and what it leaves
    where, exp, tanh, lt, logical_and, float64, ...       every name of FUNCTIONS

sympy is only the tree: every operation on values is a function that nothing is known of, so nothing is reordered,
distributed or cancelled.  Arithmetic of coordinates, sizes and whole numbers alone, as in the brackets of a captured
tensor, is sympy's own, because exact.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import sympy
from sympy.printing.str import StrPrinter

from kvt_compile.kernels.language import limits
from kvt_compile.kernels.language.limits import ScoreSyntaxError as ScoreSyntaxError

s, p = sympy.symbols("s p")
gradient = sympy.Symbol("gradient")
"""What a derivative starts from: the gradient of the expression itself.  Not part of a text."""
VALUES = frozenset({s, p, gradient})
"""What a value is made of that is computed anew at every score, in the accumulation type."""
b, h, i, j = sympy.symbols("b h i j", integer=True, nonnegative=True)
_NAMES: dict[str, sympy.Expr] = {str(x): x for x in (s, p, b, h, i, j)} | {"oo": sympy.oo}
one, zero = sympy.Float(1.0), sympy.Float(0.0)


def size_symbol(n: int) -> sympy.Symbol:
    """The n-th size that is known only at run time (`n0`, `n1`, ...)."""
    return sympy.Symbol(f"n{n}", integer=True, positive=True)


class _Unevaluated(sympy.Function):
    """A function that stays what it was written as, of numbers too."""

    @classmethod
    def _should_evalf(cls, argument: sympy.Expr) -> int:
        return -1


class load(_Unevaluated):  # noqa: N801 - sympy functions are written in lower case
    """`load(n, x, y)` is element [x, y] of captured tensor n; printed `cn[x, y]`."""

    @property
    def slot(self) -> int:
        return int(self.args[0])

    @property
    def index(self) -> tuple[sympy.Expr, ...]:
        return tuple(self.args[1:])


class Operation(_Unevaluated):
    """One operation on values."""

    arity = 0


FUNCTIONS: dict[str, type[Operation]] = {}
"""Operations that are written as calls."""


def _define(name: str, arity: int) -> type[Operation]:
    return type(name, (Operation,), {"arity": arity})


def _function(name: str, arity: int) -> type[Operation]:
    FUNCTIONS[name] = _define(name, arity)
    return FUNCTIONS[name]


# written with signs; `add` and the like below are what makes them
Add, Sub, Mul, Div, Power = (_define(name, 2) for name in ("add", "sub", "mul", "div", "power"))
Neg = _define("neg", 1)
# comparisons and logic: truth values come out
lt, le, gt, ge, eq, ne = (_function(name, 2) for name in ("lt", "le", "gt", "ge", "eq", "ne"))
logical_and, logical_or, logical_not = (_function(f"logical_{x}", n) for x, n in (("and", 2), ("or", 2), ("not", 1)))
floordiv, mod = _function("floordiv", 2), _function("mod", 2)
where = _function("where", 3)
exp, log, sqrt, sin, cos, tanh, sigmoid, erf = (
    _function(name, 1) for name in ("exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf")
)
abs_, relu = _function("abs", 1), _function("relu", 1)
maximum, minimum = _function("maximum", 2), _function("minimum", 2)
# the same numbers; at its bounds clamp has the whole gradient and hardtanh none
clamp, hardtanh = _function("clamp", 3), _function("hardtanh", 3)
CASTS = ("float64", "float32", "int64", "int32", "int16", "int8", "uint8")
"""Types a value can be brought to."""
_CASTS = {name: _function(name, 1) for name in CASTS}

ARITHMETIC: dict[type[Operation], str] = {Add: "+", Sub: "-", Mul: "*", Div: "/", floordiv: "//", mod: "%"}
"""Operations of two values that every lowering's language writes with a sign between them."""


def is_index(x: sympy.Basic) -> bool:
    """Whether it is arithmetic of coordinates, sizes and whole numbers, which is exact however it is written."""
    if isinstance(x, sympy.Integer):
        return True
    if isinstance(x, sympy.Symbol):
        return bool(x.is_integer)
    return isinstance(x, sympy.Add | sympy.Mul | floordiv | mod) and all(is_index(y) for y in x.args)


def add(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    """x + y."""
    return x + y if is_index(x) and is_index(y) else Add(x, y)


def sub(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    """x - y."""
    return x - y if is_index(x) and is_index(y) else Sub(x, y)


def mul(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    """x * y, a number first: which of two factors stands first changes no bit."""
    if is_index(x) and is_index(y):
        return x * y
    return Mul(y, x) if is_number(y) and not is_number(x) else Mul(x, y)


def neg(x: sympy.Expr) -> sympy.Expr:
    """-x."""
    return -x if is_index(x) or (is_number(x) and x != 0) else Neg(x)


def div(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    """x / y."""
    return Div(x, y)


def power(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    """x ** y."""
    return Power(x, y)


def cast(dtype: str, x: sympy.Expr) -> sympy.Expr:
    """x as `dtype`, one of CASTS."""
    return _CASTS[dtype](x)


def is_number(x: sympy.Basic) -> bool:
    """Whether it is a number that stands in the text itself."""
    return isinstance(x, sympy.Number) or x in (sympy.oo, -sympy.oo)


def holds(x: sympy.Expr) -> bool:
    """Whether a value is made of s or p, or of a gradient: it is then computed in the accumulation type."""
    return bool(x.free_symbols & VALUES)


# ---- printing --------------------------------------------------------------------------------------------------------

_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(5)
"""How tightly a text binds: brackets go around what binds less than its place asks for."""
_BINDING: dict[type, int] = {
    Add: _SUM, Sub: _SUM, sympy.Add: _SUM, Mul: _PRODUCT, Div: _PRODUCT, floordiv: _PRODUCT, mod: _PRODUCT,
    sympy.Mul: _PRODUCT, Neg: _SIGN, Power: _POWER, sympy.Pow: _POWER,
}  # fmt: skip


def _binding(x: sympy.Expr) -> int:
    if is_number(x) and x < 0:
        return _SIGN
    if isinstance(x, sympy.Mul) and x.could_extract_minus_sign():
        return _SUM
    return next((binding for kind, binding in _BINDING.items() if isinstance(x, kind)), _ATOM)


class _Printer(StrPrinter):
    """Prints what `parse` reads back bit for bit: floats with all their digits, loads with brackets, and brackets
    wherever Python's own order of operations would not be that of the expression."""

    def at(self, x: sympy.Expr, binding: int) -> str:
        text = str(self._print(x))
        return text if _binding(x) >= binding else f"({text})"

    def _infix(self, x: sympy.Expr, sign: str) -> str:
        own = _binding(x)
        return f"{self.at(x.args[0], own)}{sign}{self.at(x.args[1], own + 1)}"

    def _print_Float(self, x: sympy.Float) -> str:  # noqa: N802 - sympy's name for it
        return repr(float(x))

    def _print_Infinity(self, x: sympy.Expr) -> str:  # noqa: N802 - sympy's name for it
        return "oo"

    def _print_NegativeInfinity(self, x: sympy.Expr) -> str:  # noqa: N802 - sympy's name for it
        return "-oo"

    def _print_load(self, x: load) -> str:
        return f"c{x.slot}" + (f"[{', '.join(self._print(k) for k in x.index)}]" if x.index else "")

    def _print_add(self, x: sympy.Expr) -> str:
        return self._infix(x, " + ")

    def _print_sub(self, x: sympy.Expr) -> str:
        return self._infix(x, " - ")

    def _print_mul(self, x: sympy.Expr) -> str:
        return self._infix(x, "*")

    def _print_div(self, x: sympy.Expr) -> str:
        return self._infix(x, "/")

    def _print_floordiv(self, x: sympy.Expr) -> str:
        return self._infix(x, " // ")

    def _print_mod(self, x: sympy.Expr) -> str:
        return self._infix(x, " % ")

    def _print_neg(self, x: sympy.Expr) -> str:
        return f"-{self.at(x.args[0], _SIGN)}"

    def _print_power(self, x: sympy.Expr) -> str:
        return f"{self.at(x.args[0], _ATOM)}**{self.at(x.args[1], _ATOM)}"


_PRINTER = _Printer({"order": None})
# in sympy's own sums and products these need brackets like a product
floordiv.precedence = mod.precedence = 50


def to_text(expression: sympy.Expr) -> str:
    """The canonical text of an expression; `parse(to_text(e)) == e`."""
    return str(_PRINTER.doprint(sympy.sympify(expression)))


# ---- reading ---------------------------------------------------------------------------------------------------------

_Signs = dict[type[ast.operator], Callable[[Any, Any], sympy.Expr]]
_ON_VALUES: _Signs = {
    ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: div, ast.Pow: power, ast.FloorDiv: floordiv, ast.Mod: mod,
}  # fmt: skip
_ON_INDICES: _Signs = {
    ast.Add: lambda x, y: x + y, ast.Sub: lambda x, y: x - y, ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y, ast.Pow: lambda x, y: x**y, ast.FloorDiv: floordiv, ast.Mod: mod,
}  # fmt: skip


@lru_cache(maxsize=4096)
def parse(text: str) -> sympy.Expr:
    """Text -> expression.  Raises ScoreSyntaxError with the offending part; nothing is run as Python."""
    return _build(limits.read(text), text, _ON_VALUES)


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The text as the printer writes what was parsed: the only text a generator may see (see `limits`).

    Raises ScoreSyntaxError, also when what the printer writes cannot be read back as itself."""
    printed = to_text(parse(text))
    if to_text(parse(printed)) != printed:
        limits.refuse(text, f"it has no canonical form, {limits.shown(printed)} reads as something else")
    return printed


def _build(node: ast.expr, text: str, signs: _Signs) -> sympy.Expr:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return limits.number(value, text)
        case ast.Name(id=name):
            return _name(name, text)
        case ast.UnaryOp(op=ast.USub()):
            operand = _build(node.operand, text, signs)
            return neg(operand) if signs is _ON_VALUES else -operand
        case ast.UnaryOp(op=ast.UAdd()):
            return _build(node.operand, text, signs)
        case ast.BinOp():
            return _build_binary(node, text, signs)
        case ast.Subscript(value=ast.Name(id=name)) if re.fullmatch(r"c\d+", name):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return load(sympy.Integer(name[1:]), *(_build(item, text, _ON_INDICES) for item in items))
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and not node.keywords:
            found, expected = len(node.args), FUNCTIONS[name].arity
            if found != expected:
                limits.refuse(text, f"{name} has {found} arguments, expected {expected}")
            return FUNCTIONS[name](*(_build(argument, text, signs) for argument in node.args))
    _refuse_node(node, text)


def _build_binary(node: ast.BinOp, text: str, signs: _Signs) -> sympy.Expr:
    # a long sum leans to the left: without recursion
    spine = [node]
    while isinstance(spine[-1].left, ast.BinOp):
        spine.append(spine[-1].left)
    value = _build(spine[-1].left, text, signs)
    for step in reversed(spine):
        right = _build(step.right, text, signs)
        if type(step.op) not in signs:
            _refuse_node(step, text)
        if isinstance(step.op, ast.Pow):
            limits.check_exponent(right, text)
        value = limits.checked(signs[type(step.op)](value, right), text)
    return value


def _refuse_node(node: ast.expr, text: str) -> NoReturn:
    limits.refuse(
        text,
        f"{limits.shown(ast.unparse(node))} is not part of the score language "
        f"(names s p b h i j n0 c0[...] oo, arithmetic, and {', '.join(sorted(FUNCTIONS))})",
    )


def _name(name: str, text: str) -> sympy.Expr:
    if name in _NAMES:
        return _NAMES[name]
    if re.fullmatch(r"n\d+", name):
        return size_symbol(int(name[1:]))
    if re.fullmatch(r"c\d+", name):
        return load(sympy.Integer(name[1:]))
    limits.refuse(text, f"unknown name {name!r}")


def is_of_places(condition: sympy.Expr) -> bool:
    """Whether it asks where a score stands, and for nothing else.  A model that writes to `scores[:, :1]` computes
    nothing in the other rows: 0 times what is infinite there is no part of its gradient."""
    return not condition.free_symbols & VALUES and not loads(condition)


def loads(expression: sympy.Expr) -> tuple[load, ...]:
    """Every distinct captured load, ordered by slot then text, so that generated code is deterministic."""
    return tuple(sorted(expression.atoms(load), key=lambda x: (x.slot, to_text(x))))
