"""The four operators under torch.func and both kinds of vmap, against the same function written densely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import kvt_compile
from kvt_compile import topk_attention

F64 = torch.float64


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return topk_attention(q, k, v, topk=1.0)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def weights(scores: Tensor) -> Tensor:
    return torch.ops.kvt.topk_softmax(scores, -1, scores.shape[-1], scores.dtype, "auto")  # type: ignore[no-any-return]


def tensors(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 2, n, 3, dtype=F64) for n in (4, 5, 5))
    return q, k, v


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss(f: Attention) -> Callable[..., Tensor]:
    return lambda q, k, v: f(q, k, v).square().sum()


TRANSFORMS: dict[str, Callable[[Attention, Any], Any]] = {
    "grad": lambda f, x: grad(loss(f), (0, 1, 2))(*x),
    "vjp": lambda f, x: vjp(f, *x)[1](x[0]),
    "vmap": lambda f, x: vmap(f)(*x),
    "vmap_over_heads": lambda f, x: vmap(f, in_dims=1, out_dims=1)(*x),
    "vmap_of_vmap": lambda f, x: vmap(vmap(f))(*x),
    "vmap_shared_keys": lambda f, x: vmap(f, in_dims=(0, None, None))(x[0], x[1][0], x[2][0]),
    "jacrev": lambda f, x: jacrev(f, (0, 1, 2))(*x),
    "vmap_of_grad": lambda f, x: vmap(grad(loss(f), (0, 1, 2)))(*x),
    "grad_of_vmap": lambda f, x: grad(lambda *y: vmap(f)(*y).square().sum(), (0, 2))(*x),
    "vmap_of_jacrev": lambda f, x: vmap(jacrev(f))(*x),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "jacobian_vectorised": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_attention(name: str, batch: int) -> None:
    torch.testing.assert_close(TRANSFORMS[name](ours, tensors(batch)), TRANSFORMS[name](dense, tensors(batch)))


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap_of_grad", "jacrev", "vjp"])
def test_attention_inside_a_compiled_function(name: str) -> None:
    compiled = torch.compile(lambda *x: TRANSFORMS[name](ours, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors()), TRANSFORMS[name](dense, tensors()))


def test_batched_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    cotangents = torch.randn(3, *q.shape[:3], v.shape[3], dtype=F64)
    found, expected = (
        torch.autograd.grad(f(q, k, v), (q, k, v), cotangents, is_grads_batched=True) for f in (ours, dense)
    )
    torch.testing.assert_close(found, expected)


def test_captured_tensors_that_are_mapped() -> None:
    q, k, v = tensors()
    bias = torch.randn(2, 4, 5, dtype=F64)

    def with_bias(f: str) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            if f == "ours":
                return topk_attention(q, k, v, topk=1.0, attn_mask=bias).square().sum()
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias).square().sum()

        return run

    found, expected = (vmap(grad(with_bias(f), (0, 3)))(q, k, v, bias) for f in ("ours", "dense"))
    torch.testing.assert_close(found, expected)


SCORES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, s: grad(lambda s: f(s).square().sum())(s),
    "vmap": lambda f, s: vmap(f, in_dims=2)(s),
    "vmap_of_grad": lambda f, s: vmap(grad(lambda s: f(s).square().sum()))(s),
    "jacrev": lambda f, s: jacrev(f)(s),
    "jacobian_vectorised": lambda f, s: torch.autograd.functional.jacobian(f, s, vectorize=True),
    "rows": lambda f, s: vmap(vmap(vmap(f)))(s.unsqueeze(-1)),
}


@pytest.mark.parametrize("name", SCORES)
def test_topk_softmax(name: str) -> None:
    scores = torch.randn(2, 3, 4, dtype=F64)
    torch.testing.assert_close(SCORES[name](weights, scores), SCORES[name](lambda s: s.softmax(-1), scores))


@pytest.mark.parametrize("kind", [jvp, hessian])
def test_what_there_is_no_derivative_for_is_told_and_leaves_nothing_behind(kind: Any) -> None:
    q, k, v = tensors()
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda q: ours(q, k, v), (q,), (q,)) if kind is jvp else hessian(lambda q: loss(ours)(q, k, v))(q)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == depth
    out, tangent = jvp(torch.sin, (q,), (q,))
    torch.testing.assert_close((out, tangent), (q.sin(), q.cos() * q))


def test_second_derivatives_are_refused_by_name() -> None:
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad(lambda q: grad(lambda q: loss(ours)(q, k, v))(q).sum())(q)


def test_per_sample_gradients_of_a_rewritten_module() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 10, 32)
    module = kvt_compile.rewrite(net, x, topk=1.0, force_rewrite=True).module
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def of(model: torch.nn.Module) -> Any:
        def sample(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, parameters, (x[None],)).square().mean()  # type: ignore[no-any-return]

        return vmap(grad(sample), in_dims=(None, 0))(parameters, x)

    torch.testing.assert_close(of(module), of(net), rtol=1e-4, atol=1e-5)


class OfNames(torch.nn.Module):
    """Sizes of its own, and a second attention over the batch of the first."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        y = (q @ q.mT).softmax(-1) @ q
        return (y @ y.mT / y.shape[-1]).softmax(-1).sum(1) @ x


@pytest.mark.parametrize("by", [lambda x: x, lambda x: torch.export.export(x, (torch.randn(2, 10, 32),))])
@pytest.mark.parametrize("net", [Net, OfNames])
def test_vmap_of_a_rewritten_module(net: Callable[[], torch.nn.Module], by: Callable[[torch.nn.Module], Any]) -> None:
    """Sizes that a graph reads are read of the tensor that is mapped."""
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 2, 10, 32)
    module = kvt_compile.rewrite(by(model), x[0], topk=1.0, force_rewrite=True).module
    torch.testing.assert_close(vmap(module)(x), vmap(model)(x), rtol=1e-4, atol=1e-5)
    found, expected = (vmap(grad(lambda x, f=f: f(x).square().sum()))(x) for f in (module, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_forward_mode_over_a_rewritten_module() -> None:
    net, x = Net(), torch.randn(2, 10, 32)
    module = kvt_compile.rewrite(net, x, topk=1.0, force_rewrite=True).module
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(module, (x,), (x,))
    torch.testing.assert_close(jvp(torch.sin, (x,), (x,))[1], x.cos() * x)
