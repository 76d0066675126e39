"""A high-resolution vision transformer made faster within an error budget, on photographs.

    python examples/faster_vit.py             768 x 768 pixels, 2,304 tokens (some minutes of two CPU cores)
    python examples/faster_vit.py --small     a small model on small images (what the tests run)

At 2,304 tokens attention is much of the work.  `calibrate(select="auto")` tries windows, halos and regions at every
attention, measures what each does to the outputs and how long its kernel takes on this machine, and takes the cheapest
policy that keeps the promise: a cosine of 0.99 between the outputs, on images it did not measure on.

The photographs ship with scikit-image.  No weights are downloaded: the model is random.  That changes nothing about how
long a selection takes, and everything about which ones the budget allows: attention of random weights spreads evenly
over all keys, and what it adds to a token is small.  Put your own model, weights and images here to learn about them.
"""

import torchvision_cpu  # noqa: F401, I001 - first: lets torchvision import beside a CPU-only torch

import sys

import skimage.data
import skimage.transform
import timm
import torch
from torch import Tensor, nn

import kvt_compile

COSINE = 0.99


def crops(count: int, size: int, seed: int) -> Tensor:
    """`[count, 3, size, size]`: random squares of four photographs, some of them mirrored, as the model wants them."""
    pictures = (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.chelsea())
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        picture = torch.from_numpy(pictures[n % len(pictures)]).permute(2, 0, 1)
        side = int(min(picture.shape[1:]) * (0.7 + 0.3 * torch.rand((), generator=generator)))
        top, left = (int(torch.randint(have - side + 1, (), generator=generator)) for have in picture.shape[1:])
        square = picture[:, top : top + side, left : left + side]
        square = square.flip(2) if torch.rand((), generator=generator) < 0.5 else square
        scaled = skimage.transform.resize(square.permute(1, 2, 0).numpy(), (size, size), anti_aliasing=True)
        found.append((torch.from_numpy(scaled).permute(2, 0, 1).float() - 0.5) / 0.5)
    return torch.stack(found)


def main(small: bool = False) -> None:
    torch.manual_seed(0)
    size, depth, sample, batch = (96, 1, 8, 4) if small else (768, 4, 16, 2)
    name = "vit_tiny_patch16_224" if small else "vit_small_patch16_224"
    model = timm.create_model(name, img_size=size, depth=depth, num_classes=10).eval()

    policy = kvt_compile.calibrate(
        model, crops(sample, size, seed=1), cosine=COSINE, select="auto", batch_size=batch, progress=not small
    )
    print(policy)

    # a policy is a mapping from module path to a selection, and goes wherever `select` goes
    images = crops(4, size, seed=2)
    result = kvt_compile.rewrite(model, images, select=policy)
    print(result.report)
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(result.module(images), model(images)).mean().item()
    print(f"on {len(images)} images that calibration has not seen: cosine {cosine:.4f} (promised: {COSINE})")
    assert policy.met
    assert cosine >= COSINE
    assert policy.speed is not None
    if not small:
        print(
            f"the model is {policy.speed.measured:.2f} times as fast as it was, {policy.speed.predicted:.2f} predicted"
        )
        # and compiled, for use: Inductor does the rest of the model
        fast = torch.compile(model, backend="kvt", options={"select": policy})
        with torch.no_grad():
            torch.testing.assert_close(fast(images), result.module(images), rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(small="--small" in sys.argv)
