"""The canonical form of a graph: a list of `Value`s in static single assignment.

    fx.Graph  --canonicalise-->  [Value]  --find-->  sites

A Value is one tensor *version*: what a node's tensor holds between two writes.  In-place operations make new
versions, so nothing downstream has to think about mutation or aliasing again.  Spellings are gone as well: there are
a few kinds only, and whatever is not understood is `opaque`, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import fx

Dim: TypeAlias = "int | sympy.Expr"
"""A size: an int, or the symbolic expression of a dynamic one."""

Kind = Literal[
    "source",  # graph input, parameter, buffer, constant
    "pointwise",  # fn(inputs), broadcast together
    "layout",  # the same elements at other coordinates
    "select_by",  # elements of several inputs, chosen by coordinate (cat, setitem, pad)
    "contraction",  # einsum of two inputs
    "reduce",  # sum, amax, ... over dims
    "softmax",
    "sdpa",
    "border",  # its one input, detached: what is recorded for a backward, seen from where nothing is
    "opaque",
]


@dataclass(eq=False)
class Value:
    """One version of one tensor.  `inputs` are Values or Python scalars; `attrs` say what the kind needs."""

    kind: Kind
    name: str
    node: fx.Node
    shape: tuple[Dim, ...]
    dtype: torch.dtype | None
    inputs: tuple[Any, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    index: int = -1
    """Position in the canonical graph; -1 until it is listed."""
    users: list[Value] = field(default_factory=list)
    holder: fx.Node | None = None
    """A node whose tensor is exactly this version; None for the inner part of a node."""
    expired: int | None = None
    """Index of the first value after the holder was overwritten; None while it never is."""
    origin: Literal["", "input", "parameter", "buffer"] = ""
    """For sources: who feeds it."""
    attached: bool = False
    """Whether a backward may come through it: it was computed with grad of something attached, or is a source."""

    @property
    def operands(self) -> Iterator[Value]:
        """The inputs that are tensors of the graph."""
        return (x for x in self.inputs if isinstance(x, Value))

    def __repr__(self) -> str:
        return f"{self.node.name}:{self.name}{list(self.shape)}"


NOT_MEANT = ("fn", "call", "given", "within", "made")
"""What `attrs` keep beside a value and say nothing more of what it computes than its name."""


def dim_of(size: Any) -> Dim:
    """int or SymInt -> int or sympy expression."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol or size.node.hint is None:
        return expression
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # where it met another size the graph was traced under an assumption, which the expression does not show
    return int(size.node.hint) if statically_known_true(size == size.node.hint) else expression


def product(sizes: Any) -> Dim:
    """The product of sizes, an int when it can be one."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total if isinstance(total, int) else as_dim(total)


def as_dim(size: Any) -> Dim:
    """sympy or int -> int where it is one."""
    if isinstance(size, int):
        return size
    size = sympy.cancel(size)
    return int(size) if size.is_Integer else size


def same(x: Dim, y: Dim) -> bool:
    """Whether two sizes are provably equal (for every value of the dynamic ones)."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    return bool(sympy.expand(sympy.sympify(x) - y) == 0)


def same_shape(x: tuple[Dim, ...], y: tuple[Dim, ...]) -> bool:
    """Whether two shapes are provably equal."""
    return len(x) == len(y) and all(map(same, x, y))


def broadcasts(shape: tuple[Dim, ...], full: tuple[Dim, ...]) -> bool:
    """Whether every size is certainly 1 or that of the full shape, counted from the right."""
    return all(x == 1 or same(x, y) for x, y in zip(reversed(shape), reversed(full), strict=False))


def at_most(x: Dim, y: Dim) -> bool:
    """Whether x <= y is certain."""
    return x <= y if isinstance(x, int) and isinstance(y, int) else same(x, y)


def divide(x: Dim, y: Dim) -> Dim | None:
    """x / y when it is provably a whole number, else None."""
    if isinstance(x, int) and isinstance(y, int):
        return x // y if y and x % y == 0 else None
    quotient = sympy.cancel(sympy.sympify(x) / y)
    numerator, denominator = quotient.as_numer_denom()
    if denominator != 1 or not numerator.is_polynomial():
        return None
    return as_dim(quotient)


LITERAL = "kvt_literal"
"""The key in a node's meta of what its tensor holds, where the model writes it as numbers (`capture/literals.py`)."""


def is_number(value: Value) -> bool:
    """Whether it is a number in the graph and no tensor: nothing a kernel could be given as it is."""
    return isinstance(meta_value(value.node), torch.SymFloat | torch.SymInt)


def made_of_sizes(node: fx.Node) -> Value | None:
    """A number that the graph computes of sizes that are known only at run time, as `x.shape[1] ** 0.5`, or of whole
    numbers that it is given: no gradient comes to it.

    None for what is no number, and for one that is read out of a tensor of real numbers."""
    fake = meta_value(node)
    if not isinstance(fake, torch.SymFloat | torch.SymInt) or fake.node.hint is None:
        return None
    return Value("opaque", "number", node, (), torch.float64, holder=node)


def known_number(x: Any) -> Any:
    """A SymInt or SymFloat that turned out to be one number, as that number; anything else as it is."""
    if isinstance(x, torch.SymInt):
        size = dim_of(x)
        return size if isinstance(size, int) else x
    known = x.node.maybe_as_float() if isinstance(x, torch.SymFloat) else None
    return x if known is None else known


def meta_value(node: fx.Node) -> Any:
    """The fake value a capture left on a node (Dynamo: `example_value`, export and shape propagation: `val`)."""
    return node.meta.get("example_value", node.meta.get("val"))
