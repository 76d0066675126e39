"""`verify`: what is right is right whatever the model looks like, what is wrong is named, with a file."""

from __future__ import annotations

import copy
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken import wrong
from factories import Attention, Stack, TwoSizes
from nets import Block, Checkpointed, Net, TalkingHeads
from torch import Tensor, nn

import kvt_compile
from kvt_compile import OptionError, Verification, VerificationError
from kvt_compile.verification.beside import NAME, beside_the_reference
from kvt_compile.verification.compare import compare, settled
from kvt_compile.verification.outcome import Outcome


def verify(model: Any, *inputs: Any, **keywords: Any) -> Verification:
    """With plain torch operators: nothing to build, and the lowering the tests break."""
    return kvt_compile.verify(model, *inputs, **{"lowering": "aten", "reproduce_in": False, **keywords})


def images(tokens: int = 7, width: int = 16) -> Tensor:
    return torch.randn(2, tokens, width)


# ---- what is right --------------------------------------------------------------------------------------------------


def test_every_attention_and_its_gradients() -> None:
    found = verify(Stack().eval(), images())
    assert found.ok, found
    assert [site.module for site in found.sites] == ["blocks.0", "blocks.1"]
    assert [site.outcome for site in found.sites] == ["fused", "fused"]
    assert found.sites[0].location.startswith("factories.py:")
    assert found.gradients
    assert found.first is None
    assert found.reproduction is None
    assert found.bite is not None
    assert found.bite > 1e-4
    assert "its weights are not multiplied" in dict(found.left)[""]
    assert found.together is not None
    assert 0 < found.together.budget < 1e-3


@dataclass
class Answer:
    logits: Tensor
    count: int


class Words(nn.Module):
    """Whole numbers in; a dictionary, a tuple, a dataclass, whole numbers and None out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention, self.unused = nn.Embedding(9, 16, sparse=True), Attention(), nn.Linear(2, 2)

    def forward(self, ids: Tensor, *, bias: Tensor, scale: float = 1.0, quiet: bool = True) -> dict[str, Any]:
        x = self.attention(self.words(ids), bias) * scale
        return {"answer": Answer(x, ids.shape[1]), "pair": (x.sum(1), x.argmax(-1)), "none": None, "quiet": quiet}


def test_whole_numbers_keywords_and_nested_outputs() -> None:
    found = verify(Words(), torch.randint(0, 9, (2, 7)), bias=torch.randn(7, 7), scale=0.5)
    assert found.ok, found
    assert len(found.sites) == 1


class WithNorm(nn.Module):
    """Statistics that training writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(x).flatten(0, 1))


class Writing(nn.Module):
    """Writes to its input, which can have no gradient then."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.attention(x)


class Choosing(nn.Module):
    """Rounding decides which of two equal tokens comes out first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(torch.cat([x, x], 1))
        return x.gather(1, x.sum(-1, keepdim=True).sort(1).indices.expand_as(x)) * torch.arange(x.shape[1]).view(-1, 1)


RIGHT: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "scores_kept": lambda: (TalkingHeads(), images()),
    "checkpoint": lambda: (Checkpointed(), images()),
    "norm_in_training": lambda: (WithNorm(), images(width=32)),
    "dropout_in_training": lambda: (Net(dropout=0.3), images(width=32)),
    "writes_to_its_input": lambda: (Writing(), images()),
    "a_choice_that_rounding_makes": lambda: (Choosing(), images(4)),
    "bfloat16": lambda: (Stack().bfloat16(), images().bfloat16()),
    "float16": lambda: (Stack().half(), images().half()),
    "float64": lambda: (Stack().double(), images().double()),
    "compiled": lambda: (torch.compile(Stack(), backend="kvt", options={"topk": 1}), images()),
    "frozen": lambda: (Stack().requires_grad_(False), images()),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str) -> None:
    model, x = RIGHT[case]()
    found = verify(model, x)
    assert found.ok, found
    assert found.sites
    assert found.gradients


def test_compiled_by_itself_and_in_parts() -> None:
    """What a model compiles of itself, with another k, has no part in it."""
    model = Stack()
    model.blocks[0].compile(backend="kvt", options={"topk": 1})
    model.blocks[1] = torch.compile(model.blocks[1], backend="kvt", options={"topk": 1})
    found = verify(model, images())
    assert found.ok, found
    assert len(found.sites) == 2


def test_without_grad_outputs_alone() -> None:
    with torch.no_grad():
        found = verify(Stack(), images())
    assert found.ok
    assert not found.gradients
    assert "gradients were not compared" in str(found)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(Stack(), images()).ok


def test_the_model_stays_as_it_is() -> None:
    model, x = WithNorm().train(), images(width=32)
    x.requires_grad_()
    model.block.gain.grad = torch.ones_like(model.block.gain)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert verify(model, x).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.block.gain.grad, torch.ones_like(model.block.gain))
    assert model.block.qkv.weight.grad is None
    assert x.grad is None
    assert model.training


def test_nothing_to_rewrite_is_said() -> None:
    found = verify(nn.Sequential(nn.Linear(16, 4), nn.Softmax(-1)), images())
    assert found.ok
    assert found.sites == ()
    assert "nothing to compare" in str(found)


def test_weights_that_hide_everything_are_said() -> None:
    model = Stack()
    for block in model.blocks:
        nn.init.zeros_(block.out.weight)
    assert "little would be noticed" in str(verify(model, images()))
    assert "little would be noticed" not in str(verify(Stack(), images()))


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_a_wrong_lowering_is_named_with_a_file_that_shows_it(tmp_path: Path) -> None:
    with wrong("out", where=lambda call: call.q.shape[-1] == 16):
        found = verify(TwoSizes().eval(), images(), reproduce_in=tmp_path)
        assert not found.ok
        assert [site.ok for site in found.sites] == [True, False]
        assert found.first is not None
        assert found.first.module == "large"
        worst = found.first.worst
        assert worst.error == pytest.approx(1e-3, rel=0.05)
        assert float(worst.found) == pytest.approx(1.001 * float(worst.expected), rel=1e-4)
        assert "FAILED: large at factories.py:" in str(found)
        assert found.reproduction == str(tmp_path / "kvt_verify_large.py")
        with pytest.raises(SystemExit) as end:
            runpy.run_path(found.reproduction, run_name="__main__")
        assert end.value.code == 1
    assert "from factories" not in Path(found.reproduction).read_text()  # torch and kvt_compile alone
    assert subprocess.run([sys.executable, found.reproduction], cwd="/", check=False).returncode == 0  # it is mended


WRONG: dict[str, tuple[Callable[[], nn.Module], str, torch.dtype]] = {
    "gradient_of_keys": (Stack, "k", torch.float32),
    "gradient_of_a_bias": (lambda: Stack(), "captured", torch.float32),
    "weights": (TalkingHeads, "weights", torch.float32),
    "in_a_checkpoint": (Checkpointed, "out", torch.float32),
    "short_dtype": (Stack, "k", torch.bfloat16),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str, tmp_path: Path) -> None:
    make, part, dtype = WRONG[case]
    more = (torch.randn(7, 7, dtype=dtype),) if part == "captured" else ()
    with wrong(part, factor=1.05):
        found = verify(make().to(dtype), images().to(dtype), *more, reproduce_in=tmp_path)
        assert not found.ok
        assert found.first is found.sites[0]
        assert found.reproduction is not None, found
        with pytest.raises(SystemExit) as end:
            runpy.run_path(found.reproduction, run_name="__main__")
        assert end.value.code == 1


def test_wrong_in_short_precision_alone() -> None:
    """Float64 would not see it: the attention is held against the reference in the model's own precision."""
    with wrong("out", factor=1.1, where=lambda call: call.q.dtype == torch.bfloat16):
        found = verify(Stack().bfloat16(), images().bfloat16())
    assert found.first is not None
    assert "of the attention itself" in found.first.worst.name


@pytest.mark.parametrize(("size", "width"), [(1.0, 8), (3000.0, 8), (0.05, 3136)])
def test_an_attention_in_float64_is_held_to_float64(size: float, width: int) -> None:
    """The budget grows with the scores and the features, as rounding does, and a difference of a billionth is over it
    all the same."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, width, dtype=torch.float64) for _ in range(3))
    for factor, right in ((1.0, True), (1 + 4e-14, width > 8), (1 + 1e-8, False)):
        with wrong("out", factor=factor), beside_the_reference("aten") as beside:
            torch.ops.kvt.attention(q * size, k, v, [], "s", "p", 8, [], 0.0, None, NAME)
        assert beside.worst.ok == right, (size, factor, beside.worst)


ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "one image": lambda v: torch.where(torch.arange(3)[:, None, None, None] != 1, v, -1e4),
    "one channel": lambda v: torch.where(torch.arange(2) == 0, 3e3, v),
    "all, nearly": lambda v: 5e3 + v,
}
"""What makes dq and dk sums that cancel: values that are large and the same for every key."""


@pytest.mark.parametrize("lowering", ["aten", "c"])
@pytest.mark.parametrize("case", ALIKE)
def test_a_gradient_that_cancels_is_held_to_what_rounding_leaves_of_it(case: str, lowering: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(3, 2, n, 2) for n in (2, 3, 3))
        v = ALIKE[case](v)
        for factor in (1.0, 1.5):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with wrong("k", factor=factor), beside_the_reference(lowering if factor == 1.0 else "aten") as beside:
                out = torch.ops.kvt.attention(*leaves, [], "0.3*s", "p", 3, [], 0.0, None, NAME)[0]
                out.backward(torch.randn_like(out))
            assert beside.worst.ok == (factor == 1.0), (seed, factor, beside.worst)


def test_a_lowering_that_raises_is_named_too() -> None:
    with wrong("raises", where=lambda call: call.q.shape[-1] == 16):
        found = verify(TwoSizes(), images())
    assert [site.ok for site in found.sites] == [True, False]
    assert found.first is not None
    assert found.first.worst.found == "RuntimeError: a lowering that fails"


def test_float64_has_no_say_about_kinds() -> None:
    """That a gradient is missing, or a dtype another, is not explained by rounding."""
    dense = outcome(X, output=X)
    for found in (outcome(None, output=X), outcome(X, output=X.bfloat16())):
        assert settled(compare(found, dense, dense))
    assert not settled(compare(outcome(X, output=X + 1), dense, dense))


def outcome(gradient: Tensor | None = None, attached: bool = True, **outputs: Any) -> Outcome:
    return Outcome(outputs, {"gradient of w": gradient}, frozenset(outputs if attached else ()))


X = torch.randn(5)
UNLIKE: dict[str, tuple[Outcome, Outcome]] = {
    "gradient_too_many": (outcome(torch.zeros(3), output=X), outcome(None, output=X)),
    "gradient_missing": (outcome(None, output=X), outcome(torch.zeros(3), output=X)),
    "attached": (outcome(output=X), outcome(output=X, attached=False)),
    "dtype": (outcome(output=X.bfloat16()), outcome(output=X)),
    "shape": (outcome(output=X[:4]), outcome(output=X)),
    "nan": (outcome(output=X.clone().index_fill_(0, torch.tensor([3]), math.nan)), outcome(output=X)),
    "whole_numbers": (outcome(output=torch.tensor([1, 2])), outcome(output=torch.tensor([1, 3]))),
    "plain": (outcome(output=3), outcome(output=4)),
    "none": (outcome(output=None), outcome(output=X)),
    "absent": (outcome(), outcome(output=X)),
    "written": (outcome(output=X, buffer=X), outcome(output=X, buffer=X + 1)),
    "value": (outcome(output=X + 1e-5), outcome(output=X)),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_comparison_notices(case: str) -> None:
    found, dense = UNLIKE[case]
    exact = Outcome(
        {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in dense.outputs.items()},
        {n: None if x is None else x.double() for n, x in dense.gradients.items()},
        dense.attached,
    )
    check = compare(found, dense, exact)
    assert not check.ok
    assert check.found != check.expected
    assert compare(dense, dense, exact).ok


# ---- what torch drops -----------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Attention in a function that torch is told not to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hidden = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) + torch.compiler.disable(self.hidden)(x)


class Disabled(Stack):
    forward = torch.compiler.disable(Stack.forward)


def test_attention_outside_of_every_graph_fails() -> None:
    for model in (Hidden(), Disabled()):
        found = verify(model, images())
        assert not found.ok
        assert "exactly dense" in found.dropped[-1]
        assert "FAILED" in str(found)


def test_compilation_that_is_switched_off_fails() -> None:
    with torch.compiler.set_stance("force_eager"):
        stance = verify(Stack(), images())
    with torch._dynamo.config.patch(disable=True):
        off = verify(Stack(), images())
    assert (stance.ok, off.ok) == (False, False)
    assert "force_eager" in stance.dropped[0]
    assert "switched off" in off.dropped[0]
    assert verify(Stack(), images()).ok  # the neighbour


# ---- what cannot be judged ------------------------------------------------------------------------------------------


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


class EveryTimeAnother(Stack):
    """Random numbers that no seed of torch sets."""

    calls = 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        type(self).calls += 1
        return super().forward(x, bias) * self.calls


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class AllNaN(Stack):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x, bias) * math.nan


class DropsByHand(Attention):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.dropout((x @ x.mT).softmax(-1), 0.25, True) @ x


class Float32Inside(Stack):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x @ torch.eye(16, dtype=torch.float32), bias)


JUDGED: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("fails", lambda: verify(Raising(), images()), VerificationError, "the model itself fails.*ValueError: not today"),
    ("other", lambda: verify(EveryTimeAnother(), images()), VerificationError, "another result each time"),
    ("nothing", lambda: verify(Nothing(), images()), VerificationError, "returns no tensor"),
    ("nan", lambda: verify(AllNaN(), images()), VerificationError, "NaN or infinite"),
    ("dropout", lambda: verify(DropsByHand(), images()), VerificationError, r"probability of 0.25.*eval\(\)"),
    ("float64", lambda: verify(Float32Inside(), images()), VerificationError, "does not run in float64"),
    ("vmap", lambda: torch.vmap(partial(verify, Stack()))(images()[None]), VerificationError, "torch.func"),
    ("folder", lambda: verify(Stack(), images(), reproduce_in="nowhere"), VerificationError, "no folder 'nowhere'"),
    ("function", lambda: verify(torch.relu, images()), TypeError, "takes an nn.Module, got builtin"),
    ("program", lambda: verify(torch.export.export(Stack(), (images(),)), images()), TypeError, r"module\(\)"),
    ("topk", lambda: verify(Stack(), images(), topk=3), OptionError, "takes no topk"),
    ("then", lambda: verify(Stack(), images(), then="eager"), OptionError, "takes no then"),
    ("value", lambda: verify(Stack(), images(), lowering="atem"), OptionError, "atem"),
    ("pattern", lambda: verify(Stack(), images(), include="layers.*"), OptionError, "matches no attention site"),
]


@pytest.mark.parametrize(("call", "kind", "says"), [row[1:] for row in JUDGED], ids=[row[0] for row in JUDGED])
def test_what_cannot_be_judged_is_said(call: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call()


def test_one_site_of_several() -> None:
    found = verify(Stack(), images(), include="blocks.1")
    assert [site.module for site in found.sites] == ["blocks.1"]
    assert ("blocks.0", "not in `include`") in found.left


def test_all_together_only() -> None:
    found = verify(Stack(), images(), one_by_one=False)
    assert (found.ok, found.sites) == (True, ())
    assert "OK: The attentions at k = N are" in str(found)
    with wrong("k", factor=1.05):
        assert verify(Stack(), images(), one_by_one=False).first is not None


def test_plain_values() -> None:
    with wrong("out", factor=math.inf):
        data = verify(TwoSizes(), images()).to_dict()
    assert data["ok"] is False
    assert data["sites"][0]["worst"]["error"] is None
