"""A value -> the softmax it is, whatever it is written as.

    exp(s) / exp(s).sum(-1, True),  exp(s - logsumexp(s)),  2**s * (1 / (2**s).sum(-1, True))   ->   softmax(s)
    (exp(s) @ v) / exp(s).sum(-1, True)                                                        ->   softmax(s) @ v

A value w is one along a row if w = A * r, where A varies along it and r * sum_j A = 1: then w is the softmax of log A.
Both are read off its form (`row.py`), so nothing here knows a spelling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.algebra import exponents, rules  # noqa: F401 - they fill the tables of rules
from kvt_compile.passes.canonical.algebra.dead_rows import without_dead_rows
from kvt_compile.passes.canonical.algebra.forms import (
    Chosen,
    Element,
    Entry,
    Exp,
    Form,
    NotRead,
    Program,
    Total,
    not_negative,
    of_atom,
    over,
    program_of,
    times,
)
from kvt_compile.passes.canonical.algebra.program import laid_out, written
from kvt_compile.passes.canonical.algebra.row import Row
from kvt_compile.passes.canonical.coords import ZERO, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import Builder
from kvt_compile.passes.canonical.values import NOT_MEANT, Value, meta_value, same_shape

_ENDS = frozenset({"div", "mul", "exp", "exp2", "pow", "power_of_number", "where", "reciprocal", "add", "sub"})
"""What the last operation of a softmax can be."""
_SUMS = frozenset({"sum", "mean", "logsumexp"})
_SAME = 1e-9
"""How far a number that was made of others, rounded to 12 digits, may be from 1."""
_CARRY = ("pointwise", "layout", "border", "select_by")


@dataclass
class Recogniser:
    """Looks at each value of a graph as it is read; remembers which have a sum of a row in them, so that nearly all of
    them cost nothing."""

    sums: set[Value] = field(default_factory=set)
    softmaxes: set[Value] = field(default_factory=set)
    """Softmaxes, and what is made of one: its logarithm has a sum in it."""
    same: dict[Value, Value] = field(default_factory=dict)
    """What computes the same as an earlier value, as the maximum of an exponential that is written twice -> that."""
    products: dict[Value, Value] = field(default_factory=dict)
    """What is a product, at most scaled and rearranged -> that product."""
    _first: dict[object, Value] = field(default_factory=dict)

    def look(self, b: Builder, value: Value) -> Value:
        """The value, or the softmax (the product with one) that it is."""
        if value.kind in ("contraction", "pointwise") and any(x.index < 0 for x in value.operands):
            value.inputs = tuple(self.look(b, x) if isinstance(x, Value) and x.index < 0 else x for x in value.inputs)
        self._note(value)
        if value.name == "where" and (alive := without_dead_rows(b, value)) is not None:
            self._note(alive)
            return alive
        if value.kind != "pointwise" or value.name not in _ENDS or not _is_real(value):
            return value
        if any(x in self.sums for x in value.operands):
            try:
                found = self._softmax(b, value) or self._product(b, value)
            except NotRead:
                found = None
            if found is not None:
                return found
        return value

    def _number(self, value: Value) -> None:
        """Finds the first value that is computed alike."""
        computes = value.kind in ("layout", "reduce", "border") or (value.kind == "opaque" and value.name == "detach")
        if not computes and (value.kind != "pointwise" or value.name == "dropout"):
            return
        inputs = tuple(self.same.get(x, x) if isinstance(x, Value) else (type(x), x) for x in value.inputs)
        attrs = tuple((key, x) for key, x in value.attrs.items() if key not in NOT_MEANT)
        key = (value.kind, value.name, value.shape, value.dtype, inputs, attrs)
        try:
            first = self._first.setdefault(key, value)
        except TypeError:  # an argument that is a list
            return
        if first is not value:
            self.same[value] = first

    def _note(self, value: Value) -> None:
        self._number(value)
        if value.kind == "reduce":
            if value.name in _SUMS and len(value.attrs["dims"]) == 1:
                self.sums.add(value)
        elif value.kind == "contraction":
            self.products[value] = value
            if value.name == "mul_sum" or any(_is_ones(x) for x in value.operands):
                self.sums.add(value)
        elif value.kind == "softmax":
            self.softmaxes.add(value)
        elif value.kind in _CARRY or (value.kind == "opaque" and value.name != "detach" and value.name in _SHAPELESS):
            for x in value.operands:
                if x.index < 0:
                    self._note(x)  # an inner part of the same operation
            of_softmax = any(x in self.softmaxes for x in value.operands)
            if of_softmax:
                self.softmaxes.add(value)
            if any(x in self.sums for x in value.operands) or (of_softmax and value.name == "log"):
                self.sums.add(value)
            made = [self.products[x] for x in value.operands if x in self.products]
            if made and value.kind in ("pointwise", "layout"):
                self.products[value] = made[0]
                if value.kind == "layout" and value.name in ("slice", "select") and _has_ones(made[0]):
                    self.sums.add(value)

    # ---- normalised before the product -------------------------------------------------------------------------------

    def _softmax(self, b: Builder, value: Value) -> Value | None:
        for dim in reversed(range(len(value.shape))):
            if value.shape[dim] == 1:
                continue
            space = Space()
            frame = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(value.shape))
            row = Row(space, frame[dim], same=self.same)
            form = _settled(row, value, frame)
            found = self._written(b, row, value, form, frame, dim)
            if found is not None:
                return found
        return None

    def _written(self, b: Builder, row: Row, value: Value, form: Form, frame: Coords, dim: int) -> Value | None:
        for total in _totals_below(form):
            rest = over(times(form, of_atom(total)), total.form)
            if rest is None or not not_negative(total.form):
                continue
            scores = _scores(b, row, total.form, frame, value, _values_of(rest))
            if scores is None or not same_shape(scores.shape, value.shape):
                continue
            weights = Value("softmax", "softmax", b.node, value.shape, value.dtype, (scores,), {"dim": dim})
            _absorb(row, weights)
            if rest.is_number and abs(rest.number - 1.0) < _SAME:
                return weights
            return _scaled(b, row, weights, rest, frame)
        return None

    # ---- normalised after the product --------------------------------------------------------------------------------

    def _product(self, b: Builder, value: Value) -> Value | None:
        product = next((self.products[x] for x in value.operands if x in self.products), None)
        if product is None:
            return None
        labels = product.attrs["lhs"], product.attrs["rhs"]
        summed = [x for x in labels[0] if x is not None and x in labels[1] and x not in product.attrs["out"]]
        if len(summed) != 1:
            return None
        for side in (1, 0):  # the values stand on the right, as a rule
            values = product.inputs[side]
            size = values.shape[labels[side].index(summed[0])]
            if size == 1:
                continue
            space = Space()
            frame = tuple(space.fresh(f"o{d}", n) for d, n in enumerate(value.shape))
            row = Row(space, space.fresh("j", size), frozenset({values, *_parts(values)}), self.same)
            found = self._normalised_after(b, row, value, _settled(row, value, frame), product, values, frame)
            if found is not None:
                return found
        return None

    def _normalised_after(
        self, b: Builder, row: Row, value: Value, form: Form, product: Value, values: Value, frame: Coords
    ) -> Value | None:
        for atom, power in form.powers:
            if not isinstance(atom, Total) or power != 1.0:
                continue
            mine = [x for x in atom.form.atoms if isinstance(x, Element) and (x.of is values or x.of in _parts(values))]
            if len(mine) != 1 or atom.form.power_of(mine[0]) != 1.0 or atom.form.program is None:
                continue
            own = of_atom(mine[0])
            weights = over(atom.form, own)
            total = None if weights is None else row.total(weights)
            left = None if total is None else over(times(form, total), of_atom(atom))
            if left is None or not left.is_number or abs(left.number - 1.0) > _SAME:
                continue
            assert weights is not None
            program = [e for e in atom.form.program if not (e.value is mine[0].of and e.at == mine[0].at)]
            if not_negative(weights):
                weights = replace(weights, program=tuple(program))
                return self._built(b, row, value, weights, mine[0], product, frame)
        return None

    def _built(
        self, b: Builder, row: Row, value: Value, weights: Form, values: Element, product: Value, frame: Coords
    ) -> Value | None:
        space, key = row.space, row.space.resolve(row.row)
        out = space.resolve_all(frame)
        weighing = {atom for entry in weights.program or () for atom in space.atoms_of(entry.at)}
        at = (*(coord for coord in out if set(coord.digits) & weighing), key)
        values_at = (*(coord for coord in out if set(coord.digits) & space.atoms_of(values.at)), key)
        scores = _scores(b, row, weights, at, value, [values.of])
        laid = laid_out(b, space, values.of, values.at, values_at)
        if scores is None or laid is None or len(scores.shape) != len(at) or len(laid.shape) != len(values_at):
            return None
        if {*at, *values_at} - {key} != {*out} - {ZERO}:
            return None
        made = Value("softmax", "softmax", b.node, scores.shape, scores.dtype, (scores,), {"dim": len(at) - 1})
        _absorb(row, made)
        labels = {"lhs": _labels(at), "rhs": _labels(values_at), "out": _labels(out)}
        return Value("contraction", product.name, b.node, value.shape, value.dtype, (made, laid), labels)


def _scores(b: Builder, row: Row, weights: Form, frame: Coords, whole: Value, others: list[Value]) -> Value | None:
    """What the weights are the exponentials of, by the model's own operations.  Read back, it has to say the same, and
    all that feeds the whole has to feed it, or what else is left of the whole."""
    programs = [weights.program, program_of(weights)]
    if weights.program is not None and any(entry.kind == "log" for entry in weights.program):
        programs.reverse()  # log(exp(s) - 1 + 1) is s
    for program in programs:
        program = _without_shifts(row, program)
        scores = written(b, row.space, program, frame) if program else None
        if scores is None or any(entry.kind == "log" and _of_softmax(entry.value) for entry in program or ()):
            continue  # weights that are changed and normalised again have their own softmax
        at = frame[len(frame) - len(scores.shape) :]
        again = over(Row(row.space, row.row, same=row.same).exponent(scores, at), weights)
        says_the_same = again is not None and not any(map(row.atom_along, again.atoms))
        if says_the_same and _keeps_gradients([whole], [scores, *others]):
            return scores
    return None


def _without_shifts(row: Row, program: Program) -> Program:
    """The program without what is taken of the row itself and subtracted from all of it."""
    along = [entry for entry in program or () if row.along(entry.at) and entry.kind == "exp"]

    def is_shift(entry: Entry) -> bool:
        return any(
            entry.power == -x.power and row.is_own((entry.value, entry.at), (x.value, x.at)) for x in along
        )  # fmt: skip

    return program and tuple(
        entry for entry in program if entry.kind != "exp" or row.along(entry.at) or not is_shift(entry)
    )


def _of_softmax(value: Value) -> bool:
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        if here.kind == "softmax":
            return True
        if here.kind in (*_CARRY, "reduce"):
            queue += [x for x in here.operands if x not in seen]
            seen.update(here.operands)
    return False


def _absorb(row: Row, made: Value) -> None:
    """Softmaxes that were read as a part of this one are no softmaxes of their own."""
    for value in row.read():
        if value.kind == "softmax":
            value.attrs["within"] = made


def _labels(at: Coords) -> tuple[Coord | None, ...]:
    return tuple(None if coord == ZERO else coord for coord in at)


def _settled(row: Row, value: Value, frame: Coords) -> Form:
    """Read twice: the first reading splits the coordinates that reshapes split."""
    row.form(value, frame)
    again = Row(row.space, row.row, row.stops, row.same)
    return again.form(value, frame)


def _totals_below(form: Form) -> list[Total]:
    return [atom for atom, power in form.powers if isinstance(atom, Total) and power == -1.0]


def _scaled(b: Builder, row: Row, weights: Value, rest: Form, frame: Coords) -> Value | None:
    """What is left beside a softmax, as factors of it."""
    result = weights
    if rest.number != 1.0:
        result = _pointwise(b, "mul", score.mul, weights, result, rest.number)
    for atom, power in rest.powers:
        if power != 1.0 or not isinstance(atom, Element | Chosen):
            return None
        x = laid_out(b, row.space, atom.of, atom.at, frame)
        if x is None:
            return None
        if isinstance(atom, Element):
            result = _pointwise(b, "mul", score.mul, weights, result, x)
        else:
            sides = (result, 0.0) if atom.on else (0.0, result)
            result = _pointwise(b, "where", score.where, weights, x, *sides)
    return result


def _pointwise(b: Builder, name: str, fn: object, like: Value, *inputs: object) -> Value:
    return Value("pointwise", name, b.node, like.shape, like.dtype, inputs, {"fn": fn})


def _values_of(form: Form) -> list[Value]:
    return [x.of for x in form.atoms if isinstance(x, Element | Chosen | Exp) and isinstance(x.of, Value)]


def _keeps_gradients(before: list[Value], after: list[Value]) -> bool:
    """Whether every tensor that feeds what is replaced still feeds what replaces it: one that cancels has a gradient of
    zeros in the model, and would have none."""
    kept = set(_behind(after, set()))
    return not any(here.kind == "source" and _is_real(here) and not _is_fixed(here) for here in _behind(before, kept))


def _behind(values: list[Value], seen: set[Value]) -> Iterator[Value]:
    """The values and all they are made of, but what was seen and what only that is made of."""
    queue, seen = list(values), set(seen)
    while queue:
        here = queue.pop()
        if here not in seen:
            seen.add(here)
            queue += here.operands
            yield here


def _is_fixed(value: Value) -> bool:
    return value.origin == "buffer" and not getattr(meta_value(value.node), "requires_grad", False)


def _is_real(value: Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point


_SHAPELESS = frozenset({"expm1", "cosh", "sinh", "softplus", "logsigmoid", "logaddexp", "log1p"})


def _is_ones(value: Value) -> bool:
    while value.kind == "layout" or (value.kind == "pointwise" and value.name == "identity"):
        inner = next(iter(value.operands), None)
        if inner is None:
            return False
        value = inner
    if value.kind == "pointwise" and value.name in ("constant", "fill"):
        return True
    return value.kind == "opaque" and value.name in ("ones", "full")


def _parts(value: Value) -> tuple[Value, ...]:
    return tuple(x for x in value.operands if not _is_ones(x)) if value.name == "cat" else ()


def _has_ones(product: Value) -> bool:
    return any(x.name == "cat" and any(map(_is_ones, x.operands)) for x in product.operands)
