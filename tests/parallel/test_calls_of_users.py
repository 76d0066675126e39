"""Calls as users write them, on DTensors and under context parallelism: one process's results, or a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from no_compiler import without_compiler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., list[Any]]
SHAPE = (2, 4, 24, 8)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


# ---- DTensors --------------------------------------------------------------------------------------------------------


def _same(function: Callable[..., Tensor], tensors: Sequence[Tensor], at: Sequence[Any], needs: Sequence[bool]) -> None:
    """Of whole tensors and of DTensors: result, and the gradients that exist."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone = [_leaf(x).requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    cut = [distribute_tensor(x.detach(), mesh, [place]) for x, place in zip(alone, at, strict=True)]
    cut = [x.requires_grad_(need) for x, need in zip(cut, needs, strict=True)]
    expected, found = function(*alone), function(*cut)
    torch.testing.assert_close(found.full_tensor(), expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(distribute_tensor(grad, mesh, found.placements))
    for x, y in zip(alone, cut, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(y.grad.full_tensor(), x.grad)


def check_uneven(lowering: str) -> None:
    """Sizes that the ranks do not divide; of five, the last of four ranks has nothing."""
    from torch.distributed.tensor import Replicate, Shard

    import kvt_compile

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvt_compile.topk_attention(q, k, v, topk=0.5, is_causal=True, lowering=lowering)

    tensors = [torch.randn(5, 3, 5, 8) for _ in range(3)]
    for at in ((Shard(0),) * 3, (Shard(1),) * 3, (Shard(2), Replicate(), Replicate()), (Shard(2),) * 3):
        _same(attend, tensors, at, (True, True, True))


@pytest.mark.parametrize(("ranks", "lowering"), [(2, "auto"), (4, "aten")])
def test_sizes_that_ranks_do_not_divide(run: Run, ranks: int, lowering: str) -> None:
    run(ranks, check_uneven, lowering)


def check_gradients_of_some() -> None:
    """Only the bias is trained, or only the values are."""
    from torch.distributed.tensor import Replicate, Shard

    import kvt_compile

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return kvt_compile.topk_attention(q, k, v, topk=3, attn_mask=bias, lowering="aten")

    tensors = [*(torch.randn(2, 4, 6, 8) for _ in range(3)), torch.randn(4, 6, 6)]
    whole = Replicate()
    for at in ((*(Shard(0),) * 3, whole), (*(Shard(1),) * 3, whole), (Shard(2), whole, whole, Shard(1))):
        for needs in ((False, False, False, True), (False, False, True, False)):
            _same(attend, tensors, at, needs)


def test_gradients_of_some_alone(run: Run) -> None:
    run(2, check_gradients_of_some)


def check_key_heads() -> None:
    """Fewer key heads than ranks, more, and a number that ranks do not divide."""
    from torch.distributed.tensor import Replicate, Shard

    import kvt_compile

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvt_compile.topk_attention(q, k, v, topk=3, enable_gqa=True, lowering="aten")

    for heads in (1, 2, 3, 6):
        tensors = [torch.randn(2, 6, 6, 8), *(torch.randn(2, heads, 6, 8) for _ in range(2))]
        for at in ((Shard(1),) * 3, (Shard(1), Replicate(), Replicate())):
            _same(attend, tensors, at, (True, True, True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_key_heads_and_ranks(run: Run, ranks: int) -> None:
    run(ranks, check_key_heads)


def check_masks_and_autocast() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import kvt_compile

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q = torch.randn(2, 4, 6, 8)
    for shape in ((6, 6), (4, 6, 6), (2, 1, 6, 6), (2, 1, 1, 6), (1, 4, 1, 6)):
        mask = torch.randn(shape) > -0.5
        lying = distribute_tensor(mask, mesh, [Replicate()])
        expected = kvt_compile.topk_attention(q, q, q, topk=3, attn_mask=mask, lowering="aten")
        for place in (Shard(0), Shard(1), Shard(2)):
            x = distribute_tensor(q, mesh, [place])
            found = kvt_compile.topk_attention(x, x, x, topk=3, attn_mask=lying, lowering="aten")
            torch.testing.assert_close(found.full_tensor(), expected)
            with torch.autocast("cpu", torch.bfloat16):
                low, lower = (kvt_compile.topk_attention(y, y, y, topk=3, lowering="aten") for y in (q, x))
            assert lower.dtype == torch.bfloat16
            torch.testing.assert_close(lower.full_tensor(), low)


def test_masks_and_autocast_on_dtensors(run: Run) -> None:
    run(2, check_masks_and_autocast)


def check_other_mesh() -> list[list[tuple[int, ...]]]:
    """A rank that is not of the mesh makes the calls too, as SPMD programs do."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    import kvt_compile

    x = distribute_tensor(torch.randn(SHAPE), DeviceMesh("cpu", [0]), [Replicate()]).requires_grad_()
    out = kvt_compile.topk_attention(x, x, x, topk=3, dropout_p=0.3, lowering="aten")
    weights = torch.ops.kvt.topk_softmax(x, -1, 3, torch.float32, "aten")
    (out + weights).sum().backward()
    assert out.shape == weights.shape == x.grad.shape == SHAPE
    return [[tuple(y.to_local().shape) for y in (out, weights, x.grad)]]


def test_ranks_that_are_not_of_the_mesh(run: Run) -> None:
    ((inside,), (outside,)) = run(2, check_other_mesh)
    assert inside == [SHAPE] * 3
    assert outside == [(0,)] * 3


SELECTIONS = (
    ("window(3) & topk(2)", 0),
    ("(window(3) | prefix) & topk(2)", 1),
    ("sinks(2) | window(3)", 0),
    ("halo(2, 1)", 0),
    ("shifted(2)", 0),
    ("regions(2, 2) & topk(2)", 0),
    ("regions(2, 2, heads=all)", 0),
    ("regions(2, 2, by=max, heads=2)", 0),
    ("keys(3)", 0),
    ("heads(2)", 0),
    ("mass(0.7)", 0),
    ("topk(3, ties=lowest)", 0),
)


def check_selections() -> None:
    """Of every kind, however q, k and v lie: the batch is cut, heads where they choose by themselves, never tokens."""
    from torch.distributed.tensor import Replicate, Shard

    import kvt_compile
    from kvt_compile.kernels.op.selection import counts_heads

    whole, tensors = Replicate(), [torch.randn(2, 4, 6, 8) for _ in range(3)]
    for text, prefix in SELECTIONS:
        lies: list[Any] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, text: str = text, prefix: int = prefix) -> Tensor:
            out = kvt_compile.attention(q, k, v, select=text, grid=(-1,), prefix=prefix, lowering="aten")
            lies.extend(getattr(out, "placements", ()))  # noqa: B023 - called in this turn
            return out

        for at in ((Shard(0),) * 3, (Shard(1),) * 3, (Shard(2), whole, whole), (Shard(2),) * 3):
            _same(attend, tensors, at, (True, True, True))
        assert lies[0] == Shard(0)
        assert (lies[1] == Shard(1)) == (not counts_heads(text)), text
        assert Shard(2) not in lies


def test_selections_on_dtensors(run: Run) -> None:
    run(2, check_selections)


# ---- context parallelism ---------------------------------------------------------------------------------------------


def _mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


@without_compiler()
def check_whole_keys() -> None:
    """Cross-attention: keys that are cut too are right, keys that every rank has whole are told."""
    import kvt_compile
    from kvt_compile.parallel import ContextParallelError, context_parallel

    q, text = torch.randn(SHAPE), torch.randn(2, 4, 10, 8)
    expected = kvt_compile.topk_attention(q, text, text, topk=0.3)
    with context_parallel(_mesh()) as context:
        rows, keys = context.shard(q, 2), context.shard(text, 2)
        found = kvt_compile.topk_attention(rows, keys, keys, topk=0.3)
        torch.testing.assert_close(context.unshard(found, 2), expected)
        with pytest.raises(ContextParallelError, match=r"10 keys .* are the same on all 2 ranks"):
            kvt_compile.topk_attention(rows, text, text, topk=0.3)
        kvt_compile.topk_attention(rows, torch.ones(2, 4, 9, 8), torch.ones(2, 4, 9, 8), topk=3)  # tells nothing


def test_keys_that_every_rank_has_are_told(run: Run) -> None:
    run(2, check_whole_keys)


@without_compiler()
def check_checkpoint(reentrant: bool) -> None:
    import kvt_compile
    from kvt_compile.kernels.op.lowerings import LoweringError
    from kvt_compile.parallel import context_parallel

    def attend(x: Tensor) -> Tensor:
        return kvt_compile.topk_attention(x, x, x, topk=5, is_causal=True)

    alone = _leaf(torch.randn(SHAPE))
    attend(alone).square().sum().backward()
    with context_parallel(_mesh(), order="balanced") as context:
        x, y = (_leaf(context.shard(alone, 2)) for _ in range(2))
        checkpoint(attend, x, use_reentrant=reentrant).square().sum().backward()
        late, plain = checkpoint(attend, y, use_reentrant=reentrant), attend(y)
        torch.testing.assert_close(x.grad, context.shard(alone.grad, 2), atol=1e-4, rtol=1e-4)
    plain.square().sum().backward()  # nothing is computed again
    torch.testing.assert_close(y.grad, x.grad)
    with pytest.raises(LoweringError, match="call backward inside as well"):
        late.square().sum().backward()
    after = _leaf(alone)  # attention that never was inside is nobody's business
    checkpoint(attend, after, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(after.grad, alone.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_are_recomputed_inside(run: Run, reentrant: bool) -> None:
    run(2, check_checkpoint, reentrant)


def check_refused_selections() -> None:
    """A grid is that of all tokens: in every way in the reason is told, and nothing is computed over a part."""
    import kvt_compile
    from kvt_compile.parallel import ContextParallelError, context_parallel

    with context_parallel(_mesh()) as context:
        x = context.shard(torch.randn(SHAPE), 2)
        for text, _ in SELECTIONS:
            with pytest.raises(ContextParallelError, match="whose grid is that of all tokens"):
                kvt_compile.attention(x, x, x, select=text, grid=(-1,))
            torch.compiler.reset()
            compiled = torch.compile(Causal(), backend="kvt", options={"select": text, "grid": -1, "then": "aot_eager"})
            with pytest.raises(Exception, match="the grid of a selection is that of all tokens"):  # as Dynamo wraps it
                compiled(x)
        module = kvt_compile.rewrite(Causal(), x, topk=5).module
        kvt_compile.set_topk(module, 3)
        with pytest.raises(kvt_compile.RefusalError, match="the grid of a selection is that of all tokens"):
            kvt_compile.rewrite(Causal(), x, select="keys(3)")


def test_selections_are_refused_over_a_part_of_the_tokens(run: Run) -> None:
    run(2, check_refused_selections)


class Weights(nn.Module):
    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ q.transpose(-1, -2)).softmax(-1)
        return weights @ q, weights


def check_group_of_one() -> None:
    """A mesh dimension of one rank changes nothing: weights and selections too are those of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import kvt_compile
    from kvt_compile.parallel import context_parallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "cp"))
    q, compiled = torch.randn(SHAPE), torch.compile(Weights(), backend="kvt", options={"topk": 4, "then": "aot_eager"})
    expected = *compiled(q), kvt_compile.attention(q, q, q, select="window(3)", grid=(24,))
    with context_parallel(mesh, "cp") as context:
        found = *compiled(q), kvt_compile.attention(q, q, q, select="window(3)", grid=(24,))
        assert torch.equal(context.shard(q, 2), q)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_context_of_one_rank(run: Run) -> None:
    run(2, check_group_of_one)


@without_compiler()
def check_shares_of_integrations() -> None:
    """A share counts keys of the whole sequence in transformers' attention too."""
    from types import SimpleNamespace

    import kvt_compile
    from kvt_compile.integrations.transformers import attention
    from kvt_compile.parallel import context_parallel

    module, q = nn.Module(), torch.randn(SHAPE)
    for topk in (0.25, 3, None):
        module.config = SimpleNamespace(kvt_topk=topk)
        expected = attention(module, q, q, q, None, is_causal=True)[0]
        with kvt_compile.options(topk=0.4):
            other = attention(module, q, q, q, None, is_causal=True)[0]
        with context_parallel(_mesh(), order="balanced") as context:
            x = context.shard(q, 2)
            torch.testing.assert_close(
                context.unshard(attention(module, x, x, x, None, is_causal=True)[0], 1), expected
            )
            with kvt_compile.options(topk=0.4):
                torch.testing.assert_close(
                    context.unshard(attention(module, x, x, x, None, is_causal=True)[0], 1), other
                )


def test_shares_in_transformers_attention(run: Run) -> None:
    run(2, check_shares_of_integrations)


@without_compiler()
def check_low_precision_and_masks(way: str) -> None:
    """Halves, autocast, and a mask of padded keys that is cut as the tokens are."""
    import kvt_compile
    from kvt_compile.parallel import context_parallel

    whole, mask = [torch.randn(SHAPE) for _ in range(3)], torch.rand(2, 1, 1, 24) < 0.7

    def attend(tensors: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        q, k, v = tensors
        with torch.autocast("cpu", torch.bfloat16):
            low = kvt_compile.topk_attention(q, k, v, topk=5, is_causal=True)
        halves = [x.bfloat16() for x in tensors]
        return [
            kvt_compile.topk_attention(q, k, v, topk=0.3, attn_mask=mask),
            kvt_compile.topk_attention(q, k, v, topk=3, attn_mask=mask & False),  # rows without a key: zeros
            low,
            kvt_compile.topk_attention(*halves, topk=5),
            kvt_compile.topk_attention(*(x.flatten(0, 1) for x in tensors), topk=5).unflatten(0, (2, 4)),
        ]

    expected = attend(whole, mask)
    with context_parallel(_mesh(), order="balanced", way=way) as context:
        found = attend([context.shard(x, 2) for x in whole], context.shard(mask, 3))
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype
            close = {"atol": 2e-2, "rtol": 2e-2} if y.dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 2e-5}
            torch.testing.assert_close(context.unshard(x, 2), y, **close)


@pytest.mark.parametrize("way", ["gather", "count"])
def test_low_precision_and_masks_of_keys(run: Run, way: str) -> None:
    run(2, check_low_precision_and_masks, way)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x.sin(), x, is_causal=True)


class Near(nn.Module):
    """A window of places, which are given; where they are not, the model counts its tokens itself."""

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        rows, keys = (torch.arange(x.shape[2]) if places is None else places.clone() for _ in range(2))
        apart = rows[:, None] - keys
        scores = (x @ x.mT * 0.3).masked_fill(apart < 0, -torch.inf).masked_fill(apart > 6, -torch.inf)
        return scores.softmax(-1) @ x


@without_compiler()
def check_positions() -> None:
    """Places in the sequence are right, those in a part are told, whichever way they are compared."""
    import kvt_compile
    from kvt_compile.parallel import ContextParallelError, context_parallel

    x, places = torch.randn(SHAPE), torch.arange(24)
    expected = kvt_compile.rewrite(Near(), x, places, topk=3).module(x, places)
    for order in ("contiguous", "balanced"):
        with context_parallel(_mesh(), order=order) as context:
            mine, where = context.shard(x, 2), context.positions(12)
            found = kvt_compile.rewrite(Near(), mine, where, topk=3).module(mine, where)
            torch.testing.assert_close(context.unshard(found, 2), expected, atol=2e-5, rtol=2e-5)
            with pytest.raises(ContextParallelError, match="places in a part"):
                kvt_compile.rewrite(Near(), mine, topk=3).module(mine)
            half = where.float() / 2  # of a rank, and not of all: nothing is wrong
            torch.ops.kvt.attention(
                mine, mine, mine, [half], "s + c0[j]", "p", 3, [], 0.0, None, context.name
            )  # fmt: skip
            with pytest.raises(ContextParallelError, match="places in a part"):
                torch.ops.kvt.attention(
                    mine, mine, mine, [-torch.arange(12.0)], "s*c0[i]", "p", 3, [], 0.0, None, context.name
                )
            with pytest.raises(ContextParallelError, match="places in a part"):
                kvt_compile.topk_attention(mine, mine, mine, topk=3, attn_mask=torch.arange(12)[None] > 4)
            kvt_compile.topk_attention(mine, mine, mine, topk=3, attn_mask=where[None] > 4)


def test_places_are_those_in_the_sequence(run: Run) -> None:
    run(2, check_positions)


@without_compiler()
def check_lengths() -> None:
    """One compiled model, sequences of three lengths: the third is a graph for any."""
    import kvt_compile
    from kvt_compile.parallel import context_parallel

    compiled = torch.compile(Causal(), backend="kvt", options={"topk": 0.25, "then": "aot_eager"})
    for tokens in (16, 24, 40):
        alone = _leaf(torch.randn(1, 2, tokens, 8))
        expected = kvt_compile.topk_attention(alone, alone.sin(), alone, topk=0.25, is_causal=True)
        expected.square().sum().backward()
        with context_parallel(_mesh(), order="balanced") as context:
            mine = _leaf(context.shard(alone, 2))
            found = compiled(mine)
            torch.testing.assert_close(context.unshard(found, 2), expected, atol=2e-5, rtol=2e-5)
        found.square().sum().backward()
        torch.testing.assert_close(mine.grad, context.shard(alone.grad, 2), atol=1e-4, rtol=1e-4)


def test_sequences_of_many_lengths(run: Run) -> None:
    run(2, check_lengths)
