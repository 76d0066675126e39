"""What a launch reads of its surroundings: torch's precision settings, sizes that ask for 64-bit offsets or another
lowering, and nothing that costs time where nothing is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from spec_calls import call_of
from triton_specs import VIT, VIT32, training

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec
from kvt_compile.kernels.plain.aten import AtenLowering
from kvt_compile.kernels.triton import choose as choosing
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Launch, choose
from kvt_compile.kernels.triton.launch import MOST_PROGRAMS, Launcher
from kvt_compile.kernels.triton.lowering import TritonLowering
from kvt_compile.kernels.tune.store import Store
from kvt_compile.kernels.tune.tuner import Tuner


class Noting(Launcher):
    """Launches nothing and notes the compile-time arguments, on tensors without data."""

    def __init__(self) -> None:
        super().__init__(chooser=lambda launch: Blocks("streaming", 16, 16, 4, 1))
        self.constants: list[Mapping[str, Any]] = []

    def launch(
        self, kernel: Any, programs: int, arguments: Sequence[Any], constants: Mapping[str, Any], blocks: Blocks
    ) -> None:
        self.constants.append(constants)

    def index_types(self) -> set[str]:
        return {str(x["INDEX"]) for x in self.constants}


# --- precision of float32 products ------------------------------------------------------------------------------------

PRECISION = """
import torch
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton.targets import precision
backends, float32 = torch.backends, KernelSpec("float32", "float32", 8, 8)
for settings in (
    ["torch.set_float32_matmul_precision('high')", "torch.set_float32_matmul_precision('highest')"],
    ["torch.set_float32_matmul_precision('medium')"],
    ["backends.cuda.matmul.allow_tf32 = True", "backends.cuda.matmul.allow_tf32 = False"],
    ["backends.cuda.matmul.fp32_precision = 'tf32'", "backends.cuda.matmul.fp32_precision = 'ieee'"],
    ["backends.fp32_precision = 'tf32'", "backends.cuda.matmul.fp32_precision = 'ieee'"],
    ["backends.cudnn.conv.fp32_precision = 'tf32'"],
):
    backends.fp32_precision = backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "none"
    found = [precision(float32)]
    for setting in settings:
        exec(setting)
        found.append(precision(float32))
    print(*found, precision(KernelSpec("bfloat16", "bfloat16", 8, 8)))
"""


def test_every_way_to_allow_tf32_is_followed() -> None:
    """In a process of its own: once both ways to set it were used, torch's own getters raise."""
    done = subprocess.run([sys.executable, "-c", PRECISION], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "tf32x3 tf32 tf32x3 ieee",
        "tf32x3 tf32 ieee",
        "tf32x3 tf32 tf32x3 ieee",
        "tf32x3 tf32 tf32x3 ieee",
        "tf32x3 tf32 tf32x3 ieee",
        "tf32x3 tf32x3 ieee",
    ]


@pytest.fixture
def tf32() -> Any:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_a_launch_and_its_key_follow_the_setting(request: pytest.FixtureRequest) -> None:
    launcher, call = Noting(), call_of(VIT32, 5, 7)
    launcher.forward(call)
    before = [key_of(spec) for spec in (VIT32, VIT)]
    request.getfixturevalue("tf32")
    launcher.forward(call)
    after = [key_of(spec) for spec in (VIT32, VIT)]
    assert [x["PRECISION"] for x in launcher.constants] == ["tf32x3", "tf32"]
    assert before[0] != after[0]
    assert before[1] == after[1]  # no float32 in it


# --- measured choices -------------------------------------------------------------------------------------------------


def launch_of(spec: KernelSpec) -> Launch:
    def run(blocks: Blocks) -> Any:
        raise AssertionError(f"{blocks} was tried")

    return Launch(spec, "forward", 5, 7, 2, 3, torch.device("cpu"), run)


def key_of(spec: KernelSpec) -> Any:
    """What `choose` asks the tuner for."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing.tune, "pick", lambda key, listed, default, *rest: asked.append(key) or default)
        choose(launch_of(spec), "cached")
    return asked[0]


@pytest.mark.parametrize("state", ["known", "given up", "capturing"])
def test_no_clock_is_made_where_nothing_is_measured(state: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock allocates twice the second-level cache and waits for the GPU: at every launch that would be felt."""

    def never(device: torch.device) -> Any:
        raise AssertionError("a clock was made")

    tuner = Tuner(Store(tmp_path), capturing=lambda: state == "capturing")
    launch = launch_of(VIT)
    key = key_of(VIT)
    if state == "known":
        tuner._known[key, Blocks] = launch.first
    if state == "given up":
        tuner._given_up.add(key)
    monkeypatch.setattr(choosing, "DeviceClock", never)
    monkeypatch.setattr(choosing.tune, "pick", tuner.pick)
    assert choose(launch, "on") == launch.first


# --- sizes ------------------------------------------------------------------------------------------------------------

LONG = 46_341  # its square is just beyond 2**31
BIASED = KernelSpec(
    "bfloat16", "bfloat16", 8, 8, score="s + c0[h, i, j]", captured=(CapturedSpec("float32", 3),),
    needs_grad=(False, False, False, True),
)  # fmt: skip


def backward(launcher: Launcher, call: AttentionCall) -> None:
    out = torch.empty((*call.rows, call.spec.value_dim), dtype=call.v.dtype, device="meta")
    statistics = [torch.empty(call.rows, device="meta") for _ in range(2)]
    launcher.backward(call, out, out, *statistics)


@pytest.mark.parametrize(("length", "expected"), [(LONG, "int64"), (LONG // 2, "int32")])
def test_a_sum_into_an_expanded_tensor_is_as_large_as_it_looks(length: int, expected: str) -> None:
    """One float stands for all: its offsets are small.  The gradient has an element for every index."""
    small = call_of(BIASED, 2, 2, batch=1, heads=1)
    q, k, v = (torch.empty(1, 1, length, 8, dtype=torch.bfloat16, device="meta") for _ in range(3))
    call = replace(small, q=q, k=k, v=v, captured=[torch.empty((), device="meta").expand(1, length, length)])
    launcher = Noting()
    backward(launcher, call)
    assert launcher.index_types() == {expected}
    launcher.constants.clear()
    launcher.forward(replace(call, spec=replace(BIASED, needs_grad=())))
    assert launcher.index_types() == {"int32"}  # the forward only reads the one float


@pytest.mark.parametrize("expanded", ["q", "k", "v"])
def test_so_is_the_gradient_of_an_expanded_matrix(expanded: str) -> None:
    spec = KernelSpec("bfloat16", "bfloat16", 256, 256, needs_grad=tuple(x == expanded for x in "qkv"))
    one = torch.empty(1, 1, 1024, 256, dtype=torch.bfloat16, device="meta")
    call = call_of(spec, 2, 2)
    for batch, expected in ((64, "int32"), (128, "int64")):
        launcher, x = Noting(), one.expand(batch, 64, 1024, 256)
        backward(launcher, replace(call, q=x, k=x, v=x))
        assert launcher.index_types() == {expected}


class Elsewhere(AtenLowering):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def forward(self, call: AttentionCall) -> Any:
        self.asked.append("forward")

    def backward(self, *_: Any) -> Any:
        self.asked.append("backward")

    def softmax(self, *_: Any) -> Any:
        self.asked.append("softmax")

    def softmax_backward(self, *_: Any) -> Any:
        self.asked.append("softmax_backward")


def test_more_programs_than_a_grid_has_run_elsewhere() -> None:
    for more in (0, 1):
        launcher, fallback = Noting(), Elsewhere()
        lowering = TritonLowering(launcher, devices=("cpu",), fallback=fallback)
        heads = 2**11 - 1 + more
        x = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta").expand(2**20, heads, 1, 64)
        call = AttentionCall(VIT, x, x, x, [], 1)
        lowering.forward(call)
        rows = torch.empty(2**20, heads, 1, device="meta")
        lowering.backward(replace(call, spec=training(VIT)), x, x, rows, rows)
        scores = torch.empty(1, 2, device="meta").expand(MOST_PROGRAMS + more, 2)
        lowering.softmax(scores, 1, 1, torch.float32)
        lowering.softmax_backward(scores, scores, 1, torch.float32)
        assert fallback.asked == ["forward", "backward", "softmax", "softmax_backward"] * more
        assert bool(launcher.constants) != bool(more)
