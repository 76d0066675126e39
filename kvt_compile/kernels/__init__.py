"""One attention node -> the code that runs it.

    language/  what stands between the products: text <-> algebra    op/      op arguments -> KernelSpec; the operators
    plain/     the contract, dense and readable; tiles of torch ops  c/, triton/  generated kernels, and tune/ for them
    lowerings.py   name -> lowering, the choice behind "auto"

Importing this package registers nothing and loads no lowering; `kvt_compile.kernels.op.ops` does.
"""
