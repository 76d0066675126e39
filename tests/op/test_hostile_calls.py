"""Calls that a saved program may hold: whatever does not fit is refused before a pointer is taken, with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops

LOWERINGS = ("c", "aten", "reference", "auto")
B, H, N, D = 2, 2, 5, 4


def call(lowering: str = "c", **changes: Any) -> dict[str, Any]:
    """Arguments of `kvt::attention_backward` that fit, in order; those of `kvt::attention` among them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    forward = {"q": q, "k": k, "v": v, "captured": [], "score": "s", "weight": "p", "topk": 2, "sizes": []}
    forward |= {"dropout_p": 0.0, "seed": None, "lowering": lowering}
    out, logsumexp, threshold = torch.ops.kvt.attention(*forward.values())
    saved = {"grad_out": torch.randn(B, H, N, D), "out": out, "logsumexp": logsumexp, "threshold": threshold}
    return forward | saved | {"needs_grad": [True, True, True]} | changes


FORWARD = ("q", "k", "v", "captured", "score", "weight", "topk", "sizes", "dropout_p", "seed", "lowering")
BACKWARD = (
    *("grad_out", "q", "k", "v", "captured", "out", "logsumexp", "threshold", "score", "weight", "topk", "sizes"),
    *("dropout_p", "seed", "needs_grad", "lowering"),
)


def attention(arguments: dict[str, Any]) -> Any:
    return torch.ops.kvt.attention(*(arguments[x] for x in FORWARD))


def backward(arguments: dict[str, Any]) -> Any:
    return torch.ops.kvt.attention_backward(*(arguments[x] for x in BACKWARD))


# --- captured tensors -------------------------------------------------------------------------------------------------

OUTSIDE = ["c0[-1, j]", "c0[-1000000000, j]", "c0[i, -1]", "c0[5, j]", "c0[9223372036854775807, j]", "c0[c1[-1], j]"]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("index", OUTSIDE)
def test_a_constant_outside_of_a_captured_tensor_is_refused(index: str, lowering: str) -> None:
    captured = [torch.randn(5, 5), torch.zeros(5, dtype=torch.int64)]
    with pytest.raises(ValueError, match=r"captured tensor [01] "):
        attention(call(lowering, captured=captured, score=f"s + {index}"))
    arguments = call(lowering, captured=captured, score=f"s + {index}", needs_grad=[True, True, True, True, False])
    with pytest.raises(ValueError, match=r"captured tensor [01] "):
        backward(arguments)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("index", ["b", "h", "i", "j"])
def test_a_coordinate_that_leaves_a_captured_tensor_is_refused_by_every_lowering(index: str, lowering: str) -> None:
    with pytest.raises(ValueError, match="captured tensor 0 has size 1 in dimension 0"):
        attention(call(lowering, captured=[torch.randn(1)], score=f"s + c0[{index}]"))


CLAMPED = [
    "where(lt(i, 2), c0[-1, j], s)",
    "c0[i - 1000000000, j + 1000000000]",
    "c0[4611686018427387904*i, j*9223372036854775807]",
    "c0[i - n0, n0*j]",
    "c0[c1[j], c1[i]]",
    "c0[c1[c1[j]] // 3, c1[i] % 7]",
    "c0[minimum(i - 9, c1[j]), maximum(j, 70)]",
    "c0[abs(c1[i]), relu(c1[j])]",
    "where(lt(c1[i], 0), c0[c1[i], 5], c0[0, 0])",
]


@pytest.mark.parametrize("index", CLAMPED)
def test_every_other_index_is_clamped_alike_by_every_lowering(index: str) -> None:
    torch.manual_seed(3)
    wild = torch.tensor([-(2**63), 2**63 - 1, -1, 5, 2**31])
    captured = [torch.randn(5, 5), wild]
    changes: dict[str, Any] = {"captured": captured, "score": f"0.5*s + {index}", "sizes": [2**62]}
    changes |= {"needs_grad": [True, True, True, True, False], "topk": N}
    results = {}
    for lowering in ("reference", "aten", "c"):
        arguments = call(lowering, **changes)
        arguments["out"], arguments["logsumexp"], arguments["threshold"] = attention(arguments)
        dq, dk, dv, dcaptured = backward(arguments)
        results[lowering] = [arguments["out"], dq, dk, dv, dcaptured[0]]
    for lowering in ("aten", "c"):
        torch.testing.assert_close(results[lowering], results["reference"], rtol=2e-4, atol=2e-5)


def test_an_index_is_not_made_of_scores() -> None:
    with pytest.raises(ValueError, match="not of a score"):
        attention(call(captured=[torch.randn(5)], score="c0[s]"))
    with pytest.raises(ValueError, match="not of a score"):
        attention(
            call(
                captured=[torch.randn(5), torch.zeros(5, dtype=torch.int64)],
                score="s + c0[c1[where(gt(s, 0.0), i, j)]]",
            )
        )


# --- tensors ----------------------------------------------------------------------------------------------------------


def spoiled(x: Tensor) -> dict[str, Tensor]:
    """Tensors of the same meaning or shape whose memory is another."""
    return {
        "half": x.half(),
        "double": x.double(),
        "whole": x.long(),
        "complex": x.to(torch.complex64),
        "eight bits": x.to(torch.float8_e5m2),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "larger": torch.cat([x, x], 1),
        "smaller": x[:, :1],
        "unsqueezed": x.unsqueeze(0),
        "flat": x.reshape(-1),
    }


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["grad_out", "out", "logsumexp", "threshold", "q", "k", "v"])
@pytest.mark.parametrize("how", list(spoiled(torch.zeros(2, 2, 2))))
def test_a_backward_takes_no_tensor_of_another_kind(name: str, how: str, lowering: str) -> None:
    arguments = call(lowering)
    arguments[name] = spoiled(arguments[name])[how]
    with pytest.raises((ValueError, NotImplementedError), match=r"kvt::attention|sparse|Sparse|expected"):
        backward(arguments)


@pytest.mark.parametrize("how", ["complex", "eight bits", "meta", "sparse"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_captured_tensor_of_another_kind_is_refused(how: str, lowering: str) -> None:
    captured = spoiled(torch.zeros(2, 2, 2))[how]
    with pytest.raises((ValueError, NotImplementedError), match=r"captured tensor 0|Sparse"):
        attention(call(lowering, captured=[captured], score="s + c0[b, h, 0]"))


@pytest.mark.parametrize("lowering", ["c", "aten"])
def test_a_number_on_a_device_without_memory_is_refused(lowering: str) -> None:
    with pytest.raises(ValueError, match="captured tensor 0 is on meta"):
        attention(call(lowering, captured=[torch.zeros((), device="meta")], score="s + c0"))


def test_a_negative_view_is_read_as_what_it_means() -> None:
    arguments = call()
    out, *_ = attention(arguments)
    dq, *_ = backward(arguments)
    negative = {name: torch._neg_view(-arguments[name]) for name in ("q", "v", "grad_out", "logsumexp", "threshold")}
    assert all(x.is_neg() for x in negative.values())
    assert torch.equal(attention(arguments | negative)[0], out)
    assert torch.equal(backward(arguments | negative)[0], dq)


def test_freed_memory_is_refused() -> None:
    for name in ("q", "k", "v", "grad_out"):
        arguments = call()
        arguments[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} has no memory"):
            backward(arguments)


def test_more_keys_than_there_is_memory_are_refused() -> None:
    for keys in (2**41, 2**58):
        arguments = call()
        arguments |= {x: arguments[x][:, :, :1].expand(-1, -1, keys, -1) for x in ("k", "v")}
        with pytest.raises((MemoryError, RuntimeError), match="memory"):
            attention(arguments)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_row_softmax_checks_its_tensors(lowering: str) -> None:
    ops = torch.ops.kvt
    weights = ops.topk_softmax(torch.randn(3, 5), 1, 2, torch.float32, lowering)
    for how, grad in spoiled(weights).items():
        with pytest.raises((ValueError, NotImplementedError), match=r"kvt::topk_softmax|Sparse|sparse"):
            ops.topk_softmax_backward(grad, weights, 1, torch.float32, lowering)
        if how in ("complex", "eight bits", "sparse", "whole"):
            with pytest.raises((ValueError, NotImplementedError), match=r"kvt::topk_softmax|Sparse|sparse"):
                ops.topk_softmax(grad, 0, 2, torch.float32, lowering)


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"topk": 0}, "topk is 0"),
    ({"topk": -(2**63)}, "topk is -9223372036854775808"),
    ({"dropout_p": math.nan}, "dropout_p is nan"),
    ({"dropout_p": math.inf}, "dropout_p is inf"),
    ({"dropout_p": -0.1}, "dropout_p is -0.1"),
    ({"dropout_p": 0.5}, "needs a seed"),
    ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed"),
    ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed"),
    ({"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int64, device="meta")}, "seed"),
    ({"score": "s*n0"}, "uses n0, but 0 sizes were given"),
    ({"score": "s*n0", "sizes": [0]}, "size n0 is 0, expected at least 1"),
    ({"score": "s + i % n0", "sizes": [0]}, "size n0 is 0, expected at least 1"),
    ({"score": "s + i // n1", "sizes": [1, -(2**63)]}, "size n1 is -9223372036854775808"),
    ({"score": "s + c0[i]"}, "reads c0, but 0 captured tensors were given"),
    ({"score": "s + c0[i]", "captured": [torch.zeros(())]}, "with 1 indices"),
    ({"score": "s + c0[i]", "captured": [torch.zeros(0)]}, "captured tensor 0 has"),
    ({"score": "s + c0[i - 1]", "captured": [torch.zeros(0)]}, "captured tensor 0 has no elements"),
    ({"score": "s", "captured": [torch.zeros(1)] * 300}, "300 captured tensors"),
]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(("changes", "reason"), NUMBERS, ids=[x for _, x in NUMBERS])
def test_numbers_that_mean_nothing_are_refused(changes: dict[str, Any], reason: str, lowering: str) -> None:
    with pytest.raises(ValueError, match=reason):
        attention(call(lowering, **changes))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_largest_topk_is_all_keys(lowering: str) -> None:
    assert torch.equal(attention(call(lowering, topk=2**63 - 1))[0], attention(call(lowering, topk=N))[0])


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("empty", ["B", "Hq", "Hk", "Nq", "Nk", "D", "Dv"])
def test_empty_dimensions(empty: str, lowering: str) -> None:
    size = {"B": 2, "Hq": 2, "Hk": 2, "Nq": 3, "Nk": 4, "D": 5, "Dv": 6} | {empty: 0}
    if empty in ("Hq", "Hk"):
        size |= {"Hq": 0, "Hk": 0}
    q = torch.randn(size["B"], size["Hq"], size["Nq"], size["D"])
    k = torch.randn(size["B"], size["Hk"], size["Nk"], size["D"])
    v = torch.randn(size["B"], size["Hk"], size["Nk"], size["Dv"])
    if lowering == "c" and empty in ("D", "Dv"):
        lowering = "auto"  # which is ATen: for these no C is generated
    # what is empty is divided by nobody
    arguments = call(lowering, q=q, k=k, v=v, score="s + i % n0", sizes=[0 if empty in ("B", "Nq", "Nk") else 1])
    out, logsumexp, threshold = attention(arguments)
    assert out.shape == (*q.shape[:3], size["Dv"])
    saved = {"out": out, "logsumexp": logsumexp, "threshold": threshold, "grad_out": torch.ones_like(out)}
    dq, dk, dv, _ = backward(arguments | saved)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    if empty in ("Nq", "Nk", "Dv"):
        assert not dq.any()


def test_heads_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        attention(call(q=torch.randn(B, 3, N, D)))


def test_more_captured_values_than_a_stack_holds_are_computed_without_a_kernel() -> None:
    captured = [torch.randn(N, N) for _ in range(50)]
    score = "s" + "".join(f" + c{n}[i, j]*s" for n in range(50))
    arguments = call("auto", captured=captured, score=score, needs_grad=[True] * 53)
    out, logsumexp, threshold = attention(arguments)
    assert all(x.isfinite().all() for x in (out, logsumexp))
    saved = {"out": out, "logsumexp": logsumexp, "threshold": threshold}
    assert all(x.isfinite().all() for x in backward(arguments | saved)[3])
