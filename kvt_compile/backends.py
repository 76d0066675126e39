"""The passes for compilers of one's own: in front of any Dynamo backend, or inside Inductor before gradients are
traced.

    passes_for(backend, topk=64)      (graph, inputs) -> passes -> backend
    inductor_pass(topk=64)            torch._inductor.config.pre_grad_custom_pass

What follows sees an ordinary graph with `kvt::` operators, which run wherever torch runs them and bring their own
backward.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from torch import fx

from kvt_compile.backend import Backend, apply_passes, backend_of, in_cache_keys
from kvt_compile.config import OptionError, make_options
from kvt_compile.passes.canonical.modes import ambient


@overload
def passes_for(backend: str | Backend, /, **options: Any) -> Backend: ...


@overload
def passes_for(*, topk: Any = ..., **options: Any) -> Callable[[Backend], Backend]: ...


def passes_for(backend: str | Backend | None = None, /, **options: Any) -> Any:
    """A Dynamo backend -> the same backend, which gets every graph rewritten.

        torch.compile(model, backend=kvt_compile.passes_for("openvino", topk=64))

        @kvt_compile.passes_for(topk=64)
        def my_backend(graph, example_inputs): ...

    Args:
        backend: a function that takes a graph and its inputs and returns what runs, or the name of a registered one.
            None: returns a decorator.
        options: of `kvt_compile.config.Options`, but `then`, which is the backend here.

    `mode` and `options` of `torch.compile` go to the backend as they are.  Raises OptionError (a ValueError) for an
    unknown option or backend.
    """
    if "then" in options:
        raise OptionError(f"passes_for takes the backend itself, and was given then={options['then']!r} besides")
    if backend is None:
        make_options(options)
        return lambda function: passes_for(function, **options)
    chosen = make_options({**options, "then": backend}, compiling=True)
    behind = backend_of(backend)

    @functools.wraps(behind)
    def run(gm: fx.GraphModule, example_inputs: list[Any], **more: Any) -> Callable[..., Any]:
        with in_cache_keys(apply_passes(gm, chosen)):
            return behind(gm, example_inputs, **more)

    return run


def inductor_pass(**options: Any) -> Any:
    """The passes as a custom pass of Inductor, for programs that call Inductor through somebody else's backend.

        torch._inductor.config.pre_grad_custom_pass = kvt_compile.inductor_pass(topk=64)
        torch.compile(model, options={"pre_grad_custom_pass": kvt_compile.inductor_pass(topk=64)})

    options: of `kvt_compile.config.Options`, but `then`.  Raises OptionError (a ValueError) for an unknown one.

    Inductor's caches know the pass by its options and by the library's code; with a function among the options they are
    not used.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    chosen = make_options(options)
    name = _name_of(options)

    class KvtPass(CustomGraphPass):
        """A graph that Inductor has before gradients are traced -> the same with k-NN attention."""

        def __call__(self, graph: fx.Graph) -> None:
            gm = graph.owning_module
            if gm is None:
                raise OptionError("kvt's pass needs a graph that belongs to a GraphModule")
            apply_passes(gm, chosen)

        def uuid(self) -> str | None:
            return name and f"{name}-{ambient()}"  # what a graph becomes depends on the modes it will run in

    return KvtPass()


def _name_of(options: Mapping[str, Any]) -> str | None:
    """The same text for the same options and the same code; None where an option is a function."""
    if not _is_plain(options):
        return None
    return f"kvt-{_code()}-{sorted(options.items())!r}"


def _is_plain(x: Any) -> bool:
    if isinstance(x, Mapping):
        return type(x) is dict and all(_is_plain(key) and _is_plain(value) for key, value in x.items())
    if isinstance(x, list | tuple):
        return all(map(_is_plain, x))
    return x is None or type(x) in (str, int, float, bool)


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """Of everything that decides what a graph becomes."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
