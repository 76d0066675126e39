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


@dataclass(frozen=True)
class Part:
    """A named value that does not hold the tile's variable."""

    name: str
    text: str
    ctype: str
    vtype: str
    reads_memory: bool


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
    uses_symbol: bool


@dataclass(frozen=True)
class Value:
    """A piece of C: a vector of reals or of lane masks, or (`scalar`) one number or truth value for all lanes."""

    text: str
    mask: bool = False
    scalar: bool = False


@dataclass
class Builder:
    """Builds one Program; `symbol` is s or p."""

    scalar: ScalarPrinter
    symbol: sympy.Symbol
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
            uses_symbol=any(self.symbol in x.free_symbols for x in results),
        )

    # --- parts without the tile's variable ----------------------------------------------------------------------------

    def part(self, x: sympy.Expr) -> Value:
        if isinstance(x, sympy.Number) or x in (sympy.oo, -sympy.oo, sympy.nan):
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
            self.parts[place].append(Part(name, text, ctype, "ivec" if truth else "vec", bool(language.loads(x))))
            self.known[x] = Value(f"{name}_v", mask=truth)
        else:
            self.parts[place].append(Part(name, wanted, "int" if truth else "real", "", False))
            self.known[x] = Value(name, mask=truth, scalar=True)
        return self.known[x]

    def note_slots(self, x: sympy.Expr) -> None:
        self.slots.update(y.slot for y in language.loads(x))

    # --- parts with it ------------------------------------------------------------------------------------------------

    def value(self, x: sympy.Expr) -> Value:
        if x == self.symbol:
            return Value(str(self.symbol))
        if self.symbol not in x.free_symbols:
            return self.part(x)
        if x in self.known:
            return self.known[x]
        match x:
            case sympy.Add() | sympy.Mul():
                return self.fold(x)
            case sympy.Pow():
                return self.power(x)
            case sympy.Function() if type(x).__name__ in language.FUNCTIONS:
                self.known[x] = self.name_it(self.function(type(x).__name__, x))
                return self.known[x]
        raise NotGenerated(f"{x} ({type(x).__name__}) cannot hold {self.symbol}")

    def fold(self, x: sympy.Add | sympy.Mul) -> Value:
        """All terms without the variable become one part; what is left is added or multiplied lane by lane."""
        free = [y for y in x.args if self.symbol not in y.free_symbols]
        held = [y for y in x.args if self.symbol in y.free_symbols]
        if isinstance(x, sympy.Add):
            texts = [self.real(self.value(y)) for y in held]
            return Value(f"({' + '.join(texts + ([self.real(self.part(sympy.Add(*free)))] if free else []))})")
        above = [self.real(self.value(y)) for y in held if not (isinstance(y, sympy.Pow) and y.exp == -1)]
        below = [self.real(self.value(y.base)) for y in held if isinstance(y, sympy.Pow) and y.exp == -1]
        # one division by c, not a product with 1 / c
        over = [y.base for y in free if isinstance(y, sympy.Pow) and y.exp == -1 and not y.base.is_number]
        rest = [y for y in free if not (isinstance(y, sympy.Pow) and y.exp == -1 and not y.base.is_number)]
        if rest and sympy.Mul(*rest) == -1:
            above[0:1] = [f"-{above[0]}"] if above else []
        elif rest:
            above.insert(0, self.real(self.part(sympy.Mul(*rest))))
        below += [self.real(self.part(sympy.Mul(*over)))] if over else []
        text = " * ".join(above) if above else self.real(self.part(sympy.Float(1.0)))
        return Value(f"({text} / ({' * '.join(below)}))" if below else f"({text})")

    def power(self, x: sympy.Pow) -> Value:
        base = self.real(self.value(x.base))
        if isinstance(x.exp, sympy.Integer) and 0 < x.exp <= 8:
            return Value(f"({' * '.join([base] * int(x.exp))})")
        if x.exp == -1:
            return Value(f"({constant(sympy.Float(1.0), self.scalar.wide)} / {base})")
        self.functions.add("pow")
        return self.name_it(Value(f"vpow({self.vector(self.value(x.base))}, {self.vector(self.value(x.exp))})"))

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
        if name == "clamp":
            self.functions |= {"maximum", "minimum"}
            return Value(f"vminimum(vmaximum({vectors[0]}, {vectors[1]}), {vectors[2]})")
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
