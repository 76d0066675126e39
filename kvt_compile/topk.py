"""topk as a user writes it -> k for a site: an int is clamped to Nk, a float is a share of Nk; and how far from k a
tolerance lets a row stray.

100 -> min(100, Nk)        0.5 -> ceil(0.5 * Nk)        k = 100, tolerance 0.02 -> 98 to 102
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
    if not isinstance(topk, torch.SymInt) and not isinstance(keys, torch.SymInt):
        return max(min(topk, keys), 1)  # Dynamo of torch 2.11 knows sym_min of symbols only, and makes one of min
    return cast(int, torch.sym_max(torch.sym_min(topk, keys), 1))


def validate_tolerance(tolerance: Any) -> float:
    """`tolerance` itself, as a float.  Raises TypeError or ValueError unless it is a number with 0 <= tolerance < 1."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, torch.SymFloat)):
        raise TypeError(
            f"topk_tolerance is {tolerance!r} ({type(tolerance).__name__}), expected a number in [0, 1): by "
            "which share of k the number of kept keys may differ from k, 0.02 for 2 %"
        )
    if not 0.0 <= tolerance < 1.0:  # also False for NaN
        hint = f"; for {tolerance:g} % write {tolerance / 100:g}" if 1.0 <= tolerance < 100.0 else ""
        raise ValueError(f"topk_tolerance is {tolerance!r}, expected a number in [0, 1){hint}")
    return tolerance if isinstance(tolerance, float) else tolerance + 0.0  # type: ignore[operator]


def kept_range(topk: int, tolerance: float) -> tuple[int, int]:
    """The numbers of keys a row may be asked to keep: (ceil(k * (1 - tolerance)), floor(k * (1 + tolerance))).

    The decimal number a person wrote counts, exactly: 2 % of 50 keys is 1.  Neither is clamped to the number of keys.
    """
    if tolerance == 0.0:
        return topk, topk
    numerator, denominator = as_fraction(tolerance)
    slack = topk * numerator // denominator
    return topk - slack, topk + slack


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
