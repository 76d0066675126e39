"""What a model does around its operations: kept by the capture, or refused with the line that does it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kvt_compile
from kvt_compile.capture.capture import CaptureError

FORCED: dict[str, Any] = {"topk": 1.0, "force_rewrite": True}


class Model(nn.Module):
    """A frozen or otherwise special part, and an attention after it."""

    def __init__(self, part: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.qkv, self.stem = part, nn.Linear(8, 24), nn.Linear(8, 8)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT * 8**-0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self, x)


def frozen_stem(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = model.stem(x)
    return model.attention(x)


@torch.no_grad()
def _stem(model: Model, x: Tensor) -> Tensor:
    return model.stem(x).relu()


def frozen_by_decorator(model: Model, x: Tensor) -> Tensor:
    return model.attention(_stem(model, x))


def frozen_by_call(model: Model, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    x = model.stem(x)
    torch.set_grad_enabled(before)
    return model.attention(x)


def frozen_weights(model: Model, x: Tensor) -> Tensor:
    q, k, v = model.qkv(x).chunk(3, -1)
    with torch.no_grad():
        w = (q @ k.mT).softmax(-1)
    return w @ v


def frozen_whole(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model.attention(x)
    return out + model.stem(x)


def in_autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.attention(x)


@torch.autocast("cpu", torch.bfloat16)
def _stem_in_autocast(model: Model, x: Tensor) -> Tensor:
    return model.stem(x)  # type: ignore[no-any-return]


def in_autocast_by_decorator(model: Model, x: Tensor) -> Tensor:
    return model.attention(_stem_in_autocast(model, x).float())


def out_of_autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return model.attention(model.stem(x.float()))


def plain(model: Model, x: Tensor) -> Tensor:
    return model.attention(model.stem(x))


def one_sdpa_kernel(model: Model, x: Tensor) -> Tensor:
    q, k, v = model.qkv(x).chunk(3, -1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def outcome(model: nn.Module, x: Tensor, autocast: bool) -> tuple[Any, ...]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.float().square().sum().backward()
    return out.dtype, out.detach(), [x.grad, *(p.grad for _, p in sorted(model.named_parameters()))]


KEPT = [
    (frozen_stem, True), (frozen_by_decorator, True), (frozen_by_call, True), (frozen_weights, True),
    (frozen_whole, True), (in_autocast, True), (in_autocast_by_decorator, True), (out_of_autocast, True),
    (plain, False), (one_sdpa_kernel, False),
]  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["", "under_autocast"])
@pytest.mark.parametrize(("part", "exported"), KEPT, ids=[part.__name__ for part, _ in KEPT])
def test_kept(part: Callable[[Model, Tensor], Tensor], exported: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Model(part), torch.randn(2, 6, 8)
    result = kvt_compile.rewrite(model, x, **FORCED)
    assert (result.program is not None) == exported
    ours, eager = outcome(result.module, x, autocast), outcome(model, x, autocast)
    assert ours[0] == eager[0]
    tolerance = 0.05 if autocast or "in_autocast" in part.__name__ else 1e-5
    torch.testing.assert_close(ours[1], eager[1], atol=tolerance, rtol=tolerance)
    assert [g is None for g in ours[2]] == [g is None for g in eager[2]]
    for x, y in zip(ours[2], eager[2], strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, atol=20 * tolerance, rtol=tolerance)


def test_a_capture_without_grad_trains_as_any_other() -> None:
    model, x = Model(frozen_stem), torch.randn(2, 6, 8)
    with torch.no_grad():
        module = kvt_compile.rewrite(model, x, **FORCED).module
    ours, eager = outcome(module, x, False), outcome(model, x, False)
    assert [g is None for g in ours[2]] == [g is None for g in eager[2]]


# ---- refused ---------------------------------------------------------------------------------------------------------


def in_inference_mode(model: Model, x: Tensor) -> Tensor:
    with torch.inference_mode():
        shift = x.mean()
    return model.attention(x + shift.clone())


def checkpointed(model: Model, x: Tensor) -> Tensor:
    return checkpoint(model.attention, x, use_reentrant=False)  # type: ignore[no-any-return]


def saved_elsewhere(model: Model, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model.attention(x)


def forked(model: Model, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        x = F.dropout(x, 0.1)
    return model.attention(x)


def seeded(model: Model, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model.attention(F.dropout(x, 0.1))


def on_a_device(model: Model, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return model.attention(x + torch.ones(8))


def branching_in_inference_mode(model: Model, x: Tensor) -> Tensor:
    if x.shape[1] > 100:  # symbolic_trace does not get as far as the mode
        return x
    return in_inference_mode(model, x)


def frozen_in_autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y = model.stem(x)
    return model.attention(y.float())


def switched_in_autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.set_grad_enabled(False)
        y = model.stem(x)
        torch.set_grad_enabled(True)
    return model.attention(y.float())


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded(model: Model, x: Tensor) -> Tensor:
    return model.attention(Rounded.apply(x * 3))  # type: ignore[no-untyped-call]


def checkpointed_reentrantly(model: Model, x: Tensor) -> Tensor:
    return checkpoint(model.attention, x, use_reentrant=True)  # type: ignore[no-any-return]


def hooked_gradient(model: Model, x: Tensor) -> Tensor:
    y = model.stem(x)
    y.register_hook(lambda gradient: gradient * 5)
    return model.attention(y)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (frozen_in_autocast, "one within the other"),
        (switched_in_autocast, "one within the other"),
        (rounded, "autograd.Function"),
        (checkpointed_reentrantly, "autograd.Function"),
        (hooked_gradient, "a hook on a gradient"),
        (in_inference_mode, "inference mode"),
        (branching_in_inference_mode, "inference mode"),
        (checkpointed, "saved-tensor hooks"),
        (saved_elsewhere, "saved-tensor hooks"),
        (forked, "random state"),
        (seeded, "random state"),
        (on_a_device, "a mode for functions"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused_with_the_line(part: Callable[[Model, Tensor], Tensor], what: str) -> None:
    model, x = Model(part), torch.randn(2, 6, 8)
    with pytest.raises(CaptureError, match=what) as refusal:
        kvt_compile.rewrite(model, x, **FORCED)
    assert f"{__file__}:" in str(refusal.value)
    assert "torch.compile" in str(refusal.value)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("where", ["", "second"])
def test_hooks_of_what_is_traced_into_are_refused(kind: str, where: str) -> None:
    net, x = Net(), torch.randn(2, 10, 32)
    handle = getattr(net.get_submodule(where), f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(CaptureError, match=where or "Net"):
        kvt_compile.rewrite(net, x, **FORCED)
    handle.remove()
    kvt_compile.rewrite(net, x, **FORCED)


class Layered(Model):
    """Softmax and dropout are layers, which a rewrite replaces."""

    def __init__(self, part: Callable[[Model, Tensor], Tensor] = plain) -> None:
        super().__init__(part)
        self.soft, self.drop = nn.Softmax(-1), nn.Dropout(0.0)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.drop(self.soft(q @ k.mT * 8**-0.5)) @ v  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", ["soft", "drop"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_what_is_replaced_are_refused(kind: str, layer: str) -> None:
    net, x = Layered(), torch.randn(2, 6, 8)
    handle = getattr(net.get_submodule(layer), f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(CaptureError, match=f"{layer} has hooks"):
        kvt_compile.rewrite(net, x, **FORCED)
    graph = torch.fx.symbolic_trace(net)  # a graph comes as it is: what has hooks is not read
    rewritten = kvt_compile.rewrite(graph, x, **FORCED)
    torch.testing.assert_close(rewritten.module(x), net(x))
    assert torch.ops.kvt.attention.default not in {node.target for node in rewritten.module.graph.nodes}
    reasons = [*(r.reason for r in rewritten.report.refusals), *(s.reason for s in rewritten.report.sites)]
    assert any("has hooks" in reason or "dropout between" in reason for reason in reasons)
    handle.remove()
    kvt_compile.rewrite(net, x, **FORCED)


def test_hooks_of_every_module_are_refused() -> None:
    net, x = Layered(), torch.randn(2, 6, 8)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with everywhere, pytest.raises(CaptureError, match="every module"):
        kvt_compile.rewrite(net, x, **FORCED)
    kvt_compile.rewrite(net, x, **FORCED)


def test_hooks_of_a_layer_are_refused_where_export_would_lose_them() -> None:
    net, x = Model(frozen_stem), torch.randn(2, 6, 8)
    net.qkv.register_full_backward_hook(lambda module, given, out: (given[0] * 2,))
    with pytest.raises(CaptureError, match="qkv has hooks"):
        kvt_compile.rewrite(net, x, **FORCED)


@pytest.mark.parametrize("layer", ["soft", "drop", "stem"])
def test_a_forward_of_its_own_is_the_layers_meaning(layer: str) -> None:
    torch.manual_seed(0)
    net, x = Layered(), torch.randn(2, 6, 8)
    module = net.get_submodule(layer)
    module.forward = torch.no_grad()(module.forward)  # type: ignore[method-assign]
    ours, eager = (outcome(m, x, False) for m in (kvt_compile.rewrite(net, x, **FORCED).module, net))
    torch.testing.assert_close(ours[1], eager[1], atol=1e-5, rtol=1e-5)
    assert [g is None for g in ours[2]] == [g is None for g in eager[2]]


def test_hooks_of_a_layer_run_as_ever() -> None:
    net, x = Net(), torch.randn(2, 10, 32)
    seen: list[str] = []
    net.second.out.register_forward_hook(lambda module, args, out: seen.append("out") or out * 2)
    module = kvt_compile.rewrite(net, x, **FORCED).module
    assert seen == []
    torch.testing.assert_close(module(x), net(x), rtol=1e-5, atol=1e-5)
    assert seen == ["out", "out"]


def test_parametrised_layers_train_as_ever() -> None:
    net, x = Net(), torch.randn(2, 10, 32)
    nn.utils.parametrizations.weight_norm(net.first.qkv)
    module = kvt_compile.rewrite(net, x, **FORCED).module
    torch.testing.assert_close(module(x), net(x), rtol=1e-5, atol=1e-5)
    module(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_weight_that_a_hook_computes_is_no_constant() -> None:
    net, x = Net(), torch.randn(2, 10, 32)
    net.first.scale = nn.Parameter(torch.ones(()))
    doubled = net.first.scale * 2  # outside of the forward: what a trace meets is a tensor with a history

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return net(x) * doubled

    with pytest.raises(CaptureError, match="gradient of a tensor"):
        kvt_compile.rewrite(Outer(), x, **FORCED)


# ---- threads ---------------------------------------------------------------------------------------------------------


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[1] < 100 else -x)


@pytest.mark.skipif(
    torch.__version__ < (2, 13) and torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="torch 2.11 built for CUDA crashes without a GPU where a second thread exports",
)
@pytest.mark.parametrize("what", ["rewrite", "explain", "both"])
def test_captures_in_several_threads(what: str) -> None:
    x = torch.randn(2, 10, 32)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            net = (Branching if number % 2 else Net)()
            if what == "rewrite" or (what == "both" and number < 2):
                module = kvt_compile.rewrite(net, x, **FORCED).module
                torch.testing.assert_close(module(x), net(x), rtol=1e-4, atol=1e-5)
            else:
                assert len(kvt_compile.explain(net, x, **FORCED).sites) == 2
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    net = Net()
    compiled = torch.compile(net, backend="kvt", options={"topk": 3})
    assert not torch.allclose(compiled(x), net(x))
    torch.testing.assert_close(compiled(x), net.by_hand(x, 3), rtol=1e-4, atol=1e-5)
