"""Random choices -> a small program with attention (or nearly attention) in it, as source text with labelled axes.

    draw  --Writer-->  Program(source, tensors)  --build-->  nn.Module

Each tensor of a program carries labels that say what runs along its dimensions (`("b", "h"), ("i",), ("j",)`: batch and
heads folded, queries, keys), so that layouts can be shuffled at will and the generator still knows which axis is which.
Every line is run while it is written, with real tensors: a program is valid by construction, and its labels are checked
against the shapes.  A softmax is written twice, dense and as k-NN attention by hand: the second is the independent
oracle for what a rewritten softmax must compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

Dims = tuple[tuple[str, ...], ...]
"""For each dimension the labels that run along it, most significant first; () is a dimension of size 1."""


@dataclass(frozen=True)
class Labelled:
    """A variable of the program: a tensor whose dimensions are known."""

    name: str
    dims: Dims

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for dim in self.dims for label in dim)

    def at(self, *labels: str) -> int:
        """The dimension that holds exactly these labels."""
        return self.dims.index(labels)


def near_tie(scores: Tensor, tau: Tensor, tolerance: float) -> bool:
    """Whether some score is so near the threshold that rounding may decide about it; exact ties are none."""
    distance = (scores - tau).abs()
    close = (distance > 0) & (distance <= tolerance * (1 + tau.abs()))
    return bool((close & scores.isfinite()).any())


class Selection:
    """k-NN softmax by hand, and whether its choice was ever close.

    Ties are kept, as the kernels keep them, but in float32 they say nothing: kernels do without the cast to it, which
    may have made the tie (of values close to -1 behind a tanh, say).
    """

    def __init__(self, topk: int, tolerance: float) -> None:
        self.topk, self.tolerance, self.close = topk, tolerance, False

    def __call__(self, scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        scores = scores if dtype is None else scores.to(dtype)
        if not scores.dim():
            return scores.softmax(dim)
        tau = scores.detach().topk(min(self.topk, scores.shape[dim]), dim).values.amin(dim, keepdim=True)
        self.close |= near_tie(scores.detach(), tau, self.tolerance)
        if scores.dtype != torch.float64:
            self.close |= bool(((scores.detach() >= tau).sum(dim) > self.topk).any())
        weights = scores.masked_fill(scores < tau, -torch.inf).softmax(dim)
        # laid out in memory as softmax would: a later `view` depends on it
        return torch.empty_like(scores.detach().softmax(dim)).copy_(weights)


@dataclass(frozen=True)
class Line:
    """A statement; for an anchor also the one that makes it k-NN attention."""

    dense: str
    knn: str = ""


@dataclass
class Program:
    """A generated program.  `inputs`, `parameters` and `buffers` are what its tensors hold at the start."""

    lines: list[Line] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    returns: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    """What was drawn, for `expect` and for statistics."""
    exact: bool = True
    """No cast to a smaller dtype on the way."""
    plain: bool = True
    """Nothing was drawn that keeps the attention from being found and fused."""
    negative: bool = False
    """No softmax of the program is attention."""

    @property
    def anchors(self) -> int:
        return sum(bool(line.knn) for line in self.lines)

    def source(self, knn: Sequence[bool] = ()) -> str:
        """The forward function's text, with k-NN attention at the anchors where `knn` is True."""
        body: list[str] = []
        choices = iter(knn)
        for line in self.lines:
            body.append(line.knn if line.knn and next(choices, False) else line.dense)
        text = "\n".join([*body, f"return {', '.join(self.returns)}"])
        indented = "\n".join(f"    {x}" for x in text.splitlines())
        return f"def forward({', '.join(['self', *self.inputs])}):\n{indented}\n"

    def build(self, knn: Sequence[bool] = (), selection: Selection | None = None) -> nn.Module:
        """A module with this forward; its parameters are fresh copies."""
        namespace: dict[str, Any] = {"torch": torch, "F": F, "knn": selection}
        exec(self.source(knn), namespace)
        module = type("Fuzzed", (nn.Module,), {"forward": namespace["forward"]})()
        for name, tensor in self.parameters.items():
            module.register_parameter(name, nn.Parameter(tensor.clone()))
        for name, tensor in self.buffers.items():
            module.register_buffer(name, tensor.clone())
        return module

    def __repr__(self) -> str:
        """The source with every tensor's shape: a reproduction."""
        shapes = [
            f"# {kind} {name}: {tuple(x.shape)} {x.dtype}"
            for kind, group in (("input", self.inputs), ("parameter", self.parameters), ("buffer", self.buffers))
            for name, x in group.items()
        ]
        return "\n" + "\n".join([*shapes, f"# tags: {' '.join(self.tags)}", self.source()])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


class Writer:
    """Writes one program, running each line as it goes."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self.program = Program()
        self.sizes: dict[str, int] = {}
        self._self = SimpleNamespace()
        self._env: dict[str, Any] = {"torch": torch, "F": F, "self": self._self}
        self._count = 0
        self._random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    # ---- choices -----------------------------------------------------------------------------------------------------

    def pick(self, *options: Any) -> Any:
        """One of the options; the first is the simplest."""
        return self._draw(st.sampled_from(options))

    def chance(self, percent: int) -> bool:
        return bool(self._draw(st.integers(0, 99)) >= 100 - percent)

    def number(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def order(self, items: Iterable[Any]) -> list[Any]:
        return list(self._draw(st.permutations(list(items))))

    def tag(self, *names: str, plain: bool = True) -> None:
        self.program.tags += names
        self.program.plain &= plain

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def size(self, labels: Iterable[str]) -> int:
        total = 1
        for label in labels:
            total *= self.sizes[label]
        return total

    def shape(self, dims: Dims) -> tuple[int, ...]:
        return tuple(self.size(dim) for dim in dims)

    def sizes_of(self, dims: Dims) -> str:
        return ", ".join(map(str, self.shape(dims)))

    def random(self, dims: Dims, dtype: torch.dtype = torch.float64) -> Tensor:
        if dtype == torch.bool:
            return torch.rand(self.shape(dims), generator=self._random) < 0.4
        return torch.randn(self.shape(dims), generator=self._random, dtype=torch.float64).to(dtype)

    def tensor(self, dims: Dims, *, origin: str, value: Tensor | None = None) -> Labelled:
        """A new tensor that is an "input", a "parameter" or a "buffer"."""
        value = self.random(dims) if value is None else value
        self._count += 1
        if origin == "input":
            name = f"x{self._count}"
            self.program.inputs[name] = value
            self._env[name] = value.clone()
            return Labelled(name, dims)
        group = self.program.parameters if origin == "parameter" else self.program.buffers
        name = f"{origin[0]}{self._count}"
        group[name] = value
        setattr(self._self, name, value.clone())
        return Labelled(f"self.{name}", dims)

    def value(self, x: Labelled) -> Tensor:
        """What the variable holds now."""
        found: Tensor = eval(x.name, self._env)
        return found

    # ---- statements --------------------------------------------------------------------------------------------------

    def run(self, dense: str, knn: str = "") -> None:
        """Adds a statement as it stands.  A statement that raises makes the draw invalid."""
        try:
            exec(dense, self._env)
        except (RuntimeError, IndexError, ValueError) as error:
            self.program.tags.append(f"rejected:{type(error).__name__}")
            reject()
        self.program.lines.append(Line(dense, knn))

    def let(self, expression: str, dims: Dims, *, prefix: str = "t", knn: str = "") -> Labelled:
        """A new variable that holds the expression; the labels are checked against its shape."""
        self._count += 1
        name = f"{prefix}{self._count}"
        self.run(f"{name} = {expression}", knn and f"{name} = {knn}")
        shape = tuple(self._env[name].shape)
        assert shape == self.shape(dims), f"{name} = {expression} is {shape}, labelled {dims}\n{self.program!r}"
        return Labelled(name, dims)

    def possible(self, expression: str) -> bool:
        """Whether an expression can be evaluated (a view that needs strides which are not there cannot)."""
        try:
            eval(expression, self._env)
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    # ---- layout ------------------------------------------------------------------------------------------------------

    def split(self, x: Labelled) -> Labelled:
        """One dimension per label, none of size 1 without one."""
        dims = tuple((label,) for label in x.labels)
        return x if dims == x.dims else self.reshaped(x, dims)

    def reshaped(self, x: Labelled, dims: Dims) -> Labelled:
        """The same labels in the same order, dealt out to other dimensions."""
        assert [y for d in dims for y in d] == list(x.labels), (x, dims)
        sizes = self.sizes_of(dims)
        forms = [f"{x.name}.reshape({sizes})", f"{x.name}.view({sizes})", f"torch.reshape({x.name}, ({sizes},))"]
        merged = [n for n, d in enumerate(dims) if len(d) == 2 and x.dims[n : n + 2] == ((d[0],), (d[1],))]
        if len(dims) == len(x.dims) - 1 and len(merged) == 1 and len(dims) > merged[0]:
            n = merged[0]
            if dims == (*x.dims[:n], dims[n], *x.dims[n + 2 :]):
                forms += [f"{x.name}.flatten({n}, {n + 1})"] * 2
        opened = [n for n, d in enumerate(x.dims) if len(d) == 2 and dims[n : n + 2] == ((d[0],), (d[1],))]
        if len(dims) == len(x.dims) + 1 and len(opened) == 1:
            n = opened[0]
            if x.dims == (*dims[:n], x.dims[n], *dims[n + 2 :]):
                forms += [f"{x.name}.unflatten({n}, ({self.sizes[dims[n][0]]}, -1))"] * 2
        form = self.pick(*forms)
        return self.let(form if self.possible(form) else forms[0], dims)

    def permuted(self, x: Labelled, order: Sequence[int]) -> Labelled:
        """The dimensions in another order."""
        dims = tuple(x.dims[n] for n in order)
        if list(order) == list(range(len(order))):
            return x
        listed = ", ".join(map(str, order))
        forms = [f"{x.name}.permute({listed})", f"torch.permute({x.name}, ({listed},))"]
        moved = [n for n, at in enumerate(order) if n != at]
        rank = len(order)
        if len(moved) == 2:
            a, b = moved
            forms += [f"{x.name}.transpose({a}, {b})", f"{x.name}.transpose({b - rank}, {a - rank})"]
            forms += [f"torch.swapaxes({x.name}, {a}, {b})"]
            if moved == [rank - 2, rank - 1]:
                forms += [f"{x.name}.mT"]
            if rank == 2:
                forms += [f"{x.name}.t()", f"{x.name}.T"]
        else:
            forms += [f"torch.movedim({x.name}, ({listed},), ({', '.join(map(str, range(rank)))},))"]
        return self.let(self.pick(*forms), dims)

    def arranged(self, x: Labelled, dims: Dims) -> Labelled:
        """Any rearrangement to dimensions of the same labels."""
        if x.dims == dims:
            return x
        wanted = [label for dim in dims for label in dim]
        if [y for y in x.labels] != wanted:
            x = self.split(x)
            x = self.permuted(x, [x.at(label) for label in wanted])
            if self.chance(15):
                x = self.let(f"{x.name}.contiguous()", x.dims)
        return x if x.dims == dims else self.reshaped(x, dims)

    def shuffled(self, labels: Iterable[str], *, alone: Iterable[tuple[str, ...]] = ()) -> Dims:
        """Labels in a random order, some neighbours merged; each group of `alone` stays one dimension of its own."""
        groups = list(alone)
        single = [(y,) for y in labels if not any(y in group for group in groups)]
        dims: list[tuple[str, ...]] = []
        for group in self.order([*single, *groups]):
            if dims and self.chance(25) and group not in groups and dims[-1] not in groups:
                dims[-1] = (*dims[-1], *group)
            else:
                dims.append(group)
        return tuple(dims)

    def renamed(self, x: Labelled, names: dict[str, str]) -> Labelled:
        """The same tensor, its labels read as others of the same size."""
        return Labelled(x.name, tuple(tuple(names.get(y, y) for y in dim) for dim in x.dims))

    def broadcastable(
        self, labels: Iterable[str], like: Labelled, *, origin: str, value: Tensor | None = None
    ) -> Labelled:
        """A tensor over some labels of `like`, shaped so that it broadcasts against it."""
        kept = set(labels)
        dims = tuple(tuple(y for y in dim if y in kept) for dim in like.dims)
        # a dimension is there as a whole or not at all
        dims = tuple(dim if dim == full else () for dim, full in zip(dims, like.dims, strict=True))
        while dims and dims[0] == () and self.chance(60):
            dims = dims[1:]
        return self.tensor(dims, origin=origin, value=value)
