"""One attention node -> the code that runs it.

    score.py      the score language: text <-> algebra      spec.py       op arguments -> KernelSpec
    ops.py        the operators (importing it registers)    lowerings.py  name -> lowering, the choice behind "auto"
    reference.py  the contract, dense and readable          aten.py, c/   lowerings

Importing this package registers nothing and loads no lowering; `kvt_compile.kernels.ops` does.
"""
