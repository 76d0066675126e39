"""`torch.compile(model, backend="kvt")` in the ways people use it, through Inductor."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvt_compile.backend import kvt_backend

FORCED: dict[str, Any] = {"topk": 1.0, "force_rewrite": True}


class Block(nn.Module):
    """Residual attention with a learned bias per head and key parity, so that captured tensors have gradients."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.drop = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, topk: int | None = None) -> Tensor:
        q, k, v = self.project(x)
        scores = q * 8**-0.5 @ k.transpose(-2, -1) * self.gain
        if topk is not None:  # the official k-NN attention, by hand
            scores = scores.masked_fill(scores < scores.topk(topk, -1).values[..., -1:], -torch.inf)
        weights = self.drop(scores.softmax(-1))
        return x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = Block(dropout), Block(dropout)
        self.around = around or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.second, self.around(self.first, x))

    def by_hand(self, x: Tensor, topk: int) -> Tensor:
        return self.second(self.first(x, topk), topk)


def broken(block: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return block(x)


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, x, use_reentrant=False)
    return out


def autocast(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: Tensor = block(x)
    return out


def step(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """[output, d input, d parameters]."""
    x = x.clone().requires_grad_()
    out = call(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float = 2e-6) -> None:
    scale = max(float(x.abs().max()) for x in expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize(
    ("around", "rtol"),
    [(None, 2e-6), (broken, 2e-6), (checkpointed, 2e-6), (autocast, 2e-2)],
    ids=["plain", "graph-break", "checkpoint", "autocast"],
)
def test_training_with_all_keys_equals_dense(around: Callable[..., Tensor] | None, rtol: float) -> None:
    model = Net(around=around)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="kvt", options=FORCED, fullgraph=around is not broken)
    x = torch.randn(2, 10, 32)
    assert_same(step(compiled, other, x), step(model, model, x), rtol)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_under(mode: Any) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with mode():
        assert_same([torch.compile(model, backend="kvt", options={"topk": 4})(x)], [model.by_hand(x, 4)])


@pytest.mark.parametrize("topk", [0.5, 8], ids=["share", "count"])
def test_one_dynamic_graph_serves_every_size(topk: float) -> None:
    model = Net()
    compiled = torch.compile(model, backend="kvt", options={"topk": topk}, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, tokens in ((2, 10), (3, 7), (1, 20), (5, 11)):
            x = torch.randn(batch, tokens, 32)
            kept = -(-tokens // 2) if topk == 0.5 else min(8, tokens)
            assert_same([compiled(x)], [model.by_hand(x, kept)])


def test_marking_the_tokens_dynamic() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(model, backend="kvt", options={"topk": 0.5})
    with torch.no_grad():
        assert_same([compiled(x)], [model.by_hand(x, 5)])
        other = torch.randn(2, 13, 32)
        assert_same([compiled(other)], [model.by_hand(other, 7)])


def test_different_options_live_side_by_side() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with torch.no_grad():
        for topk in (2, 6, 2):
            compiled = torch.compile(model, backend="kvt", options={"topk": topk})
            assert_same([compiled(x)], [model.by_hand(x, topk)])


def test_dropout_follows_the_seed_and_the_training_mode() -> None:
    model, x = Net(dropout=0.5), torch.randn(2, 10, 32)
    compiled = torch.compile(model, backend="kvt", options=FORCED)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(compiled(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert_same([compiled(x)], [model(x)])


def test_inductors_own_options_pass_through() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    options = {**FORCED, "epilogue_fusion": False, "max_autotune": False}
    assert_same([torch.compile(model, backend="kvt", options=options)(x)], [model(x)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topkk": 3}, "did you mean 'topk'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"topk": 0}, "at least 1 key"),
        ({"topk": True}, "bool"),
        ({"topk": 1.5}, r"in \(0, 1\]"),
        ({"topk": "half"}, "str"),
        ({"topk": float("nan")}, "nan"),
        ({"topk": {"blocks.*": 0}}, "at least 1 key"),
        ({"lowering": "tritn"}, "lowering must be one of"),
        ({"on_refusal": "panic"}, "on_refusal must be one of"),
        ({"force_rewrite": 1}, "force_rewrite must be True or False"),
        ({"include": 3}, "include must be"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    from kvt_compile.config import split_options

    with pytest.raises((ValueError, TypeError), match=message):
        split_options(options)


def test_an_error_about_options_reaches_the_user_of_torch_compile() -> None:
    with pytest.raises(Exception, match="did you mean 'topk'"):
        torch.compile(Net(), backend="kvt", options={"tpok": 3})(torch.randn(1, 4, 32))


class Classifier(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1).softmax(-1)


def test_a_refusal_can_warn_or_raise() -> None:
    x = torch.randn(1, 4, 32)
    with pytest.warns(UserWarning, match="not multiplied with values"):
        torch.compile(Classifier(), backend=kvt_backend, options={"on_refusal": "warn"})(x)
    torch.compiler.reset()
    with pytest.raises(Exception, match="not multiplied with values"):
        torch.compile(Classifier(), backend=kvt_backend, options={"on_refusal": "error"})(x)


def test_compile_caches_never_serve_another_k(tmp_path: Any) -> None:
    """The same model in fresh processes that share one cache folder: each k computes its own answer."""
    program = textwrap.dedent(
        """
        import sys, torch
        from test_backend import Net
        torch.manual_seed(0)
        model, x, topk = Net(), torch.randn(2, 10, 32), int(sys.argv[1])
        with torch.no_grad():
            found = torch.compile(model, backend="kvt", options={"topk": topk})(x)
            assert torch.allclose(found, model.by_hand(x, topk), atol=1e-5), topk
        """
    )
    import os

    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.path.join(folder, "..", "examples")])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    for topk in (2, 5, 2):
        subprocess.run([sys.executable, "-c", program, str(topk)], env=environment, check=True)
