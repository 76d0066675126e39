"""ViT-B/16 at 224, bfloat16 autocast: a training step, then inference, each against dense torch.compile ->
speed.json."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from benchmarks._vit import VisionTransformer
from benchmarks.gpu.bars import MODEL
from benchmarks.gpu.place import Place, place
from benchmarks.gpu.plan import reason_of
from benchmarks.gpu.speed import NOT_TIMED
from benchmarks.gpu.step import Context
from benchmarks.gpu.tuning import import_results
from kvt_compile.kernels.tune.timing import Run, medians

BATCH = 128
TOPK = 0.5


def run(context: Context) -> None:
    import_results(context)
    with place(context.dry) as here:
        for train in (True, False):
            name = f"training step, batch {BATCH}" if train else f"inference, batch {BATCH}"
            models = context.load("speed.json").get("models", {})
            if name in models:
                continue
            record = compare(train, here)
            context.save("speed.json", models=models | {name: record})
            context.log(f"{name}: {record}")
            context.say(f"{name}: {record['ratios'].get(MODEL, record.get('dropped'))}")
            context.survive()
            if context.dry:
                break
    failed = [
        name
        for name, m in context.load("speed.json").get("models", {}).items()
        if m.get("dropped", NOT_TIMED) != NOT_TIMED
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def compare(train: bool, here: Place) -> dict[str, Any]:
    """Milliseconds of both, their ratio, or why there are none."""
    record: dict[str, Any] = {"train": train, "ms": {}, "ratios": {}}
    try:
        torch.compiler.reset()
        runs: list[Run] = []
        ours: dict[str, Any] = {"topk": TOPK, "autotune": "cached"}
        if not here.real:  # Inductor would write C++ here, and tell nothing about a GPU
            ours["then"] = "aot_eager"
        for backend, options in (("kvt", ours), ("inductor", None)):
            net = VisionTransformer() if here.real else VisionTransformer(depth=1)
            compiled = torch.compile(net, backend=backend, options=options)
            runs.append(model_run(here.device, BATCH if here.real else 2, train, compiled, net))
        if not here.real:
            runs[0]()
            return record | {"dropped": NOT_TIMED, "launches": here.launches}
        ms = dict(zip(("ours", "dense"), medians(runs, here.clock, seconds=4.0), strict=True))
        return record | {"ms": ms, "ratios": {MODEL: ms["ours"] / ms["dense"]}}
    except Exception as error:
        return record | {"dropped": reason_of(error)}


def model_run(device: torch.device, batch: int, train: bool, compiled: Any, net: nn.Module) -> Run:
    """One inference, or forward, loss, backward and an AdamW step."""
    net.to(device).train(train)
    side = 224
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True) if train else None

    def infer() -> object:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return compiled(images)

    def step() -> None:
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()

    return step if train else infer
