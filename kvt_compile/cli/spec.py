"""SPEC -> a model with random weights, and inputs to run it on.

    timm:NAME                 timm.create_model(NAME), images of the size in its configuration
    torchvision:NAME          torchvision.models.get_model(NAME), images or video clips
    transformers:MODEL_TYPE   AutoModel from the type's default configuration (transformers_spec.py)
    path/to/file.py:factory   factory() -> (model, args) or (model, args, kwargs)

No weights are downloaded.  Nothing here imports one of those libraries before its name is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvt_compile.cli.errors import UserError, did_you_mean, in_one_line
from kvt_compile.cli.files import run_file, where
from kvt_compile.cli.subject import DEFAULT_BATCH, Attention, Subject, Wanted, failure, library
from kvt_compile.cli.transformers_spec import from_transformers


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
            return from_transformers(name, wanted)
    hint = did_you_mean(kind, ("timm", "torchvision", "transformers"))
    raise UserError(f"SPEC {spec!r}: {kind!r} is neither timm, torchvision, transformers nor a .py file{hint}")


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
