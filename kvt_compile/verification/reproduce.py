"""A failure -> a Python file that shows it again, with its tensors beside it: torch and kvt_compile are all it needs.

    captured graph  --cut-->  the attention alone, from its q, k and v on  --print-->  NAME.py, NAME.pt

What is written is tried first: where the attention alone does not fail the whole graph is taken, and where that does
not either nothing is written, and it is said.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kvt_compile.kernels.disk.whole import write_whole
from kvt_compile.passes.pipeline import run_passes
from kvt_compile.passes.site import AttentionSite, Fused
from kvt_compile.verification.facts import Findings
from kvt_compile.verification.outcome import first_line
from kvt_compile.verification.ways import NONE, Rewrites, copied

Fails = Callable[[nn.Module, Sequence[Any]], bool]
"""Whether a model on these inputs fails as well, with attention over every axis rewritten."""
_CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap")
_CONSTANTS = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "NoneType": "NoneType = type(None)",
    "device": "from torch import device",
    "torch": "",
}


@dataclass(frozen=True)
class _Small:
    """A graph that has everything it needs, and values of its inputs."""

    graph: fx.GraphModule
    inputs: list[Any]
    parameters: dict[str, Tensor]
    """The graph reads them as `get_attr`: that they are no activations is part of what an attention is known by."""


def reproduce(
    rewrites: Rewrites,
    run: Callable[[], Any],
    wrong: tuple[int, int] | None,
    found: Findings,
    folder: str | Path | None,
    fails: Fails,
    call: str,
) -> tuple[str | None, str]:
    """(path, "") of what was written, or (None, why nothing was).

    run: runs the model once.  wrong: the site that fails, as `Way.only`; None where sites fail together only.
    call: the text of the arguments of `verify` behind the inputs, with the `with` it stands in.
    """
    number = wrong[0] if wrong else max(range(len(rewrites.graphs)), key=lambda n: len(rewrites.results[n].decisions))
    rewrites.seen = {}
    with rewrites.use(NONE):
        run()
    inputs, rewrites.seen = rewrites.seen.get(number, ()), None
    module = found.first.module if found.first else ""
    try:
        for small in _candidates(rewrites, number, inputs, module if wrong else None):
            text = _model_text(small.graph, small.parameters)
            if text is None:
                continue
            with _built(text, small.parameters) as model:
                again = fails(model, small.inputs)
            if again:
                return str(_write(text, small, found, folder, call)), ""
    except Exception as error:  # whatever a graph holds that cannot be printed, or a folder that cannot be written to
        return None, f"no file reproduces it: {first_line(error)}"
    return None, "no file reproduces it: the attention, and its graph, are right when they run alone"


def _candidates(rewrites: Rewrites, number: int, inputs: Sequence[Any], module: str | None) -> Iterator[_Small]:
    graph = copied(rewrites.graphs[number])
    _inline_checkpoints(graph)
    if module is not None:
        result = run_passes(copied(graph), rewrites.policy, apply=False)
        for site in (decision.site for decision in result.decisions):
            if site.where.module == module and site.softmax.graph.owning_module is not None:
                yield _cut(site.softmax.graph.owning_module, *_ends(site), inputs)
    output = graph.graph.output_node()
    yield _cut(graph, output, (), inputs)


def _ends(site: AttentionSite) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node a site computes, and what it computes it of."""
    sources = site.plan.sources if isinstance(site.plan, Fused) else (site.plan.scores,)
    return site.plan.node, tuple(value.node for value in sources)


def _cut(gm: fx.GraphModule, end: fx.Node, sources: Iterable[fx.Node], inputs: Sequence[Any]) -> _Small:
    """Everything `end` needs and `sources` do not, with the rest as inputs."""
    outside = _ancestors(sources)
    inside = _ancestors([end]) - outside
    made, taken = fx.Graph(), dict[fx.Node, fx.Node]()
    copies: dict[fx.Node, fx.Node] = {}

    def needed(node: fx.Node) -> fx.Node:
        return copies[node] if node in copies else taken[node]

    kept = [node for node in gm.graph.nodes if node in inside and not _is_given(gm, node)]
    edge = [n for n in gm.graph.nodes if n not in kept and any(user in kept for user in n.users)]
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    parameters: dict[str, Tensor] = {}
    for node in edge:
        name = re.sub(r"\W|^_+", "", node.name) or "x"
        if isinstance(given.get(node), nn.Parameter):
            parameters[name] = given[node].detach().clone()
            taken[node] = made.get_attr(name)
        else:
            taken[node] = made.placeholder(name)
    for node in kept:
        copies[node] = made.node_copy(node, needed)
    if end.op != "output":
        made.output(needed(end))
    edge = [node for node in edge if taken[node].op == "placeholder"]
    return _Small(fx.GraphModule(dict(parameters), made), _values(gm, edge, inputs), parameters)


def _is_given(gm: fx.GraphModule, node: fx.Node) -> bool:
    """An input, or a tensor of the module."""
    if node.op != "get_attr":
        return bool(node.op == "placeholder")
    return not isinstance(getattr(gm, str(node.target), None), nn.Module)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all they are computed of."""
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(gm)
        self.found: dict[fx.Node, Any] = dict.fromkeys(wanted)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.found:
            self.found[n] = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), result)
        return result


def _values(gm: fx.GraphModule, wanted: Sequence[fx.Node], inputs: Sequence[Any]) -> list[Any]:
    recorder = _Recorder(gm, wanted)
    with torch.no_grad():
        recorder.run(*pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), list(inputs)))
    return list(recorder.found.values())


def _inline_checkpoints(gm: fx.GraphModule) -> None:
    """What is computed again in the backward is the same the first time: a checkpoint's body in place of its call."""
    for node in list(gm.graph.nodes):
        body = getattr(gm, str(node.args[0].target), None) if _calls_body(node) else None
        if not isinstance(body, fx.GraphModule):
            continue
        _inline_checkpoints(body)
        inner = {p: arg for p, arg in zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True)}
        for name, value in (*body.named_children(), *body.named_buffers(), *body.named_parameters()):
            if not hasattr(gm, name):
                setattr(gm, name, value)
        with gm.graph.inserting_before(node):
            result = gm.graph.graph_copy(body.graph, inner)
        fx.map_arg(result, lambda n: n)
        _replace_items(node, result)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _calls_body(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in _CHECKPOINTS and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"


def _replace_items(node: fx.Node, result: Any) -> None:
    for user in list(node.users):
        if getattr(user.target, "__name__", "") == "getitem":
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)


# ---- text -----------------------------------------------------------------------------------------------------------


def _model_text(gm: fx.GraphModule, known: Container[str]) -> str | None:
    """The graph as a class; None where it needs modules of its own."""
    if any(node.op == "call_module" or (node.op == "get_attr" and node.target not in known) for node in gm.graph.nodes):
        return None
    code = gm.graph.python_code("self")
    lines = [_import_line(name, value, code.src) for name, value in sorted(code.globals.items())]
    body = "\n".join(f"    {line}" if line else "" for line in code.src.strip().splitlines())
    imports = "\n".join(filter(None, lines))
    return f"{imports}\n\n\nclass Model(torch.nn.Module):\n{_INIT}\n{body}\n"


_INIT = """    def __init__(self, parameters):
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, torch.nn.Parameter(value))
"""


def _import_line(name: str, value: Any, source: str) -> str:
    if not re.search(rf"\b{re.escape(name)}\b", source):
        return ""
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if isinstance(value, ModuleType):
        return f"import {name}" if value.__name__ == name else f"import {value.__name__} as {name}"
    return f"from {value.__module__} import {value.__qualname__} as {name}"


@contextmanager
def _built(text: str, parameters: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The class of the text, made; Dynamo asks for its module by name."""
    module = sys.modules["kvt_reproduction"] = ModuleType("kvt_reproduction")
    try:
        vars(module)["torch"] = torch
        exec(compile(text, "<kvt_reproduction>", "exec"), vars(module))
        yield module.Model(parameters)
    finally:
        del sys.modules["kvt_reproduction"]


def _write(text: str, small: _Small, found: Findings, folder: str | Path | None, call: str) -> Path:
    wrong = found.first
    where = (wrong.module or "(top level)") if wrong else "every attention together"
    worst = wrong.worst if wrong else found.together
    name = "kvt_verify_" + (re.sub(r"\W+", "_", wrong.module).strip("_") if wrong and wrong.module else "model")
    place = Path(tempfile.mkdtemp(prefix="kvt_verify_") if folder is None else folder) / f"{name}.py"
    torch.save((small.parameters, small.inputs), place.with_suffix(".pt"))
    said = f"{where}: {worst}".replace("\\", "/").replace('"""', "'''")
    return write_whole(
        place,
        f'"""{said}\n\nWritten by kvt_compile.verify: prints what it finds now, and exits with 1 where that is wrong.\n'
        f'The tensors are in {place.with_suffix(".pt").name}, beside this file.\n"""\n\n'
        f"import sys\nfrom pathlib import Path\n\nimport torch\n\nimport kvt_compile\n{text}\n\n"
        f'if __name__ == "__main__":\n'
        f'    parameters, inputs = torch.load(Path(__file__).with_suffix(".pt"), weights_only=True)\n{call}'
        f"    print(result)\n    sys.exit(not result.ok)\n",
    )


def options_text(options: Mapping[str, Any], gradients: bool) -> str:
    """The lines of the file that call `verify`, in the modes it was called in."""
    modes = [] if gradients else ["torch.no_grad()"]
    modes += [
        f"torch.autocast({device!r}, {torch.get_autocast_dtype(device)})"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    line = f"result = kvt_compile.verify(Model(parameters).eval(), *inputs, reproduce_in=False{given})\n"
    return f"    with {', '.join(modes)}:\n        {line}" if modes else f"    {line}"
