"""Three outcomes -> how far the first is from the third, beside how far it may be given how far the second is.

    found    the rewritten model          error  = |found - exact|
    dense    the model itself             budget = FACTOR * |dense - exact| + one rounding
    exact    the model in float64         both relative to the largest value of the tensor

Integers, plain values, infinities, shapes, dtypes and which gradients there are have to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvt_compile.verification.facts import Difference
from kvt_compile.verification.outcome import Outcome

FACTOR = 8.0
"""Another order of sums, through a network of dozens of layers."""
FLOAT64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
LOOSE = 1e-3
"""A budget that says nothing any more."""
NOTHING = Difference("", 0.0, 0.0)
SMALL = torch.finfo(torch.float32).eps

Row = tuple[str, Any, Any, Any]
"""name, found, dense, exact"""


def compare(found: Outcome, dense: Outcome, exact: Outcome, *, unit: float = 1.0) -> Difference:
    """What comes nearest to its budget, or goes furthest over it.

    `unit`: the rounding of `found` in units of that of `dense`; FLOAT64 where it was computed in float64.
    """
    same = exact if unit < 1 else dense  # of the precision of `found`
    if strange := next(_different_kinds(found, same), None):
        return strange
    values = [(n, found.outputs[n], x, exact.outputs[n]) for n, x in dense.outputs.items()]
    gradients = [(n, found.gradients[n], x, exact.gradients[n]) for n, x in dense.gradients.items() if x is not None]
    returned = [row for row in values if row[0].startswith("output")]
    written = [row for row in values if not row[0].startswith("output")]
    return worst([x for rows in (returned, written, gradients) for x in compare_tensors(rows, unit)])


def unlike(found: Outcome, expected: Outcome, tolerance: float) -> list[Difference]:
    """What differs between two results of the same precision: by more than `tolerance` of 1 and the largest value of
    the tensor, or in kind."""
    if kinds := list(_different_kinds(found, expected)):
        return kinds
    pairs = [(n, found.outputs[n], x) for n, x in expected.outputs.items()]
    pairs += [(n, found.gradients[n], x) for n, x in expected.gradients.items() if x is not None]
    plain = [_unlike(*pair) for pair in pairs if not _is_number(pair[2])]
    numbers = [_difference(n, a, x, 1.0 + size(x), tolerance * (1.0 + size(x))) for n, a, x in pairs if _is_number(x)]
    return [check for check in (*plain, *numbers) if check is not None and not check.ok]


def compare_tensors(rows: Sequence[Row], unit: float = 1.0, least: float = SMALL) -> Iterator[Difference]:
    """A difference for each row; a row whose values have no rounding differs infinitely or not at all.  `least`: what a
    budget in float64 is at least, of the tensor's largest value; a model that casts to float32 inside is only that
    exact."""
    numbers = [row for row in rows if _is_number(row[3])]
    for name, found, _, exact in rows:
        if not _is_number(exact) and (different := _unlike(name, found, exact)):
            yield different
    roundings = [apart(dense, exact) for _, _, dense, exact in numbers]
    largest_rounding, largest = max(roundings, default=0.0), max((size(row[3]) for row in numbers), default=0.0)
    lost = torch.finfo(torch.float64).eps * largest  # what a sum of terms of that size does not hold, in any order
    for (name, found, dense, exact), rounding in zip(numbers, roundings, strict=True):
        scale = size(exact)
        if scale <= max(rounding, lost):  # zero in truth (the gradient of a bias that a norm cancels): all rounding
            scale, rounding = largest, largest_rounding
        budget = unit * (FACTOR * rounding + torch.finfo(dense.dtype).eps * scale)
        if unit < 1:  # a saturated softmax leaves gradients that are differences of terms of the largest size
            budget = max(budget, least * scale, FACTOR * lost)
        yield _difference(name, found, exact, scale, budget)


def worst(differences: Sequence[Difference]) -> Difference:
    """The one that is nearest to its budget."""
    return max(differences, key=_nearness, default=NOTHING)


def settled(check: Difference) -> bool:
    """Whether the model's own precision has said what there is to say: it is within its budget, or of another kind.

    Where a model chooses (the best queries, an expert, one side of a ReLU whose gradient jumps) rounding may choose
    otherwise, in the dense model as well as in the rewritten one; then float64 has to tell it from a wrong rewrite.
    """
    return check.certain or check.error <= check.budget <= LOOSE


def distance(found: Outcome, exact: Outcome) -> float:
    """The largest difference of any output, relative to its tensor's largest value; infinite where one is another."""
    rows: list[tuple[Any, Tensor]] = [
        (found.outputs.get(n), x) for n, x in exact.outputs.items() if _is_number(x) and n.startswith("output")
    ]
    return max((apart(f, x) / (size(x) or 1.0) if _is_number(f) else math.inf for f, x in rows), default=0.0)


def size(x: Tensor) -> float:
    """The largest finite magnitude."""
    finite = x.detach()[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where shapes differ, or what is infinite or NaN is not so in both."""
    a, b = wide(a), wide(b)
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    usual = a.isfinite() & b.isfinite()
    if not torch.equal(a[~usual].nan_to_num(7.0), b[~usual].nan_to_num(7.0)):
        return math.inf
    return float((a - b)[usual].abs().max()) if usual.any() else 0.0


def wide(x: Tensor) -> Tensor:
    """In float64 on the CPU, detached, complex numbers as pairs."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double().cpu()


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _nearness(check: Difference) -> float:
    if check.budget:
        return check.error / check.budget
    return math.inf if check.error > 0 else 0.0


def _difference(name: str, found: Tensor, exact: Tensor, scale: float, budget: float) -> Difference:
    relative = budget / (scale or 1.0)
    error = apart(found, exact) / (scale or 1.0)
    if found.shape != exact.shape:
        return Difference(name, math.inf, relative, f"shape {tuple(found.shape)}", f"shape {tuple(exact.shape)}")
    if not found.numel():
        return Difference(name, 0.0, relative)
    a, b = wide(found), wide(exact)
    far = (a - b).abs().nan_to_num(nan=math.inf)
    far = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, far)
    at = tuple(int(n) for n in torch.unravel_index(far.argmax(), far.shape))
    return Difference(name, error, relative, f"{float(a[at]):.9g}", f"{float(b[at]):.9g}", at)


def _unlike(name: str, found: Any, expected: Any) -> Difference | None:
    """Of values without rounding."""
    if isinstance(expected, Tensor):
        if found.shape != expected.shape:
            return Difference(name, math.inf, 0.0, f"shape {tuple(found.shape)}", f"shape {tuple(expected.shape)}")
        unlike = (found != expected).nonzero()
        if not len(unlike):
            return None
        at = tuple(unlike[0].tolist())
        return Difference(name, math.inf, 0.0, str(found[at].item()), str(expected[at].item()), at)
    if isinstance(expected, float) and isinstance(found, float):
        close = math.isclose(found, expected, rel_tol=LOOSE, abs_tol=LOOSE) or found != found != expected != expected
        return None if close else Difference(name, math.inf, 0.0, repr(found), repr(expected))
    return None if found == expected else Difference(name, math.inf, 0.0, repr(found), repr(expected))


def _different_kinds(found: Outcome, expected: Outcome) -> Iterator[Difference]:
    """What is not even of the same kind: names, dtypes, whether there is a gradient."""

    def unlike(name: str, a: str, b: str) -> Difference:
        return Difference(name, math.inf, 0.0, a, b, certain=True)

    for name in (*expected.outputs, *found.outputs):
        if name not in found.outputs or name not in expected.outputs:
            yield unlike(name, *("present" if name in x.outputs else "absent" for x in (found, expected)))
            continue
        a, b = found.outputs[name], expected.outputs[name]
        if _kind(a) != _kind(b):
            yield unlike(name, _kind(a), _kind(b))
        elif (name in found.attached) != (name in expected.attached):
            yield unlike(f"{name}.requires_grad", str(name in found.attached), str(name in expected.attached))
    for name in expected.gradients:
        f, e = found.gradients.get(name), expected.gradients[name]
        if (f is None) != (e is None):
            yield unlike(name, "None" if f is None else "a gradient", "None" if e is None else "a gradient")
        elif f is not None and e is not None and f.dtype != e.dtype:
            yield unlike(name, str(f.dtype), str(e.dtype))


def _kind(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
