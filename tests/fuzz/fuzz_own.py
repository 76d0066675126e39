"""Random selections of a model's own, k-NN attention or nearly: whatever is made of them, the model stays what it is.

    scores -> bias, mask -> which keys (topk, sort, ...; of what) -> how (scatter, threshold) -> after it -> softmax

No choice is invalid: what is no k-NN attention has to be left alone, and nothing may be selected on top.
"""

from __future__ import annotations

import torch
from fuzz_check import traced
from hypothesis import assume, note
from hypothesis import strategies as st
from torch import Tensor, nn

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes

NQ, NK, K = 6, 9, 3
INF = float("inf")

BEFORE = ("nothing", "bias", "causal", "causal_finite", "scale")
RANKED_BY = ("scores", "detached", "doubled", "negated", "other", "weights")
RANKING = ("topk", "sort", "argsort", "kthvalue", "smallest", "queries")
HOW = (
    "mask",
    "bool",
    "values",
    "additive",
    "ge",
    "lt",
    "gt",
    "amin",
    "weights",
    "normalised",
    "place",
    "quantile",
    "top",
)
FILL = (-INF, -1e9, -5.0)
AFTER = ("nothing", "scale", "negative", "fold", "mask", "bias")


class Model(nn.Module):
    """One choice of each."""

    def __init__(self, choice: dict[str, object]) -> None:
        super().__init__()
        self.choice = choice
        self.bias = nn.Parameter(torch.randn(NQ, NK, dtype=torch.float64))
        self.register_buffer("hidden", torch.ones(NQ, NK, dtype=torch.bool).triu(4))

    def changed(self, t: Tensor, how: object) -> Tensor:
        match how:
            case "bias":
                return t + self.bias
            case "causal" | "mask":
                return t.masked_fill(self.hidden, -INF)
            case "causal_finite":
                return t.masked_fill(self.hidden, -1e9)
            case "scale":
                return t * 0.5
            case "negative":
                return t * -0.5
            case "fold":
                return t.reshape(-1, NQ, NK).reshape(t.shape)
        return t

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.choice
        t = self.changed(q @ k.mT, c["before"])
        by = {
            "scores": t,
            "detached": t.detach(),
            "doubled": t * 2.0,
            "negated": t * -1.0,
            "other": t + self.bias.T[0, 0] * t,
            "weights": t.softmax(-1),
        }[str(c["by"])]
        dim = -2 if c["ranking"] == "queries" else -1
        if c["ranking"] in ("topk", "smallest", "queries"):
            values, index = by.topk(K, dim, largest=c["ranking"] != "smallest")
            least = values[..., -1:] if dim == -1 else values[..., -1:, :]
            last = values.amin(dim, keepdim=True) if c["how"] == "amin" else least
        elif c["ranking"] == "kthvalue":
            values, index = by.topk(K)
            last = by.kthvalue(NK - K + 1, -1, keepdim=True)[0]
        elif c["ranking"] == "sort":
            values, index = tuple(by.sort(-1, descending=True)[n][..., :K] for n in (0, 1))
            last = values[..., -1:]
        else:
            index = by.argsort(-1)[..., -K:]
            values = by.gather(-1, index)
            last = values.amin(-1, keepdim=True)
        zeros, fill = torch.zeros_like(t), c["fill"]
        match c["how"]:
            case "mask":
                x = torch.where(zeros.scatter(dim, index, 1.0) > 0, t, fill)
            case "bool":
                x = t.masked_fill(~(zeros > 1).scatter(dim, index, True), fill)
            case "values":
                x = torch.full_like(t, fill).scatter(dim, index, values)
            case "additive":
                x = t + (zeros + fill).scatter(dim, index, 0.0)
            case "gt":
                x = torch.where(by > last, t, fill)
            case "lt":
                x = t.masked_fill(by < last, fill)
            case "weights":
                return zeros.scatter(dim, index, values.softmax(dim)) @ v
            case "normalised":
                w = t.softmax(-1) * zeros.scatter(dim, index, 1.0)
                return (w / w.sum(-1, keepdim=True)) @ v
            case "place":
                x = torch.where(by.argsort(-1, descending=True).argsort(-1) < K, t, fill)
            case "quantile":
                x = torch.where(by >= by.quantile(0.7, -1, keepdim=True), t, fill)
            case "top":
                largest, index = t.softmax(-1).topk(K)
                return zeros.scatter(-1, index, largest / largest.sum(-1, keepdim=True)) @ v
            case _:
                x = torch.where(by >= last, t, fill)
        return self.changed(x, c["after"]).softmax(-1) @ v


CHOICES = st.fixed_dictionaries(
    {
        "before": st.sampled_from(BEFORE), "by": st.sampled_from(RANKED_BY), "ranking": st.sampled_from(RANKING),
        "how": st.sampled_from(HOW), "fill": st.sampled_from(FILL), "after": st.sampled_from(AFTER),
    }
)  # fmt: skip


def check(choice: dict[str, object], seed: int) -> None:
    """Asserts that the model with one choice of each, rewritten, is what it was."""
    # masked keys tie at the top where -1e9 is turned round
    assume(not (choice["before"] == "causal_finite" and choice["by"] in ("negated", "other")))
    torch.manual_seed(seed)
    model = Model(choice)
    inputs = [torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (NQ, NK, NK)]
    graph = traced(model, inputs)
    result = run_passes(graph, Policy(topk=0.5), lowering="aten")
    note(f"{[(d.site.tier, d.topk, d.own) for d in result.decisions]} {[r.reason for r in result.refusals]}")
    assert all(decision.own for decision in result.decisions if decision.topk is not None)
    wanted = [x.requires_grad_() for x in inputs]
    found, expected = graph(*wanted), model(*wanted)
    rows = expected.detach().isfinite().all(-1, keepdim=True)  # a row without keys is NaN in the model, and 0 here
    torch.testing.assert_close(found.where(rows, 0.0), expected.where(rows, 0.0), rtol=1e-9, atol=1e-9)
    if bool(rows.all()):
        factors = torch.randn(expected.shape, dtype=torch.float64)
        leaves = [*wanted, model.bias]
        mine, theirs = (torch.autograd.grad((x * factors).sum(), leaves, allow_unused=True) for x in (found, expected))
        assert [x is None for x in mine] == [x is None for x in theirs]
        for x, y in zip(mine, theirs, strict=True):
            if y is not None and x is not None and bool(y.isfinite().all()):
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)
