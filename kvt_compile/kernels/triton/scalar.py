"""Score language -> Triton expression over a tile.

    0.125*s + c0[h, i, j]  ->  0.125 * s + tl.load(c0_ptr + ...).to(REAL)

A value has the shape its coordinates give it (b, h: a number; i: [ROWS, 1]; j: [1, COLS]) and meets others by
broadcasting, so what does not depend on a key is computed once a row.  Types follow the values as in every lowering:
indices and integer tensors are integers, comparisons truth values, and whatever meets a float becomes REAL, the
accumulation type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.expressions import COMPARE, NotGenerated, guarded_loads, nonnegative, plain_index
from kvt_compile.kernels.op.spec import KernelSpec

Kind = Literal["real", "int", "bool"]

ELEMENTS = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "bool": "i1",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
}
"""torch dtype of a captured tensor -> Triton's name of its element type."""

DIRECT = {"exp": "tl.exp", "log": "tl.log", "sin": "tl.sin", "cos": "tl.cos", "erf": "tl.erf", "sigmoid": "tl.sigmoid"}
UNSURE = ("erf", "sin", "cos", "log")
"""Functions with sums of their own inside, in code that is not ours."""
OWN = ("tanh", "clamp", "relu", "abs")
"""Functions that stand in templates/functions.py.jinja."""


@dataclass(frozen=True)
class Program:
    """Captured elements, one statement each, and an expression of them."""

    loads: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Text:
    """A piece of Triton, complete enough to stand beside any operator, and the type of its value."""

    text: str
    kind: Kind
    constant: bool = False
    """A number in the text itself: it adapts to the type of what it meets."""


def real_constant(value: sympy.Expr) -> Text:
    """A literal with all its digits."""
    number = float("nan") if value is sympy.nan else float(value)
    if number != number:
        return Text('float("nan")', "real", True)
    if number in (float("inf"), float("-inf")):
        return Text('float("inf")' if number > 0 else '(-float("inf"))', "real", True)
    return Text(repr(number) if number >= 0 else f"({number!r})", "real", True)


def bare(constant: str) -> str:
    """The text of a constant without the brackets that let it stand beside any operator."""
    return constant[1:-1] if constant.startswith("(") else constant


def axes_of(x: sympy.Expr) -> frozenset[str]:
    """Which of the tile's axes i and j a value changes with."""
    return frozenset(str(y) for y in x.free_symbols) & {"i", "j"}


class TilePrinter:
    """Prints the expressions of one spec; `functions` collects which of OWN and of the other helpers they use.

    contracting: for a compiler that may contract a product and a sum into a multiply-add; no sum may then be a `+`.
    """

    def __init__(self, spec: KernelSpec, contracting: bool = False) -> None:
        self.spec = spec
        self.contracting = contracting
        self.wide = spec.dtype == "float64"
        self.guarded = guarded_loads(spec.score_expression) | guarded_loads(spec.weight_expression)
        self.functions: set[str] = set()
        self.loaded: dict[language.load, tuple[str, Text]] = {}

    def program(self, x: sympy.Expr) -> Program:
        """The value of an expression of type REAL."""
        self.loaded = {}
        text = self.tensor(self(x))
        return Program(self.load_statements(), text)

    def load_statements(self) -> tuple[str, ...]:
        """One for every captured element that was printed since the last program; those inside indices first."""
        return tuple(f"{value.text} = {statement}" for statement, value in self.loaded.values())

    def __call__(self, x: sympy.Expr) -> Text:
        match x:
            case sympy.Integer():
                return Text(str(int(x)) if x >= 0 else f"({int(x)})", "int", True)
            case language.s | language.p:
                return Text(str(x), "real")
            case sympy.Symbol():
                return Text(str(x), "int")
            case language.load():
                return self.load(x)
            case sympy.Add():
                return self.sum(x)
            case sympy.Mul():
                return self.product(x)
            case sympy.Pow():
                return self.power(x)
            case sympy.Function() if type(x).__name__ in language.FUNCTIONS:
                return self.function(type(x).__name__, x)
            case _ if isinstance(x, sympy.Number) or x in (sympy.oo, -sympy.oo, sympy.nan):
                return real_constant(self.narrowed(x))
        raise NotGenerated(f"{x} ({type(x).__name__}) is not part of the score language")

    def narrowed(self, x: sympy.Expr) -> sympy.Expr:
        """A finite constant beyond the accumulation type is an infinity there."""
        if not self.wide and x.is_finite and abs(float(x)) > 3.4028235677973366e38:
            return sympy.oo if x > 0 else -sympy.oo
        return x

    # --- conversions --------------------------------------------------------------------------------------------------

    def real(self, value: Text) -> Text:
        """As an operand of arithmetic with reals."""
        if value.kind == "real":
            return value
        if value.constant:
            return real_constant(sympy.sympify(value.text))
        return Text(f"{value.text}.to(REAL)", "real")

    def tensor(self, value: Text) -> str:
        """As an argument of a function: a constant does not adapt there, so it is given its type."""
        value = self.real(value)
        return f"tl.full((), {bare(value.text)}, REAL)" if value.constant else value.text

    def truth(self, x: sympy.Expr) -> str:
        value = self(x)
        return value.text if value.kind == "bool" else f"({value.text} != 0)"

    def common(self, values: list[Text]) -> tuple[list[Text], Kind]:
        """As soon as one value is real all are."""
        if any(v.kind == "real" for v in values):
            return [self.real(v) for v in values], "real"
        return [Text(f"{v.text}.to(INDEX)", "int") if v.kind == "bool" else v for v in values], "int"

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def infix(self, sign: str, values: list[Text]) -> Text:
        values, kind = self.common(values)
        if all(v.constant for v in values) and kind == "real":
            values = [Text(self.tensor(values[0]), "real"), *values[1:]]
        return Text(f"({sign.join(v.text for v in values)})", kind, all(v.constant for v in values))

    def sum(self, x: sympy.Add) -> Text:
        """Left to right.  s + c is no `+`: wherever s has no other use, Triton starts the product's accumulator with c,
        which rounds otherwise than the kernels where s has one."""
        values, kind = self.common([self(y) for y in x.args])
        if kind != "real" or not (self.contracting or language.s in x.args):
            return self.infix(" + ", values)
        self.functions.add("exact_sum")
        text = self.tensor(values[0])
        for value in values[1:]:
            text = f"exact_sum({text}, {self.tensor(value)})"
        return Text(text, "real")

    def product(self, x: sympy.Mul) -> Text:
        above, below = [], []
        for factor in x.args:
            # x / y is one rounding, x * (1 / y) two
            if isinstance(factor, sympy.Pow) and factor.exp == -1:
                below.append(self(factor.base))
            else:
                above.append(self(factor))
        if above and above[0].constant and above[0].text in ("(-1)", "(-1.0)") and len(above) > 1:
            rest = self.infix(" * ", above[1:]) if len(above) > 2 else above[1]
            rest = self.real(rest) if rest.kind == "bool" or above[0].text == "(-1.0)" else rest
            numerator = Text(f"(-{rest.text})", rest.kind)
        else:
            numerator = self.infix(" * ", above) if len(above) > 1 else above[0] if above else self(sympy.Float(1.0))
        if not below:
            return numerator
        denominator = self.infix(" * ", below) if len(below) > 1 else below[0]
        return Text(f"({self.tensor(numerator)} / {self.tensor(denominator)})", "real")

    def power(self, x: sympy.Pow) -> Text:
        if isinstance(x.exp, sympy.Integer) and 0 < x.exp <= 8:
            return self.infix(" * ", [self(x.base)] * int(x.exp))
        if isinstance(x.exp, sympy.Integer) and -8 <= x.exp < 0:
            below = self.infix(" * ", [self(x.base)] * -int(x.exp)) if x.exp < -1 else self(x.base)
            return Text(f"(1.0 / {self.tensor(below)})", "real")
        if x.exp == sympy.Rational(1, 2) or x.exp == 0.5:
            return Text(f"tl.sqrt({self.tensor(self(x.base))})", "real")
        raise NotGenerated(f"the power {language.to_text(x)} is not generated for a GPU")

    # --- functions ----------------------------------------------------------------------------------------------------

    def function(self, name: str, x: sympy.Function) -> Text:
        args = x.args
        if name in COMPARE:
            values, _ = self.common([self(y) for y in args])
            if all(v.constant for v in values):
                values = [Text(f"tl.full((), {bare(v.text)}, {'INDEX' if v.kind == 'int' else 'REAL'})", v.kind)
                          for v in values]  # fmt: skip
            return Text(f"({values[0].text} {COMPARE[name]} {values[1].text})", "bool")
        if name in ("logical_and", "logical_or"):
            sign = "&" if name == "logical_and" else "|"
            return Text(f"({self.truth(args[0])} {sign} {self.truth(args[1])})", "bool")
        if name == "logical_not":
            return Text(f"({self.truth(args[0])} == 0)", "bool")
        if name == "where":
            return self.where(args)
        if name == "sqrt":
            return Text(f"tl.sqrt({self.tensor(self(args[0]))})", "real")
        if name in DIRECT:
            return Text(f"{DIRECT[name]}({self.tensor(self(args[0]))})", "real")
        if name in ("floordiv", "mod"):
            return self.division(name, args[0], args[1])
        values, kind = self.common([self(y) for y in args])
        if name in ("maximum", "minimum"):
            texts = [self.argument(v) for v in values]
            return Text(f"tl.{name}({texts[0]}, {texts[1]}, propagate_nan=tl.PropagateNan.ALL)", kind)
        if name in OWN:
            self.functions.add(name)
            return Text(f"{name}_({', '.join(self.argument(v) for v in values)})", kind)
        raise NotGenerated(f"{name} is not generated for a GPU")

    def argument(self, value: Text) -> str:
        if value.kind == "real":
            return self.tensor(value)
        return f"tl.full((), {bare(value.text)}, INDEX)" if value.constant else value.text

    def where(self, args: tuple[sympy.Expr, ...]) -> Text:
        yes, no = self(args[1]), self(args[2])
        if yes.kind == no.kind == "bool":
            return Text(f"tl.where({self.truth(args[0])}, {yes.text}, {no.text})", "bool")
        (yes, no), kind = self.common([yes, no])
        return Text(f"tl.where({self.truth(args[0])}, {self.argument(yes)}, {self.argument(no)})", kind)

    def division(self, name: str, x: sympy.Expr, y: sympy.Expr) -> Text:
        values, kind = self.common([self(x), self(y)])
        if kind == "real":
            quotient = f"tl.floor({self.tensor(values[0])} / {self.tensor(values[1])})"
            if name == "floordiv":
                return Text(quotient, "real")
            whole = f"{quotient} * {self.tensor(values[1])}"
            if self.contracting:
                self.functions.add("exact_sum")
                return Text(f"exact_sum({self.tensor(values[0])}, -({whole}))", "real")
            return Text(f"({self.tensor(values[0])} - {whole})", "real")
        if nonnegative(x) and nonnegative(y):  # Triton divides towards zero, the language downwards
            return Text(f"({values[0].text} {'//' if name == 'floordiv' else '%'} {values[1].text})", "int")
        self.functions.add(name)
        return Text(f"{name}_({self.argument(values[0])}, {self.argument(values[1])})", "int")

    # --- captured tensors ---------------------------------------------------------------------------------------------

    def load(self, x: language.load) -> Text:
        """The name of a captured element; `load_statements` says how it is read."""
        if x not in self.loaded:
            statement, kind = self.read(x)
            self.loaded[x] = statement, Text(f"c{x.slot}_{len(self.loaded)}", kind)
        return self.loaded[x][1]

    def read(self, x: language.load) -> tuple[str, Kind]:
        spec = self.spec.captured[x.slot]
        mask = self.inside(x)
        place = f"c{x.slot}_ptr + {self.offset(x, 'stride')}" if x.index else f"c{x.slot}_ptr"
        text = f"tl.load({place}, mask={mask}, other=0)" if mask else f"tl.load({place})"
        if spec.dtype == "bool":
            return f"({text} != 0)", "bool"
        if not spec.is_float:
            return f"{text}.to(tl.int64)", "int"
        return f"{text}.to(REAL)", "real"

    def inside(self, x: language.load) -> str:
        """The mask of its places in the tile; rows and keys beyond the last are not read."""
        axes: frozenset[str] = frozenset().union(*(axes_of(y) for y in x.index))
        return " & ".join(f"inside_{axis}" for axis in sorted(axes))

    def offset(self, x: language.load, unit: str) -> str:
        """Where the element stands: index * stride, each index in range.  unit "stride": in the tensor, "size": in a
        contiguous tensor of its shape."""
        positions = [self.position(x, dim) for dim in range(len(x.index))]
        if unit == "stride":
            return " + ".join(f"{p} * c{x.slot}_stride{dim}" for dim, p in enumerate(positions))
        text = positions[0]
        for dim, p in enumerate(positions[1:], start=1):
            text = f"({text}) * c{x.slot}_size{dim} + {p}"
        return text

    def position(self, x: language.load, dim: int) -> str:
        """One index of a load, clamped unless it is a coordinate the launch has checked."""
        index = x.index[dim]
        value = self(index)
        if plain_index(index) and x not in self.guarded:
            return value.text
        text = f"tl.full((), {bare(value.text)}, INDEX)" if value.constant else value.text
        if value.kind != "int":
            text = f"{self.real(value).text}.to(INDEX)" if value.kind == "real" else f"{text}.to(INDEX)"
        self.functions.add("clamp_index")
        return f"clamp_index({text}, c{x.slot}_size{dim})"


def unsure_functions(x: sympy.Expr) -> list[str]:
    """Which of UNSURE an expression names."""
    return sorted({type(y).__name__ for y in x.atoms(sympy.Function)} & set(UNSURE))


def index_needs_64_bits(expressions: list[sympy.Expr]) -> bool:
    """Whether an integer in the expressions may leave 32 bits though every coordinate and size is below 2**24."""
    return any(_magnitude(x) >= 2**31 for expression in expressions for x in sympy.preorder_traversal(expression))


def _magnitude(x: sympy.Expr) -> float:
    """A bound of an integer's absolute value; 0 for what is not an integer of the index type."""
    if isinstance(x, sympy.Integer):
        return abs(int(x))
    if isinstance(x, sympy.Symbol):
        return 0.0 if x in (language.s, language.p) else 2.0**24
    if isinstance(x, sympy.Add):
        return sum(_magnitude(y) for y in x.args)
    if isinstance(x, sympy.Mul):
        return float(sympy.prod([max(_magnitude(y), 1) for y in x.args])) if not x.has(language.s, language.p) else 0.0
    if isinstance(x, sympy.Pow):
        return _magnitude(x.base) ** float(x.exp) if isinstance(x.exp, sympy.Integer) and x.exp > 0 else 0.0
    if isinstance(x, language.load):
        return 0.0  # an integer tensor's elements are 64 bits wide by themselves
    return max((_magnitude(y) for y in x.args), default=0.0)


__all__ = [
    "ELEMENTS",
    "NotGenerated",
    "Program",
    "Text",
    "TilePrinter",
    "axes_of",
    "index_needs_64_bits",
    "real_constant",
    "unsure_functions",
]
