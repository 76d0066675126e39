"""A graph of Dynamo -> the module paths of its nodes as the whole model has them.

    def forward(self, x):              model.blocks[3].attn, after a graph break in it
        q, k, v = ...                    Dynamo's own:   ""            (relative to the frame it resumes)
        print("a graph break")           here:           "blocks.3.attn"
        return softmax(q @ kT) @ v

A frame belongs to the innermost module on the Python stack: one that is called, or one of whose methods runs
(`layer.attend(x)`, `layer.forward(x)`); the model is the outermost one that is called and contains it.  Dynamo compiles
a frame once for all modules it runs for, so where a policy goes by paths a guard is added: what was compiled for one
module serves another only where the policy decides the same for both.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

from torch import fx, nn

from kvt_compile.passes.decide import Decision, Policy, asked
from kvt_compile.passes.finding.describe import captured_path, in_torch
from kvt_compile.passes.pipeline import nested_graphs
from kvt_compile.passes.site import AttentionSite, Names

OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep
"""Where our own code lies."""
_CALL = nn.Module._call_impl.__code__
_WRAPPERS = {
    # class -> the attribute that holds the model
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def running() -> Iterator[nn.Module]:
    """The modules whose call is on this thread's Python stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]


def method_of(frame: FrameType) -> nn.Module | None:
    """The module that a frame is a method of: its first argument."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, nn.Module) else None


def is_wrapper(module: nn.Module) -> bool:
    """Whether the module only stands around a model: its name is in no path."""
    return type(module).__name__ in _WRAPPERS


def path_in(root: nn.Module, wanted: nn.Module) -> str | None:
    """The path of a module in a model, wrappers left out; None where it is no part of it."""
    queue: list[tuple[str, nn.Module]] = [("", root)]
    seen: set[int] = set()
    while queue:
        path, module = queue.pop(0)
        if module is wanted:
            return path
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, child in module.named_children():
            through = is_wrapper(module) and name == _WRAPPERS[type(module).__name__]
            queue.append((path if through else f"{path}.{name}".lstrip("."), child))
    return None


def names_of(module: nn.Module, stack: Sequence[nn.Module]) -> Names:
    """The paths of a module: in the outermost module of the stack it is part of, and in what was compiled of that.
    Empty where it is part of none."""
    names: list[str] = []
    for outer in reversed(stack):
        boundary = not names or type(outer).__name__ == "OptimizedModule" or outer._compiled_call_impl is not None
        if boundary and (path := path_in(outer, module)) is not None and path not in names:
            names.append(path)
    return tuple(names)


def note_paths(gm: fx.GraphModule) -> None:
    """Writes the paths of every node of a graph that Dynamo just captured, nested graphs included, into its meta."""
    stack = [module for module in running() if not _is_ours(module)]
    scope = _scope()
    owner = _owner(first_argument())
    around = [x for x in scope.get("L", {}).values() if isinstance(x, nn.Module)][:1] + stack
    known: dict[int, Names] = {}
    for graph in nested_graphs(gm):
        for node in graph.graph.nodes:
            path = captured_path(node)
            module = _resolve(path, scope) if path else owner
            if module is not None and id(module) not in known:
                known[id(module)] = names_of(module, around)
            if names := known.get(id(module)):
                node.meta["kvt_names"] = names


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule)


def _scope() -> dict[str, Any]:
    """The local and global variables of the frame Dynamo is compiling, under the names its paths use."""
    # (no public name gives them.  Without them paths are those of Dynamo, relative to the frame.)
    with contextlib.suppress(Exception):
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        return {"L": output.local_scope, "G": output.global_scope}
    return {}


_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(?:'([^']*)'|\"([^\"]*)\"|(-?\d+))\]")


def _resolve(path: str, scope: dict[str, Any]) -> nn.Module | None:
    """L['self'].blocks[0].attn -> the module; None where the path is not made of names and items."""
    if path[:1] not in scope:
        return None
    value: Any = scope[path[:1]]
    position = 1
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None:
            return None
        name, single, double, number = step.groups()
        try:
            if name is not None:
                value = getattr(value, name)
            else:
                value = value[int(number) if number is not None else single if single is not None else double]
        except Exception:  # whatever a user's class does when it is asked
            return None
        position = step.end()
    return value if isinstance(value, nn.Module) else None


# ---- one compilation for several modules -----------------------------------------------------------------------------


def guard_paths(policy: Policy, decisions: Sequence[Decision]) -> None:
    """Adds the guard, where the policy goes by paths and there is something to decide."""
    first = _first_name()
    owner = _owner(first_argument())
    if policy.by_path and decisions and owner is not None:
        add_guard(_same_decisions(policy, decisions, owner, first), _FOR_THIS_MODULE)


def guard_module() -> None:
    """Has Dynamo compile a frame anew for every module it runs for, and for every place it is called from in the code
    of that module: whoever lists sites wants them all."""
    first = _first_name()
    owner = _owner(first_argument())
    if owner is not None:
        wanted, calls = weakref.ref(owner), _calls(owner)

        def test(variables: Mapping[str, Any]) -> bool:
            now = _owner(variables.get(first))
            return now is not None and now is wanted() and _calls(now) == calls

        add_guard(test, _FOR_THIS_MODULE)


_FOR_THIS_MODULE = "kvt: as decided for this module"


def _owner(first: Any) -> nn.Module | None:
    """The module that a frame belongs to.

    first: the frame's first argument; the frame itself is about to run, and on no stack yet."""
    if _is_the_models(first):
        owner: nn.Module = first
        return owner
    # no frame further up is asked for its variables: before Python 3.13 it would keep them until it ends
    return next((module for _, module in _frames() if _is_the_models(module)), None)


def _calls(owner: nn.Module) -> tuple[tuple[int, int], ...]:
    """The calls that lead from the code of a module to the frame that is about to run: which instruction of which code,
    innermost first."""
    calls: list[tuple[int, int]] = []
    for frame, module in _frames():
        if _is_the_models(module) and module is not owner:
            break
        if not _is_inner(frame.f_code.co_filename):  # while Dynamo compiles there is more of it than in a guard
            calls.append((id(frame.f_code), frame.f_lasti))
    return tuple(calls)


def _frames() -> Iterator[tuple[FrameType, nn.Module | None]]:
    """The frames of this thread's Python stack, innermost first, and the module each is a method of or calls."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_inner(frame.f_code.co_filename):
            yield frame, frame.f_locals["self"] if frame.f_code is _CALL else None
        else:
            yield frame, method_of(frame)
        frame = frame.f_back


def _is_the_models(module: Any) -> bool:
    return isinstance(module, nn.Module) and not is_wrapper(module) and not _is_ours(module)


def _is_inner(file: str) -> bool:
    """Whether code is torch's or ours."""
    return in_torch(file) or file.startswith(OWN)


def compiled_code() -> CodeType | None:
    """The code of the frame that Dynamo is compiling."""
    with contextlib.suppress(Exception):  # as for its variables
        from torch._dynamo.symbolic_convert import InstructionTranslator

        code: CodeType = InstructionTranslator.current_tx().f_code
        return code
    return None


def first_argument() -> Any:
    """The first argument of the frame that Dynamo is compiling."""
    return _scope().get("L", {}).get(_first_name())


def is_entered(model: nn.Module | None) -> bool:
    """Whether the module is what was compiled, or the whole model, and not a part of it; None: whether a frame that is
    no method of a module runs outside of all of them."""
    if model is None:
        return _owner(None) is None
    return "" in names_of(model, [model, *(module for module in running() if not _is_ours(module))])


def _first_name() -> str:
    """What the first argument of the frame is called that Dynamo is compiling; empty where it has none."""
    code = compiled_code()
    return str(code.co_varnames[0]) if code is not None and code.co_argcount else ""


def add_guard(test: Callable[[Any], bool], what: str) -> None:
    """Has Dynamo ask, before it runs what it compiles now, whether a test of the frame's variables holds."""
    # (no public name adds a guard from a backend; the names are the same in torch 2.11 to 2.14.)
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard, TracingContext

    def ask(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_lambda_guard(test, [what], None)

    if (context := TracingContext.try_get()) is not None:
        context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), ask))


def install_global(prefix: str, value: Any) -> Any:
    """A global of the frame that Dynamo is compiling, for as long as what it compiles lives, as a source for guards;
    None where there is no such frame."""
    with contextlib.suppress(Exception):  # as for its variables
        from torch._dynamo.source import GlobalSource
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return GlobalSource(InstructionTranslator.current_tx().output.install_global(prefix, value))
    return None


def _same_decisions(
    policy: Policy, decisions: Sequence[Decision], owner: nn.Module, first: str
) -> Callable[[Any], bool]:
    base = names_of(owner, list(running()))
    # without the graph, which the guard would keep alive
    sites: list[AttentionSite] = [replace(d.site, plan=None, softmax=None, anchor=None) for d in decisions]  # type: ignore[arg-type]

    @functools.cache
    def said() -> list[Any]:
        return [asked(site, policy) for site in sites]  # later: a user's function is called once where one module runs

    answers: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary({owner: True})

    def test(variables: Mapping[str, Any]) -> bool:
        module = _owner(variables.get(first))
        if module is None:
            return False
        if module not in answers:
            names = names_of(module, list(running()))
            moved = [replace(site, where=site.where.moved(base, names)) for site in sites]
            answers[module] = [asked(site, policy) for site in moved] == said()
        return answers[module]

    return test
