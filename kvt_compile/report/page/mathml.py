"""A score expression as text -> MathML, which browsers draw by themselves.

    0.125*s + bias[h, i, j]      ->      s / sqrt(64) + bias with the subscript h, i, j
    where(j <= i, s, -oo)        ->      a brace with two cases

Only the text of a report is read (tensors by their names), as Python would read it.  What cannot be read is shown as
code: a picture is never worth an exception.
"""

from __future__ import annotations

import ast
from html import escape
from math import isclose

_INFIX = {"lt": "<", "le": "≤", "gt": ">", "ge": "≥", "eq": "=", "ne": "≠", "logical_and": "∧", "logical_or": "∨"}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "≤", ast.Gt: ">", ast.GtE: "≥", ast.Eq: "=", ast.NotEq: "≠",
}  # fmt: skip
_SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(5)
"""How tightly an expression binds: brackets go around what binds less than its place asks for."""


def mathml(text: str, *, left: str = "", head_dim: object = None, block: bool = False) -> str:
    """`<math>` for an expression, after `left =` where given.

    `head_dim` lets the usual scale be recognised: 0.125 with 64 features is shown as division by the root of 64.
    """
    try:
        body, _ = _Writer(head_dim).write(ast.parse(text, mode="eval").body)
    except (SyntaxError, _UnknownError, RecursionError):
        return f"<code>{escape(text)}</code>"
    start = f"{_name(left)}{_op('=')}" if left else ""
    style = ' displaystyle="true"' if block else ""
    return f"<math{style}><mrow>{start}{body}</mrow></math>"


class _UnknownError(Exception):
    """Not part of the score language."""


class _Writer:
    def __init__(self, head_dim: object) -> None:
        self._root = float(head_dim) ** -0.5 if isinstance(head_dim, int) and head_dim > 0 else 0.0
        self._head_dim = head_dim

    def at(self, node: ast.expr, binding: int) -> str:
        """In brackets where it binds less tightly than `binding`."""
        text, own = self.write(node)
        return text if own >= binding else _row(_op("("), text, _op(")"))

    def write(self, node: ast.expr) -> tuple[str, int]:
        match node:
            case ast.Constant(value=bool()):
                return _text(str(node.value)), _ATOM
            case ast.Constant(value=int() | float() as value):
                return _number(float(value)), _ATOM
            case ast.Name(id="oo"):
                return _op("∞"), _ATOM
            case ast.Name(id=name):
                return _name(name), _ATOM
            case ast.UnaryOp(op=ast.USub()):
                return _row(_op("−"), self.at(node.operand, _PRODUCT)), _SUM
            case ast.UnaryOp(op=ast.UAdd()):
                return self.write(node.operand)
            case ast.BinOp():
                return self._binary(node)
            case ast.Compare(left=first, ops=[op], comparators=[second]) if type(op) in _COMPARE:
                return _row(self.at(first, _SUM), _op(_COMPARE[type(op)]), self.at(second, _SUM)), _SUM - 1
            case ast.Subscript():
                items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                index = _op(",").join(self.at(item, _SUM) for item in items)
                return f"<msub>{self.at(node.value, _ATOM)}{_row(index)}</msub>", _ATOM
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                return self._call(name, node.args)
        raise _UnknownError

    def _binary(self, node: ast.BinOp) -> tuple[str, int]:
        match node.op:
            case ast.Add():
                match node.right:
                    case ast.UnaryOp(op=ast.USub(), operand=taken):
                        return _row(self.at(node.left, _SUM), _op("−"), self.at(taken, _PRODUCT)), _SUM
                return _row(self.at(node.left, _SUM), _op("+"), self.at(node.right, _SUM)), _SUM
            case ast.Sub():
                return _row(self.at(node.left, _SUM), _op("−"), self.at(node.right, _PRODUCT)), _SUM
            case ast.Mult():
                for factor, rest in ((node.left, node.right), (node.right, node.left)):
                    if self._is_scale(factor):
                        below = f"<msqrt>{_number(float(str(self._head_dim)))}</msqrt>"
                        return f"<mfrac>{_row(self.write(rest)[0])}{below}</mfrac>", _PRODUCT
                sign = "⁢" if isinstance(node.left, ast.Constant) else "·"  # invisible after a number
                return _row(self.at(node.left, _PRODUCT), _op(sign), self.at(node.right, _PRODUCT)), _PRODUCT
            case ast.Div():
                return f"<mfrac>{_row(self.write(node.left)[0])}{_row(self.write(node.right)[0])}</mfrac>", _PRODUCT
            case ast.Pow():
                return f"<msup>{self.at(node.left, _ATOM)}{_row(self.write(node.right)[0])}</msup>", _POWER
            case ast.Mod():
                return _row(self.at(node.left, _UNARY), _op("mod"), self.at(node.right, _UNARY)), _PRODUCT
            case ast.FloorDiv():
                inside = f"<mfrac>{_row(self.write(node.left)[0])}{_row(self.write(node.right)[0])}</mfrac>"
                return _row(_op("⌊"), inside, _op("⌋")), _ATOM
        raise _UnknownError

    def _is_scale(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, float):
            return False
        return self._root > 0 and isclose(node.value, self._root, rel_tol=1e-6)  # models compute it in float32, too

    def _call(self, name: str, args: list[ast.expr]) -> tuple[str, int]:
        if name in _INFIX and len(args) == 2:
            return _row(self.at(args[0], _SUM), _op(_INFIX[name]), self.at(args[1], _SUM)), _SUM - 1
        if name == "logical_not" and len(args) == 1:
            return _row(_op("¬"), self.at(args[0], _ATOM)), _PRODUCT
        if name == "where" and len(args) == 3:
            return self._cases(args), _SUM
        if name == "sqrt" and len(args) == 1:
            return f"<msqrt>{self.write(args[0])[0]}</msqrt>", _ATOM
        if name in ("abs", "abs_") and len(args) == 1:
            return _row(_op("|"), self.write(args[0])[0], _op("|")), _ATOM
        if name == "exp" and len(args) == 1:
            return f"<msup><mi>e</mi>{_row(self.write(args[0])[0])}</msup>", _POWER
        inside = _op(",").join(self.write(x)[0] for x in args)
        return _row(_text(name), _op("("), inside, _op(")")), _ATOM

    def _cases(self, args: list[ast.expr]) -> str:
        condition, chosen, other = (self.write(x)[0] for x in args)
        rows = f"<mtr><mtd>{chosen}</mtd><mtd>{_text('if ')}{condition}</mtd></mtr>"
        rows += f"<mtr><mtd>{other}</mtd><mtd>{_text('otherwise')}</mtd></mtr>"
        return _row(_op("{"), f'<mtable columnalign="left">{rows}</mtable>')


def _row(*parts: str) -> str:
    return f"<mrow>{''.join(parts)}</mrow>"


def _op(sign: str) -> str:
    return f"<mo>{escape(sign)}</mo>"


def _text(text: str) -> str:
    return f"<mtext>{escape(text)}</mtext>"


def _name(name: str) -> str:
    """One letter in italics; what follows it after an underscore as a subscript; longer names upright."""
    letter, _, below = name.partition("_")
    if len(letter) == 1 and below:
        index = "".join(f"<mi>{escape(x)}</mi>" for x in below) if below.isalpha() else _text(below)
        return f"<msub><mi>{escape(letter)}</mi>{_row(index)}</msub>"
    return f"<mi>{escape(name)}</mi>" if len(name) == 1 else _text(name)


def _number(value: float) -> str:
    """Four digits; the report's own text has all of them."""
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    if not exponent:
        return f"<mn>{mantissa}</mn>".replace("-", "−")
    power = f"<msup><mn>10</mn><mn>{int(exponent)}</mn></msup>".replace("-", "−")
    return f"<mrow><mn>{mantissa}</mn><mo>·</mo>{power}</mrow>".replace("-", "−")
