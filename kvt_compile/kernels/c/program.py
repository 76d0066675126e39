"""Pointwise expression over a tile -> `Program`: C for the parts that do not hold the tile's variable, by how often
they change, and vector statements for the rest.

    0.125*s + where(c1[b % 4, i, j], c0[h, i, j], -oo)

    tile0[j][l] = (c1[...] ? c0[...] : -inf)   one loop a block of keys
    0.125f * s + tile0_v                       M queries at once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from kvt_compile.kernels.c.scalar import ScalarPrinter, constant, depends_on
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.expressions import COMPARE, NotGenerated
from kvt_compile.kernels.language.types import is_whole_power


@dataclass(frozen=True)
class Row:
    """A load whose last index is the key, of the type of the scores: a row of it is moved, not read one by one."""

    start: str
    """Address of the element of query i and key j."""
    step: str
    """Distance of the next key's."""


@dataclass(frozen=True)
class Part:
    """A named value that does not hold the tile's variable."""

    name: str
    text: str
    ctype: str
    vtype: str
    reads_memory: bool
    row: Row | None = None
    """Where keys stand one after the other, this is the row of a query."""


@dataclass(frozen=True)
class Slot:
    """A captured tensor the program reads."""

    number: int
    dtype: str
    ndim: int


@dataclass(frozen=True)
class Program:
    """What `templates/program.c.jinja` prints."""

    results: tuple[str, ...]
    """Vectors of reals."""
    statements: tuple[str, ...]
    uniforms: tuple[Part, ...]
    """Change with b and h."""
    keys: tuple[Part, ...]
    """Change with j too."""
    lanes: tuple[Part, ...]
    """Change with i, not with j."""
    tiles: tuple[Part, ...]
    """Change with i and j."""
    slots: tuple[Slot, ...]
    functions: frozenset[str]
    symbols: frozenset[str]
    """Which of s, p and gradient it reads."""


@dataclass(frozen=True)
class Value:
    """A piece of C: a vector of reals or of lane masks, or (`scalar`) one number or truth value for all lanes."""

    text: str
    mask: bool = False
    scalar: bool = False


@dataclass
class Builder:
    """Builds one Program."""

    scalar: ScalarPrinter
    parts: dict[str, list[Part]] = field(default_factory=lambda: {x: [] for x in ("uniform", "key", "lane", "tile")})
    statements: list[str] = field(default_factory=list)
    known: dict[sympy.Expr, Value] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    slots: set[int] = field(default_factory=set)

    def build(self, results: Sequence[sympy.Expr], extra: Sequence[sympy.Expr] = ()) -> Program:
        """The program of several results; `extra`: expressions whose captured tensors have to be at hand as well."""
        texts = tuple(self.vector(self.value(x)) for x in results)
        for x in extra:
            self.note_slots(x)
        captured = self.scalar.spec.captured
        return Program(
            results=texts,
            statements=tuple(self.statements),
            uniforms=tuple(self.parts["uniform"]),
            keys=tuple(self.parts["key"]),
            lanes=tuple(self.parts["lane"]),
            tiles=tuple(self.parts["tile"]),
            slots=tuple(Slot(n, captured[n].dtype, captured[n].ndim) for n in sorted(self.slots)),
            functions=frozenset(self.functions),
            symbols=frozenset(str(y) for x in results for y in x.free_symbols & language.VALUES),
        )

    # --- parts without the tile's variable ----------------------------------------------------------------------------

    def part(self, x: sympy.Expr) -> Value:
        if language.is_number(x):
            text = constant(x, self.scalar.wide)
            return Value(f"({text})" if text[0] == "-" else text, scalar=True)
        if x in self.known:
            return self.known[x]
        self.note_slots(x)
        axes = depends_on(x)
        place = ("tile" if "j" in axes else "lane") if "i" in axes else ("key" if "j" in axes else "uniform")
        printed = self.scalar(x)
        truth = printed.kind == "bool"
        name = f"{place}{len(self.parts[place])}"
        wanted = printed.text if truth else self.scalar.real(printed)
        if place in ("lane", "tile"):
            text, ctype = (f"-(lane_int){wanted}", "lane_int") if truth else (wanted, "real")
            vtype, row = "ivec" if truth else "vec", self.row(x) if place == "tile" else None
            self.parts[place].append(Part(name, text, ctype, vtype, bool(language.loads(x)), row))
            self.known[x] = Value(f"{name}_v", mask=truth)
        else:
            self.parts[place].append(Part(name, wanted, "int" if truth else "real", "", False))
            self.known[x] = Value(name, mask=truth, scalar=True)
        return self.known[x]

    def row(self, x: sympy.Expr) -> Row | None:
        real = "float64" if self.scalar.wide else "float32"
        if not isinstance(x, language.load) or self.scalar.spec.captured[x.slot].dtype != real:
            return None
        last = len(x.index) - 1
        if self.scalar.position(x, last) != "j" or any("j" in depends_on(index) for index in x.index[:last]):
            return None
        step = f"c{x.slot}_stride{last}"
        return Row(f"c{x.slot} + {self.scalar.offset(x, lambda dim: f'c{x.slot}_stride{dim}')}", step)

    def note_slots(self, x: sympy.Expr) -> None:
        self.slots.update(y.slot for y in language.loads(x))

    # --- parts with it ------------------------------------------------------------------------------------------------

    def value(self, x: sympy.Expr) -> Value:
        if x in language.VALUES:
            return Value(str(x))
        if not language.holds(x):
            return self.part(x)
        if x in self.known:
            return self.known[x]
        if not isinstance(x, language.Operation):
            raise NotGenerated(f"{x} ({type(x).__name__}) cannot hold a score")
        name = type(x).__name__
        if name in ("add", "sub", "mul", "div"):
            return self.infix(language.ARITHMETIC[type(x)], *(self.real(self.value(y)) for y in x.args))
        if name == "neg":
            return Value(f"(-{self.real(self.value(x.args[0]))})")
        if name in ("float32", "float64"):
            return Value(self.real(self.value(x.args[0])))
        self.known[x] = self.name_it(self.power(x) if name == "power" else self.function(name, x))
        return self.known[x]

    def infix(self, sign: str, left: str, right: str) -> Value:
        return Value(f"({left} {sign} {right})")

    def power(self, x: language.Operation) -> Value:
        base, exponent = x.args
        if is_whole_power(x) and 0 < exponent <= 8:
            return Value(f"({' * '.join([self.real(self.value(base))] * int(exponent))})")
        self.functions.add("pow")
        return Value(f"vpow({self.vector(self.value(base))}, {self.vector(self.value(exponent))})")

    def function(self, name: str, x: sympy.Function) -> Value:
        args = [self.value(y) for y in x.args]
        if name in COMPARE:
            return Value(f"({self.vector(args[0])} {COMPARE[name]} {self.vector(args[1])})", mask=True)
        if name in ("logical_and", "logical_or"):
            sign = "&" if name == "logical_and" else "|"
            return Value(f"({self.mask(args[0])} {sign} {self.mask(args[1])})", mask=True)
        if name == "logical_not":
            return Value(f"(~{self.mask(args[0])})", mask=True)
        if name == "where":
            return self.where(*args)
        vectors = [self.vector(y) for y in args]
        if name == "abs":
            return Value(f"choose({vectors[0]} < 0, -{vectors[0]}, {vectors[0]})")
        if name == "relu":
            return Value(f"choose({vectors[0]} < 0, (vec){{0}}, {vectors[0]})")
        if name in ("clamp", "hardtanh"):
            self.functions |= {"maximum", "minimum"}
            return Value(f"vminimum(vmaximum({vectors[0]}, {vectors[1]}), {vectors[2]})")
        if name in language.CASTS:
            raise NotGenerated(f"{name}(...) of a value made of scores is not generated")
        if name in ("floordiv", "mod"):
            self.functions.add("floor")
            quotient = f"vfloor({vectors[0]} / {vectors[1]})"
            return Value(quotient if name == "floordiv" else f"({vectors[0]} - {quotient} * {vectors[1]})")
        self.functions.add(name)
        return Value(f"v{name}({', '.join(vectors)})")

    def where(self, condition: Value, yes: Value, no: Value) -> Value:
        if condition.scalar:
            return Value(f"({condition.text} ? {self.vector(yes)} : {self.vector(no)})")
        return Value(f"choose({self.mask(condition)}, {self.vector(yes)}, {self.vector(no)})")

    def name_it(self, value: Value) -> Value:
        """A statement of its own, so that a value used twice is computed once and the C stays readable."""
        name = f"x{len(self.statements)}"
        self.statements.append(f"const {'ivec' if value.mask else 'vec'} {name} = {value.text};")
        return Value(name, mask=value.mask)

    # --- conversions --------------------------------------------------------------------------------------------------

    def real(self, value: Value) -> str:
        """As an operand of + * /: a number is spread over the lanes by the operator."""
        if value.mask:
            return f"(real){value.text}" if value.scalar else f"mask_to_real({value.text})"
        return value.text

    def vector(self, value: Value) -> str:
        return f"splat({self.real(value)})" if value.scalar else self.real(value)

    def mask(self, value: Value) -> str:
        if value.scalar:
            return f"isplat(-(lane_int)({value.text} != 0))"
        return value.text if value.mask else f"({value.text} != 0)"
