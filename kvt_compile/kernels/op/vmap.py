"""One call of an op under torch.vmap -> one call with the mapped dimension folded into the batch, or a loop of calls.

    rule(size, in_dims, *arguments of the operator) -> results, their mapped dimensions

`function.py` uses the rules for torch.func; `register` for the older vmap under which
`torch.autograd.grad(is_grads_batched=True)` and `torch.autograd.functional.jacobian(vectorize=True)` run a backward.

Folding `[V, B, ...]` into `[V*B, ...]` renumbers b, so it is right only where nothing reads b: no captured tensor is
mapped or indexed by b, and there is no dropout, whose draw depends on b.  A gradient of an unmapped captured tensor
would be summed over V; vmap wants V of them.  In those cases: a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kvt_compile.kernels.language import score as language

Dims = Any


def attention(size: int, dims: Sequence[Dims], *args: Any) -> tuple[Any, Any]:
    """out, logsumexp, threshold."""
    captured_mapped = any(dim is not None for dim in dims[3] or ())
    score, weight, dropout_p = args[4], args[5], args[8]
    if captured_mapped or dropout_p > 0.0 or _reads_batch(score) or _reads_batch(weight):
        return _loop(torch.ops.kvt.attention, size, dims, args), (0, 0, 0)
    q, k, v = (_fold(x, dim, size) for x, dim in zip(args[:3], dims[:3], strict=True))
    return tuple(_unfold(x, size) for x in torch.ops.kvt.attention(q, k, v, *args[3:])), (0, 0, 0)


def attention_backward(size: int, dims: Sequence[Dims], *args: Any) -> tuple[Any, Any]:
    """dq, dk, dv, [dcaptured]."""
    captured, captured_dims = args[4] or (), dims[4] or ()
    score, weight, dropout_p, needs_grad = args[8], args[9], args[12], args[14]
    out_dims = (0, 0, 0, [0] * len(captured))
    captured_mapped = any(dim is not None for dim in captured_dims) or any(needs_grad[3:])
    if captured_mapped or dropout_p > 0.0 or _reads_batch(score) or _reads_batch(weight):
        return _loop(torch.ops.kvt.attention_backward, size, dims, args), out_dims
    grad_out, q, k, v, out, logsumexp, threshold = (_fold(args[n], dims[n], size) for n in (0, 1, 2, 3, 5, 6, 7))
    logsumexp, threshold = logsumexp.contiguous(), threshold.contiguous()  # as the forward op returned them
    results = torch.ops.kvt.attention_backward(grad_out, q, k, v, captured, out, logsumexp, threshold, *args[8:])
    grads = [
        _unfold(x, size) if need else x.new_empty((size, 0))
        for x, need in zip(results[:3], needs_grad[:3], strict=True)
    ]
    return (*grads, [x.new_empty((size, 0)) for x in results[3]]), out_dims


def topk_softmax(size: int, dims: Sequence[Dims], *args: Any) -> tuple[Tensor, int]:
    """The weights."""
    return _rowwise(torch.ops.kvt.topk_softmax, size, dims, *args)


def topk_softmax_backward(size: int, dims: Sequence[Dims], *args: Any) -> tuple[Tensor, int]:
    """The gradient of the scores."""
    return _rowwise(torch.ops.kvt.topk_softmax_backward, size, dims, *args)


def _rowwise(op: Callable[..., Tensor], size: int, dims: Sequence[Dims], *args: Any) -> tuple[Tensor, int]:
    """topk_softmax and its backward know one dimension; every other, a mapped one too, is only more rows."""
    tensors = [
        x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        for x, dim in zip(args, dims, strict=True)
        if isinstance(x, Tensor)
    ]
    dim, *rest = args[len(tensors) :]
    if tensors[0].dim() == 1:
        # each is a 0-d tensor: a row of one
        return op(*(x.unsqueeze(-1) for x in tensors), 1, *rest).squeeze(-1), 0
    return op(*tensors, dim + 1 if dim >= 0 else dim, *rest), 0


def _reads_batch(text: str) -> bool:
    return language.b in language.parse(text).free_symbols


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """-> `[V*B, ...]`; an unmapped tensor with B = 1 stays a view."""
    x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // max(size, 1), *x.shape[1:])


def _loop(op: Callable[..., Any], size: int, dims: Sequence[Dims], args: Sequence[Any]) -> tuple[Any, ...]:
    calls = [op(*(_pick(x, dim, n) for x, dim in zip(args, dims, strict=True))) for n in range(size)]
    return tuple(
        [torch.stack(tensors) for tensors in zip(*results, strict=True)]
        if isinstance(results[0], (list, tuple))
        else torch.stack(results)
        for results in zip(*calls, strict=True)
    )


def _pick(x: Any, dim: Dims, n: int) -> Any:
    if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_pick(y, d, n) for y, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, n)


# ---- the older vmap ------------------------------------------------------------------------------------------------


def register(library: torch.library.Library) -> None:
    """Gives every operator its rule for the dispatch key of the older vmap."""
    for name, rule in (
        ("attention", attention),
        ("attention_backward", attention_backward),
        ("topk_softmax", topk_softmax),
        ("topk_softmax_backward", topk_softmax_backward),
    ):
        library.impl(name, _for_older_vmap(rule), "Batched")


def _for_older_vmap(rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # (no public name says which level is running; torch's own vmap counts them so.)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        leaves, spec = pytree.tree_flatten(args)
        mapped = [isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in leaves]
        # the size that is passed is of use only where a tensor is not mapped
        plain = [torch._remove_batch_dim(x, level, 1, 0) if here else x for x, here in zip(leaves, mapped, strict=True)]
        size = next(x.shape[0] for x, here in zip(plain, mapped, strict=True) if here)
        dims = pytree.tree_unflatten([0 if here else None for here in mapped], spec)
        results, _ = rule(size, dims, *pytree.tree_unflatten(plain, spec))
        return pytree.tree_map_only(Tensor, lambda x: torch._add_batch_dim(x, 0, level), results)

    return run
