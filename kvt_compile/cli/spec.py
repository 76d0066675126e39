"""SPEC -> a model with random weights, and inputs to run it on.

    timm:NAME                 timm.create_model(NAME), images of the size in its configuration
    torchvision:NAME          torchvision.models.get_model(NAME), images or video clips
    transformers:MODEL_TYPE   AutoModel from the type's default configuration (transformers_spec.py)
    path/to/file.py:factory   factory() -> (model, args) or (model, args, kwargs)

No weights are downloaded.  Nothing here imports one of those libraries before its name is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kvt_compile.cli.errors import UserError, did_you_mean, in_one_line
from kvt_compile.cli.files import run_file, where

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


def load(spec: str, wanted: Wanted) -> Subject:
    """Builds what SPEC names; the random weights and inputs are the same every time."""
    torch.manual_seed(0)
    kind, colon, name = spec.rpartition(":") if ".py:" in spec else spec.partition(":")
    if not colon or not kind or not name:
        raise UserError(
            f"SPEC {spec!r} is not timm:NAME, torchvision:NAME, transformers:MODEL_TYPE or path/to/file.py:factory"
        )
    if kind.endswith(".py"):
        return from_factory(kind, name, wanted)
    match kind:
        case "timm":
            return from_timm(name, wanted)
        case "torchvision":
            return from_torchvision(name, wanted)
        case "transformers":
            from kvt_compile.cli.transformers_spec import from_transformers

            return from_transformers(name, wanted)
    hint = did_you_mean(kind, ("timm", "torchvision", "transformers"))
    raise UserError(f"SPEC {spec!r}: {kind!r} is neither timm, torchvision, transformers nor a .py file{hint}")


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


def from_timm(name: str, wanted: Wanted) -> Subject:
    timm = library("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    with _timm_attention(timm, wanted.attention):
        model = _build(name, partial(timm.create_model, name), "img_size", wanted.image_size)
    channels, height, width = timm.data.resolve_model_data_config(model)["input_size"]
    if wanted.image_size:
        height = width = wanted.image_size
    return Subject(model, (torch.randn(wanted.batch or DEFAULT_BATCH, channels, height, width),))


@contextmanager
def _timm_attention(timm: Any, attention: Attention | None) -> Iterator[None]:
    """timm reads this switch while it builds a model."""
    before = timm.layers.use_fused_attn()
    if attention is not None:
        timm.layers.set_fused_attn(attention == "sdpa")
    try:
        yield
    finally:
        timm.layers.set_fused_attn(bool(before))


def from_torchvision(name: str, wanted: Wanted) -> Subject:
    models = library("torchvision.models")
    if wanted.attention:
        raise UserError("--attn: torchvision's models have one attention each; it applies to timm and transformers")
    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}")
    model = _build(name, partial(models.get_model, name), "image_size", wanted.image_size)
    size = wanted.image_size or (299 if name == "inception_v3" else 224)
    clip = (16,) if name in models.list_models(module=models.video) else ()
    return Subject(model, (torch.randn(wanted.batch or DEFAULT_BATCH, 3, *clip, size, size),))


def _build(name: str, create: Callable[..., Any], size_argument: str, size: int | None) -> nn.Module:
    """Calls a library's constructor, with the image size where one is wanted and the model takes one."""
    try:
        try:
            model = create() if size is None else create(**{size_argument: size})
        except TypeError:
            if size is None:
                raise
            model = create()  # it takes images of any size
    except Exception as error:
        raise failure(f"{name} cannot be built", error) from error
    assert isinstance(model, nn.Module)
    return model


def from_factory(file: str, name: str, wanted: Wanted) -> Subject:
    if wanted != Wanted():
        raise UserError(f"--batch, --image-size and --attn are for named models; {name}() in {file} decides its own")
    module = run_file(file, "SPEC")
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"SPEC: {file} defines no function {name!r}{did_you_mean(name, known)}")
    try:
        made = factory()
    except Exception as error:
        raise UserError(f"SPEC: {name}() fails{where(error, Path(file))} of {file}: {in_one_line(error)}") from error
    match made:
        case (nn.Module() as model, tuple() | list() as args):
            return Subject(model, tuple(args))
        case (nn.Module() as model, tuple() | list() as args, dict() as kwargs):
            return Subject(model, tuple(args), kwargs)
    kind = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
    raise UserError(
        f"SPEC: {name}() in {file} returned {kind}; expected (model, args) or (model, args, kwargs), "
        "with args a tuple and kwargs a dict"
    )
