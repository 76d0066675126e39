"""AOTInductor packages that hold the kernels of k-NN attention, and so need nothing of this library to run.

    program = rewrite(torch.export.export(model, inputs), *inputs, topk=0.5).program
    with kernels_inside():
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

Without the `with`, a package calls our operators, and whoever loads it imports `kvt_compile.kernels.ops` first.
"""

from __future__ import annotations

from kvt_compile.kernels.inside import kernels_inside

__all__ = ["kernels_inside"]
