"""KernelSpec + block sizes + target -> compiled kernel and what it uses, on a machine without a GPU.

registers, spills      cuobjdump of the binary (NVIDIA), metadata of the assembly (AMD)
shared memory          Triton
matrix instructions    wgmma, tcgen05, mma (NVIDIA), mfma (AMD): their names as they stand in the assembly
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.constants import constexprs, options
from kvt_compile.kernels.triton.layout import listing, listing_names
from kvt_compile.kernels.triton.listed import constants_of
from kvt_compile.kernels.triton.module import module
from kvt_compile.kernels.triton.scalar import ELEMENTS
from kvt_compile.kernels.triton.targets import TARGETS, precision


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses."""

    registers: int
    """Of a thread."""
    spills: int
    """Bytes (NVIDIA) or registers (AMD) of a thread that did not fit and live in memory."""
    shared: int
    """Bytes."""
    matrix_instructions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"matrix_instructions": list(self.matrix_instructions)}


def resources(spec: KernelSpec | SoftmaxSpec, part: str, blocks: Blocks, target: str, ranked: bool = True) -> Resources:
    """Compile one kernel for a target of TARGETS and see what it uses.  ranked: of a selection, whether rows may keep
    fewer keys than it allows.

    Raises ValueError for an unknown target, and what Triton raises when it cannot compile the kernel.
    """
    compiled = compile_kernel(spec, part, blocks, target, ranked=ranked)
    shared = int(compiled.metadata.shared)
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        # .agpr_count is part of .vgpr_count
        numbers = {x: int(_number(rf"\.{x}:\s+(\d+)", assembly)) for x in ("vgpr_count", "vgpr_spill_count")}
        matrix = sorted(set(re.findall(r"v_mfma_\w+", assembly)))
        return Resources(numbers["vgpr_count"], numbers["vgpr_spill_count"], shared, tuple(matrix))
    usage = _cuobjdump(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    # of wgmma the width of a tile does not matter, how many features it sums at a time does
    found = {f"wgmma {depth}" for depth in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+(k\d+)", ptx)}
    found |= {f"mma {shape}" for shape in re.findall(r"\bmma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)}
    found |= {"tcgen05.mma"} if "tcgen05.mma" in ptx else set()
    matrix = sorted(found)
    registers, stack = (int(_number(rf"\b{x}:(\d+)", usage)) for x in ("REG", "STACK"))
    return Resources(registers, stack, shared, tuple(matrix))


def compile_kernel(
    spec: KernelSpec | SoftmaxSpec,
    part: str,
    blocks: Blocks,
    target: str,
    kernel: Any = None,
    fusion: bool = False,
    ranked: bool = True,
) -> Any:
    """Triton's compiled kernel, for contiguous tensors of even sizes below 2**31 elements, one query head a key head.

    kernel: another one with the same parameters; fusion: products and sums may be contracted, as Inductor compiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"unknown GPU {target!r}, expected one of {', '.join(TARGETS)}")
    backend, architecture, warp = TARGETS[target]
    kernel = kernel or getattr(module(spec), part)
    products = precision(spec, backend == "hip") if isinstance(spec, KernelSpec) else None
    listed = None
    if isinstance(spec, KernelSpec) and listing(spec) is not None:
        listed = constants_of(spec, part, ranked, True)
    constants: dict[str, Any] = constexprs(part, blocks, "int32", products, listed)
    signature = {name: _type(name, spec, part) for name in kernel.arg_names}
    for name, kind in signature.items():
        if kind == "constexpr" and name not in constants:
            constants[name] = 1 if name == "group" or "stride" in name else None
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    aligned = [
        name
        for name, kind in signature.items()
        if kind[0] == "*" or re.fullmatch(r"(q|k|v|grad_out)_stride[012]", name)
    ]
    attributes = {place[name]: [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {place[name]: value for name, value in constants.items()}, attributes)
    return triton.compile(
        source, target=GPUTarget(backend, architecture, warp), options=options(blocks) | {"enable_fp_fusion": fusion}
    )


def _type(name: str, spec: KernelSpec | SoftmaxSpec, part: str) -> str:
    """Triton's type of a kernel's parameter."""
    if isinstance(spec, SoftmaxSpec):
        if not name.endswith("_ptr"):
            return "constexpr" if name.isupper() else "i32"
        first = "scores_ptr" if part == "softmax" else "out_ptr"
        return "*" + ELEMENTS[spec.dtype if name == first else spec.out_dtype]
    real = "fp64" if spec.dtype == "float64" else "fp32"
    if name.isupper() or name == "group" or name in _unit_strides(spec):
        return "constexpr"
    if captured := re.fullmatch(r"c(\d+)_ptr", name):
        return "*" + ELEMENTS[spec.captured[int(captured[1])].dtype]
    if not name.endswith("_ptr"):
        return {"drop_below": "i64", "keep_scale": "fp64"}.get(name, "i32")
    inputs = ("q", "k", "v", *(f"c{n}" for n in range(len(spec.captured))))
    wanted = dict(zip((f"d{x}_ptr" for x in inputs), spec.needs_grad, strict=False))
    if not wanted.get(name, True):
        return "constexpr"
    kinds = {"q": spec.dtype, "k": spec.dtype, "v": spec.value_dtype, "out": spec.value_dtype}
    kinds |= {"grad_out": spec.value_dtype, "dq": spec.dtype, "dk": spec.dtype, "dv": spec.value_dtype}
    bare = name.removesuffix("_ptr")
    if name in listing_names(spec):
        return "*i64" if bare == "may" else "*i32"
    return "*i64" if bare == "seed" else "*" + (ELEMENTS[kinds[bare]] if bare in kinds else real)


def _unit_strides(spec: KernelSpec) -> set[str]:
    """Triton makes a 1 part of the kernel."""
    last = {f"c{n}_stride{c.ndim - 1}" for n, c in enumerate(spec.captured)}
    return last | {f"{x}_stride3" for x in ("q", "k", "v", "grad_out")}


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the compiler said of a kernel")
    return found[1]


def _cuobjdump(cubin: bytes) -> str:
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    return done.stdout
