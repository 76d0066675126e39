"""Run kernels on CPU tensors, in Triton's interpreter: slow, exact about shapes and masks, needs no GPU.

    with interpreted():
        module(spec, interpreted=True).forward[grid](...)

Triton decides when a kernel is defined whether it will be interpreted; functions of its own library were defined as
compiled ones when it was imported, so calls of those are redirected for the time of the `with`.  So are products of
bfloat16, which the interpreter (3.7.1) multiplies as if their bits were integers; of assembly it learns the sums that
`exact_sum` is made of; and its numbers, arrays of shape (1,), are made to have an index (Triton 3.6 asks numpy for it,
which from 2.5 on refuses).  Afterwards the language is put back as it was: the interpreter leaves some of its own
functions in it, and nothing could be compiled any more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


def _everything_in_the_language() -> list[tuple[Any, dict[str, Any]]]:
    """(module or class, its names) of all of triton.language."""
    modules = [x for name, x in list(sys.modules.items()) if name.startswith("triton.language")]
    classes = {x for module in modules for x in vars(module).values() if isinstance(x, type)}
    own = [x for x in classes if x.__module__.startswith("triton.language")]
    return [(x, {k: v for k, v in vars(x).items() if not k.startswith("__") or callable(v)}) for x in (*modules, *own)]


@contextmanager
def interpreted() -> Iterator[None]:
    """Define and run kernels in the interpreter.  Not for several threads at once."""
    import numpy
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
    from triton.runtime.jit import JITFunction

    of_library: dict[int, Any] = {}  # by identity: hashing a JITFunction would look through its source

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in of_library:
            of_library[id(self)] = InterpretedFunction(self.fn)
        return of_library[id(self)](*args, **kwargs)

    def widened(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return own_product(self, widened(a), widened(b), *rest)

    def assembly(self: Any, text: str, constraints: str, values: Any, kinds: Any, *rest: Any) -> Any:
        if text.split()[0] not in ("add.rn.f32", "add.rn.f64"):
            raise NotImplementedError(f"the interpreter does not know {text!r}")
        total = TensorHandle(values[0].data + values[1].data, values[0].dtype.scalar)
        return SimpleNamespace(get_result=lambda _: total)

    def numbers(kind: Any, *rest: Any) -> None:
        own_numbers(kind, *rest)
        kind.__index__ = lambda self: int(self.handle.data.squeeze())

    own_numbers = interpreter._patch_lang_tensor
    own_product, own_assembly = InterpreterBuilder.create_dot, InterpreterBuilder.create_inline_asm
    before = triton.knobs.runtime.interpret, JITFunction.__call__
    triton.knobs.runtime.interpret = True
    JITFunction.__call__ = call
    InterpreterBuilder.create_dot = product
    InterpreterBuilder.create_inline_asm = assembly
    interpreter._patch_lang_tensor = numbers
    changed = _everything_in_the_language()
    try:
        yield
    finally:
        for owner, names in changed:
            for name, value in names.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
        interpreter._patch_lang_tensor = own_numbers
        InterpreterBuilder.create_dot = own_product
        InterpreterBuilder.create_inline_asm = own_assembly
        triton.knobs.runtime.interpret, JITFunction.__call__ = before
