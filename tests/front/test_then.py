"""The passes in front of compilers other than Inductor, and inside Inductor as a custom pass."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net, assert_same
from places import IMPORTABLE
from torch import fx

import kvt_compile
from kvt_compile.config import OptionError, make_options, split_options

Graphs = list[list[str]]


def kvt_nodes(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if "kvt" in str(node.target)]


@pytest.fixture
def seen() -> Graphs:
    return []


@pytest.fixture
def mine(seen: Graphs) -> Callable[..., Any]:
    """A backend that runs the graph as it is and remembers what it was given."""

    def my_backend(gm: fx.GraphModule, example_inputs: list[Any], **more: Any) -> Callable[..., Any]:
        seen.append([*kvt_nodes(gm), *map(str, more.items())])
        return gm.forward

    return my_backend


def trained(model: Net, x: torch.Tensor, **how: Any) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    out = torch.compile(model, **how)(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["eager", "aot_eager", "inductor", "aot_eager_decomp_partition"])
def test_named_backends_compute_what_the_definition_does(then: str) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with torch.no_grad():
        assert_same([torch.compile(model, backend="kvt", options={"topk": 4, "then": then})(x)], [model.by_hand(x, 4)])


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_gradients_are_those_of_inductor(then: str) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    ours = trained(model, x, backend="kvt", options={"topk": 4, "then": then})
    assert_same(ours, trained(model, x, backend="kvt", options={"topk": 4}))


def test_a_function_gets_an_ordinary_graph_with_our_operators(mine: Callable[..., Any], seen: Graphs) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with torch.no_grad():
        assert_same([torch.compile(model, backend="kvt", options={"topk": 4, "then": mine})(x)], [model.by_hand(x, 4)])
    assert seen == [["kvt.attention.default"] * 2]


def test_options_of_another_backend_are_bound_to_it(mine: Callable[..., Any], seen: Graphs) -> None:
    bound = functools.partial(mine, options={"device": "CPU"})
    torch.compile(Net(), backend="kvt", options={"topk": 4, "then": bound})(torch.randn(1, 10, 32))
    assert seen[0][-1] == "('options', {'device': 'CPU'})"


def test_without_a_site_the_graph_is_passed_on_all_the_same(mine: Callable[..., Any], seen: Graphs) -> None:
    x = torch.randn(3)
    assert torch.equal(torch.compile(lambda x: x.sin(), backend="kvt", options={"then": mine})(x), x.sin())
    assert seen == [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "eagr"}, "did you mean 'eager'"),
        ({"then": "kvt"}, "then must be a backend or the name of one"),
        ({"then": 3}, r"then must be a backend or the name of one.*got 3"),
        ({"then": None}, "got None"),
        ({"then": "eager", "max_autotune": True}, r"'max_autotune' is an option of Inductor.*goes to 'eager'"),
        ({"then": "eager", "tpok": 3}, "did you mean 'topk'"),
    ],
    ids=str,
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        split_options(options)


def test_good_options_are_taken() -> None:
    assert split_options({"then": "inductor", "max_autotune": True})[1] == {"max_autotune": True}
    assert split_options({"then": "eager"})[0].then == "eager"
    assert split_options(None)[0].then == "inductor"


def test_a_mode_is_inductors() -> None:
    compiled = torch.compile(Net(), backend="kvt", mode="reduce-overhead", options=None)
    assert compiled is not None
    from kvt_compile.backend import kvt_backend

    gm = fx.symbolic_trace(torch.nn.ReLU())
    with pytest.raises(OptionError, match="mode 'max-autotune' is Inductor's, and the graph goes to 'eager'"):
        kvt_backend(gm, [], mode="max-autotune", options={"then": "eager"})


def test_where_nothing_is_compiled_it_means_nothing() -> None:
    with pytest.raises(OptionError, match=r"only torch\.compile"):
        make_options({"then": "eager"})
    with pytest.raises(OptionError, match=r"only torch\.compile"):
        kvt_compile.rewrite(Net(), torch.randn(1, 10, 32), then="eager")


# --- the passes in front of a backend ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_passes_for_a_name(backend: str) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend=kvt_compile.passes_for(backend, topk=4))
        assert_same([compiled(x)], [model.by_hand(x, 4)])


def test_passes_for_inductor_take_its_mode_and_options() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    backend = kvt_compile.passes_for("inductor", topk=4)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"epilogue_fusion": False})
        assert_same([compiled(x)], [model.by_hand(x, 4)])


def test_as_a_decorator(seen: Graphs) -> None:
    @kvt_compile.passes_for
    def plain(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(kvt_nodes(gm))
        return gm.forward

    @kvt_compile.passes_for(topk=4)
    def chosen(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Mine."""
        seen.append(kvt_nodes(gm))
        return gm.forward

    assert (chosen.__name__, chosen.__doc__) == ("chosen", "Mine.")
    model, x = Net(), torch.randn(2, 10, 32)
    with torch.no_grad():
        assert_same([torch.compile(model, backend=plain)(x)], [model.by_hand(x, 5)])
        torch.compiler.reset()
        assert_same([torch.compile(model, backend=chosen)(x)], [model.by_hand(x, 4)])
    assert seen == [["kvt.attention.default"] * 2] * 2


def test_mode_and_options_reach_the_backend(mine: Callable[..., Any], seen: Graphs) -> None:
    backend = kvt_compile.passes_for(mine, topk=4)
    torch.compile(Net(), backend=backend, options={"device": "CPU"})(torch.randn(1, 10, 32))
    assert seen[0][-1] == "('options', {'device': 'CPU'})"


def test_mistakes_are_told_at_once(mine: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="did you mean 'topk'"):
        kvt_compile.passes_for(mine, tpok=4)
    with pytest.raises(OptionError, match="did you mean 'topk'"):
        kvt_compile.passes_for(tpok=4)
    with pytest.raises(OptionError, match="then must be a backend"):
        kvt_compile.passes_for("no such backend")
    with pytest.raises(OptionError, match="passes_for takes the backend itself"):
        kvt_compile.passes_for("eager", then="aot_eager")


def test_refusals_are_told() -> None:
    backend = kvt_compile.passes_for("eager", on_refusal="error")
    with pytest.raises(Exception, match="not multiplied with values"):
        torch.compile(lambda x: torch.softmax(x @ x.mT, -1), backend=backend)(torch.randn(1, 2, 4, 8))


# --- inside Inductor --------------------------------------------------------------------------------------------------


def test_as_a_custom_pass_of_inductor() -> None:
    """With two values of k, one after the other: Inductor's caches tell them apart."""
    model, x = Net(), torch.randn(2, 10, 32)
    for topk in (4, 6, 4):
        torch.compiler.reset()
        with torch.no_grad():
            options = {"pre_grad_custom_pass": kvt_compile.inductor_pass(topk=topk)}
            assert_same([torch.compile(model, options=options)(x)], [model.by_hand(x, topk)])
    torch.compiler.reset()
    with torch.no_grad():
        assert_same([torch.compile(model)(x)], [model(x)])


def test_a_custom_pass_trains() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    ours = trained(model, x, options={"pre_grad_custom_pass": kvt_compile.inductor_pass(topk=4)})
    torch.compiler.reset()
    assert_same(ours, trained(model, x, backend="kvt", options={"topk": 4}))


def test_a_custom_pass_by_configuration() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    config: Any = torch._inductor.config
    with torch.no_grad(), config.patch(pre_grad_custom_pass=kvt_compile.inductor_pass(topk=4)):
        assert_same([torch.compile(model)(x)], [model.by_hand(x, 4)])


def test_caches_know_the_pass_by_its_options() -> None:
    names = [kvt_compile.inductor_pass(topk=k).uuid() for k in (4, 4, 5, {"a": 4}, 0.5)]
    assert names[0] == names[1]
    assert len(set(names)) == 4
    assert kvt_compile.inductor_pass(topk=lambda site: 4).uuid() is None
    with torch.no_grad():
        assert kvt_compile.inductor_pass(topk=4).uuid() != names[0]


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_passes_see_the_modes_that_the_graph_will_run_in(around: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside Inductor as in front of it."""
    entries: list[Any] = []
    own = kvt_compile.backend.run_passes

    def noted(*arguments: Any, entry: Any, **keywords: Any) -> Any:
        entries.append(entry)
        return own(*arguments, entry=entry, **keywords)

    monkeypatch.setattr(kvt_compile.backend, "run_passes", noted)
    x = torch.randn(2, 10, 32)
    with around():
        torch.compile(Net(), backend="kvt", options={"then": "eager"})(x)
        torch.compiler.reset()
        uncached = kvt_compile.inductor_pass(topk=lambda site: 0.5)  # Inductor keeps what a pass with a name did
        torch.compile(Net(), options={"pre_grad_custom_pass": uncached})(x)
        assert entries == [kvt_compile.passes.canonical.modes.ambient()] * 2


# --- a real one -------------------------------------------------------------------------------------------------------

OPENVINO = """
import torch
from nets import Net
from openvino.frontend.pytorch.torchdynamo import execute

torch.manual_seed(0)
ran, own = [], execute.openvino_execute

def counted(graph, *arguments, **keywords):
    ran.append([str(node.target) for node in graph.graph.nodes])
    return own(graph, *arguments, **keywords)

execute.openvino_execute = counted
model, x = Net().eval(), torch.randn(2, 10, 32)
with torch.no_grad():
    dense = torch.compile(model, backend="openvino")(x)
    assert ran, "OpenVINO did not run the dense model"
    rounding = (dense - model(x)).abs().max()  # it may compute in bfloat16
    ran.clear()
    torch.compiler.reset()
    found = torch.compile(model, backend="kvt", options={"topk": 4, "then": "openvino"})(x)
    assert ran, "OpenVINO did not run the rewritten model"
    assert not any("kvt" in target for targets in ran for target in targets)
    exact = model.by_hand(x, 4)
    assert (found - exact).abs().max() <= 4 * rounding + 1e-6, (found - exact).abs().max()
    assert (dense - exact).abs().max() > 20 * rounding, "the test cannot tell k-NN from dense"
print("fine")
"""


def test_openvino_runs_what_is_around_our_operators() -> None:
    """In a process of its own: importing it changes settings of Dynamo."""
    pytest.importorskip("openvino")
    code = f"import sys; sys.path[:0] = {[str(path) for path in IMPORTABLE]}\n{OPENVINO}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if "did not run the dense model" in done.stderr and torch.__version__ < (2, 13):
        pytest.skip(f"OpenVINO runs no model with torch {torch.__version__}: it falls back to Inductor by itself")
    assert done.stdout.strip().endswith("fine"), done.stderr
