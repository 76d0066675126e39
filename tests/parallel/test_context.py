"""Attention over a sequence that several ranks share is that of one process: outputs, kept keys, gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from no_compiler import without_compiler
from torch import Tensor, nn

Run = Callable[..., list[Any]]
LENGTH, HEADS, KEY_HEADS, DIM = 24, 4, 2, 8


def _inputs(ties: bool) -> list[Tensor]:
    shapes = ((2, HEADS, LENGTH, DIM), (2, KEY_HEADS, LENGTH, DIM), (2, KEY_HEADS, LENGTH, 6), (2, LENGTH), (HEADS,))
    tensors = [torch.randn(shape, dtype=torch.float64).float() for shape in shapes]
    if ties:  # whole numbers: equal scores, whatever rank computes them
        tensors = [x.mul(1.5).round() for x in tensors]
    return tensors


SCORES = {
    "plain": "0.5*s",
    "causal": "where(le(j, i), 0.5*s, -oo)",
    "window": "where(logical_and(le(i - j, 6), le(j - i, 2)), 0.5*s, -oo)",
    "keys and heads": "0.5*s + c0[b, j] + c1[h]",
    "rows": "0.5*s*c1[h] + c0[b, i]*c1[h]",
}


def _call(tensors: list[Tensor], score: str, topk: int, dropout_p: float, lowering: str) -> Tensor:
    q, k, v, *captured = tensors
    captured = captured if "c0" in score else []
    return torch.ops.kvt.attention(
        q, k, v, captured, score, "p*0.5", topk, [], dropout_p, torch.tensor([5]), lowering
    )[0]  # fmt: skip


def check_operator(
    score: str, order: str, way: str, ties: bool, topk: int, dropout_p: float, dtype: str, built: bool = False
) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from kvt_compile.kernels import lowerings
    from kvt_compile.parallel import context_parallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [x.to(getattr(torch, dtype)).requires_grad_() for x in _inputs(ties)]
    expected = _call(whole, SCORES[score], topk, dropout_p, "aten")
    grad = torch.randn_like(expected)
    expected.backward(grad)
    by_torch = nullcontext() if built else without_compiler()
    with by_torch, context_parallel(mesh, order=order, way=way) as context:
        dims = (2, 2, 2, 1, None)
        mine = [
            (x.detach() if d is None else context.shard(x.detach(), d)).requires_grad_()
            for x, d in zip(whole, dims, strict=True)
        ]
        found = _call(mine, SCORES[score], topk, dropout_p, lowerings.inside().lowering)
        found.backward(context.shard(grad, 2))
        close = {"atol": 2e-5, "rtol": 2e-5} if dtype == "float32" else {}
        torch.testing.assert_close(found.detach(), context.shard(expected.detach(), 2), **close)
        for n, (x, y, d) in enumerate(zip(whole, mine, dims, strict=True)):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is None:
                continue
            if d is None:
                dist.all_reduce(y.grad)
            wanted = x.grad if d is None else context.shard(x.grad, d)
            torch.testing.assert_close(y.grad, wanted, **close, msg=lambda m, n=n: f"gradient {n}: {m}")


@pytest.mark.parametrize("way", ["gather", "count"])
@pytest.mark.parametrize("order", ["contiguous", "balanced"])
@pytest.mark.parametrize("score", SCORES)
def test_one_attention_on_two_ranks(run: Run, score: str, order: str, way: str) -> None:
    for ties, topk, dropout_p, dtype in (
        (True, 5, 0.0, "float32"),
        (False, 7, 0.3, "float64"),
        (False, 99, 0.0, "float32"),
    ):
        run(2, check_operator, score, order, way, ties, topk, dropout_p, dtype)


@pytest.mark.parametrize("score", ["causal", "keys and heads"])
def test_one_attention_by_built_kernels(run: Run, score: str) -> None:
    run(2, check_operator, score, "balanced", "gather", True, 5, 0.3, "float32", True)


@pytest.mark.parametrize("way", ["gather", "count"])
def test_one_attention_on_four_ranks(run: Run, way: str) -> None:
    run(4, check_operator, "causal", "balanced", way, True, 5, 0.2, "float64")


# ---- the ways in -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k.sin(), v, is_causal=self.causal, enable_gqa=True)


@without_compiler()
def check_ways_in() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    import kvt_compile
    from kvt_compile.parallel import context_parallel

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    whole = _inputs(ties=False)[:3]
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": lambda q, k, v: kvt_compile.topk_attention(q, k.sin(), v, topk=0.25, is_causal=True, enable_gqa=True),
        "compiled": torch.compile(
            Model(causal=True), backend="kvt", dynamic=False, options={"topk": 0.25, "then": "aot_eager"}
        ),
        "compiled by torch": torch.compile(
            lambda q, k, v: kvt_compile.topk_attention(q, k.sin(), v, topk=0.25, is_causal=True, enable_gqa=True),
            backend="aot_eager",
        ),
    }
    expected = ways["eager"](*whole)
    for name, way in ways.items():
        with context_parallel(mesh, "cp", order="balanced") as context:
            found = way(*(context.shard(x, 2) for x in whole))
            places = [[*range(6), *range(18, 24)], [*range(6, 18)]][context.ring.group.rank()]
            assert context.positions(LENGTH // 2).tolist() == places
            torch.testing.assert_close(context.unshard(found, 2), expected, msg=lambda m, n=name: f"{n}: {m}")
    dense, half, four = Model(causal=False)(*whole), _knn(whole, 0.5), _knn(whole, 4)
    with context_parallel(mesh, "cp") as context:
        mine = [context.shard(x, 2) for x in whole]
        rewritten = kvt_compile.rewrite(Model(causal=False), *mine, topk=0.5).module
        torch.testing.assert_close(context.unshard(rewritten(*mine), 2), half, msg=lambda m: f"rewritten: {m}")
        kvt_compile.set_topk(rewritten, 4)
        torch.testing.assert_close(context.unshard(rewritten(*mine), 2), four)
        kvt_compile.set_topk(rewritten, None)
        torch.testing.assert_close(context.unshard(rewritten(*mine), 2), dense)
        kept_dense = torch.compile(Model(causal=False), backend="kvt", options={"topk": None, "then": "aot_eager"})
        torch.testing.assert_close(context.unshard(kept_dense(*mine), 2), dense)


def _knn(tensors: list[Tensor], topk: float) -> Tensor:
    import kvt_compile

    q, k, v = tensors
    return kvt_compile.topk_attention(q, k.sin(), v, topk=topk, enable_gqa=True)


def test_every_way_in(run: Run) -> None:
    run(2, check_ways_in)


def check_errors() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torch_s_own

    import kvt_compile
    from kvt_compile.kernels.op.lowerings import LoweringError
    from kvt_compile.parallel import ContextParallelError, context_parallel

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    q = torch.randn(1, 2, 8, 4)

    def knn(x: Tensor, **more: Any) -> Tensor:
        return kvt_compile.topk_attention(x, x, x, topk=3, **more)

    def compiled(**options: Any) -> Any:
        torch.compiler.reset()
        return torch.compile(Model(False), backend="kvt", options={"topk": 3, "then": "aot_eager"} | options)

    with (
        pytest.raises(ValueError, match=r"order is 'zigzag', expected one of 'contiguous', 'balanced'"),
        context_parallel(mesh, order="zigzag"),
    ):
        pass
    outside, inside = compiled(), compiled()
    outside(q, q, q)
    with context_parallel(mesh) as context:
        own = context.name
        with pytest.raises(LoweringError, match="own keys only"):
            outside(q, q, q)
        with pytest.raises(
            ContextParallelError, match=r"reads a captured tensor of shape \(8, 8\) as c0\[i, j\].*both"
        ):
            knn(q, attn_mask=torch.ones(8, 8, dtype=torch.bool))
        with pytest.raises(ContextParallelError, match="its rows are not the 8 rows"):
            torch.ops.kvt.attention(q, q, q, [torch.ones(8)], "s + c0[i % 4]", "p", 3, [], 0.0, None, own)
        with pytest.raises(ContextParallelError, match="has a selection"):
            torch.ops.kvt.attention(q, q, q, [], "s", "p", 3, [], 0.0, None, own, 0.0, None, "window(3)", [8])
        with pytest.raises(LoweringError, match="own keys only"):
            torch.ops.kvt.topk_softmax(q, -1, 3, torch.float32, "aten")
        with pytest.raises(Exception, match="expected 'auto'"):  # Dynamo wraps an OptionError
            compiled(lowering="aten")(q, q, q)
        with pytest.raises(Exception, match="own keys only"):
            compiled(exclude="*")(q, q, q)
        with pytest.raises(ContextParallelError, match=r"different sizes.*on rank 0.*on rank 1"):
            knn(q[:, :, : 6 + 2 * rank])
        inside = compiled()
        inside(q, q, q)
    with pytest.raises(ContextParallelError, match="compiled inside of context_parallel and runs outside"):
        inside(q, q, q)
    with context_parallel(mesh, order="balanced"), pytest.raises(ValueError, match="expected an even number"):
        knn(q[:, :, :7])
    x = torch.randn(1, 2, 8, 4)
    with (
        torch_s_own(mesh, buffers=[x], buffer_seq_dims=[2]),
        pytest.raises(LoweringError, match=r"Use kvt_compile.parallel.context_parallel"),
    ):
        knn(x)


def test_what_cannot_be_told_is_an_error(run: Run) -> None:
    run(2, check_errors)


def check_disagreement() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import kvt_compile
    from kvt_compile.parallel import ContextParallelError, context_parallel

    mesh, q = init_device_mesh("cpu", (2,)), torch.randn(1, 2, 10, 4)
    with (
        without_compiler() if dist.get_rank() else nullcontext(),
        context_parallel(mesh),
        pytest.raises(ContextParallelError, match=r"c on rank 0, aten on rank 1.*kvt doctor"),
    ):
        kvt_compile.topk_attention(q, q, q, topk=3)


def test_ranks_with_different_lowerings_are_told(run: Run) -> None:
    run(2, check_disagreement)


def check_disagreement_without_a_context() -> list[str]:
    """What each of three calls told this rank; on rank 1 there is no compiler at the second."""
    import warnings

    import torch.distributed as dist

    from kvt_compile.kernels.warn import warn_once

    warn_once.cache_clear()
    q = torch.randn(1, 1, 7, 13)  # a kernel of no other test
    told = []
    for turn in range(3):
        if turn == dist.get_rank() or turn == 2:
            here = without_compiler() if turn == 1 else nullcontext()
            with here, warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.ops.kvt.attention(q, q, q, [], "0.3*s", "p", 3, [], 0.0, None, "auto")
            told += [str(x.message) for x in seen if "lowering" in str(x.message)]
        dist.barrier()
    return told


def test_ranks_with_different_lowerings_are_told_in_every_layout(run: Run) -> None:
    first, (message,) = run(2, check_disagreement_without_a_context)
    assert first == []
    assert "rank 1 computes k-NN attention on its cpu by the lowering 'aten' and rank 0 by 'c'" in message
    assert "kvt doctor" in message


# ---- verify ----------------------------------------------------------------------------------------------------------


@without_compiler()
def check_verify() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import kvt_compile
    from kvt_compile.parallel import context_parallel

    mesh, model, whole = init_device_mesh("cpu", (2,)), Model(causal=True), _inputs(ties=False)[:3]
    with context_parallel(mesh, order="balanced") as context:
        mine = [context.shard(x, 2) for x in whole]

        def cut(x: Tensor) -> Tensor:
            return context.shard(x, 2)

        inside = kvt_compile.verify(model, *mine, whole=whole, cut=cut, reproduce_in=False)
        with pytest.raises(kvt_compile.VerificationError, match="give whole="):
            kvt_compile.verify(model, *mine, reproduce_in=False)
    assert inside.ok, inside
    assert inside.together is not None
    outside = kvt_compile.verify(model, *mine, whole=whole, cut=cut, reproduce_in=False)
    assert not outside.ok
    assert "over its own keys" in str(outside)
    by_itself = kvt_compile.verify(model, *mine, reproduce_in=False)  # each its own: right in data parallelism
    assert by_itself.ok
    assert f"one of {dist.get_world_size()} ranks" in by_itself.note


def test_verify_tells_a_part_of_a_sequence_from_a_whole_one(run: Run) -> None:
    run(2, check_verify)


def test_verify_takes_both_or_none() -> None:
    import kvt_compile

    with pytest.raises(kvt_compile.VerificationError, match="go together"):
        kvt_compile.verify(Model(causal=True), torch.randn(1, 2, 3, 4), whole=())
