"""Opaque composites -> the operations they are made of, in place.

    multi_head_attention_forward(q, k, v, ...)   ->   linear, view, bmm, softmax, bmm, linear
    _transformer_encoder_layer_fwd(x, ...)       ->   the same plus layer norms and the feed-forward

Only what hides attention is expanded; everything else stays one node, as its author wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from kvt_compile.passes.canonical.modes import Mode, modes_of, running_as
from kvt_compile.passes.canonical.spellings import canonical_name
from kvt_compile.passes.canonical.values import meta_value


def expand_composites(gm: fx.GraphModule, entry: Mode | None = None) -> bool:
    """Expands every known composite of the graph in place; returns whether there was one.  `entry`: the mode the graph
    starts in, where it is not the usual one."""
    modes = modes_of(gm.graph, entry or Mode())
    calls = [(n, canonical_name(n.target)) for n in gm.graph.nodes if n.op == "call_function"]
    found = [(n, _COMPOSITES[name]) for n, name in calls if name in _COMPOSITES]
    found = [x for x in found if not modes[x[0]].transforms]  # what a capture left on those is of a level that is gone
    for node, function in found:
        with running_as(modes[node]):
            _expand(gm, node, function)
    if found:
        gm.graph.lint()
        gm.recompile()
    return bool(found)


def _expand(gm: fx.GraphModule, node: fx.Node, function: Callable[..., Any]) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    fakes = [meta_value(source) for source in sources]

    def call(*values: Any) -> Any:
        known = dict(zip(sources, values, strict=True))
        args, kwargs = pytree.tree_unflatten(
            [known[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec
        )
        return function(*args, **kwargs)

    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    with mode:
        traced = make_fx(call, pre_dispatch=True)(*fakes)
    results = _inline(gm, node, traced, sources)
    _take_over(gm.graph, node, results)


def _inline(gm: fx.GraphModule, node: fx.Node, traced: fx.GraphModule, sources: list[fx.Node]) -> Any:
    """Copies the traced nodes in front of `node` and returns what they return."""
    inputs = iter(sources)
    env: dict[fx.Node, Any] = {}
    key = "example_value" if "example_value" in node.meta else "val"
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                return fx.map_arg(inner.args[0], lambda n: env[n])
            elif inner.op == "get_attr":
                name = f"{node.name}_{inner.target}"
                setattr(gm, name, getattr(traced, str(inner.target)))
                env[inner] = gm.graph.get_attr(name)
                env[inner].meta[key] = inner.meta.get("val")
            else:
                copy = gm.graph.node_copy(inner, lambda n: env[n])
                value = copy.meta.pop("val", None)
                copy.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace", "kvt_names")}
                copy.meta[key] = value
                env[inner] = copy
    raise AssertionError("a traced graph ends with an output node")


def _take_over(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):  # getitem(node, n)
            item = results[user.args[1]]
            if isinstance(item, fx.Node):
                user.replace_all_uses_with(item)
            graph.erase_node(user)
    graph.erase_node(node)


def _encoder_layer(
    src: torch.Tensor, embed_dim: int, num_heads: int, qkv_weight: torch.Tensor, qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor, proj_bias: torch.Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: torch.Tensor, norm_bias_1: torch.Tensor, norm_weight_2: torch.Tensor, norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor, ffn_bias_1: torch.Tensor, ffn_weight_2: torch.Tensor, ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None, mask_type: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The inference fast path of `nn.TransformerEncoderLayer`, written out (batch first, as the fast path requires)."""

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attention(x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v, _fast_path_mask(mask, mask_type, x))
        return F.linear(out.transpose(1, 2).reshape(batch, tokens, embed_dim), proj_weight, proj_bias)

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attention(norm(src, norm_weight_1, norm_bias_1))
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attention(src), norm_weight_1, norm_bias_1)
    return norm(src + feed_forward(src), norm_weight_2, norm_bias_2)


def _fast_path_mask(mask: torch.Tensor | None, mask_type: int | None, x: torch.Tensor) -> torch.Tensor | None:
    """The fast path's three mask types (0: source, 1: padding, 2: both, already merged) as an SDPA mask."""
    if mask is None:
        return None
    if mask_type == 1:
        mask = mask.view(x.shape[0], 1, 1, x.shape[1])
    return mask.logical_not() if mask.dtype is torch.bool else mask


_COMPOSITES: dict[str | None, Callable[..., Any]] = {
    "multi_head_attention_forward": F.multi_head_attention_forward,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
