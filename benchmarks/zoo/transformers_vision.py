"""transformers: vision, vision-language and audio types, tiny."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

from benchmarks.zoo.tiny import Tiny, both, ids, images, padding, tokens

VIT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
VIDEO = VIT | {"image_size": 32, "patch_size": 8, "num_frames": 4}
WINDOWS: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
PYRAMID: dict[str, Any] = {
    "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
}  # fmt: skip
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DETR: dict[str, Any] = {
    "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_queries": 10,
}  # fmt: skip
NO_TIMM: dict[str, Any] = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "eos_token_id": 99, "pad_token_id": 0, "bos_token_id": 98,
}  # fmt: skip


def resnet(*stages: int) -> Any:
    return t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=[f"stage{n}" for n in stages]
    )


def swin(*stages: int, depths: tuple[int, ...] = (1, 1, 1, 1), cls: Any = None) -> Any:
    return (cls or t.SwinConfig)(
        image_size=64, embed_dim=16, depths=list(depths), num_heads=[1, 2, 4, 4], window_size=4,
        out_features=[f"stage{n}" for n in stages],
    )  # fmt: skip


def detr(cls: Any, *stages: int, **more: Any) -> Any:
    settings = DETR | NO_TIMM | {"encoder_layers": 2, "decoder_layers": 2, "backbone_config": resnet(*stages)} | more
    return cls(**settings)


def _plain(model: str, **more: Any) -> Tiny:
    config = getattr(t, model.removesuffix("Model").removesuffix("ForPreTraining") + "Config")
    return Tiny(model, lambda: config(**VIT | more), images())


def _sam_parts() -> Any:
    vision = t.SamVisionConfig(
        hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16,
        mlp_dim=64, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
    )  # fmt: skip
    prompt = t.SamPromptEncoderConfig(
        hidden_size=32, image_size=64, patch_size=16, image_embedding_size=4, mask_input_channels=4
    )
    decoder = t.SamMaskDecoderConfig(**SMALL, mlp_dim=64, iou_head_hidden_dim=32)
    return t.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def _maskformer() -> Any:
    decoder = t.DetrConfig(
        **DETR | NO_TIMM, encoder_layers=1, decoder_layers=2, backbone_config=t.ResNetConfig(depths=[1, 1, 1, 1])
    )
    backbone = swin(1, 2, 3, 4, depths=(1, 1, 2, 1), cls=t.MaskFormerSwinConfig)
    return t.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone, decoder_config=decoder
    )


def _grounding_dino() -> Any:
    text = t.BertConfig(
        **SMALL | {"num_hidden_layers": 1}, vocab_size=120, intermediate_size=64, max_position_embeddings=64
    )
    return t.GroundingDinoConfig(
        **DETR, encoder_layers=1, decoder_layers=1, num_feature_levels=4, max_text_len=16,
        backbone_config=swin(2, 3, 4), text_config=text,
    )  # fmt: skip


def _qwen_vision() -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    return Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, spatial_merge_size=2,
        temporal_patch_size=2, window_size=32, out_hidden_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip


VISION: dict[str, Tiny] = {
    "vit": _plain("ViTModel"),
    "deit": _plain("DeiTModel"),
    "beit": _plain("BeitModel", use_relative_position_bias=True),
    "beit_sharedrel": _plain("BeitModel", use_shared_relative_position_bias=True),
    "data2vec_vision": _plain("Data2VecVisionModel", use_relative_position_bias=True),
    "dinov2": _plain("Dinov2Model"),
    "dinov2_reg": _plain("Dinov2WithRegistersModel"),
    "dinov3_vit": _plain("DINOv3ViTModel"),
    "ijepa": _plain("IJepaModel"),
    "vit_msn": _plain("ViTMSNModel"),
    "vit_mae": _plain(
        "ViTMAEForPreTraining", decoder_hidden_size=32, decoder_num_attention_heads=4, decoder_num_hidden_layers=2,
        decoder_intermediate_size=64,
    ),
    "yolos": _plain("YolosModel", image_size=[64, 64], num_detection_tokens=10),
    "clip_vision": _plain("CLIPVisionModel"),
    "siglip_vision": _plain("SiglipVisionModel"),
    "blip_vision": _plain("BlipVisionModel"),
    "aimv2_vision": _plain("Aimv2VisionModel"),
    "vitdet": _plain(
        "VitDetModel", use_relative_position_embeddings=True, window_block_indices=[0], window_size=2,
        residual_block_indices=[],
    ),
    "vit_bool": Tiny(
        "ViTForMaskedImageModeling", lambda: t.ViTConfig(**VIT, encoder_stride=16),
        both(images(), lambda batch: {"bool_masked_pos": torch.randint(0, 2, (batch, 16)).bool()}),
    ),
    "swin": Tiny("SwinModel", lambda: t.SwinConfig(**WINDOWS), images()),
    "swinv2": Tiny("Swinv2Model", lambda: t.Swinv2Config(**WINDOWS), images()),
    "donut_swin": Tiny("DonutSwinModel", lambda: t.DonutSwinConfig(**WINDOWS), images()),
    "swin2sr": Tiny(
        "Swin2SRModel",
        lambda: t.Swin2SRConfig(image_size=32, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        images(32),
    ),
    "segformer": Tiny("SegformerModel", lambda: t.SegformerConfig(**PYRAMID), images()),
    "glpn": Tiny("GLPNModel", lambda: t.GLPNConfig(**PYRAMID), images()),
    "pvt": Tiny("PvtModel", lambda: t.PvtConfig(image_size=64, **PYRAMID), images()),
    "pvt_v2": Tiny("PvtV2Model", lambda: t.PvtV2Config(image_size=64, **PYRAMID), images()),
    "cvt": Tiny(
        "CvtModel", lambda: t.CvtConfig(embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3]), images()
    ),
    "levit": Tiny(
        "LevitModel",
        lambda: t.LevitConfig(
            image_size=128, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        images(128),
    ),
    "mobilevit": Tiny(
        "MobileViTModel",
        lambda: t.MobileViTConfig(
            image_size=128, hidden_sizes=[32, 40, 48], neck_hidden_sizes=[8, 16, 16, 32, 32, 40, 64]
        ),
        images(128),
    ),
    "mobilevitv2": Tiny("MobileViTV2Model", lambda: t.MobileViTV2Config(image_size=64, width_multiplier=0.5), images()),
    "hiera": Tiny(
        "HieraModel",
        lambda: t.HieraConfig(image_size=[64, 64], embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]), images(),
    ),
    "seggpt": Tiny(
        "SegGptModel",
        lambda: t.SegGptConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_dim=64, image_size=[64, 32], patch_size=8,
            decoder_hidden_size=16, intermediate_hidden_state_indices=[0, 1, 2], pretrain_image_size=32, merge_index=0,
        ),
        both(images(32), images(32, name="prompt_pixel_values"), images(32, name="prompt_masks")),
    ),
    "sam_vision": Tiny(
        "SamVisionModel",
        lambda: t.SamVisionConfig(
            **SMALL, output_channels=16, image_size=64, patch_size=8, mlp_dim=64, window_size=4, global_attn_indexes=[1]
        ),
        images(),
    ),
    "sam": Tiny(
        "SamModel", _sam_parts, both(images(), lambda batch: {"input_points": torch.rand(batch, 1, 2, 2) * 60})
    ),
    "sam2_hiera": Tiny(
        "Sam2HieraDetModel",
        lambda: t.Sam2HieraDetConfig(
            hidden_size=16, num_attention_heads=1, image_size=[128, 128], blocks_per_stage=[1, 2, 2, 1],
            embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
            window_size_per_stage=[8, 4, 4, 4], global_attention_blocks=[3],
            window_positional_embedding_background_size=[4, 4],
        ),
        images(128),
    ),
    "dpt": Tiny(
        "DPTForDepthEstimation",
        lambda: t.DPTConfig(
            **VIT | {"num_hidden_layers": 4}, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
        ),
        images(),
    ),
    "detr": Tiny("DetrModel", lambda: detr(t.DetrConfig, 4), images()),
    "conditional_detr": Tiny("ConditionalDetrModel", lambda: detr(t.ConditionalDetrConfig, 4), images()),
    "deformable_detr": Tiny(
        "DeformableDetrModel", lambda: detr(t.DeformableDetrConfig, 2, 3, 4, num_feature_levels=3), images()
    ),
    "rt_detr": Tiny(
        "RTDetrModel",
        lambda: t.RTDetrConfig(
            **DETR | NO_TIMM, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 32], decoder_layers=2,
            num_denoising=0, decoder_in_channels=[32, 32, 32],
            backbone_config=t.RTDetrResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"],
            ),
        ),
        images(),
    ),
    "maskformer": Tiny("MaskFormerModel", _maskformer, images()),
    "mask2former": Tiny(
        "Mask2FormerModel",
        lambda: t.Mask2FormerConfig(
            backbone_config=swin(1, 2, 3, 4, depths=(1, 1, 2, 1)), feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=64, encoder_layers=2, decoder_layers=3, num_attention_heads=4, dim_feedforward=64,
            num_queries=10,
        ),
        images(),
    ),
    "grounding_dino": Tiny(
        "GroundingDinoModel", _grounding_dino,
        both(images(), lambda batch: {
            "input_ids": ids(batch, 16), "attention_mask": torch.ones(batch, 16, dtype=torch.long)
        }),
    ),
    "videomae": Tiny("VideoMAEModel", lambda: t.VideoMAEConfig(**VIDEO), images(32, frames=4)),
    "timesformer": Tiny("TimesformerModel", lambda: t.TimesformerConfig(**VIDEO), images(32, frames=4)),
    "vivit": Tiny(
        "VivitModel",
        lambda: t.VivitConfig(
            **SMALL | {"hidden_size": 64}, intermediate_size=128, image_size=32, num_frames=4, tubelet_size=[2, 8, 8]
        ),
        images(32, frames=4),
    ),
    "vjepa2": Tiny(
        "VJEPA2Model",
        lambda: t.VJEPA2Config(
            crop_size=32, patch_size=8, frames_per_clip=4, tubelet_size=2, hidden_size=64, num_attention_heads=4,
            num_hidden_layers=2, pred_hidden_size=48, pred_num_attention_heads=4, pred_num_hidden_layers=2, mlp_ratio=2,
        ),
        images(32, frames=4, name="pixel_values_videos"),
    ),
    "clip": Tiny(
        "CLIPModel",
        lambda: t.CLIPConfig(
            text_config=CLIP_TEXT | {"max_position_embeddings": 24}, vision_config=VIT, projection_dim=32
        ),
        both(images(), tokens()),
    ),
    "owlvit": Tiny(
        "OwlViTModel",
        lambda: t.OwlViTConfig(
            text_config=CLIP_TEXT | {"max_position_embeddings": 16}, vision_config=VIT, projection_dim=32
        ),
        both(images(), tokens(16)),
    ),
    "groupvit": Tiny(
        "GroupViTVisionModel",
        lambda: t.GroupViTVisionConfig(
            hidden_size=32, depths=[2, 2, 1], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0],
            num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16, num_hidden_layers=5,
        ),
        images(),
    ),
    "blip2_qformer": Tiny(
        "Blip2QFormerModel",
        lambda: t.Blip2QFormerConfig(**SMALL, intermediate_size=64, encoder_hidden_size=48),
        lambda batch: {"query_embeds": torch.randn(batch, 8, 32), "encoder_hidden_states": torch.randn(batch, 20, 48)},
    ),
    "perceiver": Tiny(
        "PerceiverModel",
        lambda: t.PerceiverConfig(
            num_latents=8, d_latents=32, d_model=24, num_blocks=1, num_self_attends_per_block=2,
            num_self_attention_heads=4, num_cross_attention_heads=4,
        ),
        lambda batch: {"inputs": torch.randn(batch, 20, 24)},
    ),
    "pixtral_vision": Tiny(
        "PixtralVisionModel", lambda: t.PixtralVisionConfig(**VIT),
        both(images(), lambda batch: {"image_sizes": [(64, 64)] * batch}),
    ),
    "qwen2_5_vl_vision": Tiny(
        "qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel", _qwen_vision,
        lambda batch: {"hidden_states": torch.randn(64, 3 * 2 * 8 * 8), "grid_thw": torch.tensor([[1, 8, 8]])},
    ),
    "layoutlmv3": Tiny(
        "LayoutLMv3Model",
        lambda: t.LayoutLMv3Config(
            vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, coordinate_size=8, shape_size=8, input_size=64, patch_size=16, pad_token_id=1,
        ),
        both(images(), lambda batch: {
            "input_ids": ids(batch, 24), "attention_mask": padding(batch, 24),
            "bbox": torch.randint(0, 500, (batch, 24, 4)).sort(-1).values,
        }),
    ),
    "focalnet": Tiny(
        "FocalNetModel",
        lambda: t.FocalNetConfig(
            image_size=64, embed_dim=16, hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]
        ),
        images(),
    ),
    "poolformer": Tiny(
        "PoolFormerModel", lambda: t.PoolFormerConfig(hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1]), images()
    ),
    "ast_audio": Tiny(
        "ASTModel",
        lambda: t.ASTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_length=64,
            num_mel_bins=32, patch_size=16,
        ),
        lambda batch: {"input_values": torch.randn(batch, 64, 32)},
    ),
    "whisper_enc": Tiny(
        "whisper.modeling_whisper:WhisperEncoder",
        lambda: t.WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=16,
            max_source_positions=32, decoder_layers=1, decoder_attention_heads=4,
        ),
        lambda batch: {"input_features": torch.randn(batch, 16, 64)},
    ),
}  # fmt: skip
"""Type -> model.  Sizes are the smallest that keep every kind of attention the type has."""
