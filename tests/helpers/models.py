"""Small versions of real models, as objects with ids: what `torch.compile(model, backend="kvt")` must get right.

Parameters are perturbed, so that zero-initialised gates and biases cannot hide a wrong attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from timm.layers import set_fused_attn
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A model with the number of attention sites it has, and the ids of those that cannot be fused."""

    id: str
    build: Callable[[], Built]
    sites: int
    fused: int
    trains: bool = True
    """Whether its output is differentiable in train mode (every parameter that reaches an output)."""

    def __str__(self) -> str:
        return self.id

    def __call__(self, train: bool) -> Built:
        torch.manual_seed(0)
        model, args, kwargs = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train(train), args, kwargs


def image(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def timm_vit(fused: bool, **more: Any) -> Built:
    set_fused_attn(fused)
    try:
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10, **more)
    finally:
        set_fused_attn(True)
    return model, image(64), {}


def timm_deit(fused: bool) -> Built:
    set_fused_attn(fused)
    try:
        model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2, num_classes=10)
    finally:
        set_fused_attn(True)
    return model, image(64), {}


def timm_swin(fused: bool) -> Built:
    set_fused_attn(fused)
    try:
        model = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            depths=(2,),
            num_heads=(3,),
            embed_dim=24,
            num_classes=10,
            drop_path_rate=0.0,
        )
    finally:
        set_fused_attn(True)
    return model, image(56), {}


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def hf_vit(attention: str) -> Built:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    config._attn_implementation = attention
    return transformers.ViTModel(config, add_pooling_layer=False), (), {"pixel_values": torch.randn(2, 3, 32, 32)}


def hf_bert(attention: str) -> Built:
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **SMALL)
    config._attn_implementation = attention
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, -4:] = 0
    inputs = {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": mask}
    return transformers.BertModel(config, add_pooling_layer=False), (), inputs


def multihead_attention(weights: bool) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            out, map_ = self.attention(x, x, x, need_weights=weights)
            return (out, map_) if weights else out

    return Net(), (torch.randn(2, 10, 32),), {}


def transformer_encoder(norm_first: bool) -> Built:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, 10, 32),), {}


MODELS = (
    Model("timm-vit-eager", lambda: timm_vit(False), 2, 2),
    Model("timm-vit-sdpa", lambda: timm_vit(True), 2, 2),
    Model("timm-vit-qk_norm", lambda: timm_vit(False, qk_norm=True), 2, 2),
    Model("timm-deit-eager", lambda: timm_deit(False), 2, 2),
    Model("timm-deit-sdpa", lambda: timm_deit(True), 2, 2),
    Model("timm-swin-eager", lambda: timm_swin(False), 2, 2),
    Model("timm-swin-sdpa", lambda: timm_swin(True), 2, 2),
    Model("hf-vit-eager", lambda: hf_vit("eager"), 2, 2),
    Model("hf-vit-sdpa", lambda: hf_vit("sdpa"), 2, 2),
    Model("hf-bert-eager", lambda: hf_bert("eager"), 2, 2),
    Model("hf-bert-sdpa", lambda: hf_bert("sdpa"), 2, 2),
    Model("nn-mha-weights", lambda: multihead_attention(True), 1, 0),
    Model("nn-mha", lambda: multihead_attention(False), 1, 1),
    Model("nn-encoder", lambda: transformer_encoder(False), 2, 2),
    Model("nn-encoder-norm_first", lambda: transformer_encoder(True), 2, 2),
)
