"""The score language: the text of `f` in  t_ij = f(s_ij, b, h, i, j, captured tensors).

    "0.125*s + c0[h, i, j] + where(c1[b % 4, i, j], 0.0, -oo)"   <->   one sympy expression

A score expression travels through graphs, caches and kernel generators as plain text, because text is hashable,
readable and an ordinary operator argument.  This module is the one place that reads it, prints it and
differentiates it; `kernels/*` lower it, `passes/*` build it.

Vocabulary
    s            raw score  q_i . k_j                     p            softmax weight (weight expressions only)
    b, h, i, j   batch, query head, query, key index      n0, n1, ...  sizes known only at run time
    c0[...]      element of captured tensor 0             oo           infinity
    + - * / **   arithmetic                               // %         integer division of indices
    where, exp, tanh, lt, logical_and, ...                every name of FUNCTIONS
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from kvt_compile.kernels.language import limits
from kvt_compile.kernels.language.limits import ScoreSyntaxError as ScoreSyntaxError

s, p = sympy.symbols("s p")
b, h, i, j = sympy.symbols("b h i j", integer=True, nonnegative=True)
_NAMES: dict[str, sympy.Expr] = {str(x): x for x in (s, p, b, h, i, j)} | {"oo": sympy.oo}


def size_symbol(n: int) -> sympy.Symbol:
    """The n-th size that is known only at run time (`n0`, `n1`, ...)."""
    return sympy.Symbol(f"n{n}", integer=True, positive=True)


class load(sympy.Function):  # noqa: N801 - sympy functions are written in lower case
    """`load(n, x, y)` is element [x, y] of captured tensor n; printed `cn[x, y]`."""

    @property
    def slot(self) -> int:
        return int(self.args[0])

    @property
    def index(self) -> tuple[sympy.Expr, ...]:
        return tuple(self.args[1:])


class _Pointwise(sympy.Function):
    """A function sympy is told nothing about but its derivative, so that it cannot "simplify" a NaN or a tie away."""

    derivatives: tuple[Any, ...] = ()
    arity = 0

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        rule = self.derivatives[argindex - 1] if argindex <= len(self.derivatives) else None
        return sympy.Float(0.0) if rule is None else rule(*self.args)


FUNCTIONS: dict[str, Any] = {}


def _define(name: str, *derivatives: Any, arity: int = 0) -> type[_Pointwise]:
    cls = type(name, (_Pointwise,), {"derivatives": derivatives, "arity": arity or len(derivatives)})
    FUNCTIONS[name] = cls
    return cls


one, zero = sympy.Float(1.0), sympy.Float(0.0)

# comparisons and logic: bool in, bool out; derivative zero
lt, le, gt, ge, eq, ne = (_define(name, arity=2) for name in ("lt", "le", "gt", "ge", "eq", "ne"))
logical_and, logical_or, logical_not = (
    _define(f"logical_{x}", arity=n) for x, n in (("and", 2), ("or", 2), ("not", 1))
)
floordiv, mod = _define("floordiv", arity=2), _define("mod", arity=2)
floordiv.precedence = mod.precedence = PRECEDENCE["Mul"]  # printed infix, so they need brackets like a product

where: type[_Pointwise] = _define(
    "where", None, lambda c, x, y: where(c, one, zero), lambda c, x, y: where(c, zero, one)
)
exp: type[_Pointwise] = _define("exp", lambda x: exp(x))
log: type[_Pointwise] = _define("log", lambda x: 1 / x)
sqrt: type[_Pointwise] = _define("sqrt", lambda x: 0.5 / sqrt(x))
sin: type[_Pointwise] = _define("sin", lambda x: cos(x))
cos: type[_Pointwise] = _define("cos", lambda x: -sin(x))
tanh: type[_Pointwise] = _define("tanh", lambda x: 1 - tanh(x) ** 2)
sigmoid: type[_Pointwise] = _define("sigmoid", lambda x: sigmoid(x) * (1 - sigmoid(x)))
erf = _define("erf", lambda x: 1.1283791670955126 * exp(-(x**2)))
# torch's conventions at the kinks: abs'(0) = 0, relu'(0) = 0, and maximum/minimum split a tie in half
abs_ = _define("abs", lambda x: where(gt(x, zero), one, where(lt(x, zero), -one, zero)))
relu = _define("relu", lambda x: where(gt(x, zero), one, zero))
_tie = sympy.Float(0.5)
maximum = _define(
    "maximum",
    lambda x, y: where(gt(x, y), one, where(eq(x, y), _tie, zero)),
    lambda x, y: where(gt(y, x), one, where(eq(x, y), _tie, zero)),
)
minimum = _define(
    "minimum",
    lambda x, y: where(lt(x, y), one, where(eq(x, y), _tie, zero)),
    lambda x, y: where(lt(y, x), one, where(eq(x, y), _tie, zero)),
)
# clamp keeps the full gradient at its bounds, unlike maximum/minimum
clamp = _define("clamp", lambda x, lo, hi: where(logical_and(ge(x, lo), le(x, hi)), one, zero), arity=3)


class _Printer(StrPrinter):
    """Prints what `parse` reads back bit for bit: floats with all their digits, loads with brackets."""

    def _print_Float(self, x: sympy.Float) -> str:  # noqa: N802 - sympy's name for it
        return repr(float(x))

    def _print_Infinity(self, x: sympy.Expr) -> str:  # noqa: N802 - sympy's name for it
        return "oo"

    def _print_NegativeInfinity(self, x: sympy.Expr) -> str:  # noqa: N802 - sympy's name for it
        return "-oo"

    def _print_load(self, x: load) -> str:
        return f"c{x.slot}" + (f"[{', '.join(self._print(k) for k in x.index)}]" if x.index else "")

    def _print_floordiv(self, x: sympy.Function) -> str:
        return self._infix(x, "//")

    def _print_mod(self, x: sympy.Function) -> str:
        return self._infix(x, "%")

    def _infix(self, x: sympy.Function, sign: str) -> str:
        left, right = (self.parenthesize(arg, PRECEDENCE["Mul"]) for arg in x.args)
        return f"{left} {sign} {right}"


_PRINTER = _Printer({"order": None})


def to_text(expression: sympy.Expr) -> str:
    """The canonical text of an expression; `parse(to_text(e)) == e`."""
    return str(_PRINTER.doprint(sympy.sympify(expression)))


_BINARY: dict[type[ast.operator], Callable[[Any, Any], sympy.Expr]] = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y,
    ast.FloorDiv: lambda x, y: floordiv(x, y),
    ast.Mod: lambda x, y: mod(x, y),
}


@lru_cache(maxsize=4096)
def parse(text: str) -> sympy.Expr:
    """Text -> sympy expression.  Raises ScoreSyntaxError with the offending part; nothing is run as Python."""
    return _build(limits.read(text), text)


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The text as the printer writes what was parsed: the only text a generator may see (see `limits`).

    Raises ScoreSyntaxError, also when what the printer writes cannot be read back as itself."""
    printed = to_text(parse(text))
    if to_text(parse(printed)) != printed:
        limits.refuse(text, f"it has no canonical form, {limits.shown(printed)} reads as something else")
    return printed


def _build(node: ast.expr, text: str) -> sympy.Expr:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return limits.number(value, text)
        case ast.Name(id=name):
            return _name(name, text)
        case ast.UnaryOp(op=ast.USub()):
            return -_build(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _build(node.operand, text)
        case ast.BinOp():
            return _build_binary(node, text)
        case ast.Subscript(value=ast.Name(id=name)) if re.fullmatch(r"c\d+", name):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return load(sympy.Integer(name[1:]), *(_build(item, text) for item in items))
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and not node.keywords:
            found, expected = len(node.args), FUNCTIONS[name].arity
            if found != expected:
                limits.refuse(text, f"{name} has {found} arguments, expected {expected}")
            return FUNCTIONS[name](*(_build(argument, text) for argument in node.args))
    _refuse_node(node, text)


def _build_binary(node: ast.BinOp, text: str) -> sympy.Expr:
    # a long sum leans to the left: without recursion
    spine = [node]
    while isinstance(spine[-1].left, ast.BinOp):
        spine.append(spine[-1].left)
    value = _build(spine[-1].left, text)
    for step in reversed(spine):
        right = _build(step.right, text)
        if isinstance(step.op, ast.Pow):
            value = limits.checked(limits.power(value, right, text), text)
        elif type(step.op) in _BINARY:
            value = limits.checked(_BINARY[type(step.op)](value, right), text)
        else:
            _refuse_node(step, text)
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


def loads(expression: sympy.Expr) -> tuple[load, ...]:
    """Every distinct captured load, ordered by slot then text, so that generated code is deterministic."""
    return tuple(sorted(expression.atoms(load), key=lambda x: (x.slot, to_text(x))))


def derivative(expression: sympy.Expr, by: sympy.Expr) -> sympy.Expr:
    """d expression / d by, where `by` is a symbol (s, p) or one captured load; other loads count as constants."""
    names = {x: sympy.Dummy(f"c{x.slot}") for x in loads(expression)}
    back = {dummy: x for x, dummy in names.items()}
    powers = expression.xreplace(names).replace(_power_of_a_product, lambda x: _power(*x.args))
    slope = sympy.diff(powers, names.get(by, by))
    return slope.replace(_power, lambda base, exponent: base**exponent).xreplace(back)


def _power_of_a_product(x: sympy.Basic) -> bool:
    return bool(x.is_Pow and x.exp.is_number and (x.base.is_Mul or x.base.is_Pow))


class _power(sympy.Function):  # noqa: N801 - named as the function it is
    """base ** number, differentiated as such: sympy writes (-s**2)**2.0 * 4.0/s, which is NaN where s is 0."""

    nargs = 2

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        base, exponent = self.args
        return exponent * base ** (exponent - 1)
