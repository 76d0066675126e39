"""What may leave a row of scores with few keys, or with keys far below those of a usual row.

q @ k.mT * 0.125 + bias: of usual size        masked_fill(s, m, -1e9), s - 99999., s + an input: of any size
"""

from __future__ import annotations

import math

from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.constants import constant_of, is_parameter
from kvt_compile.passes.finding.own.order import factors_of_product
from kvt_compile.passes.finding.own.positive import at_least, learned

NEVER = -9.9e3
"""A score so far below those of a row without masks weighs 0 in its softmax, whatever it is exactly: -1e4, which
bfloat16 rounds to -9984."""

_USUAL = 64.0
"""As far from 0 are products of queries and keys, biases, and temperatures, unless numbers make them larger."""
_DEEP = 64


def mask_in(scores: Value, fill: float = -math.inf) -> Value | None:
    """Something that may make scores as low as keys get that are not selected: half of that, so that the distance
    counts."""
    sizes = _Sizes()
    limit = -fill / 2
    if sizes.of(scores) < limit:
        return None
    found = scores
    while (inner := next((x for x in found.operands if sizes.of(x) >= limit), None)) is not None:
        found = inner
    return found


class _Sizes:
    """How far from 0 the elements of values usually are at most; infinite where that is not known."""

    def __init__(self) -> None:
        self._known: dict[Value, float] = {}

    def of(self, x: object, deep: int = _DEEP) -> float:
        if not isinstance(x, Value):
            return abs(x) if isinstance(x, int | float) else math.inf
        if x not in self._known:
            found = self._of(x, deep - 1) if deep else math.inf
            self._known[x] = math.inf if math.isnan(found) else found
        return self._known[x]

    def _of(self, x: Value, deep: int) -> float:
        if (known := constant_of(x)) is not None:
            return abs(known)
        if x.kind == "source":
            return _USUAL if is_parameter(x) or all(size == 1 for size in x.shape) else math.inf
        if x.kind == "contraction":
            return _USUAL * math.prod(f.factor for f in factors_of_product(x) if isinstance(f.factor, float))
        if x.kind == "softmax":
            return 1.0
        if x.kind in ("layout", "border") or x.name == "detach" or (x.kind == "reduce" and x.name in _OF_THE_ROW):
            return self.of(next(x.operands), deep)
        if x.kind == "pointwise":
            return _USUAL if learned(x) else self._pointwise(x, deep)
        return math.inf

    def _pointwise(self, x: Value, deep: int) -> float:
        sizes = [self.of(y, deep) for y in x.inputs]
        match x.name:
            case "neg" | "abs" | "identity" | "relu":
                return sizes[0]
            case "add" | "sub":
                return sizes[0] + sizes[1]
            case "mul":
                return sizes[0] * sizes[1]
            case "div":
                least = at_least(x.inputs[1])
                return sizes[0] / least if least > 0 else sizes[0] * sizes[1] if learned(x.inputs[1]) else math.inf
            case "maximum" | "minimum":
                return max(sizes)
            case "clamp" | "hardtanh":
                return min(sizes[0], max(sizes[1:]))
            case "tanh" | "sigmoid" | "erf" | "sin" | "cos":
                return 1.0
            case "exp":
                return math.exp(min(sizes[0], 700.0))
            case "square":
                return sizes[0] ** 2
        return math.inf


_OF_THE_ROW = frozenset({"amax", "amin", "mean", "logsumexp"})
