"""What a SPEC is built into, how a person may want it built, and what its builders share."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from kvt_compile.cli.errors import UserError, in_one_line

Attention = Literal["eager", "sdpa"]
DEFAULT_BATCH = 2
"""With one example the batch could not be told from what is folded into it: Swin's `mask[b % 4, i, j]` needs two."""


@dataclass(frozen=True)
class Wanted:
    """How a named model is to be built; a factory decides all of it by itself."""

    batch: int | None = None
    """Examples in the batch; None: DEFAULT_BATCH."""
    image_size: int | None = None
    """Side of the images; None: what the model was made for."""
    attention: Attention | None = None
    """timm, transformers: scores written out in the model, or scaled_dot_product_attention; None: their default."""


@dataclass(frozen=True)
class Subject:
    """A model and the inputs to run it on: `model(*args, **kwargs)`."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What a person should know about how it was built."""


def library(name: str) -> Any:
    """Imports a library that models come from."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f"{name} is not installed; install it with: pip install {name}") from error
        raise failure(f"{name} does not import here", error) from error
    except Exception as error:
        raise failure(f"{name} does not import here", error) from error


def failure(what: str, error: BaseException, remedy: str = "") -> UserError:
    """`what: the exception; remedy`, or the remedy for a torchvision that was built for another torch."""
    cause: BaseException | None = error
    while cause is not None and "torchvision::" not in str(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        remedy = (
            f"the installed torchvision was built for another torch: install the one for torch {torch.__version__}, "
            "or name a file that declares its operators with --preload (the repository has examples/torchvision_cpu.py)"
        )
    return UserError(f"{what}: {in_one_line(cause or error)}{'; ' if remedy else ''}{remedy}")
