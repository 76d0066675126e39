"""A module traced for an NVIDIA GPU, as AOTInductor traces it, on a machine without one; and its graph run on CPU
tensors, its kernels in Triton's interpreter."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from kvt_compile.kernels.triton.interpret import interpreted
from kvt_compile.kernels.triton.module import load


@contextmanager
def nvidia() -> Iterator[None]:
    """torch asks Triton's driver for the GPU when it looks which arguments a kernel writes to."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


def trace(module: nn.Module, tensors: list[Tensor], dynamic: Any = None, device: str = "cuda") -> fx.GraphModule:
    """What Inductor is given to compile for tensors like these on a GPU.  module: returns a tuple."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        fakes = tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in tensors)
        program = export(module, fakes, dynamic_shapes=dynamic)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    guards = len(values[0].fake_mode.shape_env.guards)
    with nvidia(), values[0].fake_mode:
        graph, _ = aot_export_module(program.module(check_guards=False), values, trace_joint=False)
    assert len(values[0].fake_mode.shape_env.guards) == guards, "tracing narrowed what the sizes may be"
    return graph


def kernel_and_warps(number: int) -> tuple[Any, int]:
    """torch makes an autotuner of a kernel that is given a number of warps: of one configuration."""
    tuner = kernel_side_table.get_kernel(number)
    (config,) = tuner.configs
    assert not config.kwargs
    return tuner.fn, config.num_warps


def launches(graph: fx.GraphModule) -> list[tuple[Any, dict[str, Any], Any]]:
    """(kernel, arguments, grid) of every launch in a graph; num_warps is among the arguments."""
    found = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
            kernel, warps = kernel_and_warps(node.kwargs["kernel_idx"])
            arguments = {**node.kwargs["kwargs"], **constants, "num_warps": warps}
            found.append((kernel, arguments, node.kwargs["grid"]))
    return found


class OnCpu(fx.Interpreter):
    """Runs such a graph: what it allocates is on the CPU, and what it launches is interpreted."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "triton_kernel_wrapper_functional" in str(target):
            return self.launch(**kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        return super().call_function(target, args, kwargs)

    def launch(
        self, kernel_idx: int, constant_args_idx: int, grid: Any, kwargs: Any, tensors_to_clone: list[str], **_: Any
    ) -> dict[str, Tensor]:
        kernel, warps = kernel_and_warps(kernel_idx)
        every = kernel_side_table.get_constant_args(constant_args_idx)
        constants = {name: value for name, value in every.items() if name in kernel.arg_names}
        written = {name: kwargs[name].clone() for name in tensors_to_clone}
        self.run_kernel(kernel, tuple(int(x) for x in grid[0]), {**kwargs, **written, **constants}, warps)
        return written

    def run_kernel(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> None:
        text = "".join(linecache.getlines(kernel.fn.__code__.co_filename))
        with interpreted():
            getattr(load(text, interpreted=True), kernel.__name__)[grid](**arguments)


class OnStub(OnCpu):
    """Launches, with the contraction that Inductor compiles a user's kernels with, on the stub driver (`stub_gpu`)."""

    def run_kernel(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> None:
        kernel[grid](**arguments, num_warps=warps)
