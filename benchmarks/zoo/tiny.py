"""A line of the tables of tiny models (transformers_vision.py, transformers_text.py), and what its inputs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """One line of the tables."""

    model: str
    """Class in transformers, or `module.path:Class` below transformers.models."""
    config: Callable[[], Any]
    inputs: Callable[[int], Inputs]
    """Batch size -> keyword inputs."""


def images(size: int = 64, *, frames: int = 0, name: str = "pixel_values") -> Callable[[int], Inputs]:
    """[batch, (frames,) 3, size, size]"""
    shape = (frames, 3, size, size) if frames else (3, size, size)
    return lambda batch: {name: torch.randn(batch, *shape)}


def tokens(length: int = 24, *, masked: bool = True, vocabulary: int = 100, **more: Any) -> Callable[[int], Inputs]:
    """Token ids [batch, length] and a mask that leaves out the last five of the first text."""

    def make(batch: int) -> Inputs:
        made: Inputs = {"input_ids": ids(batch, length, vocabulary), **more}
        if masked:
            made["attention_mask"] = padding(batch, length)
        return made

    return make


def ids(batch: int, length: int, vocabulary: int = 100) -> Tensor:
    return torch.randint(5, vocabulary - 5, (batch, length))


def padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -5:] = 0
    return mask


def both(*parts: Callable[[int], Inputs]) -> Callable[[int], Inputs]:
    """The inputs of several parts together."""
    return lambda batch: {name: value for part in parts for name, value in part(batch).items()}
