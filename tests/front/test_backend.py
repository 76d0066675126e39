"""`torch.compile(model, backend="kvt")` in the ways people use it, through Inductor."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Classifier, Net, assert_same
from places import IMPORTABLE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvt_compile.backend import kvt_backend

FORCED: dict[str, Any] = {"topk": 1.0, "force_rewrite": True}


def broken(block: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return block(x)


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, x, use_reentrant=False)
    return out


def autocast(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: Tensor = block(x)
    return out


def step(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """[output, d input, d parameters]."""
    x = x.clone().requires_grad_()
    out = call(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("around", "rtol"),
    [(None, 2e-6), (broken, 2e-6), (checkpointed, 2e-6), (autocast, 2e-2)],
    ids=["plain", "graph-break", "checkpoint", "autocast"],
)
def test_training_with_all_keys_equals_dense(around: Callable[..., Tensor] | None, rtol: float) -> None:
    model = Net(around=around)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="kvt", options=FORCED, fullgraph=around is not broken)
    x = torch.randn(2, 10, 32)
    assert_same(step(compiled, other, x), step(model, model, x), rtol)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_under(mode: Any) -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with mode():
        assert_same([torch.compile(model, backend="kvt", options={"topk": 4})(x)], [model.by_hand(x, 4)])


@pytest.mark.parametrize("topk", [0.5, 8], ids=["share", "count"])
def test_one_dynamic_graph_serves_every_size(topk: float) -> None:
    model = Net()
    compiled = torch.compile(model, backend="kvt", options={"topk": topk}, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, tokens in ((2, 10), (3, 7), (1, 20), (5, 11)):
            x = torch.randn(batch, tokens, 32)
            kept = -(-tokens // 2) if topk == 0.5 else min(8, tokens)
            assert_same([compiled(x)], [model.by_hand(x, kept)])


def test_marking_the_tokens_dynamic() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(model, backend="kvt", options={"topk": 0.5})
    with torch.no_grad():
        assert_same([compiled(x)], [model.by_hand(x, 5)])
        other = torch.randn(2, 13, 32)
        assert_same([compiled(other)], [model.by_hand(other, 7)])


def test_different_options_live_side_by_side() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    with torch.no_grad():
        for topk in (2, 6, 2):
            compiled = torch.compile(model, backend="kvt", options={"topk": topk})
            assert_same([compiled(x)], [model.by_hand(x, topk)])


def kept(options: dict[str, Any], model: Net, x: Tensor, ks: tuple[int, ...]) -> int:
    """How many keys a compilation with these options keeps."""
    with torch.no_grad():
        found = torch.compile(model, backend="kvt", options=options)(x)
        return min(ks, key=lambda k: float((found - model.by_hand(x, k)).abs().max()))


def test_one_key_is_not_a_share_of_one() -> None:
    """Python says that 1 == 1.0, and Dynamo goes by it."""
    model, x = Net(), torch.randn(2, 10, 32)
    asked: list[Any] = [1, 1.0, 1, {"*": 1.0}, {"*": 1}]
    assert [kept({"topk": topk}, model, x, (1, 10)) for topk in asked] == [1, 10, 1, 10, 1]


def test_patterns_in_another_order_are_other_options() -> None:
    """The first match wins, and Python says that two such dicts are equal."""
    model, x = Net(), torch.randn(2, 10, 32)
    assert kept({"topk": {"*": 2, "[a-z]*": 6}}, model, x, (2, 6)) == 2
    assert kept({"topk": {"[a-z]*": 6, "*": 2}}, model, x, (2, 6)) == 6


def test_options_that_the_user_goes_on_with() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    options: dict[str, Any] = {"topk": 2}
    assert kept(options, model, x, (2, 6, 8)) == 2
    options["topk"] = 6
    assert kept(options, model, x, (2, 6, 8)) == 6
    inner = options["topk"] = {"*": 8}
    assert kept(options, model, x, (2, 6, 8)) == 8
    inner["*"] = 2
    assert kept(options, model, x, (2, 6, 8)) == 2
    assert options == {"topk": {"*": 2}}
    assert type(options) is dict


def test_options_that_ask_the_same_share_what_was_compiled() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    counter = torch._dynamo.testing.CompileCounter()
    for _ in range(2):
        options = {"topk": {"*": 0.5}, "exclude": ["head.*"], "then": counter}
        torch.compile(model, backend="kvt", options=options)(x)
    assert counter.frame_count == 1


def test_dropout_follows_the_seed_and_the_training_mode() -> None:
    model, x = Net(dropout=0.5), torch.randn(2, 10, 32)
    compiled = torch.compile(model, backend="kvt", options=FORCED)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(compiled(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert_same([compiled(x)], [model(x)])


def test_inductors_own_options_pass_through() -> None:
    model, x = Net(), torch.randn(2, 10, 32)
    options = {**FORCED, "epilogue_fusion": False, "max_autotune": False}
    assert_same([torch.compile(model, backend="kvt", options=options)(x)], [model(x)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topkk": 3}, "did you mean 'topk'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"topk": 0}, "at least 1 key"),
        ({"topk": True}, "bool"),
        ({"topk": 1.5}, r"in \(0, 1\]"),
        ({"topk": "half"}, "str"),
        ({"topk": float("nan")}, "nan"),
        ({"topk": {"blocks.*": 0}}, "at least 1 key"),
        ({"lowering": "tritn"}, "lowering must be one of"),
        ({"on_refusal": "panic"}, "on_refusal must be one of"),
        ({"force_rewrite": 1}, "force_rewrite must be True or False"),
        ({"include": 3}, "include must be"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    from kvt_compile.config import split_options

    with pytest.raises((ValueError, TypeError), match=message):
        split_options(options)


def test_an_error_about_options_reaches_the_user_of_torch_compile() -> None:
    with pytest.raises(Exception, match="did you mean 'topk'"):
        torch.compile(Net(), backend="kvt", options={"tpok": 3})(torch.randn(1, 4, 32))


def test_a_refusal_can_warn_or_raise() -> None:
    x = torch.randn(1, 4, 32)
    with pytest.warns(UserWarning, match="not multiplied with values"):
        torch.compile(Classifier(), backend=kvt_backend, options={"on_refusal": "warn"})(x)
    torch.compiler.reset()
    with pytest.raises(Exception, match="not multiplied with values"):
        torch.compile(Classifier(), backend=kvt_backend, options={"on_refusal": "error"})(x)


def test_compile_caches_never_serve_another_k(tmp_path: Any) -> None:
    """The same model in fresh processes that share one cache folder: each k computes its own answer."""
    program = textwrap.dedent(
        """
        import sys, torch
        from nets import Net
        torch.manual_seed(0)
        model, x, topk = Net(), torch.randn(2, 10, 32), int(sys.argv[1])
        with torch.no_grad():
            found = torch.compile(model, backend="kvt", options={"topk": topk})(x)
            assert torch.allclose(found, model.by_hand(x, topk), atol=1e-5), topk
        """
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, *IMPORTABLE)))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    for topk in (2, 5, 2):
        subprocess.run([sys.executable, "-c", program, str(topk)], env=environment, check=True)
