"""The name to import where a saved program or package that calls `kvt::` operators is loaded: it registers them."""

import kvt_compile.kernels.op.ops  # noqa: F401
