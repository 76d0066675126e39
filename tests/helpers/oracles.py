"""A case -> what the float64 reference says about it, and how far a lowering may be from that.

Tolerances are computed: the reference itself, run densely in float32 and rounded to the case's dtypes, is the plain
eager computation; a lowering may be FACTOR times as far from float64 as that.  The factor allows for another order of
sums, and for weights that a backward recomputes as exp(t - logsumexp), which rounds at the size of t and not of p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from near_ties import near_ties
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.plain.reference import Reference, reference_attention, reference_scores, within_tolerance
from kvt_compile.select.text import parse
from kvt_compile.select.values import split

FACTOR = 8.0
WIDEST_VALUES = 256
"""Features of a value, at most, in a generated kernel."""


@dataclass(frozen=True)
class Case:
    """One call of kvt::attention: shapes and expressions; tensors are made from the seed."""

    id: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 0
    queries: int = 13
    keys: int = 17
    head_dim: int = 8
    value_dim: int = 8
    topk: int = 5
    dtype: torch.dtype = torch.float32
    value_dtype: torch.dtype | None = None
    score: str = "0.35355339059327373*s"
    weight: str = "p"
    captured: Callable[[Case], Sequence[Tensor]] = field(default=lambda case: ())
    sizes: tuple[int, ...] = ()
    dropout_p: float = 0.0
    seed: int = 0
    tolerance: float = 0.0
    select: str = ""
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def __str__(self) -> str:
        return self.id

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """q, k, v, captured: leaves; every floating-point one requires grad."""
        torch.manual_seed(self.seed)
        kv_heads = self.kv_heads or self.heads
        q = torch.randn(self.batch, self.heads, self.queries, self.head_dim, dtype=torch.float64)
        k = torch.randn(self.batch, kv_heads, self.keys, self.head_dim, dtype=torch.float64)
        v = torch.randn(self.batch, kv_heads, self.keys, self.value_dim, dtype=torch.float64)
        q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.value_dtype or self.dtype)
        captured = [c.clone() for c in self.captured(self)]
        for x in (q, k, v, *captured):
            x.requires_grad_(x.is_floating_point())
        return q, k, v, captured

    def grad_out(self, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(self.value_dtype or self.dtype)

    @property
    def dropout_seed(self) -> Tensor | None:
        return torch.tensor([0x1234567890ABCDEF + self.seed]) if self.dropout_p else None


def floats(*shape: str | int) -> Callable[[Case], Sequence[Tensor]]:
    """A captured tensor with those of the case's sizes."""
    return lambda case: [torch.randn([getattr(case, x) if isinstance(x, str) else x for x in shape]) + 0.5]


def arguments(case: Case, lowering: str, tensors: Sequence[Tensor] | None = None) -> tuple[Any, ...]:
    """Of the op, all of them; `tensors` are q, k, v, *captured."""
    q, k, v, *captured = tensors or _flat(case.tensors())
    return (
        q, k, v, captured, case.score, case.weight, case.topk, list(case.sizes),
        case.dropout_p, case.dropout_seed, lowering, case.tolerance, None, case.select, case.grid, case.prefix,
    )  # fmt: skip


def call(case: Case, lowering: str, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, logsumexp, threshold) of the op; `tensors` are q, k, v, *captured."""
    return torch.ops.kvt.attention(*arguments(case, lowering, tensors))


def reference(case: Case, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Reference:
    q, k, v, *captured = tensors
    return reference_attention(
        q, k, v, captured, topk=case.topk, score=case.score, weight=case.weight, sizes=case.sizes,
        dropout_p=case.dropout_p, seed=case.dropout_seed, dtype=dtype,
        selection=selection_of(case.select, case.grid, case.prefix, q.shape[2], k.shape[2]),
    )  # fmt: skip


def kept_by(case: Case, lowering: str, tensors: Sequence[Tensor] | None = None) -> Tensor:
    """Which keys a lowering keeps, `[B, Hq, Nq, Nk]`: its output where the values are the identity matrix."""
    q, k, _, *captured = (x.detach() for x in (tensors or _flat(case.tensors())))
    identity = torch.eye(k.shape[2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    slabs = [x.expand(*k.shape[:2], -1, -1) for x in identity.split(WIDEST_VALUES, 1)]
    plain = case.but(weight="p", dropout_p=0.0)
    return torch.cat([call(plain, lowering, (q, k, values, *captured))[0] != 0 for values in slabs], -1)


def assert_matches_reference(case: Case, lowering: str, rounding: bool = False) -> None:
    """Outputs, kept keys, logsumexp and every gradient of one lowering against float64.

    rounding: the lowering runs on a unit whose roundings are its own, so that it may decide near-ties as it likes: what
    such a row gives is not compared, and nothing flows back through it."""
    ties = near_ties(case, _flat(case.tensors())) if rounding else None
    decided = torch.ones(case.batch, case.heads, case.queries, dtype=torch.bool) if ties is None else ~ties.undecided
    assert decided.double().mean() > 0.5, "half of the rows or more are near-ties: not a test of anything"
    exact, plain, actual = (everything(case, source, decided) for source in ("exact", "plain", lowering))
    exact_kept, plain_kept = exact.pop("kept"), plain.pop("kept")
    assert torch.equal(exact_kept[decided], plain_kept[decided]), "a near-tie of float32: choose another seed"
    kept = kept_by(case, lowering)
    assert torch.equal(kept[decided], exact_kept[decided])
    if ties is not None:
        ties.check(kept)
    for name, expected in exact.items():
        if name == "threshold":
            continue
        rows = decided if name in ("out", "logsumexp") else ...
        # a float64 lowering may err as much as float32 does, in units of its own rounding
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if case.dtype == torch.float64 else 1.0
        assert_close(name, actual[name][rows], expected[rows], plain[name][rows], unit)
    _assert_separates(case, actual["threshold"], exact_kept, decided, 0.0 if ties is None else float(ties.slack.max()))


def assert_within_tolerance(case: Case, lowering: str) -> None:
    """Every row keeps what `case.tolerance` allows, by float64 scores (which must have no near-tie among them)."""
    q, k, _, *captured = (x.detach() for x in _flat(case.tensors()))
    t = reference_scores(q, k, captured, score=case.score, sizes=case.sizes)
    allowed = within_tolerance(t, kept_by(case, lowering), case.topk, case.tolerance)
    assert allowed.all(), f"{int((~allowed).sum())} rows keep what a tolerance of {case.tolerance} does not allow"


def assert_close(name: str, actual: Tensor, exact: Tensor, plain: Tensor, unit: float = 1.0) -> None:
    """`plain` is what an eager computation in the same dtypes gives; NaN and infinities must agree exactly."""
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    special = ~exact.isfinite()
    assert torch.equal(actual[special].double().nan_to_num(nan=12345.0), exact[special].nan_to_num(nan=12345.0)), name
    usual = ~special
    if not usual.any():
        return
    scale = float(exact[usual].abs().max())
    budget = FACTOR * unit * float((plain.double() - exact)[usual].abs().max()) + torch.finfo(actual.dtype).eps * scale
    error = float((actual.double() - exact)[usual].abs().max())
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def everything(case: Case, source: str, rows: Tensor | None = None) -> dict[str, Tensor]:
    """What a lowering, or "exact" or "plain", gives for a case: its outputs by name, and every gradient; `rows`: those
    whose output has one."""
    tensors = _flat(case.tensors())
    if source in ("exact", "plain"):
        dtype = torch.float64 if source == "exact" else torch.float32
        leaves = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in tensors]
        result = reference(case, leaves, dtype)._asdict()
    else:
        leaves = tensors
        result = dict(zip(("out", "logsumexp", "threshold"), call(case, source, tensors), strict=True))
    wanted = [x for x in leaves if x.requires_grad]
    grad_out = case.grad_out(result["out"]).to(result["out"].dtype)
    if rows is not None:
        grad_out = grad_out * rows.unsqueeze(-1)
    gradients = torch.autograd.grad(result["out"], wanted, grad_out, allow_unused=True)
    names = [f"d{n}" for n, x in zip(("q", "k", "v", *map(str, range(9))), leaves, strict=False) if x.requires_grad]
    result |= {n: torch.zeros_like(x) if g is None else g for n, g, x in zip(names, gradients, wanted, strict=True)}
    if source == "plain":  # rounded to what a lowering returns
        result["out"] = result["out"].to(case.value_dtype or case.dtype)
        result["logsumexp"] = result["logsumexp"].to(torch.promote_types(case.dtype, torch.float32))
        for name, x in zip(names, [x for x in tensors if x.requires_grad], strict=True):
            result[name] = result[name].to(x.dtype)
    return {name: x.detach() for name, x in result.items()}


def _assert_separates(case: Case, threshold: Tensor, kept: Tensor, decided: Tensor, error: float) -> None:
    """threshold lies in (largest dropped, smallest kept], as the contract says; -inf when nothing valid is dropped.
    error: of a score."""
    tensors = [x.detach() for x in _flat(case.tensors())]
    q, k, _, *captured = tensors
    # scores by the reference: with the identity as values and no selection, t = log p + logsumexp
    allowed = split(parse(case.select))[0] if case.select else None
    every = reference(
        case.but(topk=case.keys, weight="p", dropout_p=0.0, select="" if allowed is None else str(allowed)),
        (q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1), *captured),
    )
    t = every.out.detach().log() + every.logsumexp.detach().unsqueeze(-1)
    t, kept, threshold = t[decided], kept[decided], threshold[decided]
    finite = t[t.isfinite()]  # none where no row keeps a key
    slack = max(1e-5 * float(finite.abs().max()) if len(finite) else 0.0, error)
    tau = threshold.double().unsqueeze(-1)
    assert (t[kept] >= (tau - slack).expand_as(t)[kept]).all()
    dropped = ~kept & (t > -torch.inf)
    assert (t[dropped] < (tau + slack).expand_as(t)[dropped]).all()
    assert (threshold[~dropped.any(-1)] == -torch.inf).all()


def _flat(tensors: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> list[Tensor]:
    return [*tensors[:3], *tensors[3]]
