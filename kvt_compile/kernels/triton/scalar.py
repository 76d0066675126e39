"""Score language -> Triton expression over a tile.

    0.125*s + c0[h, i, j]  ->  0.125 * s + tl.load(c0_ptr + ...).to(REAL)

A value has the shape its coordinates give it (b, h: a number; i: [ROWS, 1]; j: [1, COLS]) and meets others by
broadcasting, so what does not depend on a key is computed once a row.  Types are the language's (`language/types.py`):
REAL is the accumulation type and `other` the other one of float32 and float64; elements of integer tensors are held in
int64, and coordinates in INDEX, which is narrower where that is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.expressions import COMPARE, NotGenerated, guarded_loads, nonnegative, plain_index
from kvt_compile.kernels.language.types import FLOAT, INT, INTEGERS, is_whole_power
from kvt_compile.kernels.op.spec import KernelSpec

Kind = Literal["real", "other", "int", "bool"]

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
OWN = {"tanh": "tanh", "clamp": "clamp", "hardtanh": "clamp", "relu": "relu", "abs": "abs"}
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
        self.types = spec.types
        self.contracting = contracting
        self.wide = spec.dtype == "float64"
        self.triton = {"real": "REAL", "other": "tl.float32" if self.wide else "tl.float64", "int": "INDEX"}
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
            case language.s | language.p | language.gradient:
                return Text(str(x), "real")
            case sympy.Symbol():
                return Text(str(x), "int")
            case language.load():
                return self.load(x)
            case sympy.Add():
                return self.infix(" + ", [self(y) for y in x.args])
            case sympy.Mul():
                return self.infix(" * ", self.signed(x))
            case sympy.Pow():
                return self.index_power(x)
            case _ if language.is_number(x):
                return real_constant(self.narrowed(x))
            case language.Operation():
                return self.operation(type(x).__name__, x)
        raise NotGenerated(f"{x} ({type(x).__name__}) is not part of the score language")

    def narrowed(self, x: sympy.Expr) -> sympy.Expr:
        """A finite constant beyond the accumulation type is an infinity there."""
        if not self.wide and x.is_finite and abs(float(x)) > 3.4028235677973366e38:
            return sympy.oo if x > 0 else -sympy.oo
        return x

    # --- types --------------------------------------------------------------------------------------------------------

    def kind(self, dtype: str) -> Kind:
        if dtype in (INT, *INTEGERS):
            return "bool" if dtype == "bool" else "int"
        return "real" if dtype in (self.types.real, FLOAT) else "other"

    def as_kind(self, value: Text, kind: Kind) -> Text:
        """A value brought to a kind: exact for whole numbers and for what types allow to meet."""
        if value.kind == kind:
            return value
        if kind in ("real", "other"):
            if value.constant:
                return Text(real_constant(sympy.sympify(_number_of(value))).text, kind, True)
            return Text(f"{value.text}.to({self.triton[kind]})", kind)
        if kind == "bool":
            return Text(f"({value.text} != 0)", "bool")
        return value if value.constant else Text(f"{value.text}.to(INDEX)", "int")

    def real(self, value: Text) -> Text:
        """As an operand of arithmetic with reals."""
        return self.as_kind(value, "real")

    def typed(self, value: Text, dtype: str = "") -> str:
        """As an argument of a function, or beside another constant: a constant does not adapt there, so it is given its
        type."""
        if not value.constant:
            return value.text
        wide = value.kind == "int" and dtype in INTEGERS
        return f"tl.full((), {bare(value.text)}, {'tl.int64' if wide else self.triton[value.kind]})"

    def tensor(self, value: Text) -> str:
        """A real as an argument of a function."""
        return self.typed(self.real(value))

    def truth(self, x: sympy.Expr) -> str:
        return self.as_kind(self(x), "bool").text

    # --- indices ------------------------------------------------------------------------------------------------------

    def infix(self, sign: str, values: list[Text]) -> Text:
        """Inside brackets of a load and in comparisons of coordinates: all is whole numbers but for odd texts."""
        kind: Kind = "real" if any(v.kind in ("real", "other") for v in values) else "int"
        values = [self.as_kind(v, kind) for v in values]
        if all(v.constant for v in values) and kind == "real":
            values = [Text(self.tensor(values[0]), "real"), *values[1:]]
        if len(values) == 1:
            return values[0]
        return Text(f"({sign.join(v.text for v in values)})", kind, all(v.constant for v in values))

    def signed(self, x: sympy.Mul) -> list[Text]:
        """The factors of a product; -1 is a sign."""
        first, *rest = (self(y) for y in x.args)
        if first.text == "(-1)" and rest:
            product = self.infix(" * ", rest)
            return [Text(f"(-{product.text})", product.kind)]
        return [first, *rest]

    def index_power(self, x: sympy.Pow) -> Text:
        if isinstance(x.exp, sympy.Integer) and 0 < x.exp <= 8:
            return self.infix(" * ", [self(x.base)] * int(x.exp))
        raise NotGenerated(f"the power {language.to_text(x)} is not generated for a GPU")

    # --- operations ---------------------------------------------------------------------------------------------------

    def operation(self, name: str, x: language.Operation) -> Text:
        args = x.args
        if name in language.CASTS:
            return self.cast(name, x)
        if name in ("logical_and", "logical_or"):
            sign = "&" if name == "logical_and" else "|"
            return Text(f"({self.truth(args[0])} {sign} {self.truth(args[1])})", "bool")
        if name == "logical_not":
            return Text(f"({self.truth(args[0])} == 0)", "bool")
        dtype = self.types.meets_in(x)
        kind = self.kind(dtype)
        operands = [self.as_kind(self(y), kind) for y in (args[1:] if name == "where" else args)]
        if name == "where":
            branches = ", ".join(self.typed(v, dtype) for v in operands)
            return Text(f"tl.where({self.truth(args[0])}, {branches})", kind)
        if name == "power":
            return self.power(x, dtype, operands)
        if name in COMPARE:
            values = [self.typed(v, dtype) if all(y.constant for y in operands) else v.text for v in operands]
            return Text(f"({values[0]} {COMPARE[name]} {values[1]})", "bool")
        if name == "sqrt":
            return Text(f"tl.sqrt({self.tensor(operands[0])})", "real")
        if name in DIRECT:
            return Text(f"{DIRECT[name]}({self.tensor(operands[0])})", "real")
        if name in ("floordiv", "mod"):
            return self.division(name, x, dtype, operands)
        texts = [self.typed(v, dtype) for v in operands]
        if name in ("maximum", "minimum"):
            return Text(f"tl.{name}({texts[0]}, {texts[1]}, propagate_nan=tl.PropagateNan.ALL)", kind)
        if name in OWN:
            self.functions.add(OWN[name])
            return self.held(f"{OWN[name]}_({', '.join(texts)})", dtype, kind)
        return self.arithmetic(x, dtype, operands)

    def held(self, text: str, dtype: str, kind: Kind) -> Text:
        """A whole number as its own type holds it."""
        if kind != "int" or dtype in (INT, "int64"):
            return Text(text, kind)
        return Text(f"{text}.to(tl.{dtype}).to(tl.int64)", kind)

    def arithmetic(self, x: language.Operation, dtype: str, operands: list[Text]) -> Text:
        kind = operands[0].kind
        if isinstance(x, language.Neg):
            value = operands[0]
            return self.held(f"(-{self.typed(value, dtype) if kind == 'int' else value.text})", dtype, kind)
        if isinstance(x, language.Add | language.Sub) and kind != "int" and (self.contracting or self.starts(x)):
            return self.sum(x, kind, operands)
        if isinstance(x, language.Div):
            texts = [self.typed(v) for v in operands]
            rounded = not language.holds(x) and (kind == "real") != self.wide  # of float32, where `/` is not
            return Text(f"tl.div_rn({texts[0]}, {texts[1]})" if rounded else f"({texts[0]} / {texts[1]})", kind)
        texts = [v.text for v in operands]
        if all(v.constant for v in operands):
            texts[0] = self.typed(operands[0], dtype)
        if kind == "int":
            texts = [f"{y}.to(tl.int64)" if not v.constant and _is_narrow(z) else y
                     for y, v, z in zip(texts, operands, x.args, strict=True)]  # fmt: skip
        return self.held(f"({f' {language.ARITHMETIC[type(x)]} '.join(texts)})", dtype, kind)

    def starts(self, x: language.Operation) -> bool:
        """Whether s itself is added to something: wherever s has no other use, Triton starts the product's accumulator
        with the other operand, which rounds otherwise than the kernels where s has one."""
        return language.s in x.args

    def sum(self, x: language.Operation, kind: Kind, operands: list[Text]) -> Text:
        """A sum that is no `+`, because that would not stay one."""
        if kind == "other":
            raise NotGenerated("a sum in another type than that of the scores, which this compiler might contract,")
        self.functions.add("exact_sum")
        texts = [self.tensor(v) for v in operands]
        if isinstance(x, language.Sub):
            texts[1] = f"-{texts[1]}"
        return Text(f"exact_sum({texts[0]}, {texts[1]})", "real")

    def cast(self, name: str, x: language.Operation) -> Text:
        value = self(x.args[0])
        if name in ("float32", "float64"):
            kind = self.kind(self.types(x))
            value = self.as_kind(value, kind)
            return Text(self.typed(value), kind) if value.constant else value
        text = self.typed(self.as_kind(value, "int"), "int64")
        return Text(f"{text}.to(tl.{name}).to(tl.int64)" if name != "int64" else f"{text}.to(tl.int64)", "int")

    def power(self, x: language.Operation, dtype: str, operands: list[Text]) -> Text:
        base, exponent = operands[0], x.args[1]
        if base.kind == "int" and is_whole_power(x):
            text = " * ".join([f"{self.typed(base, dtype)}.to(tl.int64)"] * int(exponent)) or "1"
            return self.held(f"({text})", dtype, "int")
        if base.kind in ("real", "other") and language.is_number(exponent):
            number = float(exponent)
            if number == int(number) and 0 < abs(number) <= 8:
                text = f"({' * '.join([self.typed(base)] * int(abs(number)))})"
                return Text(text if number > 0 else f"(1.0 / {text})", base.kind)
            if number in (0.5, -0.5):
                root = f"tl.sqrt({self.typed(base)})"
                return Text(root if number > 0 else f"(1.0 / {root})", base.kind)
        raise NotGenerated(f"the power {language.to_text(x)} is not generated for a GPU")

    def division(self, name: str, x: language.Operation, dtype: str, values: list[Text]) -> Text:
        kind = values[0].kind
        if kind != "int":
            quotient = f"tl.floor({self.typed(values[0])} / {self.typed(values[1])})"
            if name == "floordiv":
                return Text(quotient, kind)
            whole = f"{quotient} * {self.typed(values[1])}"
            if self.contracting:
                self.functions.add("exact_sum")
                return Text(f"exact_sum({self.typed(values[0])}, -({whole}))", kind)
            return Text(f"({self.typed(values[0])} - {whole})", kind)
        if all(map(nonnegative, x.args)):  # Triton divides towards zero, the language downwards
            return Text(f"({values[0].text} {'//' if name == 'floordiv' else '%'} {values[1].text})", "int")
        self.functions.add(name)
        return self.held(f"{name}_({self.typed(values[0], dtype)}, {self.typed(values[1], dtype)})", dtype, "int")

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
        kind = self.kind(self.types(x))
        return f"{text}.to({self.triton[kind]})", kind

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
            text = f"{self.tensor(value) if value.kind == 'real' else text}.to(INDEX)"
        self.functions.add("clamp_index")
        return f"clamp_index({text}, c{x.slot}_size{dim})"


def _number_of(value: Text) -> float:
    text = bare(value.text)
    return float(text.replace('float("inf")', "inf").replace('float("nan")', "nan"))


def _is_narrow(x: sympy.Expr) -> bool:
    """Whether it is held in INDEX: coordinates and sizes; elements of tensors are 64 bits wide."""
    return language.is_index(x) and not isinstance(x, sympy.Integer)


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
        return 0.0 if x in language.VALUES else 2.0**24
    if isinstance(x, sympy.Add):
        return sum(_magnitude(y) for y in x.args)
    if isinstance(x, sympy.Mul):
        return float(sympy.prod([max(_magnitude(y), 1) for y in x.args]))
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
