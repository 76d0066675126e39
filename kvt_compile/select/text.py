"""The text of a selection -> its value.

    "(window(13) | sinks(4)) & topk(64)"   ->   (Window(13) | Sinks(4)) & TopK(64)

A text may come from a saved program that anybody has edited, so it is read within limits of characters, length and
depth, by names that exist and numbers; nothing of it is evaluated, and what goes on from here is the value, whose own
`str` is the canonical text.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from functools import lru_cache
from typing import Any, NoReturn

from kvt_compile.select.values import KINDS, SelectionError, Selector

CHARACTERS = 1024
DEPTH = 16
PARTS = 64
"""Selectors of one text, at most."""
_ALLOWED = re.compile(r"[a-z0-9_ ()&|,=.'\"/A-Z-]*")
_WORDS = ("all", "lowest", "each", "mean", "max", "norm", "mean_query")


def parse(text: str) -> Selector:
    """The selection a text means.  Raises SelectionError with the part that cannot be read."""
    if not isinstance(text, str):
        raise TypeError(f"a selection is a text such as 'window(13) & topk(64)', or its value, got {text!r}")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Selector:
    if len(text) > CHARACTERS:
        raise SelectionError(f"a selection of {len(text)} characters, expected at most {CHARACTERS}")
    if (end := _ALLOWED.match(text)) is None or end.end() != len(text):
        place = 0 if end is None else end.end()
        _refuse(text, f"{text[place]!a} at character {place} is not part of a selection")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError, ValueError) as error:
        _refuse(text, f"it cannot be read: {getattr(error, 'msg', 'nested too deeply')}")
    if sum(isinstance(x, ast.Call | ast.Name) for x in ast.walk(tree)) > 2 * PARTS:
        _refuse(text, f"it has too many parts, expected at most {PARTS}")
    return _build(tree, text, DEPTH)


def _refuse(text: str, reason: str) -> NoReturn:
    shown = ascii(text) if len(text) <= 200 else f"{text[:200]!a}..."
    raise SelectionError(f"selection {shown}: {reason}; expected such as 'window(13) | prefix' or 'topk(64)'")


def _build(node: ast.expr, text: str, depth: int) -> Selector:
    if depth == 0:
        _refuse(text, f"nested deeper than {DEPTH} levels")
    match node:
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            # a long chain leans to the left: without recursion
            chain = [node]
            while isinstance(chain[-1].left, ast.BinOp) and type(chain[-1].left.op) is type(node.op):
                chain.append(chain[-1].left)
            value = _build(chain[-1].left, text, depth - 1)
            for step in reversed(chain):
                right = _build(step.right, text, depth - 1)
                value = value & right if isinstance(step.op, ast.BitAnd) else value | right
            return value
        case ast.Name(id="prefix"):
            return KINDS["prefix"]()
        case ast.Call(func=ast.Name(id=name)):
            return _call(name, node, text)
    _refuse(text, f"{ast.unparse(node)[:80]!a} is no selector")


def _call(name: str, node: ast.Call, text: str) -> Selector:
    if name == "given":
        _refuse(text, "given(...) holds a function, which is no text: give its value in Python")
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        _refuse(text, f"there is no selector {name!r}, there are {', '.join(KINDS)}{hint}")
    args = [_value(x, text) for x in node.args]
    keywords = {x.arg: _value(x.value, text) for x in node.keywords if x.arg is not None}
    if len(keywords) != len(node.keywords):
        _refuse(text, f"{name} has an argument that cannot be read")
    signature = inspect.signature(KINDS[name])
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        _refuse(text, f"{name}: {error}, its arguments are {', '.join(signature.parameters) or 'none'}")
    return KINDS[name](*args, **keywords)


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Constant(value=str(word)) | ast.Name(id=word) if word in _WORDS:
            return word
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple(elts=items) if len(items) <= 8:
            return tuple(_value(x, text) for x in items)
        case ast.BinOp(op=ast.Div(), left=ast.Constant(value=int() as top), right=ast.Constant(value=int() as bottom)):
            if bottom:
                return top / bottom
    _refuse(text, f"{ast.unparse(node)[:80]!a} is no number, True, False or one of {', '.join(_WORDS)}")
