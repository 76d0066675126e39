"""From which axis of which input the keys of a site come, and that nothing is said where it cannot be followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kvt_compile

B, N, C = 6, 5, 8


def attended(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


class Written(nn.Module):
    """A model of one layer whose forward is a function of it and the inputs."""

    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)
        self.conv = nn.Conv2d(3, C, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, C))
        self.places = nn.Parameter(torch.zeros(N, C))
        self.code = code

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.code(self, x, *more)


def lone(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(x))


def group(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(x).transpose(0, 1))


def transposed_input(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(x.transpose(0, 1)))


def merged(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(x).reshape(1, -1, C))


def groups_of_the_batch(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(x).reshape(2, B // 2, N, C).transpose(1, 2))


def image(m: Any, x: Tensor) -> Tensor:
    tokens = torch.cat((m.token.expand(len(x), -1, -1), m.conv(x).flatten(2).mT), 1)
    return attended(m.linear(tokens))


def table_first(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(m.places + x))


def behind_attention(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(attended(m.linear(x))))


def behind_sdpa(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)[:, None]
    return attended(m.linear(nn.functional.scaled_dot_product_attention(y, y, y)[:, 0]))


def other_input(m: Any, x: Tensor, y: Tensor) -> Tensor:
    keys = m.linear(y)
    return (m.linear(x) @ keys.mT).softmax(-1) @ keys


def learned_keys(m: Any, x: Tensor) -> Tensor:
    keys = m.linear(m.places)
    return (m.linear(x) @ keys.mT).softmax(-1) @ keys


def channels(m: Any, x: Tensor) -> Tensor:
    return attended(m.linear(x).mT)


def returned_weights(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.linear(x).transpose(0, 1)
    weights = (y @ y.mT).softmax(-1)
    return weights, weights @ y


def no_softmax(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x).transpose(0, 1)
    weights = (y @ y.mT).relu().square()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ y


@dataclass(frozen=True)
class Case:
    code: Callable[..., Any]
    says: str
    inputs: tuple[tuple[int, ...], ...] = ((B, N, C),)

    def __str__(self) -> str:
        return self.code.__name__


CASES = [
    Case(lone, "axis 1 of x"),
    Case(group, "axis 0 of x"),
    Case(transposed_input, "axis 0 of x"),
    Case(merged, "axes 0 and 1 of x"),
    Case(groups_of_the_batch, "axis 0 of x"),
    Case(image, "axes 2 and 3 of x", ((B, 3, 4, 4),)),
    Case(table_first, "axis 1 of x"),
    Case(behind_attention, "axis 1 of x"),
    Case(behind_sdpa, "axis 1 of x"),
    Case(other_input, "axis 1 of more[0]", ((B, N, C), (B, 7, C))),
    Case(learned_keys, ""),
    Case(channels, ""),
    Case(returned_weights, "axis 0 of x"),
    Case(no_softmax, "axis 0 of x"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys_come_from(case: Case) -> None:
    report = kvt_compile.explain(Written(case.code), *map(torch.randn, case.inputs))
    assert report.sites
    assert {site.keys_from for site in report.sites} == {case.says}
    last = report.to_dict()["sites"][-1]
    assert bool(last["keys_input"]) == bool(case.says)
    assert (f"over {case.says or 'axis'}" in str(report)) == (0 in last["keys_axes"])


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor, *more: Tensor, **rest: Any) -> tuple[Tensor, ...]:
        found = [x, *more, *(rest["maps"][name] for name in rest.get("maps", {}))]
        return tuple(attended(self.linear(y)) for y in found)


def compiled_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """What the graphs of torch.compile have, seen from a policy."""
    seen: list[str] = []

    def keep(site: Any) -> None:
        seen.append(str(site.keys_from))

    torch.compile(model, backend="kvt", options={"topk": keep, "then": "eager"})(*args, **kwargs)
    return seen


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_an_input_is_called_what_the_model_calls_it(hooked: bool) -> None:
    model = Named()
    if hooked:
        model.register_forward_hook(lambda *given: None)  # then Dynamo's frame has *args and **kwargs
    x = torch.randn(2, N, C)
    inputs, maps = (x, x + 1, x + 2), {"low": x + 3}
    expected = [f"axis 1 of {name}" for name in ("x", "more[0]", "more[1]", "maps['low']")]
    assert [site.keys_from for site in kvt_compile.explain(model, *inputs, maps=maps).sites] == expected
    assert compiled_names(model, *inputs, maps=maps) == expected


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return group(self, x)


def test_programs_and_traces_have_their_placeholders_names() -> None:
    x = torch.randn(B, N, C)
    model = Layer()
    for captured in (torch.export.export(model, (x,)), torch.fx.symbolic_trace(model)):
        assert [site.keys_from for site in kvt_compile.explain(captured, x).sites] == ["axis 0 of x"]
    assert [site.keys_from for site in kvt_compile.rewrite(model, x).report.sites] == ["axis 0 of x"]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Written(group), Written(lone)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_what_crosses_a_graph_break_is_no_input_of_the_model() -> None:
    report = kvt_compile.explain(Broken(), torch.randn(B, N, C), batch_dim={"x": 0, "y": 0})  # y may be hidden
    assert [(site.keys_from, site.outcome) for site in report.sites] == [("axis 0 of x", "dense"), ("", "fused")]


class Checkpointed(Written):
    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return checkpoint(self.code, self, self.linear(x), use_reentrant=False)


def test_what_goes_into_a_nested_graph_is_no_input_of_the_model() -> None:
    report = kvt_compile.explain(Checkpointed(group), torch.randn(B, N, C, requires_grad=True), batch_dim=0)
    assert [site.keys_from for site in report.sites] == [""]
