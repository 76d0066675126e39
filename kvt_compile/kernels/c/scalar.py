"""Score language -> C scalar expression:  c0[h, j % n0] + 0.5*i  ->  get_float32(c0[h * c0_stride0 + ...]) + 0.5f * i.

Types follow the values as in every lowering: indices and integer tensors are int64_t, comparisons int, and whatever
meets a float becomes `real`, the accumulation type.
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


@dataclass(frozen=True)
class Text:
    """A piece of C, complete enough to stand beside any operator, and the type of its value."""

    text: str
    kind: Kind


def depends_on(expression: sympy.Expr) -> frozenset[str]:
    """Names of the symbols an expression reads, inside load indices too."""
    return frozenset(str(x) for x in expression.free_symbols)


def constant(value: sympy.Expr, wide: bool) -> str:
    """A C literal of type real with all its digits."""
    if value is sympy.oo:
        return "(real)INFINITY"
    if value is -sympy.oo:
        return "-(real)INFINITY"
    if value is sympy.nan:
        return "(real)NAN"
    text = repr(float(value))
    if "inf" in text:
        return "-(real)INFINITY" if text[0] == "-" else "(real)INFINITY"
    if not wide and abs(float(value)) > 3.4028235677973366e38:
        return "-(real)INFINITY" if text[0] == "-" else "(real)INFINITY"
    return text if wide else f"{text}f"


class ScalarPrinter:
    """Prints expressions that do not hold the tile's variable (s or p)."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.wide = spec.dtype == "float64"
        self.guarded = guarded_loads(spec.score_expression) | guarded_loads(spec.weight_expression)

    def __call__(self, x: sympy.Expr) -> Text:
        match x:
            case sympy.Integer():
                return Text(str(int(x)) if x >= 0 else f"({int(x)})", "int")
            case sympy.Symbol():
                name = str(x)
                return Text(f"a->{name}" if name[0] == "n" else name, "int")
            case language.load():
                return self.load(x)
            case sympy.Add():
                return self.infix(" + ", [self(y) for y in x.args])
            case sympy.Mul():
                return self.product(x)
            case sympy.Pow():
                return self.power(x)
            case sympy.Function() if type(x).__name__ in language.FUNCTIONS:
                return self.function(type(x).__name__, x)
            case _ if isinstance(x, sympy.Number) or x in (sympy.oo, -sympy.oo, sympy.nan):
                text = constant(x, self.wide)
                return Text(f"({text})" if text[0] == "-" else text, "real")
        raise NotGenerated(f"{x} ({type(x).__name__}) is not part of the score language")

    def real(self, x: sympy.Expr | Text) -> str:
        """The text of a value of type real."""
        if isinstance(x, sympy.Integer):
            return self(sympy.Float(int(x))).text
        value = x if isinstance(x, Text) else self(x)
        return value.text if value.kind == "real" else f"(real){value.text}"

    def truth(self, x: sympy.Expr) -> str:
        """The text of a value that is 0 or 1."""
        value = self(x)
        return value.text if value.kind == "bool" else f"({value.text} != 0)"

    def index(self, x: sympy.Expr) -> str:
        """The text of an int64_t without outer brackets it does not need."""
        value = self(x)
        return value.text if value.kind == "int" else f"(int64_t){value.text}"

    def infix(self, sign: str, values: list[Text]) -> Text:
        kind: Kind = "real" if any(v.kind == "real" for v in values) else "int"
        return Text(f"({sign.join(self.real(v) if kind == 'real' else v.text for v in values)})", kind)

    def product(self, x: sympy.Mul) -> Text:
        above, below = [], []
        for factor in x.args:
            # x / y is one rounding, x * (1 / y) two
            if isinstance(factor, sympy.Pow) and factor.exp == -1:
                below.append(self(factor.base))
            else:
                above.append(self(factor))
        numerator = self.infix(" * ", above) if above else Text(self.real(sympy.Integer(1)), "real")
        if not below:
            return numerator
        return Text(f"({self.real(numerator)} / {self.real(self.infix(' * ', below))})", "real")

    def power(self, x: sympy.Pow) -> Text:
        if isinstance(x.exp, sympy.Integer) and 0 < x.exp <= 8:
            return self.infix(" * ", [self(x.base)] * int(x.exp))
        if x.exp == -1:
            return Text(f"({self.real(sympy.Integer(1))} / {self.real(x.base)})", "real")
        return Text(f"REAL_FN(pow)({self.real(x.base)}, {self.real(x.exp)})", "real")

    def function(self, name: str, x: sympy.Function) -> Text:
        args = x.args
        if name in COMPARE:
            return Text(self.infix(f" {COMPARE[name]} ", [self(y) for y in args]).text, "bool")
        if name in ("logical_and", "logical_or"):
            sign = "&" if name == "logical_and" else "|"
            return Text(f"({self.truth(args[0])} {sign} {self.truth(args[1])})", "bool")
        if name == "logical_not":
            return Text(f"(!{self.truth(args[0])})", "bool")
        if name in LIBRARY:
            return Text(f"REAL_FN({name})({self.real(args[0])})", "real")
        if name == "sigmoid":
            one = self.real(sympy.Integer(1))
            return Text(f"({one} / ({one} + REAL_FN(exp)(-{self.real(args[0])})))", "real")
        if name in ("floordiv", "mod"):
            return self.division(name, args[0], args[1])
        if name == "where":
            return self.where(args)
        values = [self(y) for y in args]
        kind: Kind = "real" if any(v.kind == "real" for v in values) else "int"
        texts = [self.real(v) if kind == "real" else v.text for v in values]
        return Text(f"{kind}_{name}({', '.join(texts)})", kind)

    def where(self, args: tuple[sympy.Expr, ...]) -> Text:
        yes, no = self(args[1]), self(args[2])
        kind = yes.kind if yes.kind == no.kind else "real" if "real" in (yes.kind, no.kind) else "int"
        texts = (self.real(yes), self.real(no)) if kind == "real" else (yes.text, no.text)
        return Text(f"({self.truth(args[0])} ? {texts[0]} : {texts[1]})", kind)

    def division(self, name: str, x: sympy.Expr, y: sympy.Expr) -> Text:
        values = [self(x), self(y)]
        if any(v.kind == "real" for v in values):
            quotient = f"REAL_FN(floor)({self.real(values[0])} / {self.real(values[1])})"
            if name == "floordiv":
                return Text(quotient, "real")
            return Text(f"({self.real(values[0])} - {quotient} * {self.real(values[1])})", "real")
        certain = (
            isinstance(y, sympy.Symbol | sympy.Integer) and y.is_positive
        )  # a coordinate may be 0, a sum may wrap to 0
        if nonnegative(x) and certain:
            return Text(f"({values[0].text} {'/' if name == 'floordiv' else '%'} {values[1].text})", "int")
        return Text(f"{'floor_div' if name == 'floordiv' else 'floor_mod'}({values[0].text}, {values[1].text})", "int")

    def load(self, x: language.load) -> Text:
        spec = self.spec.captured[x.slot]
        offset = self.offset(x, lambda dim: f"c{x.slot}_stride{dim}")
        element = f"c{x.slot}[{offset}]"
        if spec.dtype == "bool":
            return Text(f"({element} != 0)", "bool")
        if not spec.is_float:
            return Text(f"(int64_t){element}", "int")
        return Text(f"(real)get_{spec.dtype}({element})", "real")

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
