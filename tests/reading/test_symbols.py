"""sympy forgets symbols and expressions apart: a symbol that is met again equals its leaf's, and is another object."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import sympy
import torch
from sympy.core.cache import clear_cache

from kvt_compile.passes.canonical.coords import Space
from kvt_compile.passes.reading.read import Leaf, Reader


def test_the_dtype_of_a_symbol_that_was_made_anew() -> None:
    before = sympy.Symbol("L0")
    clear_cache()
    symbol = sympy.Symbol("L0")
    assert symbol == before
    assert symbol is not before
    whole: Any = SimpleNamespace(dtype=torch.uint8)
    reader = Reader(Space(), lambda value: False, {}, real="float32", leaves=[Leaf(whole, (), symbol)])
    assert reader._dtype(before) == "uint8"
