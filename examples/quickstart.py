"""A vision transformer from timm -> the same model with k-NN attention: what is found, that it is right, what it costs.

    python examples/quickstart.py             looks, checks, then times (about two minutes on two CPU cores)
    python examples/quickstart.py --timings   only times
    python examples/quickstart.py --small     a model of two layers on small images, not timed (what the tests run)

The photographs ship with scikit-image.  No weights are downloaded: the model is random, which changes nothing about
what is found, whether it is right and how long it takes.
"""

import torchvision_cpu  # noqa: F401, I001 - first: lets torchvision import beside a CPU-only torch

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import skimage.data
import skimage.transform
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kvt_compile
from eager_kvt import patch
from kvt_compile.observe import SiteCall, observe

MODEL, RATIO = "vit_tiny_patch16_224", 0.5
console = Console(width=100, highlight=False)


def photographs(size: int = 224) -> Tensor:
    """Four photographs as the model wants them: [4, 3, size, size], normalised."""
    pictures = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket())
    squares = [skimage.transform.resize(p, (size, size), anti_aliasing=True) for p in pictures]
    return (torch.stack([torch.from_numpy(s).permute(2, 0, 1) for s in squares]).float() - 0.5) / 0.5


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def look(model: nn.Module, images: Tensor) -> None:
    console.rule("1. What is found")
    report = kvt_compile.explain(model, images, topk=RATIO)
    console.print(report)
    assert report.counts["sites"] == report.counts["fused"] == len(model.blocks)


def say(what: str, result: str) -> None:
    console.print(f"{what:<34}{result}")


def kept_keys(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Which keys each query keeps, [B, H, N, N] of every attention, while the model runs with k-NN attention."""
    kept: list[Tensor] = []

    def see(call: SiteCall) -> None:
        scores = torch.cat([part.t for part in call.scores()], 2)
        kept.append(scores >= scores.topk(call.topk, -1).values[..., -1:])

    observe(model, (images,), see, topk=RATIO)
    return kept


def rows_with_another_key(model: nn.Module, exact: nn.Module, images: Tensor) -> tuple[int, int]:
    """(rows whose kept keys are not those of the float64 model, all rows)"""
    pairs = zip(kept_keys(model, images), kept_keys(exact, images.double()), strict=True)
    differ = [(mine != theirs).any(-1) for mine, theirs in pairs]
    return sum(int(rows.sum()) for rows in differ), sum(rows.numel() for rows in differ)


@torch.no_grad()
def check_inference(model: nn.Module, images: Tensor) -> None:
    console.rule("2. Is it right?")
    exact = copy.deepcopy(model).double()
    dense, judge = model(images), exact(images.double())

    everything = {"topk": 1.0, "force_rewrite": True}
    assert kvt_compile.explain(model, images, **everything).counts["fused"] == len(
        model.blocks
    )  # the rewritten path really runs
    rounding = error(dense, judge)
    ours = error(torch.compile(model, backend="kvt", options=everything)(images), judge)
    say("k = N against dense", f"float32 error {ours:.1e}; the dense model's own is {rounding:.1e}")
    assert ours <= 3 * rounding, "keeping every key must be dense attention"

    # in float64 rounding moves no key across the threshold: the two must agree to the last digits
    theirs = patch(copy.deepcopy(exact), RATIO)(images.double())
    rewritten = kvt_compile.rewrite(exact, images.double(), topk=RATIO)
    assert rewritten.report.counts["fused"] == len(model.blocks)
    difference = error(rewritten.module(images.double()), theirs)
    say("k = N/2 against the authors' code", f"float64 difference {difference:.1e}")
    assert difference < 1e-10

    # said before the error is shown: where another key is kept, the row is off by that key's weight, not by rounding
    others, rows = rows_with_another_key(model, exact, images)
    say("k = N/2, in float32", f"{others} of {rows} rows keep another key than in float64")
    if others:
        say("", "(one that all but ties with the k-th: rounding decides, and")
        say("", "a whole key's weight moves), so the error is larger here:")
    compiled = torch.compile(model, backend="kvt", options={"topk": RATIO})(images)
    eager = patch(copy.deepcopy(model), RATIO)(images)
    say("", f"error {error(compiled, theirs):.1e}; the authors' {error(eager, theirs):.1e}")
    say("k = N/2 against dense", f"differs by {error(compiled, dense):.1e}: another model, on purpose")


def check_training(model: nn.Module, images: Tensor) -> None:
    console.rule("3. One training step (in float64, where both must agree)")
    labels = torch.arange(len(images), device=images.device)
    losses, gradients = [], []
    for name in ("kvt", "authors"):
        trained = copy.deepcopy(model).double().train()
        run = torch.compile(trained, backend="kvt", options={"topk": RATIO}) if name == "kvt" else patch(trained, RATIO)
        loss = nn.functional.cross_entropy(run(images.double()), labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained.parameters()]))
    say("loss", f"{losses[0]:.12f}; the authors' code {losses[1]:.12f}")
    say("gradients of all parameters", f"differ by {error(*gradients):.1e} of the largest")
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert abs(losses[0] - losses[1]) < 1e-10
    assert error(*gradients) < 1e-10


def time_all(model: nn.Module, images: Tensor, rounds: int = 15, seconds: float = 30.0) -> None:
    console.rule("4. What it costs")
    contenders: dict[str, Callable[[Tensor], Tensor]] = {
        "dense, eager (scaled_dot_product_attention)": model,
        "dense, torch.compile": torch.compile(model),
        "k = N/2, the authors' eager code": patch(copy.deepcopy(model), RATIO),
        'k = N/2, torch.compile(backend="kvt")': torch.compile(model, backend="kvt", options={"topk": RATIO}),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    first = next(iter(times))
    with torch.no_grad():
        for run in contenders.values():
            run(images)  # compiles
        begin = time.perf_counter()
        while len(times[first]) < rounds and (len(times[first]) < 3 or time.perf_counter() - begin < seconds):
            # interleaved: what slows the machine for a while slows all of them
            for name, run in contenders.items():
                start = time.perf_counter()
                run(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    table = Table(
        "inference", title=f"{MODEL}, {len(images)} images, median of {len(times[first])}", title_justify="left"
    )
    table.add_column("ms", justify="right")
    table.add_column("relative", justify="right")
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:.1f}", f"{median / medians[first]:.2f}")
    console.print(table)


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timings", action="store_true", help="only the timings")
    parser.add_argument("--small", action="store_true", help="two layers, small images, no timings")
    arguments = parser.parse_args(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    size = {"depth": 2, "img_size": 64} if arguments.small else {}
    model = timm.create_model(MODEL, **size).eval().to(device)
    images = photographs(size.get("img_size", 224)).to(device)
    if not arguments.timings:
        look(model, images)
        check_inference(model, images)
    if arguments.small:
        return
    if not arguments.timings:
        check_training(model, images)
    time_all(model, images)


if __name__ == "__main__":
    main()
