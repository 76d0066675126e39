"""Entry -> the model, in evaluation mode with perturbed random weights, and inputs to run it on.

What models initialise to 0 or 1e-6 (layer scales, gates, relative positions, the last norm of a branch) would hide
whatever goes wrong behind it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import elsewhere
from benchmarks.zoo.catalogue import Entry

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""model, args, kwargs"""
SHAKE = 0.02
"""How far parameters are moved, and ..."""
SCALE = 0.3
"""... how large scales are made that are zero or tiny at first (layer scales, gates, the last norm of a branch)."""


def build(entry: Entry, **settings: Any) -> Built:
    """Builds a model of the zoo; the same numbers every time.  `settings` go to the constructor besides the entry's."""
    torch.manual_seed(0)
    if entry.library in elsewhere.packages():
        return opened(*elsewhere.build(entry.library, entry.name, entry.batch))
    return opened(*_BUILDERS[entry.library](entry, entry.settings | settings))


@torch.no_grad()
def opened(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """Perturbs the parameters, so that nothing is shut off by a zero, and puts the model into evaluation mode."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            closed = parameter.dim() == 1 and not name.endswith("bias") and parameter.abs().max() < 0.1
            parameter.add_(torch.randn_like(parameter), alpha=SCALE if closed else SHAKE)
    settle(model, args, kwargs)
    return model.eval(), args, kwargs


def settle(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives every batch norm the statistics of these inputs: with 0 and 1, as it starts, signals die out."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    with contextlib.suppress(ValueError):  # a single value per channel has no variance
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _timm(entry: Entry, settings: dict[str, Any]) -> Built:
    import timm

    timm.layers.set_fused_attn(entry.attention == "sdpa")
    sized = {"img_size": entry.image} if entry.image else {}
    try:
        model = timm.create_model(entry.name, **sized, **settings)
    except TypeError:  # it takes images of any size and has no such argument
        model = timm.create_model(entry.name, **settings)
    channels, height, width = model.pretrained_cfg["input_size"]
    if entry.image:
        height = width = entry.image
    return model, (torch.randn(entry.batch, channels, height, width),), {}


def _torchvision(entry: Entry, settings: dict[str, Any]) -> Built:
    from torchvision import models

    size = {"swin_v2_t": 256}.get(entry.name, 224)
    return models.get_model(entry.name, **settings), (torch.randn(entry.batch, 3, size, size),), {}


def _transformers(entry: Entry, settings: dict[str, Any]) -> Built:
    from benchmarks.zoo.transformers_models import build as build_tiny

    return build_tiny(entry.name, entry.attention, entry.batch)


class WithoutWeights(nn.Module):
    """Self-attention that does not ask for the weights."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def _torch_nn(entry: Entry, settings: dict[str, Any]) -> Built:
    width, heads, hidden = 32, 4, 64
    common: dict[str, Any] = {"batch_first": True, "dropout": 0.0}
    x, memory = torch.randn(entry.batch, 10, width), torch.randn(entry.batch, 7, width)
    match entry.name:
        case "MultiheadAttention":
            return nn.MultiheadAttention(width, heads, **common), (x, x, x), {}
        case "MultiheadAttention_no_weights":
            return WithoutWeights(nn.MultiheadAttention(width, heads, **common)), (x,), {}
        case "TransformerEncoder":
            return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, hidden, **common), 2), (x,), {}
        case "TransformerDecoder":
            layer = nn.TransformerDecoderLayer(width, heads, hidden, **common)
            return nn.TransformerDecoder(layer, 2), (x, memory), {}
        case "Transformer":
            return nn.Transformer(width, heads, 1, 1, hidden, **common), (x, memory), {}
    raise ValueError(f"no torch.nn model {entry.name!r}")


_BUILDERS = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers, "torch.nn": _torch_nn}
