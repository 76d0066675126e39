"""topk_attention: scaled_dot_product_attention's signature and meaning, plus topk."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvt_compile import functional
from kvt_compile import topk as topk_module
from kvt_compile.topk import resolve, validate

# one lowering for what is not about lowerings: "auto" may compile a kernel for every mask
topk_attention = partial(functional.topk_attention, lowering="aten")


def qkv(
    q: tuple[int, ...] = (2, 3, 6, 8), k: tuple[int, ...] = (), v: tuple[int, ...] = (), seed: int = 0
) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, requires_grad=True) for shape in (q, k or q, v or k or q)]


def boolean(*shape: int) -> Tensor:
    keep = torch.rand(shape) > 0.3
    keep[..., 0] = True  # SDPA's gradients of a row without keys are NaN on some paths
    return keep


CALLS: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "plain": ([(2, 3, 6, 8)], {}),
    "rank 3": ([(3, 6, 8)], {}),
    "rank 2": ([(6, 8)], {}),
    "rank 5": ([(2, 2, 3, 6, 8)], {}),
    "cross": ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], {}),
    "batch broadcasts": ([(2, 3, 5, 8), (1, 3, 7, 8), (3, 7, 8)], {}),
    "heads broadcast": ([(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)], {}),
    "gqa": ([(2, 6, 5, 8), (2, 2, 7, 8)], {"enable_gqa": True}),
    "gqa, rank 5": ([(2, 2, 6, 5, 8), (2, 2, 2, 7, 8)], {"enable_gqa": True}),
    "gqa, rank 3": ([(6, 5, 8), (2, 7, 8)], {"enable_gqa": True}),
    "scale": ([(2, 3, 6, 8)], {"scale": 0.3}),
    "integer scale": ([(2, 3, 6, 8)], {"scale": 1}),
    "negative scale": ([(2, 3, 6, 8)], {"scale": -0.2}),
    "causal": ([(2, 3, 6, 8)], {"is_causal": True}),
    "causal, fewer queries": ([(2, 3, 4, 8), (2, 3, 7, 8)], {"is_causal": True}),
    "causal, fewer keys": ([(2, 3, 7, 8), (2, 3, 4, 8)], {"is_causal": True}),
    "float mask": ([(2, 3, 6, 8)], {"attn_mask": (6, 6)}),
    "full float mask": ([(2, 3, 6, 8)], {"attn_mask": (2, 3, 6, 6)}),
    "mask of heads": ([(2, 3, 6, 8)], {"attn_mask": (3, 1, 6)}),
    "mask of one": ([(2, 3, 6, 8)], {"attn_mask": (1, 1)}),
    "mask of a batch": ([(2, 3, 6, 8)], {"attn_mask": (2, 1, 1, 6)}),
    "mask, rank 3": ([(3, 6, 8)], {"attn_mask": (3, 6, 6)}),
    "mask, rank 5": ([(2, 4, 3, 6, 8)], {"attn_mask": (2, 4, 3, 6, 6)}),
    "mask of inner batch": ([(2, 4, 3, 6, 8)], {"attn_mask": (4, 1, 1, 6)}),
    "mask of outer batch": ([(2, 4, 3, 6, 8)], {"attn_mask": (2, 1, 1, 6, 1)}),
    "mask with gqa": ([(2, 6, 5, 8), (2, 2, 7, 8)], {"attn_mask": (6, 5, 7), "enable_gqa": True}),
}


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        *((name, "aten") for name in CALLS),
        *((name, "auto") for name in ("plain", "mask of inner batch", "gqa, rank 5")),
    ],
)
def test_keeping_all_is_scaled_dot_product_attention(name: str, lowering: str) -> None:
    shapes, options = CALLS[name]
    q, k, v = qkv(*shapes)
    options = dict(options)
    leaves = [q, k, v]
    if "attn_mask" in options:
        options["attn_mask"] = torch.randn(options["attn_mask"], requires_grad=True)
        leaves.append(options["attn_mask"])
    out = topk_attention(q, k, v, topk=1.0, lowering=lowering, **options)
    dense = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(out, dense)
    grad = torch.randn_like(dense)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(dense, leaves, grad))


@pytest.mark.parametrize("shape", [(6, 6), (2, 1, 6, 6), (3, 6, 6), (1, 6), (2, 3, 6, 6)], ids=str)
def test_bool_masks(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    mask = boolean(*shape)
    out = topk_attention(q, k, v, topk=6, attn_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_a_row_that_may_attend_to_nothing_is_zero() -> None:
    q, k, v = qkv()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    for m in (mask, torch.zeros(6, 6).masked_fill(~mask, -math.inf)):
        out = topk_attention(q, k, v, topk=4, attn_mask=m)
        assert (out[:, :, 2] == 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(("topk", "count"), [(2, 2), (0.5, 3), (0.51, 4), (1, 1), (6, 6), (99, 6), (1.0, 6)], ids=str)
def test_topk_keys_are_kept_and_are_the_largest(topk: float, count: int) -> None:
    q, k, _ = qkv()
    weights = topk_attention(q, k, torch.eye(6).expand(2, 3, 6, 6), topk=topk)
    assert (weights != 0).sum(-1).eq(count).all()
    scores = (q @ k.transpose(-1, -2)).detach()
    expected = torch.zeros_like(scores).scatter(-1, scores.topk(count, -1).indices, 1.0)
    assert torch.equal((weights != 0).float(), expected)


def test_the_mask_is_applied_before_the_selection() -> None:
    q, k, _ = qkv()
    mask = boolean(6, 6)
    weights = topk_attention(q, k, torch.eye(6).expand(2, 3, 6, 6), topk=2, attn_mask=mask)
    assert (weights[:, :, ~mask] == 0).all()
    assert (weights != 0).sum(-1).eq(mask.sum(-1).clamp(max=2)).all()


# --- topk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topk", "keys", "count"),
    [
        (100, 197, 100),
        (100, 50, 50),
        (1, 50, 1),
        (0.5, 197, 99),
        (0.1, 10, 1),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (1.0, 197, 197),
        (1e-7, 197, 1),
        (1e-7, 10**7, 1),
        (0.5, 1, 1),
        (0.5, 0, 1),
        (3, 0, 1),
    ],
    ids=str,
)
def test_resolve(topk: float, keys: int, count: int) -> None:
    assert resolve(topk, keys) == count


@given(st.floats(min_value=0.0, max_value=1.0, exclude_min=True), st.integers(1, 10**6))
def test_resolve_is_exact_decimal_arithmetic(ratio: float, keys: int) -> None:
    assert Fraction(*topk_module.as_fraction(ratio)) == Fraction(repr(ratio))
    assert resolve(ratio, keys) == math.ceil(Fraction(repr(ratio)) * keys)


@pytest.mark.parametrize(
    ("topk", "kind", "message"),
    [
        (True, TypeError, "topk is True (bool)"),
        ("8", TypeError, "topk is '8' (str)"),
        (None, TypeError, "topk is None (NoneType)"),
        (0, ValueError, "topk is 0"),
        (-3, ValueError, "topk is -3"),
        (0.0, ValueError, "topk is 0.0"),
        (-0.5, ValueError, "topk is -0.5"),
        (1.5, ValueError, "topk is 1.5"),
        (100.0, ValueError, "for 100 keys write topk=100"),
        (math.nan, ValueError, "topk is nan"),
        (math.inf, ValueError, "topk is inf"),
    ],
    ids=str,
)
def test_topk_that_means_nothing_is_rejected(topk: Any, kind: type[Exception], message: str) -> None:
    q, k, v = qkv()
    for run in (lambda: validate(topk), lambda: resolve(topk, 9), lambda: topk_attention(q, k, v, topk=topk)):
        with pytest.raises(kind) as error:
            run()
        assert message in str(error.value)


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": torch.zeros(8)}, ValueError, "q has 1 dimensions, expected at least 2"),
    "leading": ({"k": torch.zeros(2, 2, 6, 8)}, ValueError, "do not broadcast; for fewer key heads than query heads"),
    "mask dtype": ({"attn_mask": torch.ones(6, 6).int()}, TypeError, "attn_mask is torch.int32"),
    "mask shape": ({"attn_mask": torch.ones(6, 5)}, ValueError, "attn_mask has shape (6, 5)"),
    "mask rank": ({"attn_mask": torch.ones(1, 1, 1, 6, 6)}, ValueError, "attn_mask has 5 dimensions"),
    "mask and causal": ({"attn_mask": torch.ones(6, 6), "is_causal": True}, ValueError, "at most one"),
    "dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    "scale": ({"scale": math.nan}, ValueError, "scale is nan"),
    "head size": ({"q": torch.zeros(2, 3, 6, 9)}, ValueError, "head size D differs: q has 9, k has 8"),
    "lowering": ({"lowering": "refrence"}, ValueError, "did you mean 'reference'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changes, kind, message = WRONG[name]
    usual = dict(zip("qkv", qkv(), strict=True)) | {"topk": 3}
    with pytest.raises(kind) as error:
        topk_attention(**(usual | changes))  # type: ignore[arg-type]
    assert message in str(error.value)


# --- dropout, autocast, transforms, compile ---------------------------------------------------------------------------


def test_numbers_that_are_equal_and_mean_something_else_are_told_apart() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (4, 6, 6))
    one, all_of_them = (topk_attention(q, k, v, topk=x) for x in (1, 1.0))
    assert not torch.equal(one, all_of_them)
    torch.testing.assert_close(all_of_them, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    with pytest.raises(TypeError, match="topk is True"):
        topk_attention(q, k, v, topk=True)


def test_dropout_follows_manual_seed() -> None:
    q, k, v = qkv()

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return topk_attention(q, k, v, topk=4, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(topk_attention(q, k, v, topk=4, dropout_p=1.0), torch.zeros_like(q))
    state = torch.get_rng_state()
    topk_attention(q, k, v, topk=4)
    assert torch.equal(torch.get_rng_state(), state)  # without dropout nothing is drawn


def test_autocast_casts_as_sdpa_does() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, dense = topk_attention(q, k, v, topk=6), F.scaled_dot_product_attention(q, k, v)
        wide = topk_attention(q.double(), k.double(), v.double(), topk=6)
    assert out.dtype == dense.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (out - exact).abs().max() <= 2 * (dense - exact).abs().max()
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    x = torch.randn(4, 3, 6, 8)
    mask = torch.randn(4, 6, 6)

    def run(x: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
        return topk_attention(x, x, x, topk=0.5, attn_mask=mask, dropout_p=p)

    expected = torch.stack([run(*pair) for pair in zip(x, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(run)(x, mask), expected)
    same = x[:1].expand(4, -1, -1, -1)
    dropped = torch.vmap(lambda x: topk_attention(x, x, x, topk=1.0, dropout_p=0.5), randomness=randomness)(same)
    assert torch.equal(dropped[0], dropped[1]) == (randomness == "same")


def test_torch_func() -> None:
    """Per-sample gradients, those of an unmapped mask included."""
    x, mask = torch.randn(4, 3, 6, 8), torch.randn(3, 6, 6)

    def loss(x: Tensor, mask: Tensor) -> Tensor:
        return topk_attention(x, x, x, topk=0.5, attn_mask=mask).square().sum()

    leaf, bias = x.clone().requires_grad_(), mask.clone().requires_grad_()
    expected = [torch.autograd.grad(loss(row, bias), (leaf, bias)) for row in leaf]
    by_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, mask)
    torch.testing.assert_close(by_sample[0], torch.stack([dx[n] for n, (dx, _) in enumerate(expected)]))
    torch.testing.assert_close(by_sample[1], torch.stack([dbias for _, dbias in expected]))


def test_a_second_derivative_says_that_there_is_none() -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad((topk_attention(x, x, x, topk=2) ** 2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, topk: float, scale: float | None) -> Tensor:
        return topk_attention(q, k, v, topk=topk, attn_mask=mask, scale=scale)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, topk, scale, masked in ((6, 0.5, None, True), (8, 0.1, 0.2, True), (9, 3, 0.3, False)):
        q, k, v = qkv((2, 3, n, 8))
        mask = torch.randn(2, 1, n, n, requires_grad=True) if masked else None
        leaves = [q, k, v, mask] if masked else [q, k, v]
        actual, expected = (f(q, k, v, mask, topk, scale) for f in (compiled, run))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        )


def test_compiles_with_dropout_autocast_and_inductor() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return topk_attention(q, k, v, topk=4, dropout_p=p)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    q, k, v = qkv()
    torch.testing.assert_close(compiled(q, k, v, 0.0), run(q, k, v, 0.0))
    torch.manual_seed(0)
    first, second = compiled(q, k, v, 0.5), compiled(q, k, v, 0.5)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
