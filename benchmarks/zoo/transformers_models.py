"""transformers type -> a tiny random model of it, and inputs: model class, configuration and inputs in one line each.

The tables are in transformers_vision.py and transformers_text.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from torch import nn

from benchmarks.zoo.tiny import Inputs
from benchmarks.zoo.transformers_text import TEXT
from benchmarks.zoo.transformers_vision import VISION

TABLES = VISION | TEXT


def build(name: str, attention: str, batch: int) -> tuple[nn.Module, tuple[Any, ...], Inputs]:
    """A tiny model with random weights, and its inputs; `attention` is "eager" or "sdpa"."""
    tiny = TABLES[name]
    config = tiny.config()
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "_attn_implementation"))):
        part._attn_implementation = attention
        part._experts_implementation = "eager"  # the grouped product has no float64
    inputs = tiny.inputs(batch)
    cls = _find(tiny.model)
    if hasattr(cls, "_from_config"):
        return cls._from_config(config, attn_implementation=attention), (), inputs
    return cls(config), (), inputs


def _find(model: str) -> Any:
    module, colon, name = model.rpartition(":")
    return getattr(importlib.import_module(f"transformers.models.{module}") if colon else transformers, name)
