"""A checkpoint file -> a model with its weights, or a `UserError` that says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvt_compile.cli.errors import UserError, in_one_line


def load_weights(model: nn.Module, name: str) -> None:
    """Loads a state_dict (`.safetensors`, or what `torch.save` wrote; under "state_dict" or "model" too) into a model.

    Raises UserError; no code of the file is run.
    """
    state = _read(name)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"--weights: {name!r} holds no state_dict (names and tensors)")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--weights: {name!r} does not fit {type(model).__name__}: {said[-1][:200]}") from error


def _read(name: str) -> Any:
    if not Path(name).is_file():
        raise UserError(f"--weights: there is no file {name!r}")
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(name)
        return torch.load(name, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError("--weights: reading .safetensors needs: pip install safetensors") from error
    except Exception as error:
        raise UserError(f"--weights: {name!r} cannot be read: {in_one_line(error)}") from error
