"""Derivatives of score expressions: torch's own rule for every operation, kinks included, and the chain rule.

    50.0*tanh(0.02*s) by s    ->   50.0*gradient*(1.0 - tanh(0.02*s)**2)*0.02
    where(c0[i, j], -oo, s)   ->   where(c0[i, j], 0.0, gradient)

`gradient` is that of the expression: it is carried through the operations instead of multiplied with a slope at the
end, so that what a `where` shuts off is 0 though the gradient is NaN.  A rule of 1 or 0 is left out of products and
sums; nothing else is simplified.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.score import (
    add,
    cos,
    div,
    eq,
    exp,
    floordiv,
    ge,
    gt,
    le,
    log,
    logical_and,
    logical_or,
    lt,
    mul,
    neg,
    one,
    power,
    sigmoid,
    sin,
    sqrt,
    sub,
    tanh,
    where,
    zero,
)  # fmt: skip

Rule = Callable[..., sympy.Expr]
_half, _two = sympy.Float(0.5), sympy.Float(2.0)
_minus = sympy.Float(-1.0)


def _chosen(condition: sympy.Expr) -> sympy.Expr:
    return where(condition, one, zero)


def _extremum(loses: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> tuple[Rule, Rule]:
    """A tie is split in half; beside NaN both have all of it."""
    return (
        lambda x, y: where(loses(x, y), zero, where(eq(x, y), _half, one)),
        lambda x, y: where(loses(y, x), zero, where(eq(x, y), _half, one)),
    )


def _by_base(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    if not language.is_number(y):
        return where(eq(y, zero), zero, mul(y, power(x, sub(y, one))))
    exponent = float(y)
    if exponent in (0.0, 1.0):
        return sympy.Float(exponent)
    less = y - 1 if isinstance(y, sympy.Integer) else sympy.Float(exponent - 1.0)
    return mul(sympy.Float(exponent), x if exponent == 2.0 else power(x, less))


def _by_exponent(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    """0 where 0 is raised to a power that is not negative."""
    return where(logical_and(eq(x, zero), ge(y, zero)), zero, mul(power(x, y), log(x)))


RULES: dict[str, tuple[Rule | None, ...]] = {
    "add": (lambda x, y: one, lambda x, y: one),
    "sub": (lambda x, y: one, lambda x, y: _minus),
    "mul": (lambda x, y: y, lambda x, y: x),
    "div": (lambda x, y: div(one, y), lambda x, y: neg(div(div(x, y), y))),
    "neg": (lambda x: _minus,),
    "power": (_by_base, _by_exponent),
    "mod": (lambda x, y: one, lambda x, y: neg(floordiv(x, y))),
    "where": (None, lambda c, x, y: _chosen(c), lambda c, x, y: where(c, zero, one)),
    "exp": (lambda x: exp(x),),
    "log": (lambda x: div(one, x),),
    "sqrt": (lambda x: div(_half, sqrt(x)),),
    "sin": (lambda x: cos(x),),
    "cos": (lambda x: neg(sin(x)),),
    "tanh": (lambda x: sub(one, power(tanh(x), _two)),),
    "sigmoid": (lambda x: mul(sigmoid(x), sub(one, sigmoid(x))),),
    "erf": (lambda x: mul(sympy.Float(1.1283791670955126), exp(neg(power(x, _two)))),),
    "abs": (lambda x: where(gt(x, zero), one, where(lt(x, zero), _minus, zero)),),
    "relu": (lambda x: where(le(x, zero), zero, one),),
    "maximum": _extremum(lt),
    "minimum": _extremum(gt),
    "clamp": (
        lambda x, low, high: _chosen(logical_and(ge(x, low), le(x, high))),
        lambda x, low, high: _chosen(logical_and(lt(low, high), lt(x, low))),
        lambda x, low, high: _chosen(logical_or(gt(x, high), lt(high, low))),
    ),
    "hardtanh": (lambda x, low, high: _chosen(logical_and(gt(x, low), lt(x, high))), None, None),
    "float64": (lambda x: one,),
    "float32": (lambda x: one,),
}
"""Operation -> its derivative by each argument; None, or no line at all, where no gradient flows."""


_MULTIPLIES = frozenset({"abs"})
"""Torch multiplies with this rule, so that an infinite gradient times 0 is NaN; with any other it selects: what a rule
of 0 shuts off is 0, whatever comes from further down."""


def derivative(expression: sympy.Expr, by: sympy.Expr) -> sympy.Expr:
    """The gradient of `by`, a symbol (s, p) or one captured load, made of `language.gradient`, the expression's; other
    loads count as constants.

    From the result back to `by`, as torch's backward goes: the order decides what is infinite, NaN or shut off.
    """
    gradients: dict[sympy.Expr, sympy.Expr] = {expression: language.gradient}
    order = _from_the_result(expression, by)
    for x in order:
        name = type(x).__name__
        for rule, argument in zip(RULES.get(name, ()), x.args, strict=False):
            if rule is not None and (argument == by or argument in order):
                passed = _passed(gradients.get(x, zero), rule(*x.args), name in _MULTIPLIES)
                gradients[argument] = _sum(gradients.get(argument, zero), passed)
    return gradients.get(by, zero)


def _from_the_result(expression: sympy.Expr, by: sympy.Expr) -> dict[sympy.Expr, None]:
    """The operations of an expression through which a gradient flows to `by`, each before its arguments."""
    flows: dict[sympy.Expr, bool] = {by: True}

    def visit(x: sympy.Expr) -> bool:
        if x not in flows:
            rules = RULES.get(type(x).__name__, ()) if isinstance(x, language.Operation) else ()
            parts = [rule is not None and visit(y) for rule, y in zip(rules, x.args, strict=False)]
            flows[x] = any(parts)
        return flows[x]

    visit(expression)
    return dict.fromkeys(x for x in reversed(flows) if flows[x] and x != by)


def _passed(gradient: sympy.Expr, rule: sympy.Expr, multiplies: bool) -> sympy.Expr:
    """What an operation passes on of the gradient it gets."""
    if isinstance(rule, where) and not multiplies:
        condition, yes, no = rule.args
        return where(condition, _passed(gradient, yes, False), _passed(gradient, no, False))
    return _product(gradient, rule)


def is_multiple(slope: sympy.Expr) -> bool:
    """Whether a derivative is the gradient times numbers."""
    return slope.free_symbols <= {language.gradient} and not language.loads(slope)


_ZERO_AT_ZERO = frozenset({"neg", "sqrt", "sin", "tanh", "erf", "abs", "relu", "float32", "float64"})


def is_zero_at_zero(x: sympy.Expr, at: sympy.Symbol) -> bool:
    """Whether an expression is certainly 0 where the symbol is; what it is multiplied with counts as finite."""
    if x in (at, zero):
        return True
    name = type(x).__name__
    if name in _ZERO_AT_ZERO or name in ("add", "sub"):
        return all(is_zero_at_zero(y, at) for y in x.args)
    if name == "mul":
        return any(is_zero_at_zero(y, at) for y in x.args)
    if name == "where":
        return all(is_zero_at_zero(y, at) for y in x.args[1:])
    if name == "div":
        return is_zero_at_zero(x.args[0], at) and at not in x.args[1].free_symbols
    if name == "power":
        return is_zero_at_zero(x.args[0], at) and language.is_number(x.args[1]) and bool(x.args[1] > 0)
    return False


def reaches(x: sympy.Expr, by: sympy.Expr) -> bool:
    """Whether a gradient flows from the expression to `by`: not through comparisons, whole numbers and conditions."""
    if x == by:
        return True
    rules = RULES.get(type(x).__name__, ()) if isinstance(x, language.Operation) else ()
    return any(rule is not None and reaches(y, by) for rule, y in zip(rules, x.args, strict=False))


def _product(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    if isinstance(y, language.Div) and y.args[0] == one:  # a reciprocal may be infinite where the quotient is not
        return div(x, y.args[1])
    for factor, other in ((x, y), (y, x)):
        if factor == one:
            return other
        if factor == _minus:
            return neg(other)
    if zero in (x, y):
        return zero
    if isinstance(x, sympy.Float) and isinstance(y, sympy.Float):
        return sympy.Float(float(x) * float(y))
    if isinstance(x, where) and not language.is_number(y) and language.is_of_places(x.args[0]):
        condition, yes, no = x.args
        return where(condition, _product(yes, y), _product(no, y))
    return mul(x, y)


def _sum(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    if zero in (x, y):
        return y if x == zero else x
    if isinstance(x, sympy.Float) and isinstance(y, sympy.Float):
        return sympy.Float(float(x) + float(y))
    return add(x, y)
