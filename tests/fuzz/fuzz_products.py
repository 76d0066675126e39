"""Operands and products of the random programs: projections, folded heads, and every way to multiply two tensors."""

from __future__ import annotations

import string

import torch
from fuzz_graphs import Dims, Labelled, Writer

# ---- operands -----------------------------------------------------------------------------------------------------------


def operand(w: Writer, labels: tuple[str, ...], width: str) -> Labelled:
    """Queries, keys or values over these labels; `width` is the feature label."""
    match w.pick("input", "linear", "linear", "computed"):
        case "input":
            return w.tensor(w.shuffled(labels), origin="input")
        case "linear":
            return projection(w, labels, width)
        case _:
            x = w.tensor(w.shuffled(labels), origin="input")
            return w.let(
                w.pick(f"torch.sin({x.name})", f"{x.name} * 1.5", f"F.gelu({x.name})", f"{x.name} + 0.1"), x.dims
            )


def projection(w: Writer, labels: tuple[str, ...], width: str) -> Labelled:
    """x W^T + b, heads and features coming out of the weight's rows."""
    made = tuple(y for y in labels if y in ("h", "g", width))
    w.sizes.setdefault("c", 3)
    outer = w.shuffled([y for y in labels if y not in made])
    x = w.tensor((*outer, ("c",)), origin="input")
    made = tuple(w.order(made)) if w.chance(20) else made
    weight = w.tensor((made, ("c",)), origin="parameter")
    bias = f", {w.tensor((made,), origin='parameter').name}" if w.chance(50) else ""
    if w.chance(20):
        return w.let(f"{x.name} @ {weight.name}.t()", (*outer, made))
    return w.let(f"F.linear({x.name}, {weight.name}{bias})", (*outer, made))


def joint(w: Writer, labels: tuple[str, ...], tokens: tuple[str, ...]) -> tuple[Labelled, Labelled, Labelled]:
    """q, k and v from one linear layer: (labels with "t" for the token axis, "d" for the features), split in three."""
    w.sizes.setdefault("c", 3)
    w.sizes["three"] = 3
    outer: Dims = (*((y,) for y in labels if y == "b" or y == "w"), *((y,) for y in tokens))
    made = ("three", *(y for y in labels if y == "h"), "d")
    x = w.tensor((*outer, ("c",)), origin="input")
    weight = w.tensor((made, ("c",)), origin="parameter")
    y = w.let(f"F.linear({x.name}, {weight.name})", (*outer, made))
    if w.chance(50):
        opened = w.reshaped(y, (*outer, *((z,) for z in made)))
        at = opened.at("three")
        rest = tuple(d for d in opened.dims if d != ("three",))
        if w.chance(60):
            opened = w.permuted(opened, [at, *(n for n in range(len(opened.dims)) if n != at)])
            at = 0
        names = [f"q{len(w.program.lines)}", f"k{len(w.program.lines)}", f"v{len(w.program.lines)}"]
        if at == 0 and w.chance(30):
            for n, name in enumerate(names):
                w.run(f"{name} = {opened.name}[{n}]")
        else:
            w.run(f"{', '.join(names)} = {opened.name}.unbind({at})")
        return tuple(Labelled(name, rest) for name in names)  # type: ignore[return-value]
    rest = (*outer, made[1:])
    width = w.size(made[1:])
    names = [f"q{len(w.program.lines)}", f"k{len(w.program.lines)}", f"v{len(w.program.lines)}"]
    form = w.pick(
        f"{y.name}.chunk(3, dim=-1)", f"{y.name}.split({width}, -1)", f"torch.split({y.name}, [{width}] * 3, dim=-1)"
    )
    w.run(f"{', '.join(names)} = {form}")
    return tuple(Labelled(name, rest) for name in names)  # type: ignore[return-value]


def prepared(w: Writer, x: Labelled, width: str) -> Labelled:
    """What models do to queries and keys before the product: scale, normalise, rotate."""
    choice = w.pick("", "", "scale", "scale", "tensor", "normalize", "norm", "rotary", "inplace", "cast")
    w.tag(f"q:{choice}" if choice else "q")
    match choice:
        case "scale":
            return w.let(w.pick(f"{x.name} * 0.5", f"{x.name} / 1.7", f"0.3 * {x.name}", f"{x.name}.mul(0.7)"), x.dims)
        case "tensor":
            y = w.tensor((), origin=w.pick("parameter", "buffer"))
            return w.let(w.pick(f"{x.name} * {y.name}", f"{y.name} * {x.name}"), x.dims)
        case "normalize" | "norm" | "rotary":
            x = w.arranged(x, (*((y,) for y in x.labels if y != width), (width,)))
            if choice == "normalize":
                return w.let(f"F.normalize({x.name}, dim=-1)", x.dims)
            if choice == "norm":
                return w.let(f"F.layer_norm({x.name}, ({w.sizes[width]},))", x.dims)
            if w.sizes[width] % 2 == 0:
                half = w.sizes[width] // 2
                return w.let(
                    f"{x.name} * 0.6 + torch.cat([-{x.name}[..., {half}:], {x.name}[..., :{half}]], -1) * 0.8", x.dims
                )
            return x
        case "inplace":
            if x.name.startswith("x"):
                x = w.let(f"{x.name} * 1.0", x.dims)
            w.run(f"{x.name}.mul_(0.5)")
            return x
        case "cast":
            w.program.exact = False
            return w.let(f"{x.name}.float().double()", x.dims)
    return x


def grouped(w: Writer, k: Labelled, heads: str, group: str) -> Labelled:
    """Grouped-query attention: each key head repeated for its query heads."""
    k = w.split(k)
    at = k.at(heads)
    dims = (*k.dims[:at], (heads, group), *k.dims[at + 1 :])
    if w.chance(50):
        return w.let(f"{k.name}.repeat_interleave({w.sizes[group]}, dim={at})", dims)
    opened = (*k.dims[: at + 1], (group,), *k.dims[at + 1 :])
    y = w.let(f"{k.name}.unsqueeze({at + 1}).expand({w.sizes_of(opened)})", opened)
    return w.reshaped(y, dims)


# ---- products -----------------------------------------------------------------------------------------------------------


def product(w: Writer, left: Labelled, right: Labelled, summed: tuple[str, ...], *, added: bool = False) -> Labelled:
    """Sums left * right over labels both have; everything else stays.  `added`: a tensor may be added by the way."""
    both = [y for y in left.labels if y in right.labels and y not in summed]
    mine = [y for y in left.labels if y not in right.labels]
    other = [y for y in right.labels if y not in left.labels]
    forms = ["matmul", "matmul", "einsum", "einsum", "mulsum", "matmul_swapped"]
    if both:
        forms += ["bmm", "baddbmm" if added else "bmm"]
    elif w.chance(50):
        forms = ["linear"]
    form = w.pick(*forms)
    w.tag(form)
    if form == "einsum":
        return _einsum(w, left, right, summed)
    both = w.order(both)
    batch: Dims = (tuple(both),) if form in ("bmm", "baddbmm") else _merged(w, both)
    if form == "matmul_swapped":
        left, right, mine, other = right, left, other, mine
    rows, columns = tuple(mine), tuple(other)
    # without a rows label the dimension is there with size 1
    x = _as(w, left, batch, rows, summed)
    y = _as(w, right, batch, columns, summed)
    out = (*batch, rows, columns)
    if form == "mulsum":
        return w.let(f"({x.name}.unsqueeze(-2) * {y.name}.unsqueeze(-3)).sum({w.pick('-1', 'dim=-1')})", out)
    if form == "linear":
        return w.let(f"F.linear({x.name}, {y.name})", out)
    if w.chance(70):
        turned = w.pick(f"{y.name}.transpose(-1, -2)", f"{y.name}.mT", f"{y.name}.transpose(-2, -1)")
    else:
        turned = _as(w, right, batch, summed, columns).name
    match form:
        case "bmm":
            return w.let(f"torch.bmm({x.name}, {turned})", out)
        case "baddbmm":
            added = w.tensor(w.pick(out, ((), rows, columns), ((), (), columns)), origin=w.pick("input", "parameter"))
            alpha = w.pick("", ", alpha=0.5", ", beta=0.7, alpha=0.5", ", beta=0")
            return w.let(f"torch.baddbmm({added.name}, {x.name}, {turned}{alpha})", out)
    return w.let(w.pick(f"{x.name} @ {turned}", f"torch.matmul({x.name}, {turned})", f"{x.name}.matmul({turned})"), out)


def _merged(w: Writer, labels: list[str]) -> Dims:
    if len(labels) > 1 and w.chance(40):
        return (tuple(labels),)
    return tuple((y,) for y in labels)


def _as(w: Writer, x: Labelled, batch: Dims, rows: tuple[str, ...], last: tuple[str, ...]) -> Labelled:
    return w.arranged(x, (*batch, rows, last))


def _einsum(w: Writer, left: Labelled, right: Labelled, summed: tuple[str, ...]) -> Labelled:
    left, right = (w.arranged(x, w.shuffled(x.labels, alone=((y,) for y in x.labels))) for x in (left, right))
    letters = dict(zip(dict.fromkeys((*left.labels, *right.labels)), w.order(string.ascii_letters[:12]), strict=False))
    dims = tuple((y,) for y in w.order(y for y in letters if y not in summed))

    def term(dims: Dims) -> str:
        return "".join(letters[d[0]] for d in dims)

    return w.let(f"torch.einsum('{term(left.dims)},{term(right.dims)}->{term(dims)}', {left.name}, {right.name})", dims)


def sdpa(w: Writer, q: Labelled, k: Labelled, v: Labelled, keys: tuple[str, ...]) -> Labelled:
    """The whole attention as one call of torch's."""
    w.tag("sdpa")
    batch = [y for y in q.labels if y in ("b", "w", "h", "g")]
    rows = tuple(y for y in q.labels if y not in (*batch, "d"))
    heads: tuple[str, ...] = ("h", "g") if {"h", "g"} <= set(batch) else ("h",) if "h" in batch else ()
    dims: Dims = (*((y,) for y in batch if y not in heads), *([heads] if heads else []))

    def operand(x: Labelled, row: tuple[str, ...], width: str) -> Labelled:
        mine = tuple(tuple(y for y in d if y in x.labels) for d in dims)
        return w.arranged(x, (*mine, row, (width,)))

    q, k, v = operand(q, rows, "d"), operand(k, keys, "d"), operand(v, keys, "e")
    scale = w.pick("", "0.3", "1.0")
    width = w.sizes["d"] ** -0.5
    options, after = f", scale={scale}" if scale else "", ""
    match w.pick("", "bool", "float", "causal"):
        case "causal":
            options += ", is_causal=True"
            after = f".masked_fill(torch.ones({w.size(rows)}, {w.size(keys)}, dtype=torch.bool).triu(1), float('-inf'))"
        case "bool" | "float" as kind:
            full = Labelled("", (*dims, rows, keys))
            some = [y for d in full.dims if w.chance(60) for y in d]
            shape = tuple(d if d and d[0] in some else () for d in full.dims)
            while shape and shape[0] == () and w.chance(50) and len(shape) > 2:
                shape = shape[1:]
            value = w.random(shape, torch.bool if kind == "bool" else torch.float64)
            if kind == "bool":
                value[..., 0] = True
            mask = w.tensor(shape, origin=w.pick("input", "parameter") if kind == "float" else "input", value=value)
            options += f", attn_mask={mask.name}"
            after = f".add({mask.name})" if kind == "float" else f".masked_fill(~{mask.name}, float('-inf'))"
    repeated = any(len(d) > 1 and len(x) == 1 for d, x in zip(dims, k.dims, strict=False))
    if repeated:
        options += ", enable_gqa=True"
    again = f".repeat_interleave({w.sizes['g']}, -3)" if repeated else ""
    out = (*dims, rows, ("e",))
    return w.let(
        f"F.scaled_dot_product_attention({q.name}, {k.name}, {v.name}{options})", out,
        knn=f"knn(({q.name} @ {k.name}{again}.mT * {scale or width}){after}, -1) @ {v.name}{again}",
    )  # fmt: skip
