"""Twelve attentions -> outputs, kept keys and every gradient of the kernels, against float64.

    kept keys   the output of the very kernel where the values are columns of the identity matrix
    expected    o = softmax of t over those keys, times V, and its gradients, in float64
    allowed     FACTOR times what the same in float32, rounded to the dtypes, is off by

A key may be kept or not where its float64 score is as near to the k-th largest as the rounding of a sum of D products
explains: tensor cores sum in an order of their own.  What is compared is computed with the keys that the kernel kept,
so that a near-tie costs no accuracy elsewhere, and ties of whole numbers, which are exact, must all be kept.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from benchmarks.gpu.place import Place, place
from benchmarks.gpu.plan import reason_of
from benchmarks.gpu.step import Context
from kvt_compile.kernels import dropout
from kvt_compile.kernels.plain.reference import reference_scores

FACTOR = 8.0
SEED = 0x1234567890ABCDEF
CAUSAL = "where(le(j, i), 0.125*s, -oo)"


@dataclass(frozen=True)
class Check:
    """One attention."""

    name: str
    dtype: torch.dtype
    size: int
    dim: int
    topk: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 0
    """0: as many as keys."""
    score: str = ""
    """Empty: s / sqrt(D)."""
    captured: tuple[str, ...] = ()
    """Shapes by letter: "hij"."""
    dropout_p: float = 0.0
    whole: bool = False
    """q and k are small whole numbers, so that scores tie."""

    @property
    def score_text(self) -> str:
        return self.score or f"{self.dim**-0.5!r}*s"

    def tensors(self, device: torch.device, empty: bool = False) -> list[Tensor]:
        """q, k, v, captured tensors: leaves.  empty: without numbers."""
        generator = torch.Generator(device.type).manual_seed(self.size + self.dim)
        queries = self.queries or self.size
        sizes = {"b": self.batch, "h": self.heads, "i": queries, "j": self.size}
        keys = (self.batch, self.kv_heads, self.size, self.dim)
        shapes = [(self.batch, self.heads, queries, self.dim), keys, keys]
        shapes += [tuple(sizes[x] for x in letters) for letters in self.captured]
        found = []
        for number, shape in enumerate(shapes):
            if empty:
                x = torch.zeros(shape, device=device)
            elif self.whole and number < 2:
                x = torch.randint(-2, 3, shape, device=device, generator=generator).float()
            else:
                x = torch.randn(shape, device=device, generator=generator)
            found.append(x.to(self.dtype).requires_grad_())
        return found

    def seed(self, device: torch.device) -> Tensor | None:
        return torch.tensor([SEED], device=device) if self.dropout_p else None


HALF, SINGLE = torch.bfloat16, torch.float32
CHECKS = (
    Check("bf16 N=197", HALF, 197, 64, 99, batch=2, heads=3, kv_heads=3),
    Check("bf16 N=1024", HALF, 1024, 64, 512),
    Check("bf16 N=4096", HALF, 4096, 64, 2048),
    Check("fp32 N=197", SINGLE, 197, 64, 99),
    Check("fp32 N=1024", SINGLE, 1024, 64, 512),
    Check("bf16 N=1025 D=128", HALF, 1025, 128, 512),
    Check("bf16 N=257 D=80", HALF, 257, 80, 100),
    Check("fp16 N=577 k=N/8", torch.float16, 577, 64, 73),
    Check("bf16 N=197 learned bias", HALF, 197, 64, 99, batch=2, score="0.125*s + c0[h, i, j]", captured=("hij",)),
    Check("bf16 N=700 causal", HALF, 700, 64, 64, score=CAUSAL),
    Check("fp32 333 keys, 150 queries, shared heads, dropout", SINGLE, 333, 64, 50, heads=4, queries=150,
          dropout_p=0.2),
    Check("bf16 N=300 ties", HALF, 300, 64, 40, whole=True),
)  # fmt: skip


def run(context: Context) -> None:
    """Every check; each is written as soon as it is done."""
    results: dict[str, Any] = context.load("correct.json").get("cells", {})
    with place(context.dry) as here:
        for check in CHECKS:
            if "wrong" in results.get(check.name, {}):
                continue
            results[check.name] = judge(check, here)
            context.save("correct.json", cells=results)
            context.log(f"{check.name}: {verdict(results[check.name])}")
            context.say(summary(results, context.dry))
            context.survive()
    context.say(summary(results, context.dry))
    sys.exit(any(found["wrong"] for found in results.values()))


def summary(results: dict[str, Any], dry: bool) -> str:
    bad = [name for name, found in results.items() if found["wrong"]]
    said = f"{len(results) - len(bad)} of {len(CHECKS)} cells {'launched' if dry else 'right'}"
    return said + (f"; not: {', '.join(bad)}" if bad else "")


def verdict(found: dict[str, Any]) -> str:
    if found["wrong"]:
        return f"WRONG: {'; '.join(found['wrong'])}"
    return f"ok, errors as shares of what is allowed: {found['shares']}" if "shares" in found else "launched"


def judge(check: Check, here: Place) -> dict[str, Any]:
    """What one check found; `wrong` lists the faults and is empty where there is none."""
    try:
        leaves = check.tensors(here.device, empty=not here.real)
        out = attention(check, leaves)
        grad = torch.randn(out.shape, device=out.device).to(out.dtype)
        gradients = torch.autograd.grad(out, leaves, grad)
        if not here.real:
            return {"wrong": [], "launches": here.launches}
        kept = kept_keys(check, leaves)
        wrong, scores = list(selection_faults(check, leaves, kept)), {}
        names = ["out", "dq", "dk", "dv", *(f"dc{n}" for n in range(len(check.captured)))]
        exact, plain = (expected(check, leaves, kept, grad, dtype) for dtype in (torch.float64, torch.float32))
        for name, actual, right, eager in zip(names, (out.detach(), *gradients), exact, plain, strict=True):
            scores[name] = share = error_share(actual, right, eager.to(actual.dtype))
            if not share <= 1.0:  # NaN too
                wrong.append(f"{name}: {share:.1f} times the error that is allowed")
        return {"wrong": wrong, "shares": {name: round(x, 3) if x == x else "nan" for name, x in scores.items()}}
    except Exception as error:
        return {"wrong": [reason_of(error)]}


def attention(check: Check, leaves: Sequence[Tensor], dropout_p: float | None = None) -> Tensor:
    q, k, v, *captured = leaves
    p = check.dropout_p if dropout_p is None else dropout_p
    out: Tensor = torch.ops.kvt.attention(
        q, k, v, captured, check.score_text, "p", check.topk, [], p, check.seed(q.device) if p else None, "auto"
    )[0]
    return out


def kept_keys(check: Check, leaves: Sequence[Tensor]) -> Tensor:
    """`[B, H, Nq, Nk]` bool: where the output is not zero when the values are columns of the identity, D at a time, in
    the dtype and width of the check's own, so that it is the same kernel.  Dropout comes after the selection."""
    q, k, _, *captured = (x.detach() for x in leaves)
    columns = []
    for start in range(0, check.size, check.dim):
        width = min(check.dim, check.size - start)
        values = torch.zeros(check.size, check.dim, dtype=q.dtype, device=q.device)
        values[start : start + width, :width] = torch.eye(width, dtype=q.dtype, device=q.device)
        out = attention(check, (q, k, values.expand(*k.shape[:2], -1, -1), *captured), 0.0)
        columns.append(out[..., :width] != 0)
    return torch.cat(columns, -1)


def selection_faults(check: Check, leaves: Sequence[Tensor], kept: Tensor) -> Iterator[str]:
    """What a kept set may not be, by float64 scores."""
    q, k, _, *captured = (x.detach() for x in leaves)
    t = reference_scores(q, k, captured, score=check.score_text)
    bound = reference_scores(q.abs(), k.abs(), [c.abs() for c in captured], score=check.score_text)
    slack = torch.zeros((), dtype=t.dtype, device=t.device)
    if not check.whole:  # float32 sums of D products, in any order, and what a tf32 pair of three products leaves out
        slack = (
            2
            * (check.dim + 4)
            * torch.finfo(torch.float32).eps
            * bound.masked_fill(t == -torch.inf, 0.0).amax(-1, keepdim=True)
        )
    valid = t > -torch.inf
    last = t.sort(-1, descending=True).values[..., min(check.topk, check.size) - 1].unsqueeze(-1)
    if lacking := int((~kept & valid & (t > last + slack)).sum()):
        yield f"{lacking} keys above the k-th largest are not kept"
    if surplus := int((kept & (~valid | (t < last - slack))).sum()):
        yield f"{surplus} keys below the k-th largest are kept"
    few = kept.sum(-1) < valid.sum(-1).clamp(max=check.topk)
    if few.any():
        yield f"{int(few.sum())} rows keep fewer keys than k"


def expected(
    check: Check, leaves: Sequence[Tensor], kept: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """out and the gradients in `dtype`, of softmax over the given keys."""
    q, k, v, *captured = wanted = [x.detach().to(dtype).requires_grad_() for x in leaves]
    t = reference_scores(q, k, captured, score=check.score_text, dtype=dtype)
    w = t.masked_fill(~kept, -torch.inf).softmax(-1)
    if check.dropout_p:
        place_of = torch.arange(w.numel(), device=w.device).view(w.shape)
        dropped = dropout.dropped(place_of, torch.tensor(SEED, device=w.device), check.dropout_p)
        w = torch.where(dropped, 0.0, w * dropout.keep_scale(check.dropout_p))
    out = w @ v.repeat_interleave(check.heads // check.kv_heads, dim=1)
    return out.detach(), *torch.autograd.grad(out, wanted, grad.to(dtype))


def error_share(actual: Tensor, exact: Tensor, plain: Tensor) -> float:
    """Largest error, as a share of what is allowed."""
    budget = FACTOR * (plain.double() - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs().max()
    return float((actual.double() - exact).abs().max() / budget)
