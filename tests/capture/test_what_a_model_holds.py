"""What a model writes to in its call, and keeps for the next: in the rewritten module too, or refused with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvt_compile
from kvt_compile.capture.capture import CaptureError, capture

B, N, D = 2, 6, 4
Forward = Callable[["Model", Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    m: Tensor
    made: Tensor | None

    def __init__(self, call: Forward) -> None:
        super().__init__()
        self.call = call
        self.norm = nn.BatchNorm1d(N)
        self.register_buffer("m", torch.linspace(0.5, 1.0, N))
        self.register_buffer("made", None)
        self.cache: dict[str, Any] = {"maps": ([],)}
        self.table, self.map, self.calls = torch.linspace(1.0, 2.0, N), None, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(self, q, k, v)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


def counted(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.m.add_(1.0)
    return (scores(q, k) * model.m).softmax(-1) @ v


def assigned(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.m += 1
    return (scores(q, k) / (model.m * 2.0)).softmax(-1) @ v


def decayed(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    with torch.no_grad():
        model.m.mul_(0.9).add_(t.mean((0, 1)))
    return (t + model.m).softmax(-1) @ v


def part_of_it(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    model.m[:3].mul_(0.9)
    model.m[2:].add_(t.detach().mean())
    return (t * model.m).softmax(-1) @ v


def emptied(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (scores(q, k) * model.m).softmax(-1) @ v
    model.m.zero_()
    model.m.add_(out.detach().mean())
    return out


def replaced(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    model.m = model.m + t.detach().mean()
    return (t * model.m).softmax(-1) @ v


def rolled(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.m.copy_(model.m.roll(1))
    return (scores(q, k) * model.m).softmax(-1) @ v


def normalised(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(model.norm(q), k).softmax(-1) @ v


def at_random(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.rand(N, N) < 0.3, -9.0).softmax(-1) @ v


def permuted(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * model.m[torch.randperm(N)]).softmax(-1) @ v


def noisy_buffer(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.m.normal_()
    return (scores(q, k) + model.m).softmax(-1) @ v


def shows_its_map(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.map = scores(q, k).softmax(-1)  # type: ignore[assignment]
    return model.map @ v  # type: ignore[no-any-return]


def counts_for_itself(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.calls += 1
    return scores(q, k).softmax(-1) @ v


def cached(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As LeViT does, of parameters: no map of the inputs."""
    if "bias" not in model.cache:
        model.cache["bias"] = model.norm.weight * 2.0
        model.cache["sizes"] = [*model.cache.get("sizes", []), N]
    return (scores(q, k) + model.cache["bias"]).softmax(-1) @ v


def listed(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.cache["maps"][0].append(scores(q, k).softmax(-1))
    return model.cache["maps"][0][-1] @ v


def makes_its_mask(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if getattr(model, "mask", None) is None:
        model.register_buffer("mask", torch.ones(N, N).tril().bool(), persistent=False)
    return scores(q, k).masked_fill(~model.mask, -9.0).softmax(-1) @ v  # type: ignore[operator]


def makes_it_where_none_is(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if model.made is None:
        model.register_buffer("made", torch.full((D,), 0.5), persistent=False)
    return (scores(q, k) * model.made[0]).softmax(-1) @ v  # type: ignore[index]


def flagged(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    t.is_scaled = True  # type: ignore[attr-defined]
    return (t if t.is_scaled else t * 3.0).softmax(-1) @ v  # type: ignore[attr-defined]


SAME = [
    counted, assigned, decayed, part_of_it, emptied, replaced, rolled, normalised, at_random, permuted, noisy_buffer,
    shows_its_map, counts_for_itself, cached, listed, flagged, makes_its_mask,
    makes_it_where_none_is,
]  # fmt: skip


def of_its_data(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    t.data = t.data * 3.0
    return (t * 1.0).softmax(-1) @ v


def of_a_buffers_data(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    model.m.data = t.detach().mean((0, 1))
    return (t + model.m).softmax(-1) @ v


def steps(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.calls += 1
    return (scores(q, k) * model.calls).softmax(-1) @ v


def steps_where_a_trace_gives_up(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.calls += q.dim() == 3
    return (scores(q, k) * float(model.calls)).softmax(-1) @ v if q.dim() == 3 else q


def beside_the_last(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    seen = t if model.map is None else t + model.map
    model.map = t.detach()  # type: ignore[assignment]
    return seen.softmax(-1) @ v


def tables_of_the_last(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k) * model.table
    model.table = t.detach().mean((0, 1))
    return t.softmax(-1) @ v


def writes_to_no_buffer(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.table.add_(1.0)
    return (scores(q, k) * model.table).softmax(-1) @ v


def appends_to_the_last(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As a cache of keys does."""
    keys, values = (torch.cat([*model.cache["maps"][0][n::2], x], dim=1) for n, x in enumerate((k, v)))
    model.cache["maps"][0][:] = [keys, values]
    return scores(q, keys).softmax(-1) @ values


def writes_to_what_is_listed(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = model.cache.setdefault("tables", [model.table])[0]
    table.mul_(2.0)
    return (scores(q, k) * table).softmax(-1) @ v


def makes_it_where_a_trace_gives_up(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if model.made is None:
        model.made = torch.full((D,), 0.5)
    return ((scores(q, k) * model.made[0]) if q.dim() == 3 else q).softmax(-1) @ v


REFUSED = {
    makes_it_where_a_trace_gives_up: "a buffer that is made when the model first runs",
    appends_to_the_last: "the model calls",
    writes_to_what_is_listed: "a write to a tensor that is no buffer at table",
    of_its_data: "attribute of a tensor at data",
    of_a_buffers_data: "attribute of a tensor at data",
    steps: "the model calls mul",
    steps_where_a_trace_gives_up: "the model calls mul",
    beside_the_last: "the model calls detach",
    tables_of_the_last: "kept of its last call at table",
    writes_to_no_buffer: "a write to a tensor that is no buffer at table",
}


def calls() -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(B, N, D) for _ in range(3)] for _ in range(3)]


def assert_as_made(model: Model) -> None:
    made = Model(model.call)
    torch.testing.assert_close(dict(model.state_dict()), dict(made.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(model.table, made.table, rtol=0, atol=0)
    assert (model.map, model.calls, model.cache, model.made) == (None, 0, made.cache, None)
    assert list(model.state_dict()) == list(made.state_dict())
    assert model._non_persistent_buffers_set == set()


@pytest.mark.parametrize("call", SAME, ids=lambda f: f.__name__)
def test_the_rewritten_module_goes_on_as_the_model(call: Forward) -> None:
    expected, model = Model(call), Model(call)
    rewritten = kvt_compile.rewrite(model, *calls()[0], topk=1.0, force_rewrite=True)
    assert_as_made(model)
    assert rewritten.report.sites
    for given, kept in zip(calls(), calls(), strict=True):
        torch.manual_seed(1)
        wanted = expected(*given)
        torch.manual_seed(1)
        torch.testing.assert_close(rewritten.module(*given), wanted)
        torch.testing.assert_close(given, kept, rtol=0, atol=0)
    torch.testing.assert_close(dict(rewritten.module.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("call", REFUSED, ids=lambda f: f.__name__)
def test_refused_by_name(call: Forward) -> None:
    model = Model(call)
    with pytest.raises(CaptureError, match=REFUSED[call]):
        kvt_compile.rewrite(model, *calls()[0], topk=1.0, force_rewrite=True)
    assert_as_made(model)


def asks_if_any(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return (t * model.m if (model.m > 0.7).any() else t).softmax(-1) @ v


def asks_for_its_number(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) / int(model.m.sum())).softmax(-1) @ v


def asks_where_it_counts(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.m.add_(1.0)
    return asks_for_its_number(model, q, k, v)


@pytest.mark.parametrize("call", [asks_if_any, asks_for_its_number], ids=lambda f: f.__name__)
def test_control_flow_by_buffers_that_nobody_writes_to(call: Forward) -> None:
    model, (given, *_) = Model(call), calls()
    rewritten = kvt_compile.rewrite(model, *given, topk=1.0, force_rewrite=True)
    torch.testing.assert_close(rewritten.module(*given), model(*given))


def test_neighbour_that_writes_to_them() -> None:
    with pytest.raises(CaptureError):
        kvt_compile.rewrite(Model(asks_where_it_counts), *calls()[0], topk=1.0, force_rewrite=True)


def sets_its_table(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    model.table = scores(q, k)
    return model.table.softmax(-1) @ v


class Layers(nn.Module):
    def __init__(self, first: Forward, last: Forward) -> None:
        super().__init__()
        self.first, self.last = Model(first), Model(last)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.last(self.first(q, k, v), k, v)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("first", "last", "name"),
    [
        (tables_of_the_last, sets_its_table, "first.table"),
        (sets_its_table, tables_of_the_last, "last.table"),
        (sets_its_table, sets_its_table, ""),
    ],
)
def test_layers_whose_attributes_have_one_name(first: Forward, last: Forward, name: str) -> None:
    model, (given, *_) = Layers(first, last), calls()
    if not name:
        rewritten = kvt_compile.rewrite(model, *given, topk=1.0, force_rewrite=True)
        torch.testing.assert_close(rewritten.module(*given), model(*given))
        return
    with pytest.raises(CaptureError, match=f"kept of its last call at {name}"):
        kvt_compile.rewrite(model, *given, topk=1.0, force_rewrite=True)


@pytest.mark.parametrize("call", [counted, part_of_it, shows_its_map, counts_for_itself], ids=lambda f: f.__name__)
def test_a_trace_records_it(call: Forward) -> None:
    assert capture(Model(call), calls()[0], {}).how == "torch.fx.symbolic_trace"
