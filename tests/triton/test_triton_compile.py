"""Every default configuration, compiled for real GPUs on a machine without one, and held to what it may use."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
from triton_resources import BUDGET, SPILLS, Configuration, budget, configurations

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.compile import compile_kernel, resources
from kvt_compile.kernels.triton.targets import SHARED

# One cold compilation takes 1 to 5 seconds, so that all of them are slow; these cover every kernel and every target.
QUICK = (
    ("bfloat16 64", "forward", "resident", "sm_80"),
    ("bfloat16 64", "forward", "streaming 64", "sm_100"),
    ("bfloat16 64", "backward_rows", "streaming 64", "sm_90"),
    ("bfloat16 64", "backward_q", "streaming 64", "sm_90"),
    ("bfloat16 64", "backward_kv", "streaming 64", "sm_90"),
    ("bfloat16 64", "backward_q", "streaming 32", "sm_80"),
    ("bfloat16 128", "forward", "streaming 64", "gfx942"),
    ("bfloat16 128", "backward_kv", "streaming 64", "gfx942"),
    ("float32 64", "backward_q", "streaming 32", "sm_100"),
    ("rows", "softmax", "resident 4", "sm_90"),
)


def is_quick(x: Configuration) -> bool:
    shape = f"{x.blocks.kind} {x.blocks.rows}x"
    return any(
        (x.name, x.part, x.target) == (name, part, target) and shape.startswith(kind)
        for name, part, kind, target in QUICK
    )


@pytest.mark.parametrize(
    "configuration",
    [pytest.param(x, id=str(x), marks=() if is_quick(x) else pytest.mark.slow) for x in configurations()],
)
def test_resources(configuration: Configuration) -> None:
    found = configuration.resources()
    release = ".".join(triton.__version__.split(".")[:2])
    assert found.spills <= SPILLS.get(release, {}).get(str(configuration), 0)
    assert found.shared <= SHARED[configuration.target]
    # Triton multiplies float64 on sm_100 without them
    scalar = isinstance(configuration.spec, SoftmaxSpec) or configuration.spec.dtype == "float64"
    assert found.matrix_instructions or scalar
    recorded = budget()
    allowed = recorded["kernels"][str(configuration)]
    if recorded["triton"] == triton.__version__:  # another version schedules otherwise
        assert found.registers <= allowed["registers"]
        assert found.shared <= allowed["shared"]
        assert list(found.matrix_instructions) == allowed["matrix_instructions"]


def test_quick_configurations_exist() -> None:
    assert sum(map(is_quick, configurations())) >= len(QUICK)


def test_the_budget_holds_every_configuration_and_no_spill() -> None:
    kernels = budget()["kernels"]
    assert set(kernels) == {str(x) for x in configurations()}, f"make resources writes {BUDGET.name} anew"
    assert all(x["spills"] == 0 for x in kernels.values())


def test_scores_of_a_shape_come_from_one_matrix_instruction() -> None:
    """Forward and backward of a call multiply q and k alike, so that they agree about every kept key."""
    kernels = budget()["kernels"]
    seen: dict[tuple[str, ...], list[set[str]]] = {}
    for x in configurations():
        if isinstance(x.spec, KernelSpec) and x.spec.dtype != "float64":
            key = (x.name, x.target, "large" if x.blocks.rows >= 64 else "other")
            seen.setdefault(key, []).append(set(kernels[str(x)]["matrix_instructions"]))
    for key, instructions in seen.items():
        assert set.intersection(*instructions), key


def test_spills_of_other_releases_are_of_configurations_that_exist() -> None:
    assert {name for names in SPILLS.values() for name in names} <= {str(x) for x in configurations()}
    assert not any(budget()["triton"].startswith(release) for release in SPILLS), (
        "the budget's own release spills nothing"
    )


def test_a_spill_is_seen() -> None:
    """512 scores of 64 rows do not fit into the registers of 4 warps: the budget can fail."""
    spec = KernelSpec("bfloat16", "bfloat16", 64, 64)
    assert resources(spec, "forward", Blocks("resident", 64, 512, 4, 1), "sm_80").spills > 0


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown GPU 'sm_1', expected one of sm_80, sm_90, sm_100, gfx942"):
        compile_kernel(KernelSpec("float32", "float32", 8, 8), "forward", Blocks("streaming", 16, 16, 4, 1), "sm_1")
