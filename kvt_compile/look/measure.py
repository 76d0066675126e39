"""One run of a model -> what the figures show of each site: kept keys of some queries, mass, distance.

    t [B, H, rows, Nk]  --a chunk of rows at a time-->   mass inside the k largest, for every k      [H, Nk]
                                                         mean distance of the kept keys              [H]
                                                         weights of the kept keys, asked queries     [H, Nk] each

Nothing of size Nq x Nk is kept for all queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvt_compile.look.tokens import Tokens
from kvt_compile.observe import Scores, SiteCall


@dataclass(frozen=True)
class Kept:
    """The kept keys of one query in the first example."""

    query: int
    weights: Tensor
    """[H, Nk], 0 where a key is dropped."""


@dataclass(frozen=True)
class SiteMeasures:
    """What was seen at one site."""

    module: str
    topk: int
    queries: Tokens
    keys: Tokens
    windows: int
    """Parts the attention splits one example into (64 windows in Swin's first layer); 1 where it sees all of it."""
    mass: Tensor
    """[H, Nk]: mean share of the softmax inside the 1, 2, ..., Nk largest keys, over all rows that have a key."""
    distance: Tensor
    """[H]: mean distance of the kept keys from their query in patches; NaN where tokens have no common place."""
    distance_of_all: float
    """The same for all keys."""
    own: bool
    """Whether k is the model's own."""
    kept: dict[str, Kept]
    """What was asked for (`center`) -> what that query keeps here."""
    held: float
    """Mean share of the softmax inside the kept keys."""
    share: float
    """Mean share of the keys that is kept, ties included."""
    select: str = ""
    """By which selection, where it is not the k best of all."""

    @property
    def name(self) -> str:
        return self.module or "(top level)"


def measure(
    call: SiteCall, batch: int, queries: Mapping[str, int], query_tokens: Tokens, key_tokens: Tokens
) -> SiteMeasures:
    """Reads a site in chunks.  `batch` is the model's batch; `queries` are those
    whose kept keys to remember, under a name each."""
    windows, heads, keys = max(1, call.shape[0] // max(batch, 1)), call.shape[1], call.shape[3]
    mass = torch.zeros(heads, keys, dtype=torch.float64)
    near = torch.zeros(heads, dtype=torch.float64)
    rows, pairs = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    held = count = 0.0
    kept: dict[str, Kept] = {}
    where = _distances(query_tokens, key_tokens)
    for at, t in call.scores():
        valid = (t > -torch.inf).any(-1) & ~t.isnan().any(-1)
        weights = t.softmax(-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        mass += weights.sort(-1, descending=True).values.cumsum(-1).double().sum((0, 2)).cpu()
        rows += valid.double().sum((0, 2)).cpu()
        chosen = call.kept(Scores(at, t)) & valid.unsqueeze(-1)
        held += float((weights * chosen).sum(dtype=torch.float64))
        count += float(chosen.sum())
        for asked, query in queries.items():
            if query in at:
                mine = weights[0, :, query - at.start] * chosen[0, :, query - at.start]
                kept[asked] = Kept(query, (mine / mine.sum(-1, keepdim=True).clamp_min(1e-30)).float().cpu())
        if where is not None:
            first = max(at.start, query_tokens.prefix)  # prefix tokens have no place
            placed = chosen[:, :, first - at.start :, key_tokens.prefix :].to("cpu", torch.float64)
            far = where[first - query_tokens.prefix : at.stop - query_tokens.prefix]
            if placed.shape[2]:
                near += (placed * far).sum((0, 2, 3))
                pairs += placed.sum((0, 2, 3))
    return SiteMeasures(
        call.where.module, call.topk, query_tokens, key_tokens, windows,
        (mass / rows.clamp_min(1.0).unsqueeze(-1)).float(),
        (near / pairs).float(),
        float("nan") if where is None else float(where.mean()),
        call.keeps_own,
        kept,
        held / max(float(rows.sum()), 1.0),
        count / max(float(rows.sum()) * keys, 1.0),
        getattr(call, "select", ""),
    )  # fmt: skip


def _distances(queries: Tokens, keys: Tokens) -> Tensor | None:
    """[patches of the queries, patches of the keys] in patches of the queries; None where they are no common image."""
    if (queries.rows == 1) != (keys.rows == 1):
        return None
    return torch.cdist(queries.coordinates(), keys.coordinates(like=queries)).double()
