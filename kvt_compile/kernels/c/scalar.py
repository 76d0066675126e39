"""Score language -> C scalar expression:  c0[h, j % n0] + 0.5*i  ->  get_float32(c0[h * c0_stride0 + ...]) + 0.5f * i.

Types are the language's (`language/types.py`): `real` is the accumulation type and `other` the other one of float and
double; whole numbers of every type are held in int64_t, truth values in int.  What is computed here is computed of
captured tensors alone, so it is exact: whole numbers wrap as torch's do, and no product is contracted into a sum.
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
    "float64": "double",
    "float32": "float",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "bool": "uint8_t",
    "uint8": "uint8_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
}
"""torch dtype -> C type of an element in memory (float16 and bfloat16 are defined by the generated source)."""

LIBRARY = ("exp", "log", "sqrt", "sin", "cos", "tanh", "erf")
_WRAPPING = {language.Add: "int_add", language.Sub: "int_sub", language.Mul: "int_mul"}
_CALLED = {
    "maximum": "maximum",
    "minimum": "minimum",
    "clamp": "clamp",
    "hardtanh": "clamp",
    "abs": "abs",
    "relu": "relu",
}


@dataclass(frozen=True)
class Text:
    """A piece of C, complete enough to stand beside any operator, and the kind of its value."""

    text: str
    kind: Kind


def depends_on(expression: sympy.Expr) -> frozenset[str]:
    """Names of the symbols an expression reads, inside load indices too."""
    return frozenset(str(x) for x in expression.free_symbols)


def constant(value: sympy.Expr, wide: bool, ctype: str = "real") -> str:
    """A C literal with all its digits: of type double where `wide`, else float; `ctype` is the name of that type."""
    number = float("nan") if value is sympy.nan else float(value)
    if number != number:
        return f"({ctype})NAN"
    if not wide and abs(number) > 3.4028235677973366e38:
        number = float("inf") if number > 0 else -float("inf")
    if number in (float("inf"), -float("inf")):
        return f"{'-' if number < 0 else ''}({ctype})INFINITY"
    return repr(number) if wide else f"{number!r}f"


class ScalarPrinter:
    """Prints expressions that do not hold the tile's variable (s or p)."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.types = spec.types
        self.wide = spec.dtype == "float64"
        self.ctypes = {"real": "real", "other": "float" if self.wide else "double", "int": "int64_t", "bool": "int"}
        self.guarded = guarded_loads(spec.score_expression) | guarded_loads(spec.weight_expression)
        self.helpers: set[str] = set()
        """What the printed texts call of the functions that the templates define."""

    def __call__(self, x: sympy.Expr) -> Text:
        match x:
            case sympy.Integer():
                return Text("INT64_MIN" if x == -(2**63) else str(int(x)) if x >= 0 else f"({int(x)})", "int")
            case sympy.Symbol():
                name = str(x)
                if name == "j" and self.spec.select:  # j counts the keys of a list
                    return Text("(int64_t)tile->key[j]", "int")
                return Text(f"a->{name}" if name[0] == "n" else name, "int")
            case language.load():
                return self.load(x)
            case sympy.Add():
                return self.infix(" + ", [self(y) for y in x.args])
            case sympy.Mul():
                return self.infix(" * ", [self(y) for y in x.args])
            case sympy.Pow():
                return self.index_power(x)
            case _ if language.is_number(x):
                return self.number(x, "real")
            case language.Operation():
                return self.operation(type(x).__name__, x)
        raise NotGenerated(f"{x} ({type(x).__name__}) is not part of the score language")

    # --- types --------------------------------------------------------------------------------------------------------

    def kind(self, dtype: str) -> Kind:
        if dtype in (INT, *INTEGERS):
            return "bool" if dtype == "bool" else "int"
        return "real" if dtype in (self.types.real, FLOAT) else "other"

    def number(self, x: sympy.Expr, kind: Kind) -> Text:
        text = constant(x, self.wide == (kind == "real"), self.ctypes[kind])
        return Text(f"({text})" if text[0] == "-" else text, kind)

    def as_kind(self, x: sympy.Expr | Text, kind: Kind) -> Text:
        """A value brought to a kind: exact for whole numbers and for what types allow to meet."""
        if kind in ("real", "other") and not isinstance(x, Text) and language.is_number(x):
            return self.number(sympy.Float(int(x)) if isinstance(x, sympy.Integer) else x, kind)
        value = x if isinstance(x, Text) else self(x)
        if value.kind == kind or (kind == "int" and value.kind == "bool"):
            return Text(value.text, kind)
        if kind == "bool":
            return Text(f"({value.text} != 0)", kind)
        return Text(f"({self.ctypes[kind]}){value.text}", kind)

    def real(self, x: sympy.Expr | Text) -> str:
        """The text of a value of type real."""
        return self.as_kind(x, "real").text

    def truth(self, x: sympy.Expr) -> str:
        """The text of a value that is 0 or 1."""
        return self.as_kind(x, "bool").text

    def index(self, x: sympy.Expr) -> str:
        """The text of an int64_t without outer brackets it does not need."""
        value = self(x)
        return value.text if value.kind == "int" else f"(int64_t){value.text}"

    def narrowed(self, text: str, dtype: str) -> Text:
        """A whole number as its own type holds it."""
        return Text(text if dtype in ("int64", INT) else f"(int64_t)({ELEMENTS[dtype]}){text}", "int")

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def infix(self, sign: str, values: list[Text]) -> Text:
        """Inside brackets of a load, where all is whole numbers but for odd texts."""
        kind: Kind = "real" if any(v.kind in ("real", "other") for v in values) else "int"
        return Text(f"({sign.join(self.real(v) if kind == 'real' else v.text for v in values)})", kind)

    def index_power(self, x: sympy.Pow) -> Text:
        if isinstance(x.exp, sympy.Integer) and 0 < x.exp <= 8:
            return self.infix(" * ", [self(x.base)] * int(x.exp))
        return Text(f"REAL_FN(pow)({self.real(x.base)}, {self.real(x.exp)})", "real")

    def operation(self, name: str, x: language.Operation) -> Text:
        args = x.args
        if name in language.CASTS:
            return self.cast(name, args[0])
        if name in ("logical_and", "logical_or"):
            sign = "&" if name == "logical_and" else "|"
            return Text(f"({self.truth(args[0])} {sign} {self.truth(args[1])})", "bool")
        if name == "logical_not":
            return Text(f"(!{self.truth(args[0])})", "bool")
        dtype = self.types.meets_in(x)
        kind = self.kind(dtype)
        if name == "where":
            return Text(f"({self.truth(args[0])} ? {' : '.join(self.as_kind(y, kind).text for y in args[1:])})", kind)
        if name == "power":
            return self.power(x, dtype, kind)
        values = [self.as_kind(y, kind) for y in args]
        texts = [v.text for v in values]
        if name in COMPARE:
            return Text(f"({f' {COMPARE[name]} '.join(texts)})", "bool")
        if name in LIBRARY:
            return Text(f"REAL_FN({name})({texts[0]})", "real")
        if name == "sigmoid":
            one = self.real(language.one)
            return Text(f"({one} / ({one} + REAL_FN(exp)(-{texts[0]})))", "real")
        if name in ("floordiv", "mod"):
            return self.division(name, x, kind, texts)
        if name in _CALLED:
            self.helpers.add(_CALLED[name])
            called = Text(f"{kind}_{_CALLED[name]}({', '.join(texts)})", kind)
            return self.narrowed(called.text, dtype) if kind == "int" else called
        return self.arithmetic(x, dtype, kind, texts)

    def arithmetic(self, x: language.Operation, dtype: str, kind: Kind, texts: list[str]) -> Text:
        if kind == "int":
            if isinstance(x, language.Neg):
                return self.narrowed(f"int_sub(0, {texts[0]})", dtype)
            return self.narrowed(f"{_WRAPPING[type(x)]}({', '.join(texts)})", dtype)
        if isinstance(x, language.Neg):
            return Text(f"(-{texts[0]})", kind)
        if isinstance(x, language.Add | language.Sub):  # a product, rounded before it is added
            self.helpers.add("exactly")
            texts = [f"{kind}_exactly({y})" if _is_product(z) else y for y, z in zip(texts, x.args, strict=True)]
        return Text(f"({f' {language.ARITHMETIC[type(x)]} '.join(texts)})", kind)

    def cast(self, name: str, x: sympy.Expr) -> Text:
        if name in ("float32", "float64"):
            return self.as_kind(x, self.kind(name))
        return self.narrowed(self.as_kind(x, "int").text, name)

    def power(self, x: language.Operation, dtype: str, kind: Kind) -> Text:
        base, exponent = x.args
        value = self.as_kind(base, kind).text
        if is_whole_power(x) and 0 < exponent <= 8:
            text = value
            for _ in range(int(exponent) - 1):
                text = f"int_mul({text}, {value})" if kind == "int" else f"({text} * {value})"
            return self.narrowed(text, dtype) if kind == "int" else Text(text, kind)
        if kind == "int":
            raise NotGenerated(f"the power {language.to_text(x)} is not generated")
        if kind == "other":
            raise NotGenerated(f"the power {language.to_text(x)} is not generated in {dtype}")
        return Text(f"REAL_FN(pow)({value}, {self.real(exponent)})", "real")

    def division(self, name: str, x: language.Operation, kind: Kind, texts: list[str]) -> Text:
        if kind != "int":
            floor = "REAL_FN(floor)" if kind == "real" else f"floor{'f' if self.wide else ''}"
            quotient = f"{floor}({texts[0]} / {texts[1]})"
            return Text(quotient if name == "floordiv" else f"({texts[0]} - {quotient} * {texts[1]})", kind)
        if nonnegative(x.args[0]) and is_positive(x.args[1]):
            return Text(f"({texts[0]} {'/' if name == 'floordiv' else '%'} {texts[1]})", "int")
        return self.narrowed(
            f"{'floor_div' if name == 'floordiv' else 'floor_mod'}({texts[0]}, {texts[1]})", self.types(x)
        )

    def load(self, x: language.load) -> Text:
        spec = self.spec.captured[x.slot]
        offset = self.offset(x, lambda dim: f"c{x.slot}_stride{dim}")
        element = f"c{x.slot}[{offset}]"
        if spec.dtype == "bool":
            return Text(f"({element} != 0)", "bool")
        if not spec.is_float:
            return Text(f"(int64_t){element}", "int")
        kind = self.kind(self.types(x))
        return Text(f"({self.ctypes[kind]})get_{spec.dtype}({element})", kind)

    def offset(self, x: language.load, stride: object) -> str:
        """Where the element stands: sum of index * stride(dim), each index in range."""
        assert callable(stride)
        return " + ".join(f"{self.position(x, dim)} * {stride(dim)}" for dim in range(len(x.index))) or "0"

    def position(self, x: language.load, dim: int) -> str:
        """One index of a load, clamped unless it is a coordinate the launch has checked."""
        index = x.index[dim]
        if plain_index(index) and x not in self.guarded:
            return self.index(index)
        return f"clamp_index({self.index(index)}, c{x.slot}_size{dim})"


def is_positive(x: sympy.Expr) -> bool:
    """Whether a divisor is certainly not 0: a coordinate may be, and a product may wrap to 0."""
    return isinstance(x, sympy.Symbol | sympy.Integer) and bool(x.is_positive)


def _is_product(x: sympy.Expr) -> bool:
    if isinstance(x, language.Neg) or type(x).__name__ in language.CASTS:
        return _is_product(x.args[0])
    return isinstance(x, language.Mul | language.Power)
