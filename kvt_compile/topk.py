"""topk as a user writes it -> k for a site: an int is clamped to Nk, a float is a share of Nk.

100 -> min(100, Nk)        0.5 -> ceil(0.5 * Nk)
"""

from __future__ import annotations

from typing import Any, cast

import torch

TopK = int | float


def validate(topk: Any) -> TopK:
    """`topk` itself.  Raises TypeError or ValueError unless it is an int >= 1 or a float in (0, 1]."""
    if isinstance(topk, bool) or not isinstance(topk, (int, float, torch.SymInt)):
        raise TypeError(
            f"topk is {topk!r} ({type(topk).__name__}), expected an int >= 1 (how many keys each query keeps) "
            "or a float in (0, 1] (which share of them)"
        )
    if isinstance(topk, float):
        if not 0.0 < topk <= 1.0:  # also False for NaN
            hint = f"; for {int(topk)} keys write topk={int(topk)}" if topk > 1.0 and topk.is_integer() else ""
            raise ValueError(f"topk is {topk!r}, but a float is a share of the keys and must be in (0, 1]{hint}")
    elif topk < 1:
        raise ValueError(f"topk is {topk}, but a query must keep at least 1 key")
    return cast(TopK, topk)


def resolve(topk: TopK, keys: int) -> int:
    """How many keys of `keys` each query keeps, at least 1.  `keys` may be a torch.SymInt: no guard is added.

    Raises as `validate`.
    """
    validate(topk)
    if isinstance(topk, float):
        numerator, denominator = as_fraction(topk)
        topk = (keys * numerator + denominator - 1) // denominator
    return cast(int, torch.sym_max(torch.sym_min(topk, keys), 1))


def as_fraction(ratio: float) -> tuple[int, int]:
    """The decimal number a person wrote, exactly: 0.1 -> (1, 10), so that 0.1 of 10 keys is 1 and not 2, as it would be
    if the float, which lies above a tenth, were taken at its word.  Fraction(repr(ratio)), but traceable by Dynamo.
    """
    mantissa, _, exponent = repr(constant(ratio)).partition("e")
    whole, _, decimals = mantissa.partition(".")
    places = len(decimals) - int(exponent or 0)
    return int(whole + decimals), 10**places


def constant(x: float) -> float:
    """x itself, as a number that has a text also while Dynamo traces with dynamic=True, where a float argument is a
    SymFloat: `as_integer_ratio` specialises it, and the quotient of the two is exactly x.  x must be finite."""
    numerator, denominator = float(x).as_integer_ratio()
    return numerator / denominator
