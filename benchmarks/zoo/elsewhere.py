"""Models of packages the project was not made for: (package, name) -> a small model with random weights, and inputs.

The packages are optional (`elsewhere` in pyproject.toml, with the versions that were judged); a model whose package is
missing is not judged, and keeps its last verdict on the page.  Each maker imports what it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Any, ...]]
"""model, args"""
MODELS: dict[tuple[str, str], Callable[[int], Made]] = {}
"""(import name of the package, name of the model) -> batch size -> the model."""


HOW = "pip install 'kvt-compile[elsewhere]', with torch held at its version by a constraint"


def is_here(package: str) -> bool:
    """Whether a package can be imported; packages that every judge needs always are."""
    return package not in packages() or find_spec(package) is not None


def packages() -> list[str]:
    return sorted({package for package, _ in MODELS})


def build(package: str, name: str, batch: int, **settings: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    model, args = MODELS[package, name](batch, **settings)
    return model, args, {}


Maker = Callable[..., Made]


def model(package: str, *names: str) -> Callable[[Maker], Maker]:
    """Registers a maker; for several names it is given the name too."""

    def register(make: Maker) -> Maker:
        for name in names:
            MODELS[package, name] = (lambda batch, name=name: make(batch, name)) if len(names) > 1 else make
        return make

    return register


def of(package: str, path: str) -> Any:
    """`of("vit_pytorch", "cait.CaiT")`: the class."""
    module, _, name = f"{package}.{path}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def images(batch: int, side: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, side, side)


def tokens(batch: int, length: int = 12, width: int = 32) -> Tensor:
    return torch.randn(batch, length, width)


def ids(batch: int, length: int = 12, vocabulary: int = 50) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length))


# ---- vit_pytorch -----------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "heads": 2, "mlp_dim": 48}
_VITS: dict[str, dict[str, Any]] = {
    "vit.ViT": {"depth": 2, "dim_head": 16},
    "simple_vit.SimpleViT": {"depth": 2, "dim_head": 16},
    "deepvit.DeepViT": {"depth": 2, "dim_head": 16},
    "cait.CaiT": {"depth": 2, "cls_depth": 1, "dim_head": 16},
    "pit.PiT": {"depth": (1, 1), "dim_head": 16},
    "rvt.RvT": {"depth": 2, "dim_head": 16},
    "xcit.XCiT": {"depth": 1, "cls_depth": 1, "dim_head": 16},
    "parallel_vit.ViT": {"depth": 2, "dim_head": 16},
    "learnable_memory_vit.ViT": {"depth": 2, "dim_head": 16},
    "vit_for_small_dataset.ViT": {"depth": 2, "dim_head": 16},
    "vit_with_patch_merger.ViT": {"depth": 2, "dim_head": 16, "patch_merge_layer": 1, "patch_merge_num_tokens": 4},
    "simple_vit_with_qk_norm.SimpleViT": {"depth": 2, "dim_head": 16},
}


@model("vit_pytorch", *_VITS)
def _vit(batch: int, name: str) -> Made:
    return of("vit_pytorch", name)(**_PLAIN, **_VITS[name]), (images(batch),)


@model("vit_pytorch", "cross_vit.CrossViT")
def _cross_vit(batch: int) -> Made:
    heads = {f"{part}_heads": 2 for part in ("sm_enc", "lg_enc", "cross_attn")}
    heads |= {f"{part}_dim_head": 16 for part in ("sm_enc", "lg_enc", "cross_attn")}
    sizes = {"sm_dim": 24, "lg_dim": 32, "sm_patch_size": 4, "lg_patch_size": 8, "sm_enc_mlp_dim": 32}
    made = of("vit_pytorch", "cross_vit.CrossViT")(
        image_size=32, num_classes=5, depth=1, lg_enc_depth=1, lg_enc_mlp_dim=32, cross_attn_depth=1, **sizes, **heads
    )
    return made, (images(batch),)


@model("vit_pytorch", "cvt.CvT")
def _cvt(batch: int) -> Made:
    widths = {"s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 48, "s2_heads": 2, "s3_heads": 2, "s3_depth": 2}
    return of("vit_pytorch", "cvt.CvT")(num_classes=5, **widths), (images(batch, 64),)


@model("vit_pytorch", "levit.LeViT")
def _levit(batch: int) -> Made:
    made = of("vit_pytorch", "levit.LeViT")(
        image_size=64, num_classes=5, stages=2, dim=(16, 32), depth=1, heads=(2, 4), mlp_mult=2, dim_key=8, dim_value=16
    )
    return made, (images(batch, 64),)


@model("vit_pytorch", "max_vit.MaxViT")
def _max_vit(batch: int) -> Made:
    made = of("vit_pytorch", "max_vit.MaxViT")(
        num_classes=5, dim=16, dim_conv_stem=16, depth=(1, 1), dim_head=8, window_size=4
    )
    return made, (images(batch, 64),)


@model("vit_pytorch", "nest.NesT")
def _nest(batch: int) -> Made:
    made = of("vit_pytorch", "nest.NesT")(
        image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=5
    )
    return made, (images(batch),)


@model("vit_pytorch", "twins_svt.TwinsSVT")
def _twins(batch: int) -> Made:
    widths: dict[str, Any] = {f"s{n}_emb_dim": 16 * n for n in (1, 2, 3, 4)} | {f"s{n}_depth": 1 for n in (1, 2, 3, 4)}
    local = {f"s{n}_local_patch_size": size for n, size in enumerate((4, 4, 4, 2), 1)}
    spread = {f"s{n}_global_k": size for n, size in enumerate((4, 4, 4, 2), 1)}
    return of("vit_pytorch", "twins_svt.TwinsSVT")(num_classes=5, **widths, **local, **spread), (images(batch, 64),)


@model("vit_pytorch", "vivit.ViViT")
def _vivit(batch: int) -> Made:
    made = of("vit_pytorch", "vivit.ViViT")(
        image_size=32, frames=4, image_patch_size=16, frame_patch_size=2, num_classes=5, dim=32, spatial_depth=1,
        temporal_depth=1, heads=2, mlp_dim=32, dim_head=16, use_flash_attn=False,
    )  # fmt: skip
    return made, (torch.randn(batch, 3, 4, 32, 32),)


# ---- other packages of single models ---------------------------------------------------------------------------------


@model("x_transformers", "Encoder", "Decoder", "CrossAttender")
def _x_transformers(batch: int, name: str) -> Made:
    kind = of("x_transformers", name)
    made = kind(dim=32, depth=2, heads=2, attn_dim_head=16)
    return made, (tokens(batch),) if name != "CrossAttender" else (tokens(batch), tokens(batch, 7))


@model("perceiver_pytorch", "Perceiver")
def _perceiver(batch: int) -> Made:
    made = of("perceiver_pytorch", "Perceiver")(
        input_channels=3, input_axis=2, num_freq_bands=2, max_freq=4.0, depth=1, num_latents=6, latent_dim=32,
        cross_heads=1, latent_heads=2, cross_dim_head=16, latent_dim_head=16, num_classes=5,
    )  # fmt: skip
    return made, (torch.randn(batch, 8, 8, 3),)


@model("axial_attention", "AxialAttention")
def _axial(batch: int) -> Made:
    return of("axial_attention", "AxialAttention")(dim=32, dim_index=1, heads=2, num_dimensions=2), (
        images(batch, 6, 32),
    )


@model("nystrom_attention", "NystromAttention")
def _nystrom(batch: int) -> Made:
    made = of("nystrom_attention", "NystromAttention")(dim=32, dim_head=16, heads=2, num_landmarks=4, pinv_iterations=2)
    return made, (tokens(batch, 16),)


@model("conformer", "Conformer")
def _conformer(batch: int) -> Made:
    made = of("conformer", "Conformer")(dim=32, depth=1, dim_head=16, heads=2, ff_mult=2, conv_kernel_size=7)
    return made, (tokens(batch),)


@model("halonet_pytorch", "HaloAttention")
def _halonet(batch: int) -> Made:
    made = of("halonet_pytorch", "HaloAttention")(dim=32, block_size=4, halo_size=2, dim_head=16, heads=2)
    return made, (images(batch, 8, 32),)


@model("bottleneck_transformer_pytorch", "BottleStack")
def _bottleneck(batch: int) -> Made:
    made = of("bottleneck_transformer_pytorch", "BottleStack")(
        dim=32, fmap_size=8, dim_out=48, proj_factor=4, downsample=True, heads=2, dim_head=16, num_layers=1
    )
    return made, (images(batch, 8, 32),)


@model("timesformer_pytorch", "TimeSformer")
def _timesformer(batch: int) -> Made:
    made = of("timesformer_pytorch", "TimeSformer")(
        dim=32, image_size=32, patch_size=16, num_frames=3, num_classes=5, depth=1, heads=2, dim_head=16
    )
    return made, (torch.randn(batch, 3, 3, 32, 32),)


@model("invariant_point_attention", "IPABlock")
def _invariant_points(batch: int) -> Made:
    made = of("invariant_point_attention", "IPABlock")(dim=32, heads=2, scalar_key_dim=8, require_pairwise_repr=False)
    rotations = torch.linalg.qr(torch.randn(batch, 9, 3, 3)).Q
    return Called(made, "rotations", "translations"), (tokens(batch, 9), rotations, torch.randn(batch, 9, 3))


class Called(nn.Module):
    """A module whose further arguments go by name."""

    def __init__(self, inner: nn.Module, *names: str) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.inner(x, **dict(zip(self.names, more, strict=True)))


@model("rtdl_revisiting_models", "FTTransformer")
def _ft(batch: int) -> Made:
    kind = of("rtdl_revisiting_models", "FTTransformer")
    made = kind(n_cont_features=4, cat_cardinalities=[3, 5], d_out=1, n_blocks=2, d_block=32, attention_n_heads=2,
                attention_dropout=0.0, ffn_d_hidden_multiplier=2.0, ffn_dropout=0.0, residual_dropout=0.0)  # fmt: skip
    return made, (torch.randn(batch, 4), torch.randint(0, 3, (batch, 2)))


@model("esm", "ESM2")
def _esm(batch: int) -> Made:
    made = of("esm", "model.esm2.ESM2")(num_layers=2, embed_dim=32, attention_heads=2, alphabet="ESM-1b")
    return made, (torch.randint(4, 24, (batch, 12)),)


@model("segment_anything", "ImageEncoderViT", "TwoWayTransformer")
def _segment_anything(batch: int, name: str) -> Made:
    if name == "ImageEncoderViT":
        made = of("segment_anything", "modeling.image_encoder.ImageEncoderViT")(
            img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16, use_rel_pos=True,
            window_size=3, global_attn_indexes=(1,),
        )  # fmt: skip
        return made, (images(batch, 64),)
    made = of("segment_anything", "modeling.transformer.TwoWayTransformer")(
        depth=2, embedding_dim=32, num_heads=2, mlp_dim=48
    )
    return made, (images(batch, 6, 32), images(batch, 6, 32), tokens(batch, 5))


@model("open_clip", "VisionTransformer", "TextTransformer", "CoCa text decoder")
def _open_clip(batch: int, name: str) -> Made:
    if name == "VisionTransformer":
        made = of("open_clip", "transformer.VisionTransformer")(
            image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16
        )
        return made, (images(batch),)
    if name == "TextTransformer":
        made = of("open_clip", "transformer.TextTransformer")(
            context_length=12, vocab_size=50, width=32, heads=2, layers=2, output_dim=16
        )
        return made, (ids(batch),)
    made = of("open_clip", "transformer.MultimodalTransformer")(
        width=32, context_length=12, heads=2, layers=1, output_dim=16
    )
    return made, (tokens(batch, 7), tokens(batch))


@model("segmentation_models_pytorch", "MAnet", "Segformer", "DPT")
def _segmentation(batch: int, name: str) -> Made:
    encoder = {"MAnet": "resnet18", "Segformer": "mit_b0", "DPT": "tu-vit_tiny_patch16_224"}[name]
    more = {"dynamic_img_size": True} if name == "DPT" else {}
    made = of("segmentation_models_pytorch", name)(encoder_name=encoder, encoder_weights=None, classes=2, **more)
    return made, (images(batch, 64),)


@model("kornia", "VisionTransformer", "MobileViT", "LoFTR")
def _kornia(batch: int, name: str) -> Made:
    if name == "VisionTransformer":
        made = of("kornia", "models.vit.VisionTransformer")(
            image_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=32
        )
        return made, (images(batch),)
    if name == "MobileViT":
        return of("kornia", "models.vit_mobile.MobileViT")(mode="xxs"), (images(batch, 64),)
    made = of("kornia", "feature.loftr.loftr_module.transformer.LoFTREncoderLayer")(32, 2, "full")
    return made, (tokens(batch), tokens(batch, 9))


@model("monai", "ViT", "SwinUNETR", "UNETR", "AttentionUnet", "DiffusionModelUNet")
def _monai(batch: int, name: str) -> Made:
    kind = of("monai", f"networks.nets.{name}")
    if name == "ViT":
        sizes: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 2}
        return kind(in_channels=1, img_size=(16, 16), patch_size=(4, 4), spatial_dims=2, **sizes), (
            images(batch, 16, 1),
        )
    if name == "SwinUNETR":
        made = kind(in_channels=1, out_channels=2, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), feature_size=12,
                    spatial_dims=2)  # fmt: skip
        return made, (images(batch, 64, 1),)
    if name == "UNETR":
        made = kind(in_channels=1, out_channels=2, img_size=(32, 32), feature_size=8, hidden_size=32, mlp_dim=48,
                    num_heads=2, spatial_dims=2)  # fmt: skip
        return made, (images(batch, 32, 1),)
    if name == "AttentionUnet":
        return kind(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16), strides=(2,)), (
            images(batch, 16, 1),
        )
    made = kind(spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=(1, 1), channels=(8, 16),
                attention_levels=(False, True), norm_num_groups=4, num_head_channels=8)  # fmt: skip
    return made, (images(batch, 16, 1), torch.arange(batch))


class Sample(nn.Module):
    """A model whose output has its result in a field, with its arguments in order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args, return_dict=False)[0]


@model("diffusers", "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "AutoencoderKL", "VQModel")
def _diffusers(batch: int, name: str) -> Made:
    kind = of("diffusers", name)
    blocks: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    if name == "UNet2DModel":
        made = kind(sample_size=16, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                    up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **blocks)  # fmt: skip
        return Sample(made), (images(batch, 16), torch.arange(batch))
    if name == "UNet2DConditionModel":
        made = kind(sample_size=16, cross_attention_dim=24, attention_head_dim=2,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks)  # fmt: skip
        return Sample(made), (images(batch, 16, 4), torch.arange(batch), tokens(batch, 7, 24))
    if name == "DiTTransformer2DModel":
        made = kind(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8)
        return Called(Sample(made).inner, "timestep", "class_labels", "return_dict"), (
            images(batch, 8, 4), torch.arange(batch), torch.arange(batch), False,
        )  # fmt: skip
    down = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return Sample(kind(**blocks, **down)), (images(batch, 16),)


@model("spandrel", "SwinIR", "HAT", "OmniSR")
def _spandrel(batch: int, name: str) -> Made:
    small: dict[str, Any] = {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "img_size": 16}
    if name == "SwinIR":
        return of("spandrel", "architectures.SwinIR.SwinIR")(**small), (images(batch, 16),)
    if name == "HAT":
        return of("spandrel", "architectures.HAT.HAT")(**small, compress_ratio=4, squeeze_factor=4), (
            images(batch, 16),
        )
    made = of("spandrel", "architectures.OmniSR.OmniSR")(num_feat=16, res_num=1, block_num=1, window_size=4)
    return made, (images(batch, 16),)


@model("point_transformer_pytorch", "PointTransformerLayer")
def _points(batch: int) -> Made:
    made = of("point_transformer_pytorch", "PointTransformerLayer")(
        dim=16, pos_mlp_hidden_dim=8, attn_mlp_hidden_mult=2
    )
    return made, (tokens(batch, 9, 16), torch.randn(batch, 9, 3))


@model("slot_attention", "SlotAttention")
def _slots(batch: int) -> Made:
    return of("slot_attention", "SlotAttention")(num_slots=3, dim=32, iters=2), (tokens(batch),)


@model("memory_efficient_attention_pytorch", "Attention")
def _memory_efficient(batch: int) -> Made:
    made = of("memory_efficient_attention_pytorch", "Attention")(
        dim=32, dim_head=16, heads=2, memory_efficient=True, q_bucket_size=6, k_bucket_size=6
    )
    return made, (tokens(batch),)


@model("clip", "AttentionPool2d")
def _clip(batch: int) -> Made:
    return of("clip", "model.AttentionPool2d")(4, 32, 2, 16), (images(batch, 4, 32),)


@model("egnn_pytorch", "GlobalLinearAttention")
def _egnn(batch: int) -> Made:
    made = of("egnn_pytorch", "egnn_pytorch.GlobalLinearAttention")(dim=32, heads=2, dim_head=16)
    return made, (tokens(batch), tokens(batch, 4))
