"""What a random program is made of: operands, products, score and weight operations, softmaxes.

Each function writes a few lines with a `Writer` and returns the labelled result.  `plain=False` marks what may
legitimately keep the attention from being fused or found; everything else has to be followed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuzz_graphs import Labelled, Writer

Step = Callable[[Writer, Labelled], Labelled]

# ---- scores -------------------------------------------------------------------------------------------------------------


def subset(w: Writer, x: Labelled) -> list[str]:
    """Labels of some whole dimensions."""
    return [y for dim in x.dims if w.chance(55) for y in dim]


def layout(w: Writer, s: Labelled) -> Labelled:
    dims = w.shuffled(s.labels)
    return w.arranged(s, dims) if w.chance(80) else w.let(w.pick(f"{s.name}.contiguous()", f"{s.name}.clone()"), s.dims)


def scale(w: Writer, s: Labelled) -> Labelled:
    match w.pick("number", "number", "tensor", "axis", "function", "inplace", "operator"):
        case "number":
            return w.let(w.pick(f"{s.name} * 0.35", f"{s.name} / 2.5", f"0.7 * {s.name}", f"torch.div({s.name}, 1.7)",
                                f"-{s.name}", f"{s.name}.mul(1.2)", f"torch.mul({s.name}, 0.8)"), s.dims)  # fmt: skip
        case "tensor":
            y = w.tensor((), origin=w.pick("parameter", "buffer", "input"))
            return w.let(w.pick(f"{s.name} * {y.name}", f"{s.name} / ({y.name}.abs() + 1.0)"), s.dims)
        case "axis":
            y = w.broadcastable(subset(w, s), s, origin=w.pick("parameter", "input"))
            return w.let(w.pick(f"{s.name} * {y.name}", f"{y.name} * {s.name}"), s.dims)
        case "function":
            y = w.broadcastable(subset(w, s), s, origin="parameter")
            return w.let(
                w.pick(f"{s.name} * torch.clamp({y.name}, max=0.5).exp()", f"{s.name} * torch.sigmoid({y.name})"),
                s.dims,
            )
        case "inplace":
            w.run(w.pick(f"{s.name}.mul_(0.6)", f"{s.name}.div_(1.4)", f"{s.name} *= 0.9", f"{s.name} /= 1.3"))
            return s
    return w.let(w.pick(f"{s.name} * {s.name}.shape[-1] ** -0.5", f"{s.name} / 2 ** 0.5"), s.dims)


def bias(w: Writer, s: Labelled) -> Labelled:
    y = w.broadcastable(subset(w, s), s, origin=w.pick("parameter", "input", "buffer"))
    text = y.name
    if w.chance(25):
        text = w.pick(f"({text} * 0.5)", f"torch.tanh({text})", f"(16 * torch.sigmoid({text}))", f"({text} + 1)")
    if w.chance(15):
        rank = len(y.dims)
        text = f"{text}[None]" if rank < len(s.dims) else text
    forms = [f"{s.name} + {text}", f"{text} + {s.name}", f"{s.name} - {text}", f"torch.add({s.name}, {text}, alpha=0.5)",
             f"{s.name}.add({text})", f"torch.sub({s.name}, {text})"]  # fmt: skip
    if w.chance(25):
        w.run(
            w.pick(
                f"{s.name} += {text}",
                f"{s.name}.add_({text})",
                f"{s.name} -= {text}",
                f"{s.name}.add_({text}, alpha=2)",
            )
        )
        return s
    return w.let(w.pick(*forms), s.dims)


def gathered(w: Writer, s: Labelled) -> Labelled:
    """A bias table read by an index buffer, as Swin does."""
    whole = [dim for dim in s.dims if dim][-2:]
    if len(whole) < 2:
        return bias(w, s)
    rows, columns = whole
    heads = next((d for d in s.dims if d not in whole and d), None)
    w.sizes["table"] = 5
    index = torch.randint(0, 5, (w.size(rows) * w.size(columns),), generator=w._random)
    index_at = w.tensor(((*rows, *columns),), origin="buffer", value=index)
    if heads is None:
        table = w.tensor((("table",),), origin="parameter")
        y = w.let(f"{table.name}[{index_at.name}].view({w.sizes_of((rows, columns))})", (rows, columns))
    else:
        table = w.tensor((("table",), heads), origin="parameter")
        y = w.let(f"{table.name}[{index_at.name}].view({w.sizes_of((rows, columns, heads))})", (rows, columns, heads))
        y = w.permuted(y, [2, 0, 1])
    dims = tuple(dim if dim in y.dims else () for dim in s.dims)
    if [d for d in dims if d] != list(y.dims):
        y = w.arranged(y, tuple(d for d in dims if d))
    y = w.let(f"{y.name}.reshape({w.sizes_of(dims)})", dims)
    return w.let(f"{s.name} + {y.name}", s.dims)


def mask(w: Writer, s: Labelled) -> Labelled:
    """True where a key is taken away; the first key never is, so that no row is empty."""
    labels = subset(w, s) or [y for dim in s.dims[-1:] for y in dim]
    y = w.broadcastable(labels, s, origin="buffer", value=None)
    values = w.random(y.dims, torch.bool)
    keys = [n for n, dim in enumerate(y.dims) if any(z.startswith("j") for z in dim)]
    if not keys:
        values = torch.zeros_like(values)
    for n in keys:  # everything at the first key of the dimension stays, whatever else runs along it
        inner = 1
        for z in reversed(y.dims[n]):
            if z.startswith("j"):
                break
            inner *= w.sizes[z]
        every = torch.arange(values.shape[n])
        sizes = [w.sizes[z] for z in y.dims[n]]
        first = torch.ones(values.shape[n], dtype=torch.bool)
        for z, size in zip(reversed(y.dims[n]), reversed(sizes), strict=True):
            first &= (every % size == 0) | torch.tensor(not z.startswith("j"))
            every = every // size
        values = values.movedim(n, 0)
        values = (values & ~first.view(-1, *[1] * (values.dim() - 1))).movedim(0, n)
    name = y.name.removeprefix("self.")
    origin = w.pick("buffer", "input")
    del w.program.buffers[name], w._self.__dict__[name]
    y = w.tensor(y.dims, origin=origin, value=values)
    value = w.pick("float('-inf')", "-1e9", "-100.0", "-3.0", "torch.finfo(torch.float32).min")
    match w.pick("masked_fill", "where", "inplace", "additive", "not", "number", "times"):
        case "masked_fill":
            return w.let(f"{s.name}.masked_fill({y.name}, {value})", s.dims)
        case "where":
            return w.let(
                w.pick(f"torch.where({y.name}, {value}, {s.name})", f"torch.where(~{y.name}, {s.name}, {value})"),
                s.dims,
            )
        case "inplace":
            w.run(f"{s.name}.masked_fill_({y.name}, {value})")
            return s
        case "additive":
            added = w.let(f"torch.zeros_like({y.name}, dtype=torch.float64).masked_fill({y.name}, {value})", y.dims)
            return w.let(f"{s.name} + {added.name}", s.dims)
        case "not":
            return w.let(f"{s.name}.masked_fill({y.name}.logical_not() == False, {value})", s.dims)
        case "number":
            return w.let(f"{s.name} + {y.name}.to(torch.float64) * -1000.0", s.dims)
    return w.let(f"{s.name} * (1.0 - {y.name}.double())", s.dims)


def pointwise(w: Writer, s: Labelled) -> Labelled:
    return w.let(w.pick(f"torch.tanh({s.name} / 2.0) * 2.0", f"{s.name}.clamp(-1.5, 1.5)", f"torch.clamp({s.name}, max=1.0)",
                        f"torch.sigmoid({s.name})", f"{s.name} ** 2", f"{s.name}.abs()", f"F.relu({s.name})",
                        f"torch.where({s.name} > 0, {s.name}, {s.name} * 0.1)", f"{s.name} + {s.name} * 0.5",
                        f"torch.maximum({s.name}, {s.name} * 0.5)", f"{s.name}.square().neg()",
                        f"torch.clamp({s.name}, min=-2.0)", f"torch.minimum({s.name}, torch.ones(()).double())"), s.dims)  # fmt: skip


def cast(w: Writer, s: Labelled) -> Labelled:
    w.program.exact = False
    return w.let(w.pick(f"{s.name}.float()", f"{s.name}.to(torch.float32)", f"{s.name}.type(torch.float32)"), s.dims)


def triangle(w: Writer, s: Labelled) -> Labelled:
    """A causal mask made on the spot."""
    if len(s.dims) < 2 or not s.dims[-1] or not s.dims[-2]:
        return s
    rows, columns = w.size(s.dims[-2]), w.size(s.dims[-1])
    text = w.pick(
        f"torch.ones({rows}, {columns}, dtype=torch.bool).triu(1)",
        f"(torch.arange({rows})[:, None] < torch.arange({columns})[None, :])",
    )
    return w.let(f"{s.name}.masked_fill({text}, {w.pick('-10.0', '-50.0')})", s.dims)


SCORES: tuple[Step, ...] = (scale, bias, layout, mask, pointwise, gathered, triangle, cast)


def some_rows(w: Writer, s: Labelled, queries: tuple[str, ...]) -> Labelled:
    """Scores of some of the queries only; from here on there are no others."""
    alone = [n for n, dim in enumerate(s.dims) if len(dim) == 1 and dim[0] in queries and w.size(dim) > 1]
    if not alone:
        return s
    n = w.pick(*alone)
    (label,) = s.dims[n]
    w.tag("some_rows")
    start = w.number(0, w.sizes[label] - 1)
    stop, step = w.number(start + 1, w.sizes[label]), w.pick(1, 1, 2)
    w.sizes[label] = len(range(start, stop, step))
    return w.let(f"{s.name}[{', '.join([':'] * n + [f'{start}:{stop}:{step}'])}]", s.dims)


# ---- writes -------------------------------------------------------------------------------------------------------------


def part_of(w: Writer, s: Labelled) -> str:
    """The text of an index that selects a slice."""
    n = w.number(0, len(s.dims) - 1)
    size = w.size(s.dims[n])
    start = w.number(0, size - 1)
    stop = w.number(start + 1, size)
    part = w.pick(f"{start}:{stop}", f"{start}:", f":{stop}", str(start), f"{start - size}:")
    if n == len(s.dims) - 1 and w.chance(50):
        return f"..., {part}"
    return ", ".join([":"] * n + [part])


def slice_write(w: Writer, s: Labelled) -> Labelled:
    """scores[..., 1:] += bias and its relatives: MViTv2's spelling."""
    w.tag("slice_write", plain=False)
    at = part_of(w, s)
    value = eval(f"{s.name}[{at}]", w._env)
    w._count += 1
    name = f"b{w._count}"
    shape = list(value.shape)
    for n in range(len(shape)):
        if w.chance(25):
            shape[n] = 1
    w.program.parameters[name] = torch.randn(shape, generator=w._random, dtype=torch.float64).to(value.dtype)
    setattr(w._self, name, w.program.parameters[name].clone())
    b = f"self.{name}"
    forms = [f"{s.name}[{at}] += {b}", f"{s.name}[{at}] = {s.name}[{at}] + {b}", f"{s.name}[{at}] -= {b}", f"{s.name}[{at}] *= {b}",
             f"{s.name}[{at}].add_({b})", f"{s.name}[{at}] = -2.0", f"{s.name}[{at}] = {b}", f"{s.name}[{at}].mul_(0.5)",
             f"{s.name}[{at}].fill_(0.3)", f"{s.name}[{at}].zero_()", f"{s.name}[{at}].copy_({s.name}[{at}] * 3)"]  # fmt: skip
    w.run(w.pick(*forms))
    return s


def view_write(w: Writer, s: Labelled) -> Labelled:
    """A write through one view, read through another."""
    w.tag("view_write", plain=False)
    if len(s.dims) < 2:
        return s
    match w.pick("permute", "reshape", "diagonal", "flat", "twice", "view_before"):
        case "permute":
            other = w.permuted(s, w.order(range(len(s.dims))))
        case "reshape":
            other = w.reshaped(s, tuple((y,) for y in s.labels))
        case "flat":
            other = w.reshaped(s, (s.labels,))
        case "diagonal":
            w.run(f"{s.name}.diagonal(dim1=-2, dim2=-1).{w.pick('fill_(-1.0)', 'add_(1.0)', 'mul_(0.1)')}")
            return s
        case "twice":
            a = w.permuted(s, w.order(range(len(s.dims))))
            other = w.permuted(a, w.order(range(len(s.dims))))
            a = w.let(f"{a.name}[:]", a.dims)
            w.run(w.pick(f"{a.name}.mul_(0.5)", f"{a.name} += 1.0", f"{a.name}[0] = 0.25"))
            return w.pick(s, other)
        case _:
            other = w.permuted(s, w.order(range(len(s.dims))))
            w.run(
                w.pick(
                    f"{s.name}.mul_(0.5)", f"{s.name} -= 0.3", f"{s.name}[:, 0] = 0.7", f"{s.name}.clamp_(-1.0, 1.0)"
                )
            )
            return w.pick(other, s)
    if w.chance(40):
        slice_write(w, other)
    else:
        w.run(w.pick(f"{other.name}.mul_(0.5)", f"{other.name}.add_(1.5)", f"{other.name} += 0.5", f"{other.name}.neg_()",
                     f"{other.name}.tanh_()", f"{other.name}.copy_({other.name} * 2)", f"{other.name}[:] = {other.name} * 2"))  # fmt: skip
    return w.pick(s, other)


def odd_write(w: Writer, s: Labelled) -> Labelled:
    """Writes no slice expresses, writes that go elsewhere, a tensor that changes after it was captured."""
    w.tag("odd_write", plain=False)
    match w.pick("bool", "list", "captured", "out", "fill", "input", "expanded", "set", "masked_scatter", "relu"):
        case "bool":
            w.run(f"{s.name}[{s.name} > 0.5] = 0.5")
        case "list":
            w.run(f"{s.name}[..., [0]] = 0.4")
        case "captured":
            y = w.broadcastable(subset(w, s), s, origin="input")
            y = w.let(f"{y.name} * 1.0", y.dims)
            s = w.let(f"{s.name} + {y.name}", s.dims)
            w.run(w.pick(f"{y.name}.mul_(3.0)", f"{y.name}.zero_()", f"{y.name} += 1.0"))
        case "out":
            w.run(f"_ = torch.mul({s.name}.detach(), 0.5, out=torch.empty_like({s.name}))")
        case "fill":
            w.run(f"{s.name}.{w.pick('zero_()', 'fill_(0.5)', 'exp_()', 'sigmoid_()', 'pow_(2)', 'abs_()')}")
        case "input":
            y = w.broadcastable(subset(w, s), s, origin="input", value=None)
            w.program.inputs[y.name].requires_grad_(False)
            w.program.tags.append("no_grad_input:" + y.name)
            w.run(f"{y.name}.add_(0.5)")
            s = w.let(f"{s.name} + {y.name}", s.dims)
            if w.chance(50):
                w.run(f"{y.name}.mul_(2.0)")
        case "expanded":
            full = w.let(w.pick(f"torch.zeros_like({s.name})", f"{s.name}.new_zeros(({w.sizes_of(s.dims)},))"), s.dims)
            w.run(
                w.pick(
                    f"{full.name}[...] = {s.name}",
                    f"{full.name} += {s.name}",
                    f"{full.name}.copy_({s.name})",
                    f"{full.name}[:] = {s.name}",
                )
            )
            return full
        case "set":
            y = w.let(f"{s.name}.detach()", s.dims)
            w.run(f"{y.name}.mul_(0.5)")
        case "masked_scatter":
            return w.let(f"{s.name}.masked_scatter({s.name} > 0.3, {s.name} * 2)", s.dims)
        case "relu":
            return w.let(f"F.relu({s.name}, inplace=True)", s.dims)
    return s


def s_dtype(w: Writer, s: Labelled) -> str:
    return str(w.value(s).dtype)


WRITES: tuple[Step, ...] = (slice_write, view_write, odd_write)


# ---- what is not pointwise ----------------------------------------------------------------------------------------------


def mixed(w: Writer, s: Labelled) -> Labelled:
    """An operation between the products that mixes elements."""
    w.tag("mixed", plain=False)
    last = w.size(s.dims[-1]) if s.dims else 1
    match w.pick(
        "linear", "cumsum", "norm", "mean", "amax", "roll", "softmax", "conv", "norm2", "sort", "pool", "flip"
    ):
        case "linear":  # talking heads: a linear map over one axis
            label = w.pick(*s.labels) if s.labels else None
            if label is None:
                return s
            s = w.arranged(s, (*((y,) for y in s.labels if y != label), (label,)))
            weight = w.tensor(
                ((label,), (label,)), origin="parameter", value=w.random(((label,), (label,))).to(w.value(s).dtype)
            )
            return w.let(w.pick(f"F.linear({s.name}, {weight.name})", f"{s.name} @ {weight.name}"), s.dims)
        case "cumsum":
            return w.let(f"{s.name}.cumsum(-1)", s.dims)
        case "norm":
            return w.let(f"F.layer_norm({s.name}, ({last},))", s.dims)
        case "mean":
            return w.let(
                w.pick(f"{s.name} - {s.name}.mean(-1, keepdim=True)", f"{s.name} + {s.name}.mean(0, keepdim=True)"),
                s.dims,
            )
        case "amax":
            return w.let(w.pick(f"{s.name} - {s.name}.amax(-1, keepdim=True)", f"{s.name} - {s.name}.amax(0, keepdim=True)",
                                f"{s.name} * {s.name}.amax()"), s.dims)  # fmt: skip
        case "roll":
            return w.let(f"torch.roll({s.name}, 1, dims=-1)", s.dims)
        case "flip":
            return w.let(f"{s.name}.flip(-1)", s.dims)
        case "softmax":
            return w.let(f"{s.name}.softmax(0)", s.dims, knn=f"knn({s.name}, 0)")
        case "conv":
            if len(s.dims) != 4:
                return s
            channels = w.size(s.dims[1])
            weight = torch.randn(channels, channels, 1, 1, generator=w._random, dtype=torch.float64).to(
                w.value(s).dtype
            )
            w._count += 1
            name = f"w{w._count}"
            w.program.parameters[name] = weight
            setattr(w._self, name, weight)
            return w.let(f"F.conv2d({s.name}, self.{name})", s.dims)
        case "norm2":
            return w.let(f"F.normalize({s.name}, dim=-1)", s.dims)
        case "sort":
            return w.let(f"{s.name}.sort(-1).values", s.dims)
    return w.let(f"F.avg_pool1d({s.name}.reshape(1, -1, {last}), 3, 1, 1).reshape({w.sizes_of(s.dims)})", s.dims)


# ---- softmax and weights -------------------------------------------------------------------------------------------------


def softmax(w: Writer, s: Labelled, axis: int) -> Labelled:
    """The softmax over a dimension, in one of its spellings."""
    d = axis if w.chance(50) else axis - len(s.dims)
    x = s.name
    choice = w.pick("call", "call", "call", "float64", "float32", "by_hand", "by_hand", "exp_log")
    w.tag(f"softmax:{choice}")
    if choice == "call":
        text = w.pick(f"{x}.softmax({d})", f"F.softmax({x}, dim={d})", f"torch.softmax({x}, dim={d})",
                      f"{x}.softmax(dim={d})", f"torch.nn.functional.softmax({x}, {d})", f"torch.softmax({x}, {d})")  # fmt: skip
        return w.let(text, s.dims, prefix="a", knn=f"knn({x}, {d})")
    if choice == "float64":
        return w.let(
            f"{x}.softmax(dim={d}, dtype=torch.float64)", s.dims, prefix="a", knn=f"knn({x}, {d}, torch.float64)"
        )
    if choice == "float32":
        w.program.exact = False
        dtype = s_dtype(w, s)
        text = w.pick(f"F.softmax({x}, dim={d}, dtype=torch.float32)", f"F.softmax({x}.float(), dim={d})")
        back = w.pick("", f".to({dtype})", f".type_as({x})")
        return w.let(text + back, s.dims, prefix="a", knn=f"knn({x}.float(), {d}){back}")
    if choice == "exp_log":
        w.tag(plain=False)
        text = w.pick(f"F.log_softmax({x}, dim={d}).exp()", f"({x} - {x}.logsumexp({d}, keepdim=True)).exp()")
        return w.let(text, s.dims, prefix="a", knn=f"knn({x}, {d})")
    shifted = w.pick(x, f"({x} - {x}.amax({d}, keepdim=True))", f"({x} - {x}.max({d}, keepdim=True)[0])",
                     f"({x} - {x}.max(dim={d}, keepdim=True).values)", f"({x} - {x}.amax({d}, keepdim=True).detach())")  # fmt: skip
    w._count += 1
    e, a = f"e{w._count}", f"a{w._count}"
    total = w.pick(
        f"{e}.sum({d}, keepdim=True)", f"torch.sum({e}, dim={d}, keepdim=True)", f"{e}.sum({d}).unsqueeze({d})"
    )
    divided = w.pick(f"{e} / {total}", f"{e}.div({total})", f"torch.div({e}, {total})")
    w.run(f"{e} = {w.pick(f'torch.exp({shifted})', f'{shifted}.exp()')}\n{a} = {divided}", f"{a} = knn({x}, {d})")
    return Labelled(a, s.dims)


def dropout(w: Writer, a: Labelled) -> Labelled:
    return w.let(w.pick(f"F.dropout({a.name}, 0.0, True)", f"F.dropout({a.name}, p=0.1, training=False)",
                        f"torch.dropout({a.name}, 0.0, True)"), a.dims)  # fmt: skip


def gate(w: Writer, a: Labelled) -> Labelled:
    y = w.broadcastable(subset(w, a), a, origin=w.pick("parameter", "input"))
    return w.let(
        w.pick(f"{a.name} * {y.name}", f"{a.name} * torch.sigmoid({y.name})", f"{a.name} * 0.9", f"{a.name} / 1.5"),
        a.dims,
    )


def weight_write(w: Writer, a: Labelled) -> Labelled:
    w.tag("weight_write", plain=False)
    choice = w.pick(f"{a.name}.mul_(0.5)", f"{a.name} *= 0.7", f"{a.name}[..., 0] = 0.0", f"{a.name} /= {a.name}.sum(-1, keepdim=True)",
                    f"{a.name}.clamp_(max=0.4)")  # fmt: skip
    if ".sum(" in choice:
        w.tag("renormalised", plain=False)
    w.run(choice)
    return a


def revived(w: Writer, a: Labelled) -> Labelled:
    """Weights that do not vanish with the softmax, and renormalised ones."""
    w.tag("revived", plain=False)
    y = w.broadcastable(subset(w, a), a, origin="parameter")
    choice = w.pick(f"{a.name} + 0.01", f"{a.name} + {y.name}", f"{a.name} / {a.name}.sum(-1, keepdim=True)",
                    f"{a.name} - {y.name} * {a.name}", f"{a.name}.clamp(min=0.05)", f"{a.name} ** 2",
                    f"(1 - torch.sigmoid({y.name})) * {a.name} + torch.sigmoid({y.name}) * 0.3",
                    f"torch.where({a.name} > 0.2, {a.name}, 0.0)", f"1.0 - {a.name}")  # fmt: skip
    if ".sum(" in choice:
        w.tag("renormalised", plain=False)
    return w.let(choice, a.dims)


WEIGHTS: tuple[Step, ...] = (layout, dropout, gate)
ODD_WEIGHTS: tuple[Step, ...] = (weight_write, revived, mixed)
