"""Two classes of training shapes -> block sizes measured on this GPU -> tuned.json, after every kernel.

tuned.json is what `kvt cache export` writes, so `kvt cache import` reads it on another machine with such a GPU, and the
steps that follow use the results.  On the stub nothing is measured: every kernel's first candidates are launched, or
all of them for a cache to carry.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.place import NoClock, Place, place
from benchmarks.gpu.step import Context
from kvt_compile.kernels import tune
from kvt_compile.kernels.cache_folder import cache_folder
from kvt_compile.kernels.triton import candidates as tables
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Launch
from kvt_compile.kernels.tune import transfer
from kvt_compile.kernels.tune.progress import Step as Progress
from kvt_compile.kernels.tune.store import Store, read_into
from kvt_compile.kernels.tune.tuner import Effort
from kvt_compile.tuning import Shape, tune_shape

SHAPES = {
    "ViT-B at 224": Shape(128, 12, 197, 197, 64, torch.bfloat16, 0.5),
    "N = 1024": Shape(32, 12, 1024, 1024, 64, torch.bfloat16, 0.5),
}
FEW = 2
"""Candidates of a kernel that a dry run launches."""


def run(context: Context) -> None:
    import_results(context)
    if context.dry:
        return dry(context)
    store = Store(cache_folder() / "tune")
    done: list[str] = []

    def show(step: Progress) -> None:
        if step.winner is not None:
            done.append(f"{step.key.part} {step.key.shape.queries}")
            what = f"{step.key.part} {step.key.shape}: {dict(step.winner)}"
            context.log(f"{what}, {step.milliseconds:.4f} ms, of {step.total} tried")
            transfer.write(context.folder.path / "tuned.json", (entry for _, entry in store.entries()))
            context.say(f"{len(done)} kernels tuned")

    with place(False) as here:
        for name, shape in SHAPES.items():
            context.log(name)
            tune_shape(shape, here.device, backward=True, progress=show)
    entries = [entry for _, entry in store.entries()]
    transfer.write(context.folder.path / "tuned.json", entries)
    context.say(f"{len(done)} kernels tuned now, {len(entries)} results kept")


def import_results(context: Context) -> int:
    """Makes the results of an earlier step or run known on this machine; how many there are."""
    path = context.folder.path / "tuned.json"
    if not path.exists():
        return 0
    try:
        return sum(read_into(path, Store(cache_folder() / "tune")))
    except (transfer.BadFile, OSError) as error:
        context.log(f"results of an earlier run are not used: {error}")
        return 0


def dry(context: Context) -> None:
    """Through the tuner, with a clock that says nothing and a store that nobody reads."""
    with place(True) as here, tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), Path(folder))
        launched = {name: launch_candidates(shape, here, context, store) for name, shape in SHAPES.items()}
    transfer.write(context.folder.path / "tuned.json", [])
    context.say(f"{sum(launched.values())} candidates launched, none timed")
    sys.exit(0 if all(launched.values()) else "no candidate could be launched")


def launch_candidates(shape: Shape, here: Place, context: Context, store: Store) -> int:
    """Every kernel of a shape, forward and backward, with its candidates; how many ran."""
    effort = Effort(seconds=0.0, first_turns=1, turns=1)
    tuner = tune.Tuner(store, progress=lambda step: None, effort=effort, capturing=lambda: False)

    def choose(launch: Launch) -> Blocks:
        every = tables.candidates(launch.spec, launch.part, launch.queries, launch.keys)
        some = every if context.everything else every[:FEW]
        sizes = tune.ShapeClass.of(launch.queries, launch.keys, launch.heads, launch.topk)
        key = tune.Key.on(launch.device, kernel="dry", part=launch.part, triton="dry", shape=sizes)
        return tuner.pick(key, some, launch.first, launch.run, "on", NoClock())

    with here.stub.registered(choose):
        tune_shape(shape, here.device, backward=True, progress=lambda step: None)
    count = 0
    for _, entry in store.entries():
        count += len(entry.measured)
        for dropped in entry.dropped:
            context.log(f"{entry.key.part}: {dict(dropped.candidate)} dropped: {dropped.reason}")
    return count
