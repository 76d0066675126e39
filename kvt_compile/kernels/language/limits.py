"""Untrusted text -> its syntax tree, or a refusal before anything is evaluated; what numbers an expression may hold.

    "0.5*s + c0[j]"  ->  ast.expr          "0.5*s # */ int x;"  ->  ScoreSyntaxError, at character 6

The trust boundary.  A text comes from a saved program that anybody may have edited, and what is made of it ends in
source code that is compiled and run.  So: characters and tokens are those of the printer and no others (no comment,
quote, line break, backslash, letter outside ASCII); length, depth and numbers are bounded, so that reading ends; and
generators never see a text that came in, only `score.canonical` of it, which is printed from the parsed program.
"""

from __future__ import annotations

import ast
import math
import re
from typing import NoReturn

import sympy

CHARACTERS = 16_384
TOKENS = 2_048
DEPTH = 48
"""Nested brackets, calls and operators; a chain of + - * / counts once here, and step by step below.  The printers
recurse, some ten frames a level."""
LEVELS = 100
"""Operations that wait for one another, those of chains included: s + c0 + c1 has two."""
EXPONENT = 1_024
INTEGER = 2**63 - 1
"""Integers of the language are those of torch.int64; a ratio is of two of them, a float is a finite float64."""
SLOTS = 256
"""Captured tensors, and run-time sizes, of one node."""

_TOKEN = re.compile(
    r"(?P<name>[a-z][a-z_]{0,15}[0-9]{0,4})(?![A-Za-z0-9_])"
    r"|(?P<number>(?:0|[1-9][0-9]{0,399})(?:\.[0-9]{1,400})?(?:e[+-]?[0-9]{1,4})?)(?![A-Za-z0-9_.])"
    r"|(?P<sign>\*\*|//|[-+*/%(),\[\]])"
    r"| (?=[^ ])"
)
_NUMBERED = re.compile(r"[cn]0[0-9]")


class ScoreSyntaxError(ValueError):
    """A text that is not of the score language, with the place and the reason."""


def shown(text: str) -> str:
    """A text as an error message may show it: one line, escaped, not longer than two hundred characters."""
    return ascii(text) if len(text) <= 200 else f"{text[:200]!a}... ({len(text)} characters)"


def refuse(text: str, reason: str) -> NoReturn:
    """Raise ScoreSyntaxError."""
    raise ScoreSyntaxError(f"score expression {shown(text)}: {reason}")


def read(text: str) -> ast.expr:
    """The tree of a text.  Raises ScoreSyntaxError when a character, the length or the depth is not allowed."""
    if not isinstance(text, str):
        raise ScoreSyntaxError(f"a score expression is a str, not a {type(text).__name__}")
    if len(text) > CHARACTERS:
        refuse(text, f"it has {len(text)} characters, expected at most {CHARACTERS}")
    _check_tokens(text)
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        refuse(text, f"cannot be read: {error.msg}")
    except (MemoryError, RecursionError, ValueError):  # what Python says of a tree that is too deep for it
        refuse(text, f"nested too deeply, expected at most {DEPTH} levels")
    for depth, limit in ((_depth(tree), DEPTH), (_depth(tree, chains=True), LEVELS)):
        if depth > limit:
            refuse(text, f"nested {depth} levels deep, expected at most {limit}")
    return tree


def _check_tokens(text: str) -> None:
    place = count = brackets = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None or _NUMBERED.match(token[0]):
            refuse(text, f"{text[place : place + 20]!a} at character {place} is not part of the score language")
        count += token[0] != " "
        brackets += (token[0] in "([") - (token[0] in ")]")
        if brackets > DEPTH:
            refuse(text, f"more than {DEPTH} brackets are open at character {place}")
        place = token.end()
    if count > TOKENS:
        refuse(text, f"it has {count} tokens, expected at most {TOKENS}")


_CHAINS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def _depth(tree: ast.expr, chains: bool = False) -> int:
    deepest, todo = 0, [(tree, 1)]
    while todo:
        node, depth = todo.pop()
        deepest = max(deepest, depth)
        chain = isinstance(node, ast.BinOp) and isinstance(node.op, _CHAINS)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                # a + b + c + ... leans to the left
                flat = chain and not chains and child is getattr(node, "left", None)
                todo.append((child, depth if flat else depth + 1))
    return deepest


def number(value: int | float, text: str) -> sympy.Expr:
    """A number as it stands in a text."""
    if isinstance(value, int):
        return checked(sympy.Integer(value), text)
    if not math.isfinite(value):
        refuse(text, "a number is beyond float64, write oo for infinity")
    return sympy.Float(value)


def check_exponent(exponent: sympy.Expr, text: str) -> None:
    """Refuses what sympy, which evaluates a power of whole numbers at once, should not be asked for."""
    if exponent.is_Number and not abs(exponent) <= EXPONENT:
        refuse(text, f"the exponent {_brief(exponent)} is beyond {EXPONENT}")


def checked(x: sympy.Expr, text: str) -> sympy.Expr:
    """`x`, just made of parts that were checked, when its own numbers are in range."""
    for part in (x, *x.args, *(z for y in x.args for z in y.args)):
        if isinstance(part, sympy.Rational):
            if max(abs(part.p), part.q) > INTEGER:
                refuse(text, f"the number {_brief(part)} is beyond 64 bits")
        elif isinstance(part, sympy.Float):
            if not abs(part) <= sympy.Float(1.7976931348623157e308):
                refuse(text, "a number is beyond float64")
        elif part in (sympy.nan, sympy.zoo, sympy.I):
            refuse(text, "a part of it is no number (0/0, oo - oo, a division by zero, a root of a negative number)")
        if part.is_Pow and part.exp.is_Rational and abs(part.exp) > EXPONENT:
            refuse(text, f"the exponent {_brief(part.exp)} is beyond {EXPONENT}")
    return x


def _brief(x: sympy.Expr) -> str:
    bits = x.p.bit_length() if isinstance(x, sympy.Rational) else 0
    return f"of {bits} bits" if bits > 128 else str(x)
