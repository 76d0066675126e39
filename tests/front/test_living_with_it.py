"""Checkpoints, training loops, mixed precision, data parallelism, saved programs: a rewritten model among its tools."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import timm_swin, timm_vit
from nets import Net, assert_same
from oracles import FACTOR
from places import IMPORTABLE
from torch import Tensor, nn

import kvt_compile

PATH = os.pathsep.join(map(str, (Path(__file__).parent, *IMPORTABLE)))


class Stateful(nn.Module):
    """Every kind of state a model can have; `branch` keeps symbolic_trace out, so that torch.export has to do it."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.register_buffer("saved", torch.ones(32))
        self.net, self.branch = Net(), branch
        self.register_buffer("not_saved", torch.ones(32), persistent=False)
        self.plain = torch.full((32,), 2.0)
        self.norm = nn.BatchNorm1d(10)
        self.tied, self.out = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.out.weight = self.tied.weight
        self.unused = nn.ModuleList([nn.Linear(3, 3)])
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.shape[1] % 2:
            x = -x
        x = self.norm(self.tied(x) * self.saved * self.not_saved)
        return self.out(self.net(x)) * self.plain * torch.tensor([3.0]) * self.scale


def by_symbolic_trace(model: nn.Module, x: Tensor) -> nn.Module:
    result = kvt_compile.rewrite(model, x, topk=4)
    assert result.program is None
    return result.module


def by_export(model: nn.Module, x: Tensor) -> nn.Module:
    result = kvt_compile.rewrite(model, x, topk=4)
    assert result.program is not None
    return result.module


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x))
    return model


@pytest.mark.parametrize(
    ("way", "build"),
    [
        (by_symbolic_trace, lambda: (Stateful(False), (torch.randn(2, 10, 32),))),
        (by_export, lambda: (Stateful(True), (torch.randn(2, 10, 32),))),
        (by_symbolic_trace, lambda: timm_vit(True)[:2]),
        (by_symbolic_trace, lambda: timm_swin(False)[:2]),
    ],
    ids=["symbolic_trace", "export", "timm-vit", "timm-swin"],
)
def test_checkpoints_go_both_ways(way: Callable[..., nn.Module], build: Callable[[], Any]) -> None:
    model, args = build()
    model.eval()
    module = way(model, *args)
    assert list(module.state_dict()) == list(model.state_dict())
    assert [id(p) for p in module.parameters()] == [id(p) for p in model.parameters()]  # what an optimiser goes by
    # a checkpoint of the original into a rewritten model of its own, and the other way round
    trained, other = randomised(build()[0].eval()), build()[0].eval()
    theirs = way(other, *args)
    theirs.load_state_dict(trained.state_dict())
    expected = way(trained, *args)(*args)
    torch.testing.assert_close(theirs(*args), expected)
    again = build()[0].eval()
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(way(again, *args)(*args), expected)


def test_a_traced_graph_keeps_its_own_state() -> None:
    model, x = Stateful(False).eval(), torch.randn(2, 10, 32)
    traced = torch.fx.symbolic_trace(model)
    module = kvt_compile.rewrite(traced, x, topk=4).module
    assert list(module.state_dict()) == list(traced.state_dict())


def test_nothing_is_left_on_the_model() -> None:
    model = Stateful(False).eval()
    before = set(vars(model))
    by_symbolic_trace(model, torch.randn(2, 10, 32))
    assert set(vars(model)) == before


def test_a_saved_program_gives_the_same_result_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    module = kvt_compile.rewrite(model, x, topk=4).module
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    inputs = [torch.randn(batch, 10, 32) for batch in (1, 3)]
    torch.save([(x, model.by_hand(x, 4).detach()) for x in inputs], tmp_path / "cases.pt")
    program = textwrap.dedent(
        """
        import sys, torch
        folder = sys.argv[1]
        try:
            torch.export.load(folder + "/model.pt2")
        except RuntimeError as error:
            assert "deserializing" in str(error), error
        else:
            raise SystemExit("loaded without the ops")
        import kvt_compile
        module = torch.export.load(folder + "/model.pt2").module()
        for x, expected in torch.load(folder + "/cases.pt"):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def losses(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor, steps: int = 5) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (run(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


def rewritten(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return kvt_compile.rewrite(model, x, topk=4).module


def test_a_plain_loop_learns_what_hand_written_k_nn_attention_learns() -> None:
    """In float64, so that rounding moves no key across the threshold."""
    model, x, y = Net().double(), torch.randn(2, 10, 32).double(), torch.randn(2, 10, 32).double()
    other = copy.deepcopy(model)
    found = losses(rewritten(model, x), model, x, y)
    assert found == pytest.approx(losses(lambda x: other.by_hand(x, 4), other, x, y), rel=1e-9)
    assert found[-1] < found[0]
    assert_same(list(model.parameters()), list(other.parameters()), rtol=1e-9)


def test_mixed_precision_with_a_gradient_scaler() -> None:
    """bfloat16 autocast: about as far from float32 as hand-written code is, and the scaler steps."""
    model, x, y = Net(), torch.randn(2, 10, 32), torch.randn(2, 10, 32)
    reference, dense = copy.deepcopy(model), copy.deepcopy(model)
    run = rewritten(model, x)

    def first_loss(call: Callable[[Tensor], Tensor], low: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return (call(x).float() - y).square().mean()

    exact = first_loss(lambda x: reference.by_hand(x, 4), False)
    # what the same precision does to the dense model, and to k-NN attention by hand, where a key may change places
    rounding = max(
        float((first_loss(dense, True) - first_loss(dense, False)).abs()),
        float((first_loss(lambda x: dense.by_hand(x, 4), True) - exact).abs()),
    )
    scaler, optimiser = torch.amp.GradScaler("cpu"), torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    loss = first_loss(run, True)
    assert float((loss - exact).abs()) <= FACTOR * rounding
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


WORKER = textwrap.dedent(
    """
    import copy, sys, torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import kvt_compile
    from nets import Net

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(4, 10, 32).double(), torch.randn(4, 10, 32).double()
    alone = copy.deepcopy(model)
    (alone.by_hand(x, 4) - y).square().mean().backward()
    keys = list(model.state_dict())
    run = torch.compile(DistributedDataParallel(model), backend="kvt", options={"topk": 4})
    part = slice(2 * rank, 2 * rank + 2)
    (run(x[part]) - y[part]).square().mean().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert list(model.state_dict()) == keys
    dist.destroy_process_group()
    """
)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: averaged gradients of two halves are those of the whole batch."""
    environment = {**os.environ, "PYTHONPATH": PATH, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(text[-2000:] for text in said)
