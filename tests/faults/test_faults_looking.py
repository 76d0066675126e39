"""Looking at a model leaves nothing: memory returns to where it was, and what the user compiled stays compiled."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

import kvt_compile

WATCHED = (fx.Graph, fx.Node, fx.GraphModule, FakeTensor, nn.Module)
TIMES = 4
SPARE = 80
"""Objects that torch keeps for its own log of each compilation: 65 in torch 2.11, half of it in later ones."""


class Attention(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.project, self.broken = nn.Linear(16, 48), broken

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 16)).unbind(-2)
        if self.broken:
            torch._dynamo.graph_break()
        return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


def model(broken: bool = False) -> nn.Module:
    return nn.Sequential(Attention(broken), Attention(broken))


def objects() -> Counter[str]:
    for _ in range(4):
        gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    watched = {kind.__name__: sum(n for x, n in kinds.items() if issubclass(x, kind)) for kind in WATCHED}
    return Counter(watched | {"all": kinds.total()})


def growth(look: Callable[[], object], times: int) -> dict[str, int]:
    """How many more objects there are after some more looks, by kind."""
    for _ in range(3):
        look()
    before = objects()
    for _ in range(times):
        look()
    after = objects()
    return {name: after[name] - before[name] for name in after if after[name] > before[name]}


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + torch.ones(77)


def look_at(net: nn.Module) -> None:
    with contextlib.suppress(RuntimeError):
        kvt_compile.explain(net.eval(), torch.randn(2, 5, 16))


ONE, BROKEN, FAILING = model(), model(broken=True), Fails()
GRAPH = fx.symbolic_trace(model())
KEPT: dict[str, Callable[[], object]] = {
    "one graph": lambda: look_at(ONE),
    "graph breaks": lambda: look_at(BROKEN),
    "a new model each time": lambda: look_at(model()),
    "a model that fails": lambda: look_at(FAILING),
    "a graph module": lambda: look_at(GRAPH),
}


def main() -> None:
    """In a process of its own: pytest keeps every record of the log, and with it what is in one."""
    print(json.dumps({name: growth(look, TIMES) for name, look in KEPT.items()}))


@pytest.fixture(scope="module")
def grown() -> dict[str, dict[str, int]]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", KEPT)
def test_looking_leaves_nothing(grown: dict[str, dict[str, int]], name: str) -> None:
    assert set(grown[name]) <= {"all"}, grown[name]
    if name != "a graph module":  # torch keeps some sizes of the last few graphs
        assert grown[name].get("all", 0) <= SPARE * TIMES * (3 if name == "graph breaks" else 1), grown[name]


def test_the_report_of_each_look_is_whole() -> None:
    for broken in (False, True, False, True):
        report = kvt_compile.explain(model(broken).eval(), torch.randn(2, 5, 16))
        assert report.sites  # where the graph breaks, the two layers may share what is compiled


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "graph breaks"])
def test_what_was_compiled_stays_compiled(broken: bool) -> None:
    compiled: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    net, x = model(broken).eval(), torch.randn(2, 5, 16)
    fast = torch.compile(net, backend=backend)
    expected = fast(x)
    before = len(compiled)
    kvt_compile.explain(net, x)
    assert torch.equal(fast(x), expected)
    assert len(compiled) == before


if __name__ == "__main__":
    main()
