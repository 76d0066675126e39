"""The strategies: programs that are attention in some spelling, and programs that only nearly are.

positives()   softmax(f(Q K^T)) V, whatever the spelling: has to be found
writes()      the same with in-place writes on the way, through slices and views
anything()    the same with one or more things wrong: refused, kept or rewritten, but never with another meaning
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz_ops as ops
import fuzz_products as products
import torch
from fuzz_graphs import Labelled, Program, Writer
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def positives(draw: Draw) -> Program:
    return _write(Writer(draw), wild=False)


@st.composite
def writes(draw: Draw) -> Program:
    return _write(Writer(draw), writing=60)


@st.composite
def anything(draw: Draw) -> Program:
    return _write(Writer(draw), wild=True, writing=25)


def _write(w: Writer, *, wild: bool = False, writing: int = 0) -> Program:
    batch, queries, keys = _sizes(w)
    q, k, v = _operands(w, batch, queries, keys)
    w.tag(plain=w.size(keys) > 1 and w.sizes["d"] > 1)
    twist = w.pick(*_TWISTS) if wild else ""
    w.tag(*([f"twist:{twist}"] if twist else []), plain=not twist)
    if not twist and w.chance(12):
        out = products.sdpa(w, q, k, v, keys)
        w.program.returns = [out.name]
        return w.program
    if twist == "learned_queries":
        q = w.tensor(w.shuffled((*queries, "d")), origin="parameter")
    if twist == "learned_keys":
        k = w.tensor(w.shuffled((*keys, "d")), origin="parameter")
    if twist == "learned_values":
        v = w.tensor(w.shuffled((*keys, "e")), origin="parameter")
    s = products.product(w, products.prepared(w, q, "d"), products.prepared(w, k, "d"), ("d",), added=True)
    s = _scores(w, s, q, keys, writing, (*ops.WRITES, ops.mixed) if wild else ops.WRITES)
    if not twist and w.chance(15):
        s = ops.some_rows(w, s, queries)
    if twist == "two_products":
        other = products.product(w, q, k, ("d",))
        s = w.let(f"{s.name} + {w.arranged(other, s.dims).name}", s.dims)
    a, s = _weights(w, s, keys, twist)
    if w.chance(50):
        a = _steps(w, a, ops.WEIGHTS, w.number(1, 2))
    if wild and w.chance(25):
        a = w.pick(*ops.ODD_WEIGHTS)(w, a)
    out = _values(w, a, v, s, keys, twist)
    if not twist and w.value(out).dtype == torch.float64 and w.chance(8):
        out = _again(w, out, tuple(y for y in batch if y in out.labels), keys)
    if w.program.anchors == 1 and w.size(keys) > 1:
        never = ("learned_keys", "learned_values", "elementwise", "no_values")
        w.program.negative = twist in never or "negative" in w.program.tags
    w.program.returns = [out.name, *_also_returned(w, a, s, twist)]
    return w.program


def _again(w: Writer, out: Labelled, batch: tuple[str, ...], keys: tuple[str, ...]) -> Labelled:
    """A second attention whose queries are the first one's result."""
    w.tag("again")
    w.sizes["f"] = 2
    k, v = products.operand(w, (*batch, *keys, "e"), "e"), products.operand(w, (*batch, *keys, "f"), "f")
    s = ops.scale(w, products.product(w, out, k, ("e",)))
    a, _ = _weights(w, s, keys, "")
    if w.value(a).dtype != torch.float64:
        a = w.let(f"{a.name}.double()", a.dims)
    return products.product(w, a, v, keys)


def _sizes(w: Writer) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    w.sizes |= {
        "b": w.pick(2, 1, 3),
        "w": 2,
        "h": w.pick(2, 3, 1),
        "g": 2,
        "d": w.pick(2, 4, 1, 3),
        "e": w.pick(2, 3, 1),
    }
    batch = ("b",) if w.chance(90) else ()
    if w.chance(15):
        batch += ("w",)
    if w.chance(75):
        batch += ("h",)
    queries, keys = ("i",), ("j",)
    if w.chance(20):
        queries, keys = ("iy", "ix"), ("jy", "jx")
    for label in (*queries, *keys):
        w.sizes[label] = w.pick(3, 2, 4, 5, 1) if len(label) == 1 else w.pick(2, 3, 1)
    return batch, queries, keys


def _operands(
    w: Writer, batch: tuple[str, ...], queries: tuple[str, ...], keys: tuple[str, ...]
) -> tuple[Labelled, Labelled, Labelled]:
    if w.chance(25):  # self-attention from one projection: queries and keys are the same tokens
        w.tag("joint")
        for x, y in zip(queries, keys, strict=True):
            w.sizes[y] = w.sizes[x]
        w.sizes["e"] = w.sizes["d"]
        names = dict(zip(queries, keys, strict=True))
        q, k, v = products.joint(w, batch, queries)
        return q, w.renamed(k, names), w.renamed(v, {**names, "d": "e"})
    shared = tuple(y for y in batch if not (y == "h" and w.chance(10)))  # keys with a single head
    grouped = w.chance(15) and "h" in shared
    q = products.operand(w, (*batch, *(("g",) if grouped else ()), *queries, "d"), "d")
    k = products.operand(w, (*shared, *keys, "d"), "d")
    v = products.operand(w, (*shared, *keys, "e"), "e")
    if grouped and w.chance(70):
        w.tag("gqa")
        k, v = products.grouped(w, k, "h", "g"), products.grouped(w, v, "h", "g")
    return q, k, v


def _steps(w: Writer, x: Labelled, steps: tuple[ops.Step, ...], count: int) -> Labelled:
    for _ in range(count):
        step = w.pick(*steps)
        w.tag(step.__name__)
        x = step(w, x)
    return x


def _scores(
    w: Writer, s: Labelled, q: Labelled, keys: tuple[str, ...], often: int, odd: tuple[ops.Step, ...]
) -> Labelled:
    for _ in range(w.number(1 if odd is ops.WRITES and often else 0, 4)):
        s = _steps(w, s, ops.SCORES, 1)
        if w.chance(8):
            s = _relative(w, s, q, keys)
        if often and w.chance(often):
            s = w.pick(*odd)(w, s)
    return s


def _relative(w: Writer, s: Labelled, q: Labelled, keys: tuple[str, ...]) -> Labelled:
    """A bias computed from the queries: q . R, with one row of R per key (decomposed relative positions)."""
    w.tag("relative")
    some = keys if w.chance(50) else keys[-1:]
    table = w.tensor(tuple((y,) for y in (*some, "d")), origin="parameter")
    bias = products.product(w, q, table, ("d",))
    present = [y for y in s.labels if y in bias.labels]
    dims = tuple(tuple(y for y in dim if y in present) for dim in w.split(s).dims)
    opened = w.split(s)
    bias = w.arranged(bias, tuple(d for d in dims if d))
    bias = w.let(f"{bias.name}.reshape({w.sizes_of(dims)})", dims)
    return w.let(f"{opened.name} + {bias.name}", opened.dims)


_TWISTS = (
    "", "", "", "axis", "axis", "return_weights", "return_scores", "two_values", "learned_queries", "learned_keys", "learned_values", "swapped",
    "bidirectional", "differential", "two_products", "sink", "cut", "squared", "value_from_scores", "elementwise", "two_softmaxes",
    "mutated_later", "scores_read", "no_values", "statistics", "statistics",
)  # fmt: skip
"""What makes a program only nearly attention, or attention in an unusual shape."""


def _weights(w: Writer, s: Labelled, keys: tuple[str, ...], twist: str) -> tuple[Labelled, Labelled]:
    """(weights, the scores they were made of)."""
    s = w.arranged(s, w.shuffled(s.labels, alone=[keys]))
    axis = s.at(*keys)
    if twist == "axis":
        axis = w.number(0, len(s.dims) - 1)
        w.tag(*["negative"] * (s.dims[axis] != keys and w.size(s.dims[axis]) > 1))
    if twist == "sink" and len(keys) == 1:
        w.sizes["sink"] = w.size(keys) + 1
        dims = tuple(("sink",) if d == keys else d for d in s.dims)
        ones = tuple(() if d == keys else d for d in s.dims)
        column = w.tensor(
            tuple(() for _ in s.dims),
            origin="parameter",
            value=w.random(()).to(w.value(s).dtype).reshape([1] * len(s.dims)),
        )
        parts = [s.name, f"{column.name}.expand({w.sizes_of(ones)})"]
        first = w.chance(50)
        wide = w.let(f"torch.cat([{', '.join(parts[::-1] if first else parts)}], dim={axis})", dims)
        a = ops.softmax(w, wide, axis)
        at = ", ".join([":"] * axis + ["1:" if first else ":-1"])
        return w.let(f"{a.name}[{at}]", s.dims), s
    a = ops.softmax(w, s, axis)
    if twist in ("differential", "two_softmaxes"):
        other = ops.softmax(w, ops.scale(w, w.let(f"{s.name} * 1.0", s.dims)), axis)
        lam = w.tensor((), origin="parameter")
        a = w.let(f"{a.name} - {lam.name} * {other.name}", a.dims)
    return a, s


def _values(w: Writer, a: Labelled, v: Labelled, s: Labelled, keys: tuple[str, ...], twist: str) -> Labelled:
    names = {"i": "j", "j": "i"}
    square = "i" in a.labels and "j" in a.labels and w.sizes["i"] == w.sizes["j"]
    if twist == "swapped" and square:  # sums over the queries
        a = w.renamed(a, names)
        w.tag("negative")
    if twist == "squared" and square:  # weights times weights
        w.tag("negative")
        other = w.renamed(a, {"i": "j", "j": "i2"})
        w.sizes["i2"] = w.sizes["i"]
        return products.product(w, a, other, ("j",))
    if twist == "value_from_scores":
        v = w.renamed(w.split(s), {**{y: f"{y}2" for y in s.labels if y[0] == "i"}, **{y: y for y in keys}})
        w.sizes |= {f"{y}2": w.sizes[y] for y in s.labels if y[0] == "i"}
    if twist == "elementwise":
        return w.let(f"{a.name} * {w.arranged(s, a.dims).name}", a.dims)
    if twist == "no_values":
        return a
    if twist == "cut" and len(keys) == 1 and w.size(keys) > 1:  # drops a key after the softmax
        at = a.at(*keys) if keys in a.dims else None
        if at is not None:
            w.sizes["cut"] = w.size(keys) - 1
            index = ", ".join([":"] * at + ["1:"])
            a = w.let(f"{a.name}[{index}]", tuple(("cut",) if d == keys else d for d in a.dims))
            v = w.split(v)
            index = ", ".join([":"] * v.at(*keys) + ["1:"])
            v = w.let(f"{v.name}[{index}]", tuple(("cut",) if d == keys else d for d in v.dims))
            keys = ("cut",)
    if twist == "mutated_later":
        w.run(w.pick(f"{v.name} = {v.name} * 1.0\n{v.name}.mul_(0.5)", f"{s.name}.mul_(0.0)"))
    if twist == "statistics":
        _keep_statistics(w, w.pick(a, s))
    if w.value(a).dtype != w.value(v).dtype:
        a = w.let(f"{a.name}.to({w.value(v).dtype})", a.dims)
    out = products.product(w, a, v, keys)
    if twist == "bidirectional" and square:
        other = ops.softmax(w, s, w.renamed(s, names).dims.index(("j",)) if ("j",) in w.renamed(s, names).dims else 0)
        back = w.renamed(other, names)
        if w.value(back).dtype == w.value(v).dtype:
            more = w.arranged(products.product(w, back, v, keys), out.dims)
            out = w.let(f"{out.name} + {more.name}", out.dims)
    if twist == "two_values":
        more = products.product(w, a, w.let(f"{v.name} * 2.0", v.dims), keys)
        out = w.let(f"{out.name} + {w.arranged(more, out.dims).name}", out.dims)
    if w.chance(50):
        out = w.arranged(out, w.shuffled(out.labels))
    if w.chance(40):
        out = w.let(w.pick(f"{out.name} * 2.0", f"torch.sin({out.name})", f"{out.name}.contiguous()"), out.dims)
    return out


def _keep_statistics(w: Writer, seen: Labelled) -> None:
    """Writes what was seen of scores or weights to a tensor that the program returns, through something that shares
    its memory: nobody reads what such a write gives back."""
    w.sizes["kept"] = 3
    kept = w.let(f"{w.tensor((('kept',),), origin='input').name} * 1.0", (("kept",),)).name
    w.program.returns = [kept]
    read = f"{seen.name}.detach().{w.pick('mean()', 'amax()', 'flatten()[:1]')}"
    place = kept + w.pick("", ".detach()", ".data", "[1:]", ".detach()[1:]", ".view(1, 3)", ".view(3, 1).detach()")
    write = w.pick(
        "add_({})", "copy_({})", "mul_(0.9).add_({})", "lerp_({}.to(torch.float64), 0.5)", "zero_().add_({})"
    )
    w.run(f"{place}.{write.format(read)}")


def _also_returned(w: Writer, a: Labelled, s: Labelled, twist: str) -> list[str]:
    match twist:
        case "statistics":
            return w.program.returns
        case "return_weights":
            return [a.name]
        case "return_scores":
            return [s.name]
        case "scores_read":
            return [w.let(f"{s.name}.sum()", ()).name]
    return []
