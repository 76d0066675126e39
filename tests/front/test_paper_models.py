"""The KVT paper's eleven architectures by name (arXiv 2106.00515, table 2): every attention is found, meaning kept.

Real depth, small images, random weights; what no package ships is in paper_models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from paper_models import SoViT, T2TViT
from torch import nn

from benchmarks.zoo.catalogue import Entry, unfold
from benchmarks.zoo.judge import judge
from benchmarks.zoo.models import Built, opened


@dataclass(frozen=True)
class Paper:
    """A model of the paper; `sites` and `others` are module paths, folded."""

    id: str
    make: Callable[[], nn.Module]
    sites: list[str]
    others: list[str] = field(default_factory=list)
    image: int = 64

    def __str__(self) -> str:
        return self.id


def timm(name: str, image: int = 64) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm import create_model

        model: nn.Module = create_model(name, img_size=image, num_classes=10)
        return model

    return make


def cvt() -> nn.Module:
    from transformers import CvtConfig, CvtModel

    return CvtModel(CvtConfig())  # the defaults are CvT-13


def stages(pattern: str, *depths: int) -> list[str]:
    return [pattern.format(stage, f"{{0..{depth - 1}}}" if depth > 1 else 0) for stage, depth in enumerate(depths)]


PAPER = [
    Paper("DeiT-Tiny", timm("deit_tiny_patch16_224"), ["blocks.{0..11}.attn"]),
    Paper("DeiT-Small", timm("deit_small_patch16_224"), ["blocks.{0..11}.attn"]),
    Paper("So-ViT", SoViT, ["blocks.{0..1}.attn"]),
    Paper("Visformer-Tiny", timm("visformer_tiny"), ["stage2.{0..3}.attn", "stage3.{0..3}.attn"]),
    Paper("CvT-13", cvt, stages("encoder.stages.{}.layers.{}.attention.attention", 1, 2, 10)),
    Paper("TNT-Small", timm("tnt_s_legacy_patch16_224"), ["blocks.{0..11}.attn_in", "blocks.{0..11}.attn_out"]),
    # outlook attention takes its weights from a linear layer: left alone, with a reason
    Paper(
        "VOLO-D1", timm("volo_d1_384"),
        ["network.2.{0..3}.attn", "network.3.{0..7}.attn", "network.4.{0..1}.attn", "post_network.{0..1}.attn"],
        others=["network.0.{0..3}.attn"],
    ),
    Paper(
        "VOLO-D3", timm("volo_d3_448"),
        ["network.2.{0..7}.attn", "network.3.{0..15}.attn", "network.4.{0..3}.attn", "post_network.{0..1}.attn"],
        others=["network.0.{0..7}.attn"],
    ),
    Paper(
        "Swin-Tiny",
        timm("swin_tiny_patch4_window7_224", 112),
        stages("layers.{}.blocks.{}.attn", 2, 2, 6, 2),
        image=112,
    ),
    Paper("T2T-ViT-t", T2TViT, ["attention1.attn", "attention2.attn", "blocks.{0..1}.attn"]),
    Paper("DINO-Small", timm("vit_small_patch16_224"), ["blocks.{0..11}.attn"]),
    Paper("Twins-SVT-Base", timm("twins_svt_base"), stages("blocks.{}.{}.attn", 2, 2, 18, 2)),
    Paper("PiT-Base", timm("pit_b_224"), stages("transformers.{}.blocks.{}.attn", 3, 6, 4)),
]  # fmt: skip


@pytest.mark.parametrize("paper", PAPER, ids=str)
def test_every_attention_of_the_paper_is_fused(paper: Paper) -> None:
    def make(entry: Entry) -> Built:
        torch.manual_seed(0)
        return opened(paper.make(), (torch.randn(2, 3, paper.image, paper.image),), {})

    entry = Entry("paper", paper.id, "", "", 2, paper.image, {"token": unfold(paper.sites)}, unfold(paper.others))
    verdict = judge(entry, make=make)
    assert verdict.problems == []
    assert (verdict.fused, verdict.kept, verdict.dense) == (entry.count, 0, 0)
    softmaxes = [name for name, reason in verdict.refused if "s / 16" not in reason]  # which is So-ViT's covariance
    assert len(softmaxes) == len(entry.others)


def test_cross_covariance_is_named_and_is_not_attention() -> None:
    """So-ViT's classifier multiplies two projections of the tokens, with no softmax: named, left alone."""
    from paper_models import CrossCovariance

    from kvt_compile import explain

    report = explain(CrossCovariance(16, 2, 4), torch.randn(2, 9, 16))
    assert report.counts["sites"] == 0
    (refusal,) = report.refusals
    assert "between the products stands s / " in refusal.reason
    assert "normalises its rows" in refusal.reason


@pytest.mark.parametrize("model", [SoViT, T2TViT], ids=lambda m: m.__name__)
def test_gradients_of_the_models_written_here(model: Callable[[], nn.Module]) -> None:
    def make(entry: Entry) -> Built:
        torch.manual_seed(0)
        return opened(model(), (torch.randn(2, 3, 64, 64),), {})

    sites = {
        "token": ["blocks.0.attn", "blocks.1.attn"]
        + (["attention1.attn", "attention2.attn"] if model is T2TViT else [])
    }
    verdict = judge(Entry("paper", model.__name__, "", "", 2, 64, sites, gradients=True), make=make)
    assert verdict.checks.keys() == {"k = N", "k < N", "gradients"}
    assert verdict.problems == []
