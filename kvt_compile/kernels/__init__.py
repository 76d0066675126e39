"""One attention node -> the code that runs it.

    language/  what stands between the products: text <-> algebra
    op/        what torch sees: op arguments -> KernelSpec, the operators; name -> lowering, the choice behind "auto"
    plain/     the contract, dense and readable; tiles of torch operations
    c/         a generated C kernel
    triton/    generated Triton kernels        tune/  block sizes, measured once

Importing this package registers nothing and loads no lowering; `kvt_compile.kernels.op.ops` does.
"""

from kvt_compile.kernels.op import lowerings

__all__ = ["lowerings"]
