"""Any model of timm: what is found in it, that all keys give the dense model, one inference and one training step.

python examples/any_timm_model.py                                   swin_tiny_patch4_window7_224
python examples/any_timm_model.py deit_tiny_patch16_224 --topk 0.3
"""

import torchvision_cpu  # noqa: F401, I001 - first: lets torchvision import beside a CPU-only torch

import argparse
import time

import timm
import torch
from torch import nn

import kvt_compile


def main(name: str = "swin_tiny_patch4_window7_224", topk: float = 0.5, small: bool = False) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **({"img_size": 64, "depth": 2} if small else {})).eval()
    images = torch.randn(4, *timm.data.resolve_model_data_config(model)["input_size"])
    if small:
        images = images[..., :64, :64]

    report = kvt_compile.explain(model, images, topk=topk)
    print(report)
    assert report.counts["fused"] + report.counts["scores-kept"] > 0, f"no token attention in {name}"

    # the safety net: with every key the rewritten model is the dense one
    everything = kvt_compile.rewrite(model, images, topk=1.0, force_rewrite=True).module
    with torch.no_grad():
        dense = model(images)
        difference = (everything(images) - dense).abs().max() / dense.abs().max()
    print(f"all keys against dense: differs by {difference:.1e} of the largest value")
    assert difference < 1e-4

    compiled = torch.compile(model, backend="kvt", options={"topk": topk})
    with torch.no_grad():
        compiled(images)
        start = time.perf_counter()
        out = compiled(images)
    print(
        f"inference with {topk:.0%} of the keys: {1e3 * (time.perf_counter() - start):.0f} ms for {len(images)} images"
    )
    assert out.shape == dense.shape
    if small:
        return
    model.train()
    labels = torch.zeros(len(images), dtype=torch.long)
    loss = nn.functional.cross_entropy(compiled(images), labels)
    loss.backward()
    print(f"one training step: loss {loss.item():.3f}, every gradient finite")
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--topk", type=float, default=0.5)
    main(**vars(parser.parse_args()))
