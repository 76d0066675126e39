"""Assembled pieces -> `AttentionSite`: the facts a person reads beside the plan the rewrite follows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import sympy
import torch
from torch import fx

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.coords import Atom, Coords, Space
from kvt_compile.passes.canonical.made import name_of
from kvt_compile.passes.canonical.values import Dim, Value, meta_value
from kvt_compile.passes.finding.assemble import Assembled, size_of
from kvt_compile.passes.finding.miss import Miss
from kvt_compile.passes.site import (
    AttentionSite,
    Axis,
    Captured,
    Fused,
    KeysFrom,
    Operand,
    ScoresKept,
    Size,
    Thinned,
    Where,
)

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CAPTURE = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "capture") + os.sep


def in_torch(file: str) -> bool:
    """Whether a line of code is torch's own and not the model's."""
    return file.startswith(_TORCH)


def place(node: fx.Node) -> Where:
    """Module path, file and line a node came from, as far as the capture recorded them."""
    names = node.meta.get("kvt_names") or (_path(node),)
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or node.stack_trace or "")
    # symbolic_trace records its own frames below the model's
    frames = [frame for frame in frames if not frame[0].startswith(_CAPTURE)]
    model_frames = [frame for frame in frames if not in_torch(frame[0])] or frames
    file, line = model_frames[-1] if model_frames else ("", "0")
    return Where(names[0], file, int(line), tuple(names[1:]))


def _path(node: fx.Node) -> str:
    """The path relative to what was captured."""
    # a model's own names, whatever a function that runs it calls the model:
    # L['self'].head, L['args'][0].head, G['net'].head
    path = re.sub(r"\b[LG]\[['\"][^'\"]+['\"]\](?:\[\d+\])*\.?", "", captured_path(node))
    path = re.sub(r"^L__self___?|^self\.", "", path)
    # where a class has a __getattr__ of its own, Dynamo looks into __dict__
    path = re.sub(r"(?:\.?__dict__\[['\"]_modules['\"]\]|\._modules)\[['\"]([^'\"]+)['\"]\]", r".\1", path).lstrip(".")
    return path


def captured_path(node: fx.Node) -> str:
    """The module path as the capture wrote it: `L['self'].blocks[0].attn`; empty where there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry for entry in stack.values() if isinstance(entry, tuple)]
    while entries and "Softmax" in getattr(entries[-1][-1], "__name__", str(entries[-1][-1])):
        entries.pop()  # an nn.Softmax is part of the attention, not its name
    return str(entries[-1][0]) if entries else ""


def size_text(size: Dim) -> Size:
    return size if isinstance(size, int) else str(size)


def _sizes(*groups: Iterable[Atom]) -> tuple[Size, ...]:
    return tuple(size_text(size_of(tuple(group))) for group in groups)


def _named(expression: sympy.Expr, names: list[str]) -> str:
    """The expression with captured tensors by the graph's own names, for people."""
    return re.sub(r"\bc(\d+)\b", lambda match: names[int(match[1])], language.to_text(expression))


def describe_fused(
    anchor: Value,
    node: fx.Node,
    assembled: Assembled,
    out: Coords,
    space: Space,
    interior: frozenset[Value],
    dropout: float,
    dropout_module: str,
) -> AttentionSite:
    groups = assembled.groups
    names = _unique([name_of(leaf.value) for leaf in assembled.captured])
    captured = []
    for slot, leaf in enumerate(assembled.captured):
        reads = [x for e in (assembled.score, assembled.weight) for x in language.loads(e) if x.slot == slot]
        fake = leaf.value
        captured.append(
            Captured(
                names[slot], tuple(size_text(s) for s in fake.shape), str(fake.dtype).removeprefix("torch."),
                "; ".join(_named(x, names) for x in reads), _requires_grad(fake),
            )
        )  # fmt: skip
    plan = Fused(
        node, assembled.q, assembled.k, assembled.v, groups,
        tuple(c.digits for c in space.resolve_all(out)),
        language.to_text(assembled.score), language.to_text(assembled.weight),
        tuple(leaf.value for leaf in assembled.captured), assembled.sizes, dropout, dropout_module,
        assembled.sources, interior | anchor.attrs.get("selection", frozenset()),
    )  # fmt: skip
    batch, heads, kv_heads, queries, keys, head_dim, value_dim = _sizes(
        groups.batch, (*groups.kv_heads, *groups.group), groups.kv_heads, groups.queries, groups.keys,
        groups.features, groups.value_features,
    )  # fmt: skip
    weight = _named(assembled.weight, names) + (f"*dropout({dropout:g})" if dropout else "")
    return AttentionSite(
        place(anchor.node), anchor.node, "fused", assembled.axis, batch, heads, kv_heads, queries, keys,
        head_dim, value_dim, _dtype_name(assembled.q), _named(assembled.score, names), weight, tuple(captured), plan,
        anchor=anchor,
        lost_behind=assembled.lost_behind,
        own=anchor.attrs.get("own"),
        keys_from=assembled.keys_from,
    )  # fmt: skip


def _requires_grad(value: Value) -> bool:
    if not value.attached:
        return False
    fake = meta_value(value.holder or value.node)
    return bool(getattr(fake, "requires_grad", False))


def _dtype_name(operand: Operand) -> str:
    return str(operand.dtype).removeprefix("torch.")


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}.{n}" for n, name in enumerate(names)]


def describe_kept(
    anchor: Value,
    plan: ScoresKept | Thinned,
    kind: tuple[Axis, str, KeysFrom | None],
    head_dim: Dim,
    value_dim: Dim,
    miss: Miss,
) -> AttentionSite:
    """A scores-kept site; its score tensor has any rank, so sizes are those of its last axes."""
    axis, lost_behind, came = kind
    shape = [size_text(s) for s in anchor.shape]
    keys = shape.pop(plan.dim)
    queries = shape.pop() if shape else 1
    heads = shape.pop() if shape else 1
    batch: Size = 1
    for size in shape:
        batch = batch * size if isinstance(batch, int) and isinstance(size, int) else f"{batch}*{size}"
    return AttentionSite(
        place(anchor.node), anchor.node, "scores-kept", axis, batch, heads, heads, queries, keys,
        size_text(head_dim), size_text(value_dim), str(plan.scores.dtype).removeprefix("torch."),
        plan.scores.node.name, "p", (), plan, miss.reason, anchor, lost_behind,
        anchor.attrs.get("own"), came,
    )  # fmt: skip
