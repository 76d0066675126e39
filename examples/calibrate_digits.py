"""Chooses k for each attention of a trained model by measurement, and checks the promise on images it has not seen.

python examples/calibrate_digits.py          writes digits_policy.json and digits_policy.png
"""

import sys
from pathlib import Path

import digits
import torch
from torch import nn

import kvt_compile


def main(small: bool = False, folder: Path = Path()) -> None:
    model, data = digits.trained(epochs=3 if small else 15)
    sample = data.calibrate[0][: 40 if small else 300]

    # the cosine between the logits of the model with and without the policy is to be 0.99 on average
    policy = kvt_compile.calibrate(model, sample, cosine=0.99, batch_size=64, progress=not small)
    print(policy)
    policy.save(folder / "digits_policy.json")
    policy.plot().savefig(folder / "digits_policy.png", dpi=120)

    # a policy is a mapping from module path to k, and goes wherever `topk` goes
    again = kvt_compile.CalibratedPolicy.load(folder / "digits_policy.json")
    module = kvt_compile.rewrite(model, sample[:2], topk=again).module.eval()
    images, labels = data.test
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(module(images), model(images)).mean().item()
    print(f"on {len(images)} images that calibration has not seen: cosine {cosine:.4f}")
    dense, sparse = digits.accuracy(model, images, labels), digits.accuracy(module, images, labels)
    print(f"accuracy: dense {dense:.1%}, with the policy {sparse:.1%}")
    assert cosine >= 0.99


if __name__ == "__main__":
    main(small="--small" in sys.argv)
