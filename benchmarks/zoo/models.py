"""Entry -> the model, in evaluation mode with perturbed random weights, and inputs to run it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.catalogue import Entry

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""model, args, kwargs"""
SHAKE = 0.02
"""How far parameters are moved: what models initialise to 0 or 1e-6 (layer scales, gates, relative positions, last
weights of a branch) would hide whatever goes wrong behind it."""


def build(entry: Entry, **settings: Any) -> Built:
    """Builds a model of the zoo; the same numbers every time.  `settings` go to the model's constructor."""
    torch.manual_seed(0)
    model, args, kwargs = _BUILDERS[entry.library](entry, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=SHAKE)
    return model.eval(), args, kwargs


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
