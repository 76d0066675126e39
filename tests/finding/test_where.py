"""Module paths as a user writes them, however Dynamo came to the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[0](x)
        return y


class OwnGetattr(Net):
    """As every model of diffusers has it."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class ByAnotherName(Net):
    def forward(me, x: Tensor) -> Tensor:  # noqa: N805
        return super().forward(x)


class Trainer:
    def __init__(self) -> None:
        self.net = Net()

    def step(self, x: Tensor) -> Tensor:
        return self.net(x)


net = Net()


def of_argument(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def of_arguments(*args: Any) -> Any:
    return of_argument(*args)


def of_global(x: Tensor) -> Any:
    return net(x)


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "a model": (Net(), (), "blocks.0"),
    "its forward": (Net().forward, (), "blocks.0"),
    "one with a __getattr__": (OwnGetattr(), (), "blocks.0"),
    "an argument": (of_argument, (Net(),), "blocks.0"),
    "a global": (of_global, (), "blocks.0"),
    "one of several arguments": (of_arguments, (Net(),), "blocks.0"),
    "a self of another name": (ByAnotherName(), (), "blocks.0"),
    "a method of something else": (Trainer().step, (), "net.blocks.0"),
}


@pytest.mark.parametrize("name", CALLS)
def test_module_paths(name: str) -> None:
    call, first, expected = CALLS[name]
    paths: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        paths.extend(decision.site.where.module for decision in run_passes(gm, Policy(topk=2)).decisions)
        return gm

    torch._dynamo.reset()
    torch.compile(call, backend=backend)(*first, torch.randn(2, 5, 4))
    assert paths == [expected]
