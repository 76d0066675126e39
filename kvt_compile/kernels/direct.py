"""An attention node in the Python that Inductor writes -> a call of its kernel past torch's dispatcher.

    buf0 = torch.ops.kvt.attention.default(arg0, arg1, arg2, [], '0.125*s', ...)
    ->
    kvt_attention_buf0 = KvtSite()                                                  once
    buf0 = kvt_attention_buf0(arg0, arg1, arg2, [], '0.125*s', ...)

and the same of a backward.  Written where every size and stride is a number: all calls of such a node are laid out
alike, so a site looks its runner up (`op/ready.py`) by the key of its first call.  What Inductor's own loops rely on,
this does: shapes, strides and dtypes are those of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.op import lowerings, ops, ready
from kvt_compile.kernels.op.arguments import AttentionArguments

_OPERATOR, _BACKWARD = torch.ops.kvt.attention.default, torch.ops.kvt.attention_backward.default
_LOWERING = [x.name for x in fields(AttentionArguments)].index("lowering") - 4
_writing: ContextVar[bool] = ContextVar("kvt_writing_direct_calls", default=False)


class Site:
    """One attention node of a compiled graph; called with the operator's arguments, returns what it does."""

    __slots__ = ("_asked", "_key")

    def __init__(self) -> None:
        self._key: Hashable = None
        self._asked = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], *rest: Any) -> Any:
        run = ready.runner(self._key)
        if run is not None and not _is_watched():
            lowerings.check_inside(rest[_LOWERING])
            return run(q, k, v, captured)
        if not self._asked:
            self._key, self._asked = ready.key(ops.attention_arguments(q, k, v, captured, *rest)), True
        return _OPERATOR(q, k, v, captured, *rest)


class BackwardSite:
    """The backward of one attention node, likewise."""

    __slots__ = ("_asked", "_key")

    def __init__(self) -> None:
        self._key: Hashable = None
        self._asked = False

    def __call__(self, *args: Any) -> Any:
        run = ready.runner(self._key)
        if run is not None and not _is_watched():
            return run(*args[:_SAVED])
        if not self._asked:
            self._key, self._asked = ready.backward_key(ops.backward_arguments(*args)), True
        return _BACKWARD(*args)


def _is_watched() -> bool:
    """Whether a mode or the profiler wants to see operators, as it sees those that Inductor leaves to torch."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._autograd._profiler_enabled()


_SAVED = [x.name for x in _BACKWARD._schema.arguments].index("threshold") + 1
"""How many arguments a backward begins with that are tensors, or a list of them."""
_SITES = {_OPERATOR: Site, _BACKWARD: BackwardSite}


@contextmanager
def written() -> Iterator[None]:
    """What Inductor writes in here calls attention directly; with a tag in the keys of its caches, as it imports this
    module by name."""
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen

    if _writing.get():
        yield
        return
    config: Any = torch.compiler.config
    for operator in _SITES:
        CUSTOM_EXTERN_KERNEL_CODEGEN.setdefault(f"torch.ops.{operator}", CustomCodegen(python=_write))
    token = _writing.set(True)
    try:
        with config.patch(cache_key_tag=f"{config.cache_key_tag}|kvt-direct=1"):
            yield
    finally:
        _writing.reset(token)


def writing(inner_compile: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's compiler of one graph, with `written` around it: a backward is compiled when it is first needed."""

    @wraps(inner_compile)
    def compile_one(*args: Any, **kwargs: Any) -> Any:
        with written():
            return inner_compile(*args, **kwargs)

    return compile_one


def _write(node: Any, writeline: Callable[[Any], None]) -> None:
    """Inductor's fallback kernel of the operator -> the line that calls it."""
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine, PythonWrapperCodegen
    from torch._inductor.virtualized import V

    wrapper = V.graph.wrapper_code
    # a wrapper of another kind, of a part of a graph for one, has no place for what is written once
    if _writing.get() and type(wrapper) is PythonWrapperCodegen and _is_settled(node):
        site = _SITES[node.op_overload]
        kind = "attention" if site is Site else "attention_backward"
        node.python_kernel_name = f"kvt_{kind}_{node.get_name()}"
        wrapper.add_import_once(f"from {__name__} import {site.__name__} as Kvt{site.__name__}")
        wrapper.header.writeline(f"{node.python_kernel_name} = Kvt{site.__name__}()")
    writeline(ExternKernelAllocLine(wrapper, node))


def _is_settled(node: Any) -> bool:
    """Whether every tensor is on a CPU, and nothing of the call is known at run time alone."""
    if any(x.get_device().type != "cpu" for x in node.inputs):
        return False
    sizes = [size for x in node.inputs for size in (*x.get_size(), *x.get_stride())]
    numbers = torch.utils._pytree.tree_leaves(node.constant_args)
    return not any(getattr(x, "free_symbols", ()) or isinstance(x, torch.SymInt) for x in (*sizes, *numbers))
