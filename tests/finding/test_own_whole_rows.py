"""A threshold, a place or a position is of the keys of the softmax, all of them and no others; a list of positions and
one of values are in the same order."""

from __future__ import annotations

import pytest
import torch
from own_kept import INF, Model, N, keep, least, of_scores, own_ks
from torch import Tensor

PART = 10


def part(x: Tensor) -> Tensor:
    return x[..., :PART]


def of_part(of: Model) -> Model:
    """Attention over the first keys alone."""
    return lambda q, k, v: of(q, k, v) @ v[..., :PART, :]


def renormalised(w: Tensor, kept: Tensor) -> Tensor:
    x = w * kept
    return x / x.sum(-1, keepdim=True)


def at(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, D] at [B, H, N, K] -> [B, H, N, K, D]"""
    return x.unsqueeze(2).expand(2, 2, N, *x.shape[2:]).gather(3, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def weighed(w: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhim,bhimd->bhid", w, v)


def again(q: Tensor, k: Tensor, v: Tensor, index: Tensor, other: Tensor | None = None) -> Tensor:
    t = torch.einsum("bhid,bhimd->bhim", q, at(k, index))
    return weighed(t.softmax(-1), at(v, index if other is None else other))


def places(s: Tensor) -> Tensor:
    return s.argsort(-1, descending=True).argsort(-1)


OTHER_KEYS: dict[str, Model] = {
    "a part, by the k-th of all": of_part(lambda q, k, v: keep(part(s := q @ k.mT), part(s) >= least(s)).softmax(-1)),
    "all, by the k-th of a part": of_scores(lambda s: keep(s, s >= least(part(s))).softmax(-1)),
    "by the k-th of every key twice": of_scores(lambda s: keep(s, s >= least(s.repeat(1, 1, 1, 2))).softmax(-1)),
    "a part, by the kthvalue of all": of_part(
        lambda q, k, v: keep(part(s := q @ k.mT), part(s) >= s.kthvalue(13, -1, keepdim=True).values).softmax(-1)
    ),
    "a part, by the median of all": of_part(
        lambda q, k, v: keep(part(s := q @ k.mT), part(s) >= s.median(-1, keepdim=True).values).softmax(-1)
    ),
    "by the quantile of a part": of_scores(
        lambda s: keep(s, s >= s[..., :11].quantile(0.5, -1, keepdim=True)).softmax(-1)
    ),
    "weights by the k-th of a part": of_scores(lambda s: renormalised(w := s.softmax(-1), w >= least(part(w)))),
    "a part, by places among all": of_part(lambda q, k, v: keep(part(s := q @ k.mT), part(places(s)) < 4).softmax(-1)),
    "places of the first in the ranking": of_part(
        lambda q, k, v: keep(part(s := q @ k.mT), part(s.argsort(-1, descending=True)).argsort(-1) < 4).softmax(-1)
    ),
    "a part of what all keys scattered": of_part(
        lambda q, k, v: keep(
            part(s := q @ k.mT), part(torch.zeros_like(s, dtype=torch.bool).scatter(-1, s.topk(4).indices, True))
        ).softmax(-1)
    ),
    "again, the best of a part": lambda q, k, v: again(q, k, v, (q @ k[..., :PART, :].mT).topk(4).indices),
    "again, the best of a part of the scores": lambda q, k, v: again(q, k, v, part(q @ k.mT).topk(4).indices),
}
THE_SAME_KEYS: dict[str, Model] = {
    "all": of_scores(lambda s: keep(s, s >= least(s)).softmax(-1)),
    "a part by itself": of_part(lambda q, k, v: keep(s := part(q @ k.mT), s >= least(s)).softmax(-1)),
    "a part by its quantile": of_part(
        lambda q, k, v: keep(s := part(q @ k.mT), s >= s.quantile(0.65, -1, keepdim=True)).softmax(-1)
    ),
    "a part by its places": of_part(lambda q, k, v: keep(s := part(q @ k.mT), places(s) < 4).softmax(-1)),
    "weights": of_scores(lambda s: renormalised(w := s.softmax(-1), w >= least(w))),
    "again": lambda q, k, v: again(q, k, v, (q @ k.mT).topk(4).indices),
    "again, a part": lambda q, k, v: again(
        q, k[..., :PART, :], v[..., :PART, :], (q @ k[..., :PART, :].mT).topk(4).indices
    ),
}


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_of_other_keys(name: str) -> None:
    assert own_ks(OTHER_KEYS[name]) == []


@pytest.mark.parametrize("name", THE_SAME_KEYS)
def test_of_the_same_keys(name: str) -> None:
    assert own_ks(THE_SAME_KEYS[name]) == ["4"]


# ---- the least of some of a ranking ----------------------------------------------------------------------------------

LEAST: dict[str, tuple[Model, list[str]]] = {
    name: (of_scores(lambda s, last=last: keep(s, s >= last(s)).softmax(-1)), found)  # type: ignore[misc]
    for name, last, found in (
        ("of a sorted row", lambda s: s.sort(-1, descending=True).values[..., :4].amin(-1, keepdim=True), ["4"]),
        ("of the end of a row", lambda s: s.sort(-1).values[..., -4:].amin(-1, keepdim=True), ["4"]),
        ("of the first of the top", lambda s: s.topk(6).values[..., :4].amin(-1, keepdim=True), ["4"]),
        ("of the first, by min", lambda s: s.topk(6).values[..., :4].min(-1, keepdim=True).values, ["4"]),
        ("of the top", lambda s: s.topk(4, sorted=False).values.amin(-1).unsqueeze(-1), ["4"]),
        ("of every second", lambda s: s.topk(6).values[..., ::2].amin(-1, keepdim=True), []),
        ("of the last of the top", lambda s: s.topk(6).values[..., 2:].amin(-1, keepdim=True), []),
        ("of the smallest", lambda s: s.topk(6, largest=False).values.amin(-1, keepdim=True), []),
        ("of some in no order", lambda s: s.topk(6, sorted=False).values[..., :4].amin(-1, keepdim=True), []),
    )
}


@pytest.mark.parametrize("name", LEAST)
def test_the_least(name: str) -> None:
    model, found = LEAST[name]
    assert own_ks(model) == found


# ---- positions and values --------------------------------------------------------------------------------------------


def scattered(s: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return torch.full_like(s, -INF).scatter(-1, index, values).softmax(-1)


def upwards(s: Tensor) -> Tensor:
    return s.argsort(-1)[..., -4:]


IN_ANOTHER_ORDER: dict[str, Model] = {
    "values upwards": of_scores(lambda s: scattered(s, s.topk(4).indices, s.sort(-1).values[..., -4:])),
    "positions upwards": of_scores(lambda s: scattered(s, upwards(s), s.topk(4).values)),
    "gathered upwards": of_scores(lambda s: scattered(s, s.topk(4).indices, s.gather(-1, upwards(s)))),
    "weights": of_scores(lambda s: torch.zeros_like(s).scatter(-1, upwards(s), s.topk(4).values.softmax(-1))),
    "weights over their sum": of_scores(
        lambda s: torch.zeros_like(s).scatter(-1, upwards(s), (t := s.softmax(-1).topk(4).values) / t.sum(-1, True))
    ),
    "values at argsort": lambda q, k, v: weighed((s := q @ k.mT).topk(4).values.softmax(-1), at(v, upwards(s))),
    "values at sort": lambda q, k, v: weighed(
        (s := q @ k.mT).topk(4).values.softmax(-1), at(v, s.sort(-1).indices[..., -4:])
    ),
    "again": lambda q, k, v: again(q, k, v, (s := q @ k.mT).topk(4).indices, upwards(s)),
}
IN_THE_SAME_ORDER: dict[str, Model] = {
    "two calls": of_scores(lambda s: scattered(s, s.topk(4).indices, s.sort(-1, descending=True).values[..., :4])),
    "both upwards": of_scores(lambda s: scattered(s, upwards(s), s.sort(-1).values[..., -4:])),
    "of the negative": of_scores(lambda s: scattered(s, (-s).argsort(-1)[..., :4], s.topk(4).values)),
    "in no order, of one call": of_scores(lambda s: scattered(s, (t := s.topk(4, sorted=False)).indices, t.values)),
    "gathered": of_scores(lambda s: scattered(s, i := upwards(s), s.gather(-1, i))),
    "weights": of_scores(
        lambda s: torch.zeros_like(s).scatter(-1, s.sort(-1, True).indices[..., :4], s.topk(4).values.softmax(-1))
    ),
    "values": lambda q, k, v: weighed((s := q @ k.mT).topk(4).values.softmax(-1), at(v, s.topk(4).indices)),
}


@pytest.mark.parametrize("name", IN_ANOTHER_ORDER)
def test_lists_in_another_order(name: str) -> None:
    assert own_ks(IN_ANOTHER_ORDER[name]) == []


@pytest.mark.parametrize("name", IN_THE_SAME_ORDER)
def test_lists_in_the_same_order(name: str) -> None:
    assert own_ks(IN_THE_SAME_ORDER[name]) == ["4"]
