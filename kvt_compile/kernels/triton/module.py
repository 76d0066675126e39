"""Triton source -> Python module whose kernels can be launched, cross-compiled or interpreted.

Triton reads a kernel's text back with `inspect`, so the source is entered in `linecache`; no file is written.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
from functools import lru_cache
from types import ModuleType

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.generate import module_source


def digest(source: str) -> str:
    """The name of a source: independent of the process, the driver and the GPU."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@lru_cache(maxsize=512)
def module(spec: KernelSpec | SoftmaxSpec, interpreted: bool = False, contracting: bool = False) -> ModuleType:
    """The module of a spec.  interpreted: its kernels run in Triton's interpreter, within `interpret.interpreted()`;
    contracting: see `module_source`.

    Raises NotGenerated with the reason, ImportError without Triton.
    """
    return load(module_source(spec, contracting), interpreted)


def load(source: str, interpreted: bool = False) -> ModuleType:
    """The module of a generated source."""
    name = f"kvt_triton_{digest(source)}{'_interpreted' if interpreted else ''}"
    place = f"<{name}.py>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    found = ModuleType(name)
    found.__file__ = place
    sys.modules[name] = found  # inspect looks a function's module up by name
    exec(compile(source, place, "exec"), found.__dict__)
    return found
