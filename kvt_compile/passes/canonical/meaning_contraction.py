"""Contractions: every product of two tensors that sums over an axis, as einsum labels.

    matmul(a, b)  ->  contraction(a, b, lhs=(b0, m, k), rhs=(b0, k, n), out=(b0, m, n))

A label is any hashable name; `None` marks a size-1 dimension that is broadcast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.meaning import Builder, is_float, meaning
from kvt_compile.passes.canonical.values import Dim, Value, meta_value, same

Labels = tuple[Any, ...]


def _batch_labels(mine: tuple[Dim, ...], other: tuple[Dim, ...], out_rank: int) -> Labels:
    """Labels of one operand's batch dimensions under right-aligned broadcasting."""
    first = out_rank - len(mine)
    padded = (1,) * (out_rank - len(other)) + tuple(other)
    return tuple(None if size == 1 and padded[first + d] != 1 else ("batch", first + d) for d, size in enumerate(mine))


@meaning("matmul")
def matmul(b: Builder, input: Value, other: Value, **ignored: Any) -> Value | None:
    if not isinstance(input, Value) or not isinstance(other, Value) or not input.shape or not other.shape:
        return None
    left_rows = ("m",) if len(input.shape) > 1 else ()
    right_columns = ("n",) if len(other.shape) > 1 else ()
    left_batch, right_batch = input.shape[:-2], other.shape[:-2]
    rank = max(len(left_batch), len(right_batch))
    lhs = (*_batch_labels(left_batch, right_batch, rank), *left_rows, "k")
    rhs = (*_batch_labels(right_batch, left_batch, rank), "k", *right_columns)
    out = (*(("batch", d) for d in range(rank)), *left_rows, *right_columns)
    return _contraction(b, "matmul", input, other, lhs, rhs, out)


def _contraction(
    b: Builder, name: str, left: Value, right: Value, lhs: Labels, rhs: Labels, out: Labels
) -> Value | None:
    sizes: dict[Any, Dim] = {}
    for labels, shape in ((lhs, left.shape), (rhs, right.shape)):
        for label, size in zip(labels, shape, strict=True):
            if label is not None and not same(sizes.setdefault(label, size), size):
                return None  # one of them is 1 at run time
    shape = tuple(sizes.get(label, 1) for label in out)
    return b.value("contraction", name, (left, right), shape, lhs=lhs, rhs=rhs, out=out)


@meaning("linear")
def linear(b: Builder, input: Value, weight: Value, bias: Value | None = None) -> Value | None:
    if not isinstance(weight, Value) or len(weight.shape) != 2:
        return None
    outer = tuple(("row", d) for d in range(len(input.shape) - 1))
    product = _contraction(b, "linear", input, weight, (*outer, "k"), ("n", "k"), (*outer, "n"))
    if bias is None or product is None:
        return product
    return b.pointwise("biased", score.add, product, bias)


@meaning("module_linear")
def module_linear(b: Builder, input: Value, features: int, bias: bool) -> Value | None:
    """An `nn.Linear` that the capture left whole: its parameters are in the module, not in the graph."""

    def parameter(*shape: Dim) -> Value:
        return Value("source", "parameter", b.node, shape, b.dtype, origin="parameter")

    return linear(b, input, parameter(features, input.shape[-1]), parameter(features) if bias else None)


@meaning("mm")
def mm(b: Builder, input: Value, mat2: Value) -> Value | None:
    """As decompositions write a linear layer, which is why it is told from other products (`facts.may_ask`)."""
    product = matmul(b, input, mat2)
    return None if product is None else replace(product, name="mm")


@meaning("addmm")
def addmm(b: Builder, input: Value, mat1: Value, mat2: Value, *, beta: Any = 1, alpha: Any = 1) -> Value | None:
    return _scaled_sum(b, input, mm(b, mat1, mat2), beta, alpha)


@meaning("baddbmm")
def baddbmm(b: Builder, input: Value, batch1: Value, batch2: Value, *, beta: Any = 1, alpha: Any = 1) -> Value | None:
    return _scaled_sum(b, input, matmul(b, batch1, batch2), beta, alpha)


def _gets_none(value: Value) -> bool:
    """Whether nothing has a gradient through it: it was just made, or comes from outside and needs none."""
    if value.kind != "source":
        name = value.node.target if isinstance(value.node.target, str) else getattr(value.node.target, "__name__", "")
        return not value.attached or str(name).partition(".")[0] in _FACTORIES
    found = meta_value(value.node)
    return isinstance(found, torch.Tensor) and not found.requires_grad


_FACTORIES = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("zeros", "ones", "empty", "full")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
)


def _scaled_sum(b: Builder, input: Value, product: Value | None, beta: Any, alpha: Any) -> Value | None:
    if product is None:
        return None
    if beta == 0:  # torch ignores the added tensor altogether, NaNs included, but for a gradient of zeros
        if not _gets_none(input):
            return None
        return b.pointwise("mul", score.mul, product, alpha)
    return b.pointwise("scaled_sum", _sum_of_scaled, input, product, beta, alpha)


def _sum_of_scaled(x: sympy.Expr, y: sympy.Expr, of_x: sympy.Expr, of_y: sympy.Expr) -> sympy.Expr:
    return score.add(x if of_x == score.one else score.mul(of_x, x), y if of_y == score.one else score.mul(of_y, y))


@meaning("einsum")
def einsum(b: Builder, equation: Any, *operands: Any, **ignored: Any) -> Value | None:
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else list(operands)
    if not isinstance(equation, str) or not all(isinstance(x, Value) for x in tensors):
        return None
    equation = equation.replace(" ", "")
    if len(tensors) == 1:
        return _einsum_of_one(b, equation, tensors[0])
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(tensors) or len(tensors) < 2:
        return None
    if len(tensors) > 2:
        return _einsum_of_many(b, terms, output if arrow else None, tensors)
    labels = [_expand_ellipsis(term, x) for term, x in zip(terms, tensors, strict=True)]
    if any(len(set(term)) != len(term) or len(term) != len(x.shape) for term, x in zip(labels, tensors, strict=True)):
        return None
    if not arrow:  # implicit output: ellipsis first, then the labels used once, in alphabetical order
        every = [label for term in labels for label in term]
        once = sorted(label for label in every if isinstance(label, str) and every.count(label) == 1)
        out: list[Any] = [*_ellipsis_of(labels), *once]
    else:
        out = []
        for label in output.replace("...", "."):
            out.extend(_ellipsis_of(labels) if label == "." else [label])
    lhs, rhs = labels
    for label in set(lhs) ^ set(rhs):
        if label not in out:
            return None  # summed in one operand alone
    if set(lhs) | set(rhs) == set(out) and len(out) == len(set(out)) and all(map(is_float, tensors)):
        return _product_by_element(b, tensors, labels, out)
    marked = [
        tuple(None if size == 1 and _size_in(label, other, other_x) not in (None, 1) else label
              for label, size in zip(mine, x.shape, strict=True))
        for mine, x, other, other_x in ((lhs, tensors[0], rhs, tensors[1]), (rhs, tensors[1], lhs, tensors[0]))
    ]  # fmt: skip
    return _contraction(b, "einsum", tensors[0], tensors[1], marked[0], marked[1], tuple(out))


def _product_by_element(b: Builder, tensors: list[Value], labels: list[list[Any]], out: list[Any]) -> Value | None:
    """einsum("bhij,bhi->bhij", x, y): nothing is summed."""
    sides: list[Value] = []
    for x, mine in zip(tensors, labels, strict=True):
        dims = tuple(sorted(range(len(mine)), key=lambda d: out.index(mine[d])))
        if dims != tuple(range(len(dims))):
            x = b.layout("permute", x, tuple(x.shape[d] for d in dims), dims=dims)
        sizes = dict(zip((mine[d] for d in dims), x.shape, strict=True))
        shape = tuple(sizes.get(label, 1) for label in out)
        sides.append(x if shape == x.shape else b.layout("reshape", x, shape))
    return b.pointwise("mul", score.mul, *sides)


def _einsum_of_many(b: Builder, terms: list[str], output: str | None, tensors: list[Value]) -> Value | None:
    """einsum("bhij,bhi,bhjd->bhid", x, y, z): the first two, with every label that is needed later, and the rest."""
    if output is None or any("." in term for term in (*terms, output)) or not all(map(is_float, tensors)):
        return None
    later = set("".join((*terms[2:], output)))
    kept = "".join(dict.fromkeys(x for x in terms[0] + terms[1] if x in later))
    sizes = dict(zip(terms[0], tensors[0].shape, strict=False)) | dict(zip(terms[1], tensors[1].shape, strict=False))
    inner = replace(b, shape=tuple(sizes[x] for x in kept))
    first = einsum(inner, f"{terms[0]},{terms[1]}->{kept}", tensors[0], tensors[1])
    if first is None or any(size == 1 for size in inner.shape):
        return None
    return einsum(b, f"{','.join((kept, *terms[2:]))}->{output}", first, *tensors[2:])


def _einsum_of_one(b: Builder, equation: str, x: Value) -> Value | None:
    """einsum("bhij->bhi", x): a sum, and the rest in another order."""
    term, arrow, output = equation.partition("->")
    labels = _expand_ellipsis(term, x)
    out = [y for label in output.replace("...", ".") for y in (_ellipsis_of([labels]) if label == "." else [label])]
    if not arrow or len(set(labels)) != len(labels) or not set(out) <= set(labels):
        return None
    if len(set(out)) != len(out) or len(labels) != len(x.shape):
        return None
    summed = tuple(d for d, label in enumerate(labels) if label not in out)
    kept = [label for label in labels if label in out]
    if summed:
        shape = tuple(size for d, size in enumerate(x.shape) if d not in summed)
        inner = replace(b, shape=shape).call("sum", (x, list(summed)), {})
        if inner is None:
            return None
        x = inner
    dims = tuple(kept.index(label) for label in out)
    if dims != tuple(range(len(dims))):
        return b.layout("permute", x, tuple(x.shape[d] for d in dims), dims=dims)
    return x if summed else b.pointwise("identity", lambda y: y, x)


def _size_in(label: Any, labels: list[Any], x: Value) -> Dim | None:
    return x.shape[labels.index(label)] if label in labels else None


def _expand_ellipsis(term: str, x: Value) -> list[Any]:
    letters = term.replace("...", ".")
    hidden = len(x.shape) - (len(letters) - 1)
    out: list[Any] = []
    for letter in letters:
        # counted from the right, so that operands of different rank broadcast
        out.extend([("...", d - hidden) for d in range(hidden)] if letter == "." else [letter])
    return out


def _ellipsis_of(labels: list[list[Any]]) -> list[Any]:
    return sorted({label for term in labels for label in term if isinstance(label, tuple)}, key=lambda x: x[1])
