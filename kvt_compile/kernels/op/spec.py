"""Op arguments -> `KernelSpec`: everything about one attention node that changes the code generated for it.

A spec is frozen and hashable, so it keys caches by itself; sizes that a kernel takes at run time (B, Hq, Nq, Nk, k)
are not in it.  Building one checks its expressions, so whoever holds a spec need not check again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels.language import limits, missing
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import reaches
from kvt_compile.kernels.language.types import TypeMismatchError, Types, of_captured
from kvt_compile.kernels.op.selection import canonical_selection


class SpecError(ValueError):
    """A node that cannot be described: the message says which argument, what was found and what was expected."""


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = frozenset(dtype_name(x) for x in vars(torch).values() if isinstance(x, torch.dtype))
"""Names that may stand in generated code; each lowering generates for some of them."""


def _check_dtype(role: str, dtype: str, allowed: Collection[str] = DTYPES) -> None:
    if dtype not in allowed:
        expected = "a dtype of torch" if allowed is DTYPES else ", ".join(sorted(allowed))
        raise SpecError(f"{role}: dtype {dtype!r}, expected {expected}")


@dataclass(frozen=True)
class CapturedSpec:
    """A captured tensor as far as code depends on it."""

    dtype: str
    ndim: int

    def __post_init__(self) -> None:
        _check_dtype("captured tensor", self.dtype)

    @classmethod
    def of(cls, tensor: Tensor) -> CapturedSpec:
        return cls(dtype_name(tensor.dtype), tensor.dim())

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True)
class KernelSpec:
    """One `kvt::attention` node.  Raises SpecError when an expression and the captured tensors do not fit together."""

    dtype: str
    """dtype of q and k: "float16", "bfloat16", "float32" or "float64"."""
    value_dtype: str
    """dtype of v and of the output."""
    head_dim: int
    value_dim: int
    score: str = "s"
    """t = f(s, b, h, i, j, captured), text of the score language."""
    weight: str = "p"
    """What follows the softmax and precedes dropout, text of the score language over p."""
    captured: tuple[CapturedSpec, ...] = ()
    sizes: int = 0
    """How many run-time sizes n0, n1, ... the expressions may name."""
    needs_grad: tuple[bool, ...] = ()
    """For a backward: which of (q, k, v, *captured) need a gradient.  Empty for a forward."""
    dropout: bool = False
    select: str = ""
    """Which keys may be kept and how they are ranked, text of `kvt_compile.select`; empty: the best of all."""
    tables: int = 0
    """How many of the captured tensors, the last ones, say what the selection chose, in a condition that the score
    holds besides: of a spec that a lowering made of a node's (`kernels/tiles/conditions.py`)."""

    def __post_init__(self) -> None:
        for role, dtype in (("q and k", self.dtype), ("v", self.value_dtype)):
            _check_dtype(role, dtype, FLOATS)
        if max(len(self.captured), self.sizes) > limits.SLOTS:
            found = f"{len(self.captured)} captured tensors and {self.sizes} sizes"
            raise SpecError(f"{found}, expected at most {limits.SLOTS} each")
        if self.needs_grad and len(self.needs_grad) != 3 + len(self.captured):
            raise SpecError(
                f"needs_grad has {len(self.needs_grad)} entries, expected {3 + len(self.captured)}: "
                f"q, k, v and {len(self.captured)} captured tensors"
            )
        check_expressions(self.score, self.weight, tuple(x.ndim for x in self.captured), self.sizes)
        object.__setattr__(self, "select", canonical_selection(self.select))
        # the trust boundary: a text that came with a saved program ends here, generators print what was parsed of it
        for name in ("score", "weight"):
            object.__setattr__(self, name, language.canonical(getattr(self, name)))
            try:
                self.types(language.parse(getattr(self, name)))
            except TypeMismatchError as error:
                raise SpecError(f"{name} expression {getattr(self, name)!r}: {error}") from None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # once: every call of an op looks its kernel up by spec
        return hash(tuple(getattr(self, x.name) for x in fields(self)))

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor] = (),
        score: str = "s",
        weight: str = "p",
        sizes: int = 0,
        dropout_p: float = 0.0,
        needs_grad: Sequence[bool] = (),
        select: str = "",
    ) -> KernelSpec:
        """The spec of one call: q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hk, Nk, Dv]`; fake tensors will do."""
        return _cached_spec(
            q.dtype,
            v.dtype,
            q.shape[-1],
            v.shape[-1],
            score,
            weight,
            tuple((c.dtype, c.dim()) for c in captured),
            sizes,
            tuple(needs_grad),
            dropout_p > 0.0,
            select,
        )

    @property
    def accumulate(self) -> torch.dtype:
        """The type of s, t and p: float64 for float64 inputs, float32 for every other."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def __getstate__(self) -> dict[str, object]:
        """What another process is sent: the texts, which it parses itself, and not what was made of them here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def score_expression(self) -> sympy.Expr:
        return language.parse(self.score)

    @cached_property
    def weight_expression(self) -> sympy.Expr:
        return language.parse(self.weight)

    @cached_property
    def weight_of_numbers(self) -> sympy.Expr:
        """The weight expression where p is a number, which it is in all rows but those that are NaN."""
        return missing.of_numbers(self.weight_expression) if self.zero_for_nan else self.weight_expression

    @cached_property
    def zero_for_nan(self) -> bool:
        """Whether a row whose softmax is NaN has weights of 0, and not NaN."""
        return missing.zero_for_nan(self.weight_expression)

    @cached_property
    def types(self) -> Types:
        """Which type every part of the expressions is computed in."""
        return Types(dtype_name(self.accumulate), of_captured([x.dtype for x in self.captured]))

    @cached_property
    def score_loads(self) -> tuple[language.load, ...]:
        """The distinct captured elements the score reads."""
        return language.loads(self.score_expression)

    @cached_property
    def weight_loads(self) -> tuple[language.load, ...]:
        return language.loads(self.weight_expression)


@lru_cache(maxsize=4096)
def _cached_spec(
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    score: str,
    weight: str,
    captured: tuple[tuple[torch.dtype, int], ...],
    sizes: int,
    needs_grad: tuple[bool, ...],
    dropout: bool,
    select: str,
) -> KernelSpec:
    # an op call must not pay for building and checking a spec it has seen
    return KernelSpec(
        dtype=dtype_name(dtype),
        value_dtype=dtype_name(value_dtype),
        head_dim=head_dim,
        value_dim=value_dim,
        score=score,
        weight=weight,
        captured=tuple(CapturedSpec(dtype_name(d), n) for d, n in captured),
        sizes=sizes,
        needs_grad=needs_grad,
        dropout=dropout,
        select=select,
    )


@lru_cache(maxsize=4096)
def reached(score: str, weight: str, captured: int) -> tuple[bool, ...]:
    """To which of (q, k, v, *captured) a gradient can flow at all: not through comparisons and whole numbers."""
    of_score, of_weight = language.parse(score), language.parse(weight)
    through_softmax = reaches(of_weight, language.p)
    to_s = through_softmax and reaches(of_score, language.s)
    slots = {x.slot for x in language.loads(of_score) if through_softmax and reaches(of_score, x)}
    slots |= {x.slot for x in language.loads(of_weight) if reaches(of_weight, x)}
    return (to_s, to_s, True, *(n in slots for n in range(captured)))


@lru_cache(maxsize=4096)
def check_expressions(score: str, weight: str, captured_ndims: tuple[int, ...], sizes: int) -> None:
    """Raise SpecError unless both texts can be read, name what exists and index every dimension of a tensor."""
    for role, text, foreign in (("score", score, language.p), ("weight", weight, language.s)):
        expression = language.parse(text)
        if foreign in expression.free_symbols:
            raise SpecError(f"{role} expression {limits.shown(text)} uses {foreign}, which it does not have")
        for name in sorted(map(str, expression.free_symbols)):
            if name[0] == "n" and int(name[1:]) >= sizes:
                raise SpecError(f"{role} expression {limits.shown(text)} uses {name}, but {sizes} sizes were given")
        for load in language.loads(expression):
            if load.slot >= len(captured_ndims):
                raise SpecError(
                    f"{role} expression {limits.shown(text)} reads c{load.slot}, "
                    f"but {len(captured_ndims)} captured tensors were given"
                )
            if {language.s, language.p} & load.free_symbols:
                raise SpecError(
                    f"{role} expression {limits.shown(text)}: an index is made of coordinates, sizes and captured "
                    f"integers, not of a score, found {language.to_text(load)}"
                )
            if len(load.index) != captured_ndims[load.slot]:
                raise SpecError(
                    f"{role} expression {limits.shown(text)} reads {language.to_text(load)} with {len(load.index)} "
                    f"indices, but captured tensor {load.slot} has {captured_ndims[load.slot]} dimensions"
                )


@dataclass(frozen=True)
class SoftmaxSpec:
    """One `kvt::topk_softmax` node: dtype of the scores, dtype of the weights."""

    dtype: str
    out_dtype: str

    def __post_init__(self) -> None:
        _check_dtype("scores", self.dtype)
        _check_dtype("weights", self.out_dtype)

    @classmethod
    def of(cls, dtype: torch.dtype, out_dtype: torch.dtype) -> SoftmaxSpec:
        """The spec of scores of `dtype` and weights of `out_dtype`."""
        return cls(dtype_name(dtype), dtype_name(out_dtype))
