"""KernelSpec -> Triton kernels for a GPU."""
