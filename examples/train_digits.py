"""Fine-tunes a small vision transformer on handwritten digits, dense and with k-NN attention, and draws how both learn.

    python examples/train_digits.py             three seeds, about two minutes; writes digits_learning.png
    python examples/train_digits.py --small     one seed and two epochs

A dense model is trained for 15 epochs.  Three copies of it are then trained for 15 epochs more: dense as before, with
half of the keys, and with a quarter of them.  Epoch 0 of the curves is the copy before any further training: what
switching k-NN attention on costs a model that was trained without it.
"""

import copy
import statistics
import sys
from pathlib import Path

import digits
import torch
from matplotlib.figure import Figure

import kvt_compile

SHARES = {"dense": 1.0, "k = N/2": 0.5, "k = N/4": 0.25}
Curves = dict[str, list[list[float]]]
"""name -> for each seed the test accuracy after 0, 1, 2, ... epochs of fine-tuning."""


def fine_tune(dense: digits.DigitsViT, data: digits.Digits, share: float, epochs: int) -> list[float]:
    """Test accuracy before and after each epoch, for a copy of the model that keeps this share of the keys."""
    model = copy.deepcopy(dense)
    # the rewritten module shares its parameters with the copy and trains in eager code, as any module does
    module = kvt_compile.rewrite(model, data.train[0][:2], topk=share, force_rewrite=True).module
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)
    curve = [digits.accuracy(module, *data.test)]
    for _ in range(epochs):
        digits.train_epoch(module, optimiser, *data.train)
        curve.append(digits.accuracy(module, *data.test))
    return curve


def run(seeds: int, epochs: int) -> Curves:
    curves: Curves = {name: [] for name in SHARES}
    for seed in range(seeds):
        dense, data = digits.trained(epochs, seed)
        for name, share in SHARES.items():
            torch.manual_seed(seed)  # the same batches for all three
            curves[name].append(fine_tune(dense, data, share, epochs))
    return curves


def draw(curves: Curves, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), color in zip(curves.items(), ("0.3", "tab:blue", "tab:orange"), strict=True):
        epochs = range(len(runs[0]))
        axes.plot(epochs, [statistics.mean(values) for values in zip(*runs, strict=True)], color=color, label=name)
        low, high = ([choose(values) for values in zip(*runs, strict=True)] for choose in (min, max))
        axes.fill_between(epochs, low, high, color=color, alpha=0.15)
    axes.set(xlabel="epochs of fine-tuning", ylabel="test accuracy", title=f"digits, {len(runs)} seeds: mean and range")
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def main(small: bool = False, out: Path = Path("digits_learning.png")) -> Curves:
    curves = run(seeds=1, epochs=2) if small else run(seeds=3, epochs=15)
    draw(curves, out)
    print(f"{'':<10}{'switched on':>14}{'fine-tuned':>14}{'range of seeds':>20}")
    for name, runs in curves.items():
        first, last = [curve[0] for curve in runs], [curve[-1] for curve in runs]
        spread = f"{min(last):.1%} to {max(last):.1%}"
        print(f"{name:<10}{statistics.mean(first):>14.1%}{statistics.mean(last):>14.1%}{spread:>20}")
    print(f"the curves are in {out}")
    return curves


if __name__ == "__main__":
    main(small="--small" in sys.argv)
